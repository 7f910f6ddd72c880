// Inner loops that pay for wider registers than Swift's baseline. Each is plain IEEE arithmetic
// in a fixed order, never fused, so every processor gives the same bits; the Swift loop that it
// replaces is its test.
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/// A descent of AdaptiveWeightDisentanglement, as `Descent` in Swift describes it.
struct smelt_descent {
  size_t order, iterations;
  bool squared;
  double epsilon, pair_weight, penalty, rate, momentum, weight_decay, vanishing;
};

/// The most vectors that `smelt_descend` takes.
enum { smelt_descent_max_order = 32, smelt_descent_lanes = 8 };

/// Runs eight descents side by side. In every array lane l belongs to descent l, and eight lanes
/// follow each other: element (i, j) of Gram matrix l is `grams[(i * order + j) * 8 + l]`.
///
/// - last: the coefficients after all steps.
/// - slope: the coefficients of the gradient of the cosines' mean at 0.
/// - products: the Gram matrices of the cleaned vectors, as `CleanedProducts` computes them.
/// - redundancy: the squared norm of the redundant vectors.
/// - independent: whether the vectors of a lane are linearly independent beyond doubt; zero
///   vectors aside. Where they are not, the lane's results mean nothing.
void smelt_descend(const struct smelt_descent *descent, const double *grams, double *last,
                   double *slope, double *products, double *redundancy, bool *independent);

/// Adds to the symmetric `gram` the inner products of `order` rows of `columns` floats; row r
/// begins at `rows + r * stride`. Sixteen float lanes over blocks of 1024, folded into double.
void smelt_gram_add(const float *rows, size_t stride, size_t columns, size_t order, double *gram);

/// sum[i] = fma(values[i], weight, sum[i]): fused here, because it is asked for.
void smelt_accumulate(float *sum, const float *values, float weight, size_t count);

/// The random words of a tensor's elements: Philox4x32-10 with this key, whose counters are a
/// block's number and the sequence. Sixteen blocks serve a group of 64 elements: element e has
/// word e / 16 mod 4 of block 16 (e / 64) + e mod 16.
struct smelt_draws {
  uint64_t key, sequence;
};

/// The words of elements `first` to `first + count`.
void smelt_draw(const struct smelt_draws *draws, uint64_t first, uint32_t *words, size_t count);

/// Multiplies by `scale` the values whose words are below `threshold`, and sets the others to 0.
void smelt_thin(const struct smelt_draws *draws, uint64_t first, uint32_t threshold, float scale,
                float *values, size_t count);

/// Adds Σ|values| to sums[0], and to sums[1] the part whose words are below `threshold`. Sixteen
/// float lanes over blocks of 1024, folded into double.
void smelt_sum_thinned(const struct smelt_draws *draws, uint64_t first, uint32_t threshold,
                       const float *values, size_t count, double sums[2]);

/// Keeps a value whose uniform number is below its probability and sets the others to 0. The
/// probability is lowest + 2 · epsilon · rank / (count − 1), of the rank among the magnitudes, the
/// lowest index first; `only` if there is one value. `scratch` has room for 2 · count numbers.
void smelt_thin_by_rank(float *values, size_t count, const float *uniforms, float only,
                        float lowest, float epsilon, uint64_t *scratch);

/// Counts the values by the upper 16 of the 31 bits of their magnitudes. Returns the lower bits
/// that any of them has set.
uint32_t smelt_count_upper(const float *values, size_t count, int64_t *counts);

/// Counts by the lower 15 bits the values whose upper bits are uppers[k], from counts[k << 15] on.
void smelt_count_lower(const float *values, size_t count, const uint32_t *uppers, size_t order,
                       int64_t *counts);

/// How many magnitudes have the bits of `one`, and of `other`.
void smelt_count_equal(const float *values, size_t count, uint32_t one, uint32_t other,
                       size_t counts[2]);

/// sums = Σ weighted rows.
void smelt_weigh(const float *rows, size_t stride, size_t order, const float *weights,
                 size_t columns, float *sums);

/// The same of those values only whose sign is that of all together, where zero's is plus; a
/// value of zero has none. All together are the rows' sum, weighted if `weighs_votes`. `agreed`,
/// unless it is null, becomes the sum of the weights of the values that count.
void smelt_elect(const float *rows, size_t stride, size_t order, const float *weights,
                 bool weighs_votes, size_t columns, float *sums, float *agreed);

/// Σ|values|, in sixteen float lanes over blocks of 1024 that are folded into double.
double smelt_sum_magnitudes(const float *values, size_t count);

enum {
  /// The most elements that the two below take, and how many of them are sorted at a time.
  smelt_steps_largest = 1 << 20,
  smelt_steps_piece = 1 << 14,
  /// Bytes of scratch memory that they need, aligned for 32-bit numbers.
  smelt_steps_scratch = 4 * (2 * (smelt_steps_piece + 8 * 256) + 256 * (smelt_steps_largest / smelt_steps_piece)),
};

/// Whether the processor can run the two below.
bool smelt_sorts_steps(void);

/// The codes of the steps from a reference to other 16-bit floats, sorted as `Steps` in Swift
/// describes it and split into their bytes. The elements are overwritten.
void smelt_split_steps(uint16_t *elements, const uint16_t *reference, size_t count, uint8_t *upper,
                       uint8_t *lower, void *scratch);

/// Adds such steps to the reference's elements in place. `places` is scratch memory for as many.
void smelt_add_steps(const uint8_t *upper, const uint8_t *lower, size_t count, uint16_t *elements,
                     uint16_t *places, void *scratch);

/// What a number has left of its digits in a file: all, eight or eleven.
enum smelt_rounding { smelt_exact, smelt_bfloat16, smelt_half };

/// Splits a model's weights into what is to be added to the base's, rounded, which takes their
/// place, and what that misses: the weights, rounded, which rounded sums do not give back bit for
/// bit, and NaN; elsewhere `missed` becomes the bits `none`. Returns how many those weights are.
size_t smelt_split_weights(float *weights, const float *base, size_t count,
                           enum smelt_rounding rounding, uint32_t none, float *missed);

/// How many weights that misses; nothing is changed.
size_t smelt_count_missed(const float *weights, const float *base, size_t count,
                          enum smelt_rounding rounding);
