#include "include/kernels.h"
#include "lanes.h"

#include <string.h>

#pragma STDC FP_CONTRACT OFF

enum { L = 16 };
typedef float vector __attribute__((ext_vector_type(L)));
typedef float lanes __attribute__((ext_vector_type(L), aligned(4)));
typedef int mask __attribute__((ext_vector_type(L)));

#define WHERE(condition, values) ((vector)((condition) & (mask)(values)))

INLINE void load(const float *values, size_t bytes, vector *target) {
  if (bytes == sizeof(vector)) {
    *target = *(const lanes *)values;
  } else {
    *target = 0;
    memcpy(target, values, bytes);
  }
}

INLINE void elect(const float *rows, size_t stride, size_t order, const float *weights,
                  bool weighs_votes, size_t columns, float *sums, float *agreed) {
  for (size_t column = 0; column < columns; column += L) {
    const size_t bytes = (columns - column < L ? columns - column : L) * sizeof(float);
    vector votes = 0, sum = 0, weight = 0;
    for (size_t row = 0; row < order; row++) {
      vector value;
      load(rows + row * stride + column, bytes, &value);
      votes += weighs_votes ? value * weights[row] : value;
    }
    const mask wins = votes >= 0;
    for (size_t row = 0; row < order; row++) {
      vector value;
      load(rows + row * stride + column, bytes, &value);
      const vector product = value * weights[row];
      const vector vote = weighs_votes ? product : value;
      const mask agrees = (wins & (vote > 0)) | (~wins & (vote < 0));
      sum += WHERE(agrees, product);
      weight += WHERE(agrees, (vector)weights[row]);
    }
    memcpy(sums + column, &sum, bytes);
    if (agreed) memcpy(agreed + column, &weight, bytes);
  }
}

INLINE void weigh(const float *rows, size_t stride, size_t order, const float *weights,
                  size_t columns, float *sums) {
  for (size_t column = 0; column < columns; column += L) {
    const size_t bytes = (columns - column < L ? columns - column : L) * sizeof(float);
    vector sum = 0;
    for (size_t row = 0; row < order; row++) {
      vector value;
      load(rows + row * stride + column, bytes, &value);
      sum += value * weights[row];
    }
    memcpy(sums + column, &sum, bytes);
  }
}

#define KERNELS(name, target)                                                                    \
  target static void elect##name(const float *rows, size_t stride, size_t order,                  \
                                 const float *weights, bool weighs_votes, size_t columns,         \
                                 float *sums, float *agreed) {                                    \
    if (weighs_votes) elect(rows, stride, order, weights, true, columns, sums, agreed);           \
    else elect(rows, stride, order, weights, false, columns, sums, agreed);                       \
  }                                                                                              \
  target static void weigh##name(const float *rows, size_t stride, size_t order,                  \
                                 const float *weights, size_t columns, float *sums) {             \
    weigh(rows, stride, order, weights, columns, sums);                                           \
  }
FOR_EACH_TARGET(KERNELS)

void smelt_elect(const float *rows, size_t stride, size_t order, const float *weights,
                 bool weighs_votes, size_t columns, float *sums, float *agreed) {
  CHOOSE(elect, rows, stride, order, weights, weighs_votes, columns, sums, agreed);
}

void smelt_weigh(const float *rows, size_t stride, size_t order, const float *weights,
                 size_t columns, float *sums) {
  CHOOSE(weigh, rows, stride, order, weights, columns, sums);
}
