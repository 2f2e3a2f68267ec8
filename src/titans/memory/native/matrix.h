/* Small matrices, and what goes over their rows: float, every size a multiple of 16. */

#pragma once

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifdef __AVX512F__
enum { LANES = 16 };
#define NUMBERS {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}
#else
enum { LANES = 8 };
#define NUMBERS {0, 1, 2, 3, 4, 5, 6, 7}
#endif

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES), aligned(4)));
typedef uint32_t bits __attribute__((vector_size(4 * LANES), aligned(4)));
#define INLINE static inline __attribute__((always_inline))

typedef struct {
  float *at;
  long row, column; /* steps */
} matrix;

typedef struct { /* a number for every row */
  const float *at;
  long step;
} column;

static const float ONE = 1, MINUS = -1;
static const column PLUS_ALL = {&ONE, 0}, MINUS_ALL = {&MINUS, 0};

INLINE matrix dense(float *at, long width) { return (matrix){at, width, 1}; }
INLINE matrix transposed(matrix m) { return (matrix){m.at, m.column, m.row}; }
INLINE vec load(const float *at) { return *(const vec *)at; }
INLINE void store(float *at, vec x) { *(vec *)at = x; }
INLINE void add(float *at, vec x) { store(at, load(at) + x); }
INLINE vec all(float x) { return x - (vec){0}; }
INLINE vec choose(ivec mask, vec a, vec b) { return (vec)((mask & (ivec)a) | (~mask & (ivec)b)); }

INLINE float sum(vec x) {
#ifdef __clang__
  for (int i = 1; i < LANES; i++) x[0] += x[i];
#else /* by halves, in registers */
#pragma GCC unroll 4
  for (int half = LANES / 2; half; half /= 2) x += __builtin_shuffle(x, (ivec)NUMBERS ^ half);
#endif
  return x[0];
}

/* ---- numbers that are float or, low, bfloat16 ---- */

typedef uint16_t shorts __attribute__((vector_size(2 * LANES), aligned(2)));

INLINE vec get(const int low, const void *x, long i) {
  if (!low) return load((const float *)x + i);
  return (vec)(__builtin_convertvector(*(const shorts *)((const uint16_t *)x + i), bits) << 16);
}

INLINE void put(const int low, void *x, long i, vec y) {
  if (!low) {
    store((float *)x + i, y);
    return;
  }
  bits b = (bits)y, even = b >> 16 & 1;
  b = (b + 0x7fff + even) >> 16; /* to the nearest, ties to even; NaN would overflow */
  b = (bits)choose(y == y, (vec)b, (vec)((bits){0} + 0x7fc0));
  *(shorts *)((uint16_t *)x + i) = __builtin_convertvector(b, shorts);
}

/* ---- rows ---- */

/* to [n, m] from [m, n] */
static void transpose(float *restrict to, matrix from, long m, long n) {
  for (long i = 0; i < m; i += 16)
    for (long j = 0; j < n; j += 16)
      for (long y = j; y < j + 16; y++)
        for (long x = i; x < i + 16; x++) to[y * m + x] = from.at[x * from.row + y];
}

static void times(float *to, const float *a, const float *b, long n) {
  for (long i = 0; i < n; i += LANES) store(to + i, load(a + i) * load(b + i));
}

static void plus(float *to, const float *a, const float *b, long n) {
  for (long i = 0; i < n; i += LANES) store(to + i, load(a + i) + load(b + i));
}

static void add_rows(matrix to, matrix x, long rows, long n) {
  for (long t = 0; t < rows; t++)
    for (long i = 0; i < n; i += LANES) add(to.at + t * to.row + i, load(x.at + t * x.row + i));
}

static float dot(const float *a, const float *b, long n) {
  vec total[4] = {{0}};
  long i = 0;
  for (; i + 4 * LANES <= n; i += 4 * LANES)
    for (int j = 0; j < 4; j++) total[j] += load(a + i + j * LANES) * load(b + i + j * LANES);
  for (; i < n; i += LANES) total[0] += load(a + i) * load(b + i);
  return sum((total[0] + total[1]) + (total[2] + total[3]));
}

/* to [rows, n] = x, every row times its weight */
static void scale(matrix to, matrix x, column weight, long rows, long n) {
  for (long t = 0; t < rows; t++)
    for (long i = 0; i < n; i += LANES)
      store(to.at + t * to.row + i, weight.at[t * weight.step] * load(x.at + t * x.row + i));
}

/* to [rows, n] = a and b, added with two weights a row */
static void mix(matrix to, const float *a, const float *b, const float *weights, long rows, long n) {
  for (long t = 0; t < rows; t++)
    for (long i = 0; i < n; i += LANES)
      store(to.at + t * to.row + i, weights[2 * t] * load(a + t * n + i) + weights[2 * t + 1] * load(b + t * n + i));
}

/* Adds the gradient of such weights, times sign, where a and b met x. */
static void add_weights_grad(float *to, float sign, const float *a, const float *b, matrix x, long rows, long n) {
  for (long t = 0; t < rows; t++) {
    to[2 * t] += sign * dot(a + t * n, x.at + t * x.row, n);
    to[2 * t + 1] += sign * dot(b + t * n, x.at + t * x.row, n);
  }
}
