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

/// The words of `count` consecutive blocks of Philox4x32-10, four a block, from `first` on.
void smelt_philox(uint64_t key, uint64_t sequence, uint64_t first, uint32_t *words, size_t count);

/// Σ|values|, in sixteen float lanes over blocks of 1024 that are folded into double.
double smelt_sum_magnitudes(const float *values, size_t count);
