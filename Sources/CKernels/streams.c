#include "kernels.h"

#include <math.h>

// A product and a sum are fused only where it is said: results must not depend on the compiler.
#pragma STDC FP_CONTRACT OFF

#define INLINE static inline __attribute__((always_inline))

INLINE void accumulate(float *restrict sum, const float *restrict values, float weight, size_t count) {
  for (size_t i = 0; i < count; i++) sum[i] = __builtin_fmaf(values[i], weight, sum[i]);
}

// Sixteen float lanes over blocks of 1024, folded into double.
INLINE double sum_magnitudes(const float *values, size_t count) {
  double sum = 0;
  for (size_t start = 0; start < count; start += 1024) {
    size_t length = count - start < 1024 ? count - start : 1024;
    const float *block = values + start;
    float lanes[16] = {0};
    size_t i = 0;
    for (; i + 16 <= length; i += 16)
      for (int lane = 0; lane < 16; lane++) lanes[lane] += __builtin_fabsf(block[i + lane]);
    for (int lane = 0; i < length; i++, lane++) lanes[lane] += __builtin_fabsf(block[i]);
    double folded = 0;
    for (int lane = 0; lane < 16; lane++) folded += lanes[lane];
    sum += folded;
  }
  return sum;
}

#if defined(__x86_64__)
#define AVX512 __attribute__((target("avx512f,avx512dq,avx512vl,avx512bw,avx2,fma")))
#define AVX2 __attribute__((target("avx2,fma")))

AVX512 static void accumulate_512(float *s, const float *v, float w, size_t n) { accumulate(s, v, w, n); }
AVX2 static void accumulate_256(float *s, const float *v, float w, size_t n) { accumulate(s, v, w, n); }
AVX512 static double sum_magnitudes_512(const float *v, size_t n) { return sum_magnitudes(v, n); }
AVX2 static double sum_magnitudes_256(const float *v, size_t n) { return sum_magnitudes(v, n); }

// Asked for by name, not by target_clones: those break the thread sanitizer.
static int has_512(void) {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq")
      && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw");
}
static int has_256(void) { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

#define CHOOSE(name, ...) \
  if (has_512()) { name##_512(__VA_ARGS__); return; } \
  if (has_256()) { name##_256(__VA_ARGS__); return; }
#else
#define CHOOSE(name, ...)
#endif

void smelt_accumulate(float *sum, const float *values, float weight, size_t count) {
  CHOOSE(accumulate, sum, values, weight, count)
  accumulate(sum, values, weight, count);
}

double smelt_sum_magnitudes(const float *values, size_t count) {
#if defined(__x86_64__)
  if (has_512()) return sum_magnitudes_512(values, count);
  if (has_256()) return sum_magnitudes_256(values, count);
#endif
  return sum_magnitudes(values, count);
}
