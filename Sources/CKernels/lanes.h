// How one loop is compiled for several widths of registers, and the widest one is chosen.
#pragma once

#define INLINE static inline __attribute__((always_inline))

#if defined(__x86_64__)
#define FOR_EACH_TARGET(BODY)                        \
  BODY(_avx512, __attribute__((target("avx512f")))) \
  BODY(_avx2, __attribute__((target("avx2"))))      \
  BODY(_plain, )
#define CHOOSE(name, ...)                                                \
  do {                                                                   \
    if (__builtin_cpu_supports("avx512f")) return name##_avx512(__VA_ARGS__); \
    if (__builtin_cpu_supports("avx2")) return name##_avx2(__VA_ARGS__);      \
    return name##_plain(__VA_ARGS__);                                    \
  } while (0)
#else
#define FOR_EACH_TARGET(BODY) BODY(_plain, )
#define CHOOSE(name, ...) return name##_plain(__VA_ARGS__)
#endif
