#include "include/kernels.h"
#include "lanes.h"

#include <string.h>

#pragma STDC FP_CONTRACT OFF

enum { L = 16, MAGNITUDE = 0x7FFFFFFF, HALF = 15, DIGIT = 11 };
typedef int lanes __attribute__((ext_vector_type(L), aligned(4)));
typedef int words __attribute__((ext_vector_type(L)));

// The order of magnitudes is that of their bits, which are what the loops below look at.

uint32_t smelt_count_upper(const float *values, size_t count, int64_t *counts) {
  uint32_t lower = 0;
  for (size_t i = 0; i < count; i++) {
    uint32_t bits;
    memcpy(&bits, values + i, sizeof bits);
    bits &= MAGNITUDE;
    lower |= bits;
    counts[bits >> HALF]++;
  }
  return lower & ((1 << HALF) - 1);
}

INLINE void count_lower(const float *values, size_t count, const uint32_t *uppers, size_t order,
                        int64_t *counts) {
  for (size_t i = 0; i < count; i += L) {
    const size_t length = count - i < L ? count - i : L;
    words bits = -1;
    memcpy(&bits, values + i, length * sizeof(float));
    // Most values are far from every rank: sixteen at once are passed over.
    const words upper = (bits & MAGNITUDE) >> HALF;
    words found = 0;
    for (size_t k = 0; k < order; k++) found |= upper == (int)uppers[k];
    if (!__builtin_reduce_or(found)) continue;
    for (size_t j = 0; j < length; j++)
      for (size_t k = 0; found[j] && k < order; k++)
        if (upper[j] == (int)uppers[k]) counts[k << HALF | (bits[j] & ((1 << HALF) - 1))]++;
  }
}

INLINE void count_equal(const float *values, size_t count, uint32_t one, uint32_t other,
                        size_t counts[2]) {
  words ones = 0, others = 0;
  size_t i = 0;
  for (; i + L <= count; i += L) {
    const words bits = *(const lanes *)(values + i) & MAGNITUDE;
    ones -= bits == (int)one;
    others -= bits == (int)other;
  }
  counts[0] = (size_t)__builtin_reduce_add(ones);
  counts[1] = (size_t)__builtin_reduce_add(others);
  for (; i < count; i++) {
    uint32_t bits;
    memcpy(&bits, values + i, sizeof bits);
    counts[0] += (bits & MAGNITUDE) == one;
    counts[1] += (bits & MAGNITUDE) == other;
  }
}

#define KERNELS(name, target)                                                                  \
  target static void count_lower##name(const float *values, size_t count,                       \
                                       const uint32_t *uppers, size_t order, int64_t *counts) { \
    if (order == 2) count_lower(values, count, uppers, 2, counts);                              \
    else count_lower(values, count, uppers, order, counts);                                     \
  }                                                                                            \
  target static void count_equal##name(const float *values, size_t count, uint32_t one,         \
                                       uint32_t other, size_t counts[2]) {                      \
    count_equal(values, count, one, other, counts);                                             \
  }
FOR_EACH_TARGET(KERNELS)

void smelt_count_lower(const float *values, size_t count, const uint32_t *uppers, size_t order,
                       int64_t *counts) {
  CHOOSE(count_lower, values, count, uppers, order, counts);
}

void smelt_count_equal(const float *values, size_t count, uint32_t one, uint32_t other,
                       size_t counts[2]) {
  CHOOSE(count_equal, values, count, one, other, counts);
}

/// Sorts the keys' indices (lower half) by magnitude (upper half), digit by digit, each pass
/// keeping the order of the one before. Returns which of the two buffers they end in.
static uint64_t *sorted(uint64_t *keys, uint64_t *other, size_t count) {
  enum { DIGITS = 3, RADIX = 1 << DIGIT };
  uint32_t starts[DIGITS][RADIX] = {0};
  for (size_t i = 0; i < count; i++)
    for (int d = 0; d < DIGITS; d++) starts[d][keys[i] >> (32 + d * DIGIT) & (RADIX - 1)]++;
  for (int d = 0; d < DIGITS; d++) {
    uint32_t sum = 0;
    for (int value = 0; value < RADIX; value++) {
      const uint32_t here = starts[d][value];
      starts[d][value] = sum;
      sum += here;
    }
    for (size_t i = 0; i < count; i++)
      other[starts[d][keys[i] >> (32 + d * DIGIT) & (RADIX - 1)]++] = keys[i];
    uint64_t *swap = keys;
    keys = other;
    other = swap;
  }
  return keys;
}

void smelt_thin_by_rank(float *values, size_t count, const float *uniforms, float only,
                        float lowest, float epsilon, uint64_t *scratch) {
  if (count == 1) {
    if (!(uniforms[0] < only)) values[0] = 0;
    return;
  }
  for (size_t i = 0; i < count; i++) {
    uint32_t bits;
    memcpy(&bits, values + i, sizeof bits);
    scratch[i] = (uint64_t)(bits & MAGNITUDE) << 32 | i;
  }
  const uint64_t *order = sorted(scratch, scratch + count, count);
  const float last = (float)(count - 1);
  for (size_t rank = 0; rank < count; rank++) {
    const size_t i = (uint32_t)order[rank];
    const float probability = lowest + (float)rank / last * 2 * epsilon;
    if (!(uniforms[i] < probability)) values[i] = 0;
  }
}
