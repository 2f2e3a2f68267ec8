/* What a layer does head by head before and behind its memory, over sequences, as layers/heads.py has it.

   Numbers are float or, low, bfloat16; what is added up is float. A head has what it learns to itself, so that several
   threads share the heads. */

#include "pointwise.h"
#include "threads.h"

/* ---- before: convolution, silu, and queries and keys on the unit sphere ---- */

enum { PARTS = 3 };

typedef struct {
  int64_t batch, length, taps, width, heads[PARTS], step, low; /* of queries, keys, values; step: from x's row to row */
  const void *x, *before; /* [B, T, all heads, width]; the taps - 1 tokens before them */
  const float *weight;    /* [taps, all heads, width] */
  void *whole, *part[PARTS]; /* [B, T, all heads or those of a part, width]; whole, before the sphere: may be NULL */
  const void *gwhole, *gpart[PARTS];
  void *gx, *gbefore;
  float *gweight;
} convolve_job;

typedef struct { /* one head: its place among all and in its part */
  long all, at, in, of;
  int part;
} head;

INLINE long all_heads(const convolve_job *j) { return j->heads[0] + j->heads[1] + j->heads[2]; }

INLINE head head_of(const convolve_job *j, long at) {
  head h = {all_heads(j), at, at, 0, 0};
  while (h.in >= j->heads[h.part]) h.in -= j->heads[h.part++];
  h.of = j->heads[h.part];
  return h;
}

/* Where the head's numbers of token t of row b are, in what was read before, too. */
INLINE const void *input(const int low, const convolve_job *j, head h, long b, long t) {
  long D = j->width, tail = j->taps - 1, size = low ? sizeof(uint16_t) : sizeof(float);
  if (t < 0) return (const char *)j->before + ((b * tail + tail + t) * h.all + h.at) * D * size;
  return (const char *)j->x + (b * j->step + (t * h.all + h.at) * D) * size;
}

/* The convolution at token t [width]. */
INLINE void correlate(const int low, float *to, const convolve_job *j, head h, long b, long t) {
  long D = j->width;
  const void *x[j->taps];
  for (long tap = 0; tap < j->taps; tap++) x[tap] = input(low, j, h, b, t + tap - j->taps + 1);
  for (long i = 0; i < D; i += LANES) {
    vec total = {0};
    for (long tap = 0; tap < j->taps; tap++)
      total += load(j->weight + (tap * h.all + h.at) * D + i) * get(low, x[tap], i);
    store(to + i, total);
  }
}

INLINE void convolve_token(const int low, const convolve_job *j, head h, long b, long t) {
  long D = j->width, token = b * j->length + t;
  float y[D];
  correlate(low, y, j, h, b, t);
  for (long i = 0; i < D; i += LANES) {
    vec value = silu(load(y + i));
    store(y + i, value);
    if (j->whole) put(low, j->whole, (token * h.all + h.at) * D + i, value);
  }
  float share = h.part < 2 ? 1 / length_of(y, D) : 1;
  for (long i = 0; i < D; i += LANES) put(low, j->part[h.part], (token * h.of + h.in) * D + i, share * load(y + i));
}

/* Heads ``from`` to ``to``, token by token: as numbers lie. */
INLINE void convolve_heads(const int low, const convolve_job *j, long from, long to) {
  for (long b = 0; b < j->batch; b++)
    for (long t = 0; t < j->length; t++)
      for (long at = from; at < to; at++) convolve_token(low, j, head_of(j, at), b, t);
}

/* Gradient [width] of what stands before the silu, at token t. */
INLINE void convolve_slope(const int low, float *to, const convolve_job *j, head h, long b, long t) {
  long D = j->width, token = b * j->length + t;
  float y[D], slope[D], g[D];
  correlate(low, y, j, h, b, t);
  for (long i = 0; i < D; i += LANES) {
    point p = activate(SILU, load(y + i));
    store(y + i, p.value);
    store(slope + i, p.slope);
    store(g + i, get(low, j->gpart[h.part], (token * h.of + h.in) * D + i));
  }
  float size = h.part < 2 ? length_of(y, D) : 1, along = h.part < 2 ? dot(g, y, D) / (size * size) : 0;
  for (long i = 0; i < D; i += LANES) {
    vec all = (load(g + i) - along * load(y + i)) / size;
    if (j->gwhole) all += get(low, j->gwhole, (token * h.all + h.at) * D + i);
    store(to + i, all * load(slope + i));
  }
}

/* Adds what token t gives to the gradient of the weight, and finishes that of the first input it met; g:
   ``convolve_slope`` of it and of the tokens before, [taps, width]. */
INLINE void correlate_backward(const int low, const convolve_job *j, head h, long b, long t, const float *const *g) {
  long D = j->width, n = j->taps, first = t - n + 1, size = low ? sizeof(uint16_t) : sizeof(float);
  char *to = first < 0 ? (char *)j->gbefore + ((b * (n - 1) + t) * h.all + h.at) * D * size
                       : (char *)j->gx + ((b * j->length + first) * h.all + h.at) * D * size;
  const void *x[n];
  for (long tap = 0; tap < n; tap++) x[tap] = input(low, j, h, b, first + tap);
  for (long i = 0; i < D; i += LANES) {
    vec total = {0}, now = load(g[0] + i);
    for (long tap = 0; tap < n; tap++) {
      long weight = (tap * h.all + h.at) * D + i;
      total += load(j->weight + weight) * load(g[tap] + i);
      if (t < j->length) add(j->gweight + weight, now * get(low, x[tap], i));
    }
    put(low, to, i, total);
  }
}

INLINE void convolve_heads_backward(const int low, const convolve_job *j, long from, long to) {
  long D = j->width, T = j->length, n = j->taps, all = all_heads(j);
  float recent[n][(to - from) * D]; /* none before the first token or behind the last */
  for (long tap = 0; tap < n; tap++) memset(j->gweight + (tap * all + from) * D, 0, sizeof recent[0]);
  for (long b = 0; b < j->batch; b++) {
    memset(recent, 0, sizeof recent);
    for (long t = 0; t < T + n - 1; t++)
      for (long at = from; at < to; at++) {
        head h = head_of(j, at);
        const float *g[n];
        for (long tap = 0; tap < n; tap++) g[tap] = recent[(t - tap + n) % n] + (at - from) * D;
        if (t < T) convolve_slope(low, (float *)g[0], j, h, b, t);
        else memset((float *)g[0], 0, D * sizeof(float));
        correlate_backward(low, j, h, b, t, g);
      }
  }
}

/* name: a part of work, that on heads from ... to of all of them */
#define PART(name, kind, heads, work)                                         \
  static void name(void *job, long i, long of) {                              \
    const kind *j = job;                                                      \
    long all = heads, from = i * all / of, to = (i + 1) * all / of;           \
    if (j->low) work(1, j, from, to);                                         \
    else work(0, j, from, to);                                                \
  }

PART(convolve_part, convolve_job, all_heads(j), convolve_heads)
PART(convolve_part_backward, convolve_job, all_heads(j), convolve_heads_backward)

void convolve(convolve_job *j, int64_t threads) { share_out(convolve_part, j, threads); }
void convolve_backward(convolve_job *j, int64_t threads) { share_out(convolve_part_backward, j, threads); }

/* ---- behind: the token's own value, the norm and the gate ---- */

typedef struct {
  int64_t batch, length, heads, width, low;
  double eps;
  const void *reads, *values, *gate; /* [B, T, H, D]; values, and skip with them, may be NULL */
  const float *skip, *weight;        /* [H, D], [D] */
  void *out;
  const void *gout;
  void *greads, *gvalues, *ggate;
  float *gskip, *gweight; /* [H, D] twice */
} gate_job;

INLINE float read_unit(const int low, float *unit, const gate_job *j, long h, long row) {
  for (long i = 0; i < j->width; i += LANES) {
    vec x = get(low, j->reads, row + i);
    if (j->values) x += load(j->skip + h * j->width + i) * get(low, j->values, row + i);
    store(unit + i, x);
  }
  return standardise(unit, unit, j->width, j->eps);
}

INLINE void gate_heads(const int low, const gate_job *j, long from, long to) {
  long D = j->width;
  float unit[D];
  for (long token = 0; token < j->batch * j->length; token++)
    for (long h = from; h < to; h++) {
      long row = (token * j->heads + h) * D;
      read_unit(low, unit, j, h, row);
      for (long i = 0; i < D; i += LANES) {
        vec open = silu(get(low, j->gate, row + i));
        put(low, j->out, row + i, load(unit + i) * load(j->weight + i) * open);
      }
    }
}

/* One row of one head: numbers from ``row`` on. */
INLINE void gate_backward_at(const int low, const gate_job *j, long h, long row) {
  long D = j->width;
  float unit[D], inner[D], *gskip = j->gskip + h * D, *gweight = j->gweight + h * D;
  float rstd = read_unit(low, unit, j, h, row);
  for (long i = 0; i < D; i += LANES) {
    point open = activate(SILU, get(low, j->gate, row + i));
    vec g = get(low, j->gout, row + i), weight = load(j->weight + i);
    put(low, j->ggate, row + i, g * load(unit + i) * weight * open.slope);
    add(gweight + i, g * open.value * load(unit + i));
    store(inner + i, g * open.value * weight);
  }
  standardise_slope(inner, inner, unit, rstd, D);
  for (long i = 0; i < D; i += LANES) {
    vec g = load(inner + i);
    put(low, j->greads, row + i, g);
    if (!j->values) continue;
    put(low, j->gvalues, row + i, g * load(j->skip + h * D + i));
    add(gskip + i, g * get(low, j->values, row + i));
  }
}

INLINE void gate_heads_backward(const int low, const gate_job *j, long from, long to) {
  long D = j->width;
  memset(j->gweight + from * D, 0, (to - from) * D * sizeof(float));
  if (j->values) memset(j->gskip + from * D, 0, (to - from) * D * sizeof(float));
  for (long token = 0; token < j->batch * j->length; token++)
    for (long h = from; h < to; h++) gate_backward_at(low, j, h, (token * j->heads + h) * D);
}

PART(gate_part, gate_job, j->heads, gate_heads)
PART(gate_part_backward, gate_job, j->heads, gate_heads_backward)

void gate(gate_job *j, int64_t threads) { share_out(gate_part, j, threads); }
void gate_backward(gate_job *j, int64_t threads) { share_out(gate_part_backward, j, threads); }
