#include "include/kernels.h"
#include "lanes.h"

#include <string.h>

#pragma STDC FP_CONTRACT OFF

enum { L = 16, GROUP = 64, BLOCK = 1024 };
typedef uint64_t wide __attribute__((ext_vector_type(8)));
typedef uint32_t words __attribute__((ext_vector_type(L)));
typedef float vector __attribute__((ext_vector_type(L)));
typedef float lanes __attribute__((ext_vector_type(L), aligned(4)));
typedef double wide8 __attribute__((ext_vector_type(8)));

/// The words of one group: Philox4x32-10 of sixteen consecutive blocks.
//
// A 64-bit lane holds one 32-bit word of a block; what is above it is left over and never read,
// because multiplication takes the lower halves only. Even blocks are in [0], odd ones in [1].
INLINE void draw(const struct smelt_draws *draws, uint64_t group, words drawn[4]) {
  const wide low = 0xFFFFFFFF, even = {0, 2, 4, 6, 8, 10, 12, 14};
  wide a[2], b[2], c[2], d[2];
  for (int h = 0; h < 2; h++) {
    a[h] = even + (group * L + (uint64_t)h);
    b[h] = a[h] >> 32;
    c[h] = draws->sequence;
    d[h] = draws->sequence >> 32;
  }
  uint32_t one = (uint32_t)draws->key, other = (uint32_t)(draws->key >> 32);
  for (int round = 0; round < 10; round++) {
    for (int h = 0; h < 2; h++) {
      const wide left = (a[h] & low) * 0xD2511F53u, right = (c[h] & low) * 0xCD9E8D57u;
      a[h] = (right >> 32) ^ b[h] ^ one;
      c[h] = (left >> 32) ^ d[h] ^ other;
      b[h] = right;
      d[h] = left;
    }
    one += 0x9E3779B9u;
    other += 0xBB67AE85u;
  }
  drawn[0] = (words)((a[0] & low) | a[1] << 32);
  drawn[1] = (words)((b[0] & low) | b[1] << 32);
  drawn[2] = (words)((c[0] & low) | c[1] << 32);
  drawn[3] = (words)((d[0] & low) | d[1] << 32);
}

/// How much of the group that holds element `first` lies within `count` elements from there on.
#define PART(first, count)                                    \
  const size_t skipped = (first) % GROUP;                     \
  const size_t length = (count) < GROUP - skipped ? (count) : GROUP - skipped;

INLINE double folded(const vector *lanes) {
  const vector sum = *lanes;
  const wide8 eight = __builtin_convertvector(sum.lo, wide8) + __builtin_convertvector(sum.hi, wide8);
  const double a = eight[0] + eight[4], b = eight[1] + eight[5], c = eight[2] + eight[6],
               d = eight[3] + eight[7];
  return (a + c) + (b + d);
}

#define WHERE(condition, values) ((vector)((words)(condition) & (words)(values)))

INLINE void thin(const struct smelt_draws *draws, uint64_t first, uint32_t threshold, float scale,
                 float *values, size_t count) {
  while (count > 0) {
    PART(first, count)
    float part[GROUP] = {0}, *group = length < GROUP ? part : values;
    if (length < GROUP) memcpy(part + skipped, values, length * sizeof(float));
    words drawn[4];
    draw(draws, first / GROUP, drawn);
    for (int i = 0; i < 4; i++) {
      lanes *place = (lanes *)(group + i * L);
      *place = WHERE(drawn[i] < threshold, *place * scale);
    }
    if (length < GROUP) memcpy(values, part + skipped, length * sizeof(float));
    first += length, values += length, count -= length;
  }
}

INLINE void sum_thinned(const struct smelt_draws *draws, uint64_t first, uint32_t threshold,
                        const float *values, size_t count, double sums[2]) {
  vector all = 0, kept = 0;
  while (count > 0) {
    PART(first, count)
    float part[GROUP] = {0};
    const float *group = length < GROUP ? part : values;
    if (length < GROUP) memcpy(part + skipped, values, length * sizeof(float));
    words drawn[4];
    draw(draws, first / GROUP, drawn);
    for (int i = 0; i < 4; i++) {
      const vector magnitude = __builtin_elementwise_abs(*(const lanes *)(group + i * L));
      all += magnitude;
      kept += WHERE(drawn[i] < threshold, magnitude);
    }
    first += length, values += length, count -= length;
    if (first % BLOCK == 0 || count == 0) {
      sums[0] += folded(&all);
      sums[1] += folded(&kept);
      all = kept = 0;
    }
  }
}

INLINE void write_words(const struct smelt_draws *draws, uint64_t first, uint32_t *target,
                        size_t count) {
  while (count > 0) {
    PART(first, count)
    words drawn[4];
    draw(draws, first / GROUP, drawn);
    memcpy(target, (const uint32_t *)drawn + skipped, length * sizeof(uint32_t));
    first += length, target += length, count -= length;
  }
}

#define KERNELS(name, target)                                                                  \
  target static void thin##name(const struct smelt_draws *draws, uint64_t first,                \
                                uint32_t threshold, float scale, float *values, size_t count) { \
    thin(draws, first, threshold, scale, values, count);                                        \
  }                                                                                            \
  target static void sum_thinned##name(const struct smelt_draws *draws, uint64_t first,         \
                                       uint32_t threshold, const float *values, size_t count,   \
                                       double sums[2]) {                                        \
    sum_thinned(draws, first, threshold, values, count, sums);                                  \
  }                                                                                            \
  target static void write_words##name(const struct smelt_draws *draws, uint64_t first,         \
                                       uint32_t *words, size_t count) {                         \
    write_words(draws, first, words, count);                                                    \
  }
FOR_EACH_TARGET(KERNELS)

void smelt_thin(const struct smelt_draws *draws, uint64_t first, uint32_t threshold, float scale,
                float *values, size_t count) {
  CHOOSE(thin, draws, first, threshold, scale, values, count);
}

void smelt_sum_thinned(const struct smelt_draws *draws, uint64_t first, uint32_t threshold,
                       const float *values, size_t count, double sums[2]) {
  CHOOSE(sum_thinned, draws, first, threshold, values, count, sums);
}

void smelt_draw(const struct smelt_draws *draws, uint64_t first, uint32_t *words, size_t count) {
  CHOOSE(write_words, draws, first, words, count);
}
