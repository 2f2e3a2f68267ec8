/* PyTorch's own OpenMP, where it is in the process: other threads would compete with its, which wait by spinning. */

#pragma once

#ifdef __linux__
extern void GOMP_parallel(void (*)(void *), void *, unsigned, unsigned) __attribute__((weak));
extern void GOMP_barrier(void) __attribute__((weak));
extern int omp_get_thread_num(void) __attribute__((weak));
extern int omp_get_num_threads(void) __attribute__((weak));
#else
static void (*const GOMP_parallel)(void (*)(void *), void *, unsigned, unsigned) = NULL;
static void (*const GOMP_barrier)(void) = NULL;
static int (*const omp_get_thread_num)(void) = NULL, (*const omp_get_num_threads)(void) = NULL;
#endif
