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

typedef struct {
  void (*run)(void *job, long i, long of);
  void *job;
  long parts, next;
} shared;

static inline void next_of_shared(void *given) {
  shared *all = given;
  for (long i; (i = __atomic_fetch_add(&all->next, 1, __ATOMIC_RELAXED)) < all->parts;)
    all->run(all->job, i, all->parts);
}

/* ``run`` for every one of so many parts, a thread each. */
static inline void share_out(void (*run)(void *, long, long), void *job, long parts) {
  shared all = {run, job, parts, 0};
  if (parts > 1 && GOMP_parallel) GOMP_parallel(next_of_shared, &all, parts, 0);
  else next_of_shared(&all);
}
