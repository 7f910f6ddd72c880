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

// Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3, SC 2011.
#define LANES 16

INLINE void philox(uint64_t key, uint64_t sequence, uint64_t first, uint32_t *words, size_t count) {
  for (size_t start = 0; start < count; start += LANES) {
    uint32_t a[LANES], b[LANES], c[LANES], d[LANES];
    for (int i = 0; i < LANES; i++) {
      uint64_t block = first + start + (uint64_t)i;
      a[i] = (uint32_t)block;
      b[i] = (uint32_t)(block >> 32);
      c[i] = (uint32_t)sequence;
      d[i] = (uint32_t)(sequence >> 32);
    }
    uint32_t low = (uint32_t)key, high = (uint32_t)(key >> 32);
    for (int round = 0; round < 10; round++) {
      for (int i = 0; i < LANES; i++) {
        uint64_t left = (uint64_t)a[i] * 0xD2511F53u;
        uint64_t right = (uint64_t)c[i] * 0xCD9E8D57u;
        a[i] = (uint32_t)(right >> 32) ^ b[i] ^ low;
        c[i] = (uint32_t)(left >> 32) ^ d[i] ^ high;
        b[i] = (uint32_t)right;
        d[i] = (uint32_t)left;
      }
      low += 0x9E3779B9u;
      high += 0xBB67AE85u;
    }
    size_t blocks = count - start < LANES ? count - start : LANES;
    for (size_t i = 0; i < blocks; i++) {
      words[4 * (start + i)] = a[i];
      words[4 * (start + i) + 1] = b[i];
      words[4 * (start + i) + 2] = c[i];
      words[4 * (start + i) + 3] = d[i];
    }
  }
}

#if defined(__x86_64__)
#define AVX512 __attribute__((target("avx512f,avx512dq,avx512vl,avx512bw,avx2,fma")))
#define AVX2 __attribute__((target("avx2,fma")))

AVX512 static void accumulate_512(float *s, const float *v, float w, size_t n) { accumulate(s, v, w, n); }
AVX2 static void accumulate_256(float *s, const float *v, float w, size_t n) { accumulate(s, v, w, n); }
AVX512 static double sum_magnitudes_512(const float *v, size_t n) { return sum_magnitudes(v, n); }
AVX2 static double sum_magnitudes_256(const float *v, size_t n) { return sum_magnitudes(v, n); }
AVX512 static void philox_512(uint64_t k, uint64_t s, uint64_t f, uint32_t *w, size_t n) { philox(k, s, f, w, n); }
AVX2 static void philox_256(uint64_t k, uint64_t s, uint64_t f, uint32_t *w, size_t n) { philox(k, s, f, w, n); }

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

void smelt_philox(uint64_t key, uint64_t sequence, uint64_t first, uint32_t *words, size_t count) {
  CHOOSE(philox, key, sequence, first, words, count)
  philox(key, sequence, first, words, count);
}

double smelt_sum_magnitudes(const float *values, size_t count) {
#if defined(__x86_64__)
  if (has_512()) return sum_magnitudes_512(values, count);
  if (has_256()) return sum_magnitudes_256(values, count);
#endif
  return sum_magnitudes(values, count);
}
