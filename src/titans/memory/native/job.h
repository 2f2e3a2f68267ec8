/* What Python asks for: ``Job`` of scan.py. */

#pragma once

#include "matrix.h"

enum { MAPS = 4, GELU = 0, SILU = 1, RELU = 2 };

typedef struct {
  int64_t depth, heads, chunks, size, widths[MAPS + 1], activation, norm, residual, online;
  int64_t low; /* multiply bfloat16, where the processor does */
  double eps;
  const float *q, *k, *v, *gates;   /* [B, T, H, D], gates [B, T, H, 3] */
  const float *gain, *bias;         /* [G, D] or NULL */
  const float *base[MAPS];          /* [H, in, out] or NULL; gbase [G, in, out] */
  const float *start[MAPS];         /* as held: [G, 2, in, out], from the second on [G, 2, out, in] */
  float *end[MAPS], *out, *tape;    /* tape [G, tape_size] or NULL */
  const float *gout, *gend[MAPS];
  float *gstart[MAPS], *gbase[MAPS], *gq, *gk, *gv, *ggates, *ggain, *gbias;
} job;
