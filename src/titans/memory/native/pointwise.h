/* What stands between a memory's maps and behind the last, as memory/activations.py and network.py have it. */

#pragma once

#include "job.h"

/* ---- the activation ---- */

INLINE vec exponential(vec x) { /* of x <= 88: 2^n times a polynomial (relative error 2e-7) */
  x = choose(x < -87.0f, all(-87.0f), x);
  x = choose(x > 88.0f, all(88.0f), x);
  vec shifted = x * 1.44269504f + 12582912.0f, n = shifted - 12582912.0f;
  vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
  vec p = 1.9875691500e-4f * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return p * (vec)(((bits)shifted << 23) + (127u << 23)); /* the last bits of shifted are n */
}

typedef struct {
  vec value, slope, curvature;
} point;

INLINE point activate(long kind, vec z) {
  if (kind == RELU) {
    vec step = choose(z > 0.0f, all(1.0f), all(0.0f));
    return (point){choose(z <= 0.0f, all(0.0f), z), step, all(0.0f)};
  }
  if (kind == SILU) {
    vec s = 1.0f / (1.0f + exponential(-z));
    return (point){z * s, s * (1 + z * (1 - s)), s * (1 - s) * (2 + z * (1 - 2 * s))};
  }
  /* The normal distribution's tail: Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26 */
  vec bell = exponential(-0.5f * z * z), size = choose(z < 0.0f, -z, z);
  vec t = 1.0f / (1.0f + 0.3275911f * 0.70710678f * size);
  vec tail = t * (0.254829592f + t * (-0.284496736f + t * (1.421413741f + t * (-1.453152027f + t * 1.061405429f))));
  tail *= 0.5f * bell;
  vec below = choose(z < 0.0f, tail, 1.0f - tail);
  bell *= 0.39894228f;
  return (point){z * below, below + z * bell, bell * (2.0f - z * z)};
}

INLINE vec silu(vec x) { return activate(SILU, x).value; }

/* ---- lengths and the norm, the residual, and the loss's signal ---- */

/* What brings x to the unit sphere is divided by. */
static float length_of(const float *x, long D) {
  float size = sqrtf(dot(x, x, D));
  return size > 1e-6f ? size : 1e-6f;
}

/* Row x with mean 0 and variance 1; one over its deviation. */
static float standardise(float *unit, const float *x, long D, float eps) {
  vec total = {0}, square = {0};
  for (long i = 0; i < D; i += LANES) total += load(x + i);
  float mean = sum(total) / D;
  for (long i = 0; i < D; i += LANES) square += (load(x + i) - mean) * (load(x + i) - mean);
  float rstd = 1 / sqrtf(sum(square) / D + eps);
  for (long i = 0; i < D; i += LANES) store(unit + i, (load(x + i) - mean) * rstd);
  return rstd;
}

/* That, if there is a norm */
static float normalise(float *unit, const float *x, const job *j) {
  if (j->norm) return standardise(unit, x, j->widths[0], j->eps);
  memcpy(unit, x, j->widths[0] * sizeof(float));
  return 1;
}

/* J g of ``standardise`` */
static void standardise_slope(float *to, const float *g, const float *unit, float rstd, long D) {
  vec total = {0}, along = {0};
  for (long i = 0; i < D; i += LANES) total += load(g + i), along += load(g + i) * load(unit + i);
  float mean = sum(total) / D, share = sum(along) / D;
  for (long i = 0; i < D; i += LANES) store(to + i, rstd * (load(g + i) - mean - share * load(unit + i)));
}

/* J g of ``normalise`` */
static void norm_slope(float *to, const float *g, const float *unit, float rstd, const job *j) {
  if (j->norm) standardise_slope(to, g, unit, rstd, j->widths[0]);
  else memcpy(to, g, j->widths[0] * sizeof(float));
}

/* What is learned of the norm: of a memory, one row. */
typedef struct {
  float *gain, *bias;
} affine;

static affine affine_of(const float *gain, const float *bias, long g, long D) {
  return gain ? (affine){(float *)gain + g * D, (float *)bias + g * D} : (affine){0};
}

INLINE vec gain_at(affine a, long i) { return a.gain ? load(a.gain + i) : all(1.0f); }
INLINE vec bias_at(affine a, long i) { return a.bias ? load(a.bias + i) : all(0.0f); }

/* What is read, from the last map's output r at the queries. */
static void finish(matrix out, const float *r, matrix q, affine a, const job *j) {
  long D = j->widths[0];
  float unit[D];
  for (long t = 0; t < j->size; t++, r += D) {
    normalise(unit, r, j);
    for (long i = 0; i < D; i += LANES) {
      vec x = load(unit + i) * gain_at(a, i) + bias_at(a, i);
      store(out.at + t * out.row + i, j->residual ? x + load(q.at + t * q.row + i) : x);
    }
  }
}

/* Gradient of r; adds to those of gain and bias. */
static void finish_backward(float *gr, const float *r, matrix gout, affine a, affine ga, const job *j) {
  long D = j->widths[0];
  float unit[D], inner[D];
  for (long t = 0; t < j->size; t++, r += D, gr += D) {
    float rstd = normalise(unit, r, j);
    for (long i = 0; i < D; i += LANES) {
      vec g = load(gout.at + t * gout.row + i);
      store(inner + i, g * gain_at(a, i));
      if (a.gain) add(ga.gain + i, g * load(unit + i)), add(ga.bias + i, g);
    }
    norm_slope(gr, inner, unit, rstd, j);
  }
}

/* Results of the keys' norm, by token. */
typedef struct {
  float *unit, *error, *rstd; /* [C, D] twice, [C] */
} normed;

static void signal(float *d, normed s, const float *z, matrix k, matrix v, affine a, const job *j) {
  long D = j->widths[0];
  float grad[D];
  for (long t = 0; t < j->size; t++, z += D, d += D) {
    float *unit = s.unit + t * D, *error = s.error + t * D;
    s.rstd[t] = normalise(unit, z, j);
    for (long i = 0; i < D; i += LANES) {
      vec scale = gain_at(a, i), e = load(unit + i) * scale + bias_at(a, i) - load(v.at + t * v.row + i);
      if (j->residual) e += load(k.at + t * k.row + i);
      store(error + i, e);
      store(grad + i, 2 * scale * e);
    }
    norm_slope(d, grad, unit, s.rstd[t], j);
  }
}

/* Gradients of z and v from gd, that of the signal d; adds to those of k, gain and bias. */
static void signal_backward(float *gz, float *gk, matrix gv, affine ga, const float *gd, const float *d, normed s,
                            affine a, const job *j) {
  long D = j->widths[0];
  float slope[D], inner[D];
  for (long t = 0; t < j->size; t++, gz += D, gk += D, gd += D, d += D) {
    const float *unit = s.unit + t * D, *error = s.error + t * D;
    float rstd = s.rstd[t];
    vec along = {0}, asked = {0}, felt = {0};
    norm_slope(slope, gd, unit, rstd, j);
    for (long i = 0; i < D; i += LANES) {
      vec x = load(unit + i);
      along += 2 * gain_at(a, i) * load(error + i) * x;
      asked += load(gd + i) * x;
      felt += load(gd + i) * load(d + i);
    }
    float share = sum(along) / D, gshare = sum(asked) / D, turn = sum(felt) / D;
    for (long i = 0; i < D; i += LANES) {
      vec scale = gain_at(a, i), e = load(error + i), ggrad = load(slope + i), gerror = 2 * scale * ggrad;
      store(gv.at + t * gv.row + i, -gerror);
      if (j->residual) add(gk + i, gerror);
      store(inner + i, scale * gerror - (j->norm ? rstd * (share * load(gd + i) + gshare * 2 * scale * e) : all(0)));
      if (a.gain) add(ga.gain + i, gerror * load(unit + i) + 2 * e * ggrad), add(ga.bias + i, gerror);
    }
    norm_slope(gz, inner, unit, rstd, j);
    if (j->norm)
      for (long i = 0; i < D; i += LANES) store(gz + i, load(gz + i) - rstd * turn * load(unit + i));
  }
}
