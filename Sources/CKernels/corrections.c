#include "include/kernels.h"
#include "lanes.h"

#include <string.h>

#pragma STDC FP_CONTRACT OFF

enum { BLOCK = 4096 };

INLINE uint32_t bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

INLINE float number(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

/// A value as it comes back from a file of a narrower type, as DType.round has it.
INLINE float rounded(float value, enum smelt_rounding rounding) {
  const uint32_t all = bits(value), sign = all & 0x80000000u, magnitude = all & 0x7FFFFFFFu;
  if (rounding == smelt_bfloat16) {
    const uint32_t near = all + 0x7FFFu + (all >> 16 & 1);
    return number((magnitude > 0x7F800000u ? all | 0x00400000u : near) & 0xFFFF0000u);
  }
  if (rounding == smelt_half) {
    // Adding 0.5 aligns a subnormal's last bit with Float's.
    const uint32_t subnormal = bits(number(magnitude) + 0.5f - 0.5f);
    const uint32_t normal = (magnitude + 0x0FFFu + (magnitude >> 13 & 1)) & ~0x1FFFu;
    const uint32_t special =
        magnitude > 0x7F800000u ? 0x7FC00000u | (magnitude & 0x007FE000u) : 0x7F800000u;
    const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
    return number((magnitude >= 0x477FF000u ? special : finite) | sign);
  }
  return value;
}

INLINE size_t split(float *restrict weights, const float *restrict base, size_t count, enum smelt_rounding rounding,
                    bool writes, uint32_t none, float *restrict missed) {
  size_t kept = 0;
  for (size_t start = 0; start < count; start += BLOCK) {
    const size_t end = count - start < BLOCK ? count : start + BLOCK;
    // As wide as what is counted, so that both fill a register.
    uint32_t kept_here = 0;
    for (size_t i = start; i < end; i++) {
      const float weight = rounded(weights[i], rounding);
      const float vector = rounded(weights[i] - base[i], rounding);
      const float sum = rounded(base[i] + vector, rounding);
      // Which NaN a sum becomes depends on the order of its terms: a NaN is always kept.
      const uint32_t differs = bits(sum) != bits(weight) ? ~0u : 0;
      const uint32_t is_nan = (bits(weight) & 0x7FFFFFFFu) > 0x7F800000u ? ~0u : 0;
      const uint32_t keeps = differs | is_nan;
      kept_here -= keeps;
      if (writes) {
        weights[i] = vector;
        missed[i] = number((bits(weight) & keeps) | (none & ~keeps));
      }
    }
    kept += kept_here;
  }
  return kept;
}

INLINE size_t split_of(float *weights, const float *base, size_t count,
                       enum smelt_rounding rounding, uint32_t none, float *missed) {
  // Each a loop of its own, so that nothing is decided inside.
#define SPLIT(rounding)                                                             \
  (missed ? split(weights, base, count, rounding, true, none, missed)               \
          : split(weights, base, count, rounding, false, none, missed))
  switch (rounding) {
    case smelt_bfloat16: return SPLIT(smelt_bfloat16);
    case smelt_half: return SPLIT(smelt_half);
    default: return SPLIT(smelt_exact);
  }
#undef SPLIT
}

#define TARGET(suffix, attribute)                                                              \
  attribute static size_t split##suffix(float *weights, const float *base, size_t count,       \
                                        enum smelt_rounding rounding, uint32_t none,           \
                                        float *missed) {                                       \
    return split_of(weights, base, count, rounding, none, missed);                             \
  }
FOR_EACH_TARGET(TARGET)

size_t smelt_split_weights(float *weights, const float *base, size_t count,
                           enum smelt_rounding rounding, uint32_t none, float *missed) {
  CHOOSE(split, weights, base, count, rounding, none, missed);
}

size_t smelt_count_missed(const float *weights, const float *base, size_t count,
                          enum smelt_rounding rounding) {
  // Nothing is written where there is no place for what is missed.
  CHOOSE(split, (float *)weights, base, count, rounding, 0, NULL);
}
