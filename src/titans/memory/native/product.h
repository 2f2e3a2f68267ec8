/* Products of small matrices: of float32, or of bfloat16 added up in float32. Every size is a multiple of 16. */

#pragma once

#include "matrix.h"

/* A tile of a product stays in registers: DOWN rows of ACROSS vectors. */
enum { ACROSS = LANES / 4, DOWN = 6 };
enum { FULL, LOWER, UPPER }; /* LOWER: nothing right of the diagonal, UPPER: nothing left of it */

typedef struct { /* what a product is added to: p P + q Q, both laid out like the result; NULL: nothing */
  const float *P, *Q;
  float p, q;
} sum_of;

typedef struct { /* room for operands laid out anew, each as large as the largest */
  float *left, *right;
  int low; /* multiply bfloat16 */
} operands;

/* ---- bfloat16: two numbers that follow each other along the sum are one word, in place of a float ---- */

#if defined __AVX512F__ && defined __AVX512BF16__
#include <immintrin.h>

enum { LOW = 1 };

INLINE vec multiply_add(const int low, vec sum, float x, vec y) {
  return low ? (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_ps(x), (__m512bh)y) : sum + x * y;
}

INLINE __m512i both(const float *first, const float *second) {
  return (__m512i)_mm512_cvtne2ps_pbh((__m512)load(second), (__m512)load(first));
}

/* to [l / 2, n]: words of from [l, n], where rows or columns are contiguous */
static void pack(float *to, matrix from, long l, long n) {
  static const uint16_t NUMBER[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                      8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  __m512i halves = _mm512_loadu_si512(NUMBER), front = _mm512_cvtepu16_epi32(_mm256_loadu_si256((void *)NUMBER));
  __m512i back = _mm512_add_epi32(front, _mm512_set1_epi32(8));
  for (long t = 0; from.column == 1 && t < l; t += 2)
    for (long j = 0; j < n; j += 16) {
      const float *at = from.at + t * from.row + j;
      store(to + t / 2 * n + j, (vec)_mm512_permutexvar_epi16(halves, both(at, at + from.row)));
    }
  for (long t = 0; from.column != 1 && t < l; t += 16)
    for (long j = 0; j < n; j += 16) {
      __m512i word[8], next[8];
      for (int i = 0; i < 8; i++) {
        const float *at = from.at + t + (j + 2 * i) * from.column;
        word[i] = both(at, at + from.column);
      }
      for (int step = 0; step < 4; step++) { /* the bits of (i, lane) turn by one place; by four: turned */
        for (int i = 0; i < 4; i++) {
          next[2 * i] = _mm512_permutex2var_epi32(word[i], front, word[i + 4]);
          next[2 * i + 1] = _mm512_permutex2var_epi32(word[i], back, word[i + 4]);
        }
        memcpy(word, next, sizeof word);
      }
      for (int i = 0; i < 8; i++) store(to + (t / 2 + i) * n + j, (vec)word[i]);
    }
}
#else
enum { LOW = 0 };

INLINE vec multiply_add(const int low, vec sum, float x, vec y) { return sum + x * y; }
static void pack(float *to, matrix from, long l, long n) {}
#endif

/* ---- the product ---- */

INLINE void tile(const int low, const int down, const int across, long from, long depth, matrix a, matrix b, matrix c,
                 column scale, sum_of to, long place) {
  vec acc[DOWN][ACROSS];
  for (int i = 0; i < down; i++)
    for (int j = 0; j < across; j++) acc[i][j] = (vec){0};
  for (long l = from; l < depth; l++) {
    vec row[ACROSS];
    for (int j = 0; j < across; j++) row[j] = load(b.at + l * b.row + j * LANES);
    for (int i = 0; i < down; i++) {
      float x = a.at[i * a.row + l * a.column];
      for (int j = 0; j < across; j++) acc[i][j] = multiply_add(low, acc[i][j], x, row[j]);
    }
  }
  for (int i = 0; i < down; i++)
    for (int j = 0; j < across; j++) {
      long here = place + i * c.row + j * LANES;
      vec x = acc[i][j] * scale.at[i * scale.step];
      if (to.P) x += to.p * load(to.P + here);
      if (to.Q) x += to.q * load(to.Q + here);
      store(c.at + here, x);
    }
}

INLINE void strip(const int low, int shape, const int across, long rows, long depth, matrix a, matrix b,
                  matrix c, column scale, sum_of to, long place) {
  long i = 0;
#define TILE(down)                                                                                                  \
  tile(low, down, across, shape == UPPER ? i >> low : 0, (shape == LOWER ? i + down : depth) >> low,                \
       (matrix){a.at + i * a.row, a.row, a.column}, b, c, (column){scale.at + i * scale.step, scale.step}, to,      \
       place + i * c.row)
  for (; i + DOWN <= rows; i += DOWN) TILE(DOWN);
  switch (rows - i) { /* rows are multiples of 16 */
  case 4: TILE(4); break;
  case 2: TILE(2); break;
  }
#undef TILE
}

INLINE void strips(const int low, int shape, const operands *o, matrix c, sum_of to, long m, long n, long l,
                   matrix a, matrix b, column scale) {
  long j = 0;
#define STRIPS(across)                                                                                              \
  for (long width = across * LANES; j + width <= n; j += width) {                                                   \
    matrix panel = {b.at + j * b.column, b.row, b.column};                                                          \
    if (low) pack(o->right, panel, l, width), panel = dense(o->right, width);                                       \
    strip(low, shape, across, m, l, a, panel, c, scale, to, j);                                                     \
  }
  STRIPS(ACROSS)
  if (ACROSS > 2) STRIPS(2)
  STRIPS(1)
#undef STRIPS
}

/* c [m, n] = to + scale (a [m, l] b [l, n]), the scale by row; c's rows are contiguous, a may be triangular. Of b rows
   or columns are contiguous, of a, too, where bfloat16 is multiplied; o may be NULL where it is not and b's rows are.
   Compiled once: copies for constant arguments, which compilers like to make, are no faster. */
static __attribute__((noipa)) void product_of(int shape, const operands *o, matrix c, sum_of to, long m, long n,
                                              long l, matrix a, matrix b, column scale) {
  if (LOW && o && o->low) {
    pack(o->left, transposed(a), l, m);
    strips(LOW, shape, o, c, to, m, n, l, (matrix){o->left, 1, m}, b, scale);
    return;
  }
  if (b.column != 1) {
    transpose(o->right, transposed(b), n, l);
    b = dense(o->right, n);
  }
  strips(0, shape, o, c, to, m, n, l, a, b, scale);
}

static void product_onto(const operands *o, matrix c, sum_of to, long m, long n, long l, matrix a, matrix b,
                         column scale) {
  product_of(FULL, o, c, to, m, n, l, a, b, scale);
}

static void add_lower_product(const operands *o, matrix c, long m, long n, matrix a, matrix b, column scale) {
  product_of(LOWER, o, c, (sum_of){c.at, NULL, 1, 0}, m, n, m, a, b, scale);
}

static void add_upper_product(const operands *o, matrix c, long m, long n, matrix a, matrix b, column scale) {
  product_of(UPPER, o, c, (sum_of){c.at, NULL, 1, 0}, m, n, m, a, b, scale);
}

static void product(const operands *o, matrix c, long m, long n, long l, matrix a, matrix b, column scale) {
  product_onto(o, c, (sum_of){0}, m, n, l, a, b, scale);
}

static void add_product(const operands *o, matrix c, long m, long n, long l, matrix a, matrix b, column scale) {
  product_onto(o, c, (sum_of){c.at, NULL, 1, 0}, m, n, l, a, b, scale);
}
