#include "include/kernels.h"
#include "lanes.h"

#include <string.h>

#pragma STDC FP_CONTRACT OFF

enum { L = 16, BLOCK = 1024, SIDE = 4 };
typedef float lanes __attribute__((ext_vector_type(L), aligned(4)));
typedef float vector __attribute__((ext_vector_type(L)));
typedef double wide8 __attribute__((ext_vector_type(8)));

INLINE double folded(const vector *lanes) {
  const vector sum = *lanes;
  const wide8 eight = __builtin_convertvector(sum.lo, wide8) + __builtin_convertvector(sum.hi, wide8);
  const double a = eight[0] + eight[4], b = eight[1] + eight[5], c = eight[2] + eight[6],
               d = eight[3] + eight[7];
  return (a + c) + (b + d);
}

/// The products of `left` and `right` rows, over one block; on the diagonal only i ≤ j.
INLINE void add_products(const float *left, const float *right, const size_t stride,
                         const size_t columns, const int lefts, const int rights,
                         const bool diagonal, double *gram, const size_t order) {
  vector sums[SIDE][SIDE] = {0};
  size_t column = 0;
  for (; column < columns; column += L) {
    vector a[SIDE], b[SIDE];
    if (column + L <= columns) {
      for (int i = 0; i < lefts; i++) a[i] = *(const lanes *)(left + i * stride + column);
      if (!diagonal)
        for (int j = 0; j < rights; j++) b[j] = *(const lanes *)(right + j * stride + column);
    } else {
      const size_t bytes = (columns - column) * sizeof(float);
      for (int i = 0; i < lefts; i++) a[i] = 0, memcpy(&a[i], left + i * stride + column, bytes);
      if (!diagonal)
        for (int j = 0; j < rights; j++)
          b[j] = 0, memcpy(&b[j], right + j * stride + column, bytes);
    }
    for (int i = 0; i < lefts; i++)
      for (int j = diagonal ? i : 0; j < rights; j++) sums[i][j] += a[i] * (diagonal ? a[j] : b[j]);
  }
  for (int i = 0; i < lefts; i++) {
    for (int j = diagonal ? i : 0; j < rights; j++) {
      const double product = folded(&sums[i][j]);
      gram[i * order + j] += product;
    }
  }
}

#define SQUARE(N) \
  case N: add_products(left, left, stride, count, N, N, true, corner, order); break;
#define STRIP(N) \
  case N: add_products(left, right, stride, count, SIDE, N, false, corner, order); break;

// Squares of four rows, so that all sums of a square stay in registers.
#define GRAM_ADD(name, target)                                                              \
  target static void gram_add##name(const float *rows, size_t stride, size_t columns,        \
                                    size_t order, double *gram) {                            \
    for (size_t start = 0; start < columns; start += BLOCK) {                                \
      const size_t count = columns - start < BLOCK ? columns - start : BLOCK;                \
      for (size_t i = 0; i < order; i += SIDE) {                                             \
        const float *left = rows + i * stride + start;                                       \
        double *corner = gram + i * order + i;                                               \
        switch (order - i) {                                                                 \
          SQUARE(1) SQUARE(2) SQUARE(3)                                                      \
          default: add_products(left, left, stride, count, SIDE, SIDE, true, corner, order); \
        }                                                                                    \
        for (size_t j = i + SIDE; j < order; j += SIDE) {                                    \
          const float *right = rows + j * stride + start;                                    \
          double *corner = gram + i * order + j;                                             \
          switch (order - j) {                                                               \
            STRIP(1) STRIP(2) STRIP(3)                                                       \
            default: add_products(left, right, stride, count, SIDE, SIDE, false, corner, order); \
          }                                                                                  \
        }                                                                                    \
      }                                                                                      \
    }                                                                                        \
  }
FOR_EACH_TARGET(GRAM_ADD)

static void add_upper(const float *rows, size_t stride, size_t columns, size_t order,
                      double *gram) {
  CHOOSE(gram_add, rows, stride, columns, order, gram);
}

void smelt_gram_add(const float *rows, size_t stride, size_t columns, size_t order, double *gram) {
  add_upper(rows, stride, columns, order, gram);
  for (size_t i = 0; i < order; i++)
    for (size_t j = 0; j < i; j++) gram[i * order + j] = gram[j * order + i];
}
