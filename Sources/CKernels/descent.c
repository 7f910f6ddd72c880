#include "include/kernels.h"
#include "lanes.h"

#include <string.h>

#pragma STDC FP_CONTRACT OFF

enum { L = smelt_descent_lanes, MAX = smelt_descent_max_order };
typedef double lanes __attribute__((ext_vector_type(L)));
typedef long mask __attribute__((ext_vector_type(L)));

#define SQRT __builtin_elementwise_sqrt
#define MAXIMUM(a, b) ((a) > (b) ? (a) : (b))

// A vector whose Gram–Schmidt remainder is below this share of it may depend on the others.
static const double doubt = 1e-6;

/// Whether all vectors are independent: the pivots of LDLᵀ, zero vectors passed over.
INLINE void pivots(const size_t k, const lanes *m, mask *independent) {
  lanes factor[MAX * MAX], pivot[MAX];
  mask good = (mask)0 - 1;
  for (size_t j = 0; j < k; j++) {
    for (size_t i = 0; i <= j; i++) {
      lanes sum = m[j * k + i];
      for (size_t s = 0; s < i; s++) sum -= factor[j * MAX + s] * factor[i * MAX + s] * pivot[s];
      if (i == j) {
        pivot[j] = sum;
        good &= (m[j * k + j] <= 0) | (sum > m[j * k + j] * doubt);
      } else {
        factor[j * MAX + i] = m[i * k + i] <= 0 ? (lanes)0 : sum / pivot[i];
      }
    }
  }
  *independent = good;
}

// The order of every sum is that of `Descent.run`.
INLINE void descend(const size_t k, const bool squared, const struct smelt_descent *d,
                    const double *grams, double *last, double *slope_at_start, double *products,
                    double *redundancy, bool *independent) {
  lanes m[MAX * MAX], a[MAX], u[MAX], g[MAX], t[MAX], r[MAX], cosines[MAX], scales[MAX];
  memcpy(m, grams, k * k * sizeof(lanes));
  mask good;
  pivots(k, m, &good);
  const lanes zero = 0, one = 1;
  for (size_t j = 0; j < k; j++) a[j] = u[j] = zero;

  for (size_t step = 0; step < d->iterations; step++) {
    lanes q = 0;
    for (size_t j = 0; j < k; j++) {
      g[j] = zero;
      for (size_t i = 0; i < k; i++) g[j] += m[i * k + j] * a[i];
    }
    for (size_t j = 0; j < k; j++) q += a[j] * g[j];
    q = MAXIMUM(q, zero);
    for (size_t j = 0; j < k; j++) {
      const lanes square = m[j * k + j] - 2 * g[j] + q;
      const mask is_zero = (m[j * k + j] <= 0) | (square <= m[j * k + j] * d->vanishing);
      const lanes norm = SQRT(square);
      t[j] = is_zero ? zero : 1 / norm;
      r[j] = d->epsilon == 0 ? t[j] : is_zero ? zero : 1 / (norm + d->epsilon);
      cosines[j] = scales[j] = zero;
    }
    for (size_t i = 0; i < k; i++) {
      for (size_t j = 0; j < k; j++) {
        if (i == j) continue;
        const lanes cosine = (m[i * k + j] - g[j] + (q - g[i])) * r[j] * r[i];
        if (squared) {
          const lanes slope = 2 * cosine;
          cosines[j] += slope * cosine;
          scales[j] += slope * r[i];
        } else {
          const lanes slope = cosine > 0 ? one : cosine < 0 ? -one : zero;
          cosines[j] += slope * cosine;
          scales[j] += slope * r[i];
        }
      }
    }
    lanes sum = 0;
    for (size_t j = 0; j < k; j++) {
      cosines[j] = (cosines[j] * t[j] - scales[j]) * r[j] * (2 * d->pair_weight);
      sum += cosines[j];
    }
    if (step == 0) memcpy(slope_at_start, cosines, k * sizeof(lanes));
    const lanes shrink = d->weight_decay - sum + (q > 0 ? d->penalty / SQRT(q) : zero);
    for (size_t j = 0; j < k; j++) {
      u[j] = u[j] * d->momentum + (cosines[j] + a[j] * shrink);
      a[j] -= u[j] * d->rate;
    }
  }

  lanes q = 0;
  for (size_t j = 0; j < k; j++) {
    g[j] = zero;
    for (size_t i = 0; i < k; i++) g[j] += m[j * k + i] * a[i];
  }
  for (size_t j = 0; j < k; j++) q += a[j] * g[j];
  q = MAXIMUM(q, zero);
  for (size_t i = 0; i < k; i++) {
    for (size_t j = 0; j < k; j++) {
      const mask is_zero = (m[i * k + i] <= 0) | (m[j * k + j] <= 0);
      lanes product = is_zero ? zero : m[i * k + j] - g[i] - g[j] + q;
      if (i == j) product = product <= m[i * k + i] * d->vanishing ? zero : product;
      memcpy(products + (i * k + j) * L, &product, sizeof product);
    }
  }
  memcpy(last, a, k * sizeof(lanes));
  memcpy(redundancy, &q, sizeof q);
  for (size_t lane = 0; lane < L; lane++) independent[lane] = good[lane] != 0;
}

#define ARGUMENTS d, grams, last, slope, products, redundancy, independent
#define CASE(K) \
  case K: return squared ? descend(K, true, ARGUMENTS) : descend(K, false, ARGUMENTS);

#define DESCEND(name, target)                                                              \
  target static void descend##name(const struct smelt_descent *d, const double *grams,      \
                                   double *last, double *slope, double *products,          \
                                   double *redundancy, bool *independent) {                \
    const bool squared = d->squared;                                                       \
    switch (d->order) {                                                                    \
      CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8)                              \
      default: return descend(d->order, squared, ARGUMENTS);                               \
    }                                                                                      \
  }
FOR_EACH_TARGET(DESCEND)

void smelt_descend(const struct smelt_descent *d, const double *grams, double *last, double *slope,
                   double *products, double *redundancy, bool *independent) {
  CHOOSE(descend, ARGUMENTS);
}
