/* A chunk's masks from its gates, as memory/gates.py has them. */

#pragma once

#include "job.h"
#include "pointwise.h"
#include "product.h"

typedef struct {
  float *lr, *keep, *kept;                     /* [C]: theta, beta, m */
  float *retention, *momentum, *both, *write;  /* [C, C]: D, E, D E, and that with theta: A */
  float *read, *to_state, transition[4];       /* [C, 2] twice */
} masks;

/* to[t, j]: the product of steps j + 1 ... t; in place of the steps, that of 0 ... t. What is too small becomes 0. */
static void decay(float *to, float *steps, long C) {
  float whole = 1;
  memset(to, 0, C * C * sizeof(float));
  for (long t = 0; t < C; t++) {
    float step = steps[t], *row = to + t * C;
    for (long j = 0; j < t; j += LANES) {
      vec x = load(row - C + j) * step;
      store(row + j, choose(x > 1e-30f, x, all(0)));
    }
    row[t] = 1;
    whole *= step;
    steps[t] = whole = whole > 1e-30f ? whole : 0;
  }
}

/* Gradient of the logarithms of the steps, ``column`` apart, from those of both results. */
static void decay_backward(float *to, long column, const float *g, const float *gwhole, const float *made,
                           const float *whole, long C) {
  float sums[C], running = 0;
  memset(sums, 0, sizeof sums);
  for (long t = C - 1; t >= 0; t--) {
    running += gwhole[t] * whole[t];
    float total = running;
    for (long j = 0; j < t; j++) sums[j] += g[t * C + j] * made[t * C + j], total += sums[j];
    to[t * column] = total;
  }
}

static void make_masks(masks *m, matrix gates, const job *j) {
  long C = j->size;
  for (long t = 0; t < C; t++) {
    const float *gate = gates.at + t * gates.row;
    m->lr[t] = gate[0], m->kept[t] = gate[1], m->keep[t] = gate[2];
  }
  for (long t = 0; t < C; t += LANES) {
    store(m->kept + t, exponential(load(m->kept + t)));
    store(m->keep + t, exponential(load(m->keep + t)));
  }
  decay(m->retention, m->keep, C);
  decay(m->momentum, m->kept, C);
  matrix retention = dense(m->retention, C), momentum = dense(m->momentum, C);
  product_of(LOWER, NULL, dense(m->both, C), (sum_of){0}, C, C, C, retention, momentum, PLUS_ALL);
  const float *last = m->both + (C - 1) * C, *last_momentum = m->momentum + (C - 1) * C;
  for (long t = 0; t < C; t++) {
    times(m->write + t * C, m->both + t * C, m->lr, C);
    m->read[2 * t] = m->keep[t];
    m->read[2 * t + 1] = dot(m->retention + t * C, m->kept, C);
    m->to_state[2 * t] = last[t] * m->lr[t];
    m->to_state[2 * t + 1] = last_momentum[t] * m->lr[t];
  }
  m->transition[0] = m->keep[C - 1], m->transition[1] = m->read[2 * C - 1];
  m->transition[2] = 0, m->transition[3] = m->kept[C - 1];
}

/* Gradients of the gates from those of write, read, to_state and transition (g), for which there is room in it. */
static void make_masks_backward(matrix ggates, masks *g, const masks *m, float *turned, const job *j) {
  long C = j->size, last = (C - 1) * C;
  float gkept[C];
  g->read[2 * C - 2] += g->transition[0], g->read[2 * C - 1] += g->transition[1];
  for (long s = 0; s < C; s++) {
    g->write[last + s] += g->to_state[2 * s];
    g->lr[s] = g->to_state[2 * s + 1] * m->momentum[last + s];
    g->keep[s] = g->read[2 * s];
    gkept[s] = 0;
  }
  for (long t = 0; t < C; t++) {
    float *row = g->write + t * C, *gboth = g->both + t * C, gread = g->read[2 * t + 1];
    for (long s = 0; s < C; s++) { /* write has no entries right of its diagonal */
      float here = s <= t ? row[s] : 0;
      g->lr[s] += here * m->both[t * C + s];
      gboth[s] = here * m->lr[s];
      gkept[s] += gread * m->retention[t * C + s];
    }
  }
  gkept[C - 1] += g->transition[3];
  transpose(turned, dense(m->momentum, C), C, C);
  product(NULL, dense(g->retention, C), C, C, C, dense(g->both, C), dense(turned, C), PLUS_ALL);
  product(NULL, dense(g->momentum, C), C, C, C, transposed(dense(m->retention, C)), dense(g->both, C), PLUS_ALL);
  for (long t = 0; t < C; t++) {
    g->momentum[last + t] += g->to_state[2 * t + 1] * m->lr[t];
    for (long l = 0; l < C; l++) g->retention[t * C + l] += g->read[2 * t + 1] * m->kept[l];
    ggates.at[t * ggates.row] = g->lr[t];
  }
  decay_backward(ggates.at + 1, ggates.row, g->momentum, gkept, m->momentum, m->kept, C);
  decay_backward(ggates.at + 2, ggates.row, g->retention, g->keep, m->retention, m->keep, C);
}
