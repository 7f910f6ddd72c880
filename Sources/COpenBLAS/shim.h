#pragma once
#include <cblas.h>

// Debian's OpenBLAS carries LAPACK but not LAPACKE: these are the Fortran
// routines that Smelt calls, as the LAPACK manual declares them.
void dposv_(const char *uplo, const int *n, const int *nrhs, double *a,
            const int *lda, double *b, const int *ldb, int *info);

void dsyevd_(const char *jobz, const char *uplo, const int *n, double *a,
             const int *lda, double *w, double *work, const int *lwork,
             int *iwork, const int *liwork, int *info);
void sgesdd_(const char *jobz, const int *m, const int *n, float *a,
             const int *lda, float *s, float *u, const int *ldu, float *vt,
             const int *ldvt, float *work, const int *lwork, int *iwork,
             int *info);

// Not in builds of OpenBLAS without threads.
int blas_thread_shutdown_(void) __attribute__((weak));

// As it is loaded, OpenBLAS starts a thread for each core but one, which spin for a while: they
// take a core from us before we have called it once.
static inline void smelt_keep_blas_to_one_thread(void) {
  openblas_set_num_threads(1);
  if (blas_thread_shutdown_) blas_thread_shutdown_();
}
