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

// By address: a vector wider than the plain target's registers has no agreed way to be passed.
INLINE void store(const vector *values, size_t bytes, float *target) {
  if (bytes == sizeof(vector)) *(lanes *)target = *values;
  else memcpy(target, values, bytes);
}

INLINE void elect_some(const float *rows, size_t stride, size_t order, const float *weights,
                       bool weighs_votes, size_t bytes, float *sums, float *agreed) {
  vector votes = 0, sum = 0, weight = 0;
  for (size_t row = 0; row < order; row++) {
    vector value;
    load(rows + row * stride, bytes, &value);
    votes += weighs_votes ? value * weights[row] : value;
  }
  const mask wins = votes >= 0;
  for (size_t row = 0; row < order; row++) {
    vector value;
    load(rows + row * stride, bytes, &value);
    const vector product = value * weights[row];
    const vector vote = weighs_votes ? product : value;
    const mask agrees = (wins & (vote > 0)) | (~wins & (vote < 0));
    sum += WHERE(agrees, product);
    weight += WHERE(agrees, (vector)weights[row]);
  }
  store(&sum, bytes, sums);
  if (agreed) store(&weight, bytes, agreed);
}

INLINE void weigh_some(const float *rows, size_t stride, size_t order, const float *weights,
                       size_t bytes, float *sums) {
  vector sum = 0;
  for (size_t row = 0; row < order; row++) {
    vector value;
    load(rows + row * stride, bytes, &value);
    sum += value * weights[row];
  }
  store(&sum, bytes, sums);
}

// Whole vectors have a length that the compiler knows; only the last may be shorter.

INLINE void elect(const float *rows, size_t stride, size_t order, const float *weights,
                  bool weighs_votes, size_t columns, float *sums, float *agreed) {
  size_t column = 0;
  for (; column + L <= columns; column += L)
    elect_some(rows + column, stride, order, weights, weighs_votes, sizeof(vector), sums + column,
               agreed ? agreed + column : NULL);
  if (column < columns)
    elect_some(rows + column, stride, order, weights, weighs_votes,
               (columns - column) * sizeof(float), sums + column, agreed ? agreed + column : NULL);
}

INLINE void weigh(const float *rows, size_t stride, size_t order, const float *weights,
                  size_t columns, float *sums) {
  size_t column = 0;
  for (; column + L <= columns; column += L)
    weigh_some(rows + column, stride, order, weights, sizeof(vector), sums + column);
  if (column < columns)
    weigh_some(rows + column, stride, order, weights, (columns - column) * sizeof(float),
               sums + column);
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
