/* What Python asks for: ``Job`` of scan.py. */

#pragma once

#include "matrix.h"

enum { MAPS = 4, GELU = 0, SILU = 1, RELU = 2 };

typedef struct {
  int64_t depth, heads, chunks, size, widths[MAPS + 1], activation, norm, residual, online;
  int64_t low; /* q, k, v, out and their gradients are bfloat16, and multiplied as such where the processor does */
  double eps;
  const void *q, *k, *v;            /* [B, T, H, D] */
  const float *gates;               /* [B, T, H, 3] */
  const float *gain, *bias;         /* [G, D] or NULL */
  const float *base[MAPS];          /* [H, in, out] or NULL; gbase [G, in, out] */
  const float *start[MAPS];         /* as held: [G, 2, in, out], from the second on [G, 2, out, in] */
  float *end[MAPS];
  void *out;
  float *tape;                      /* [G, tape_size] or NULL */
  const void *gout;
  const float *gend[MAPS];
  float *gstart[MAPS], *gbase[MAPS];
  void *gq, *gk, *gv;
  float *ggates, *ggain, *gbias;
} job;
