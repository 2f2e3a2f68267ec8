/* Single tokens through a block on a CPU, as layers/decode.py has it.

   A block is a list of operations on places that do not move. A token of a small batch takes as long as weights, maps
   and the open chunk take to come from memory: each is read once, in the order in which it lies. */

#include "pointwise.h"
#include "product.h"
#include "threads.h"

enum {
  PANEL = 64,   /* outputs */
  AHEAD = 2048, /* numbers */
  WIDE = LANES  /* vectors of a row that are summed up side by side */
};

typedef struct { /* of a batch */
  float *at;
  int64_t step;
} rows;

INLINE float *row(rows r, long b) { return r.at + b * r.step; }

typedef struct { /* of several threads' work: one of them takes every ``of``-th part, from ``me`` on */
  int64_t me, of;
} share;

/* ---- what stands between ---- */

typedef struct {
  int64_t batch, width;
  rows x, y;
  const float *weight;
  double eps;
} norm_job;

static void scaled_norm(float *y, const float *x, const float *weight, long width, float eps) {
  standardise(y, x, width, eps);
  times(y, y, weight, width);
}

void norm(const norm_job *j, int64_t read, share s) {
  for (long b = s.me; b < j->batch; b += s.of) scaled_norm(row(j->y, b), row(j->x, b), j->weight, j->width, j->eps);
}

typedef struct {
  int64_t batch, width;
  rows a, b, y;
} sum_job;

void sum_rows(const sum_job *j, int64_t read, share s) {
  for (long b = s.me; b < j->batch; b += s.of) plus(row(j->y, b), row(j->a, b), row(j->b, b), j->width);
}

typedef struct {
  int64_t batch, width;
  rows x, y; /* gate and value in a row */
} swiglu_job;

void swiglu(const swiglu_job *j, int64_t read, share s) {
  for (long b = s.me; b < j->batch; b += s.of)
    for (long i = 0; i < j->width; i += LANES)
      store(row(j->y, b) + i, silu(load(row(j->x, b) + i)) * load(row(j->x, b) + j->width + i));
}

typedef struct {
  int64_t batch, width;
  rows y, m, out;
  const float *norm_y, *norm_m;
  double eps;
} product_job;

void gated_product(const product_job *j, int64_t read, share s) {
  float m[j->width];
  for (long b = s.me; b < j->batch; b += s.of) {
    float *out = row(j->out, b);
    scaled_norm(out, row(j->y, b), j->norm_y, j->width, j->eps);
    scaled_norm(m, row(j->m, b), j->norm_m, j->width, j->eps);
    for (long i = 0; i < j->width; i += LANES) store(out + i, load(out + i) * silu(load(m + i)));
  }
}

typedef struct {
  int64_t batch, in, panels;
  rows x, y;           /* y has room for whole panels */
  const float *weight; /* [panels, in, PANEL] */
} linear_job;

void linear(const linear_job *j, int64_t read, share s) {
  long first = j->panels * s.me / s.of, end = j->panels * (s.me + 1) / s.of; /* what lies together */
  for (long p = first; p < end; p++)
    for (long b = 0; b < j->batch; b++) {
      const float *x = row(j->x, b), *w = j->weight + p * j->in * PANEL;
      vec acc[PANEL / LANES] = {0};
      for (long l = 0; l < j->in; l++, w += PANEL)
        for (int c = 0; c < PANEL / LANES; c++) {
          if (c * LANES % 16 == 0) __builtin_prefetch(w + AHEAD + c * LANES, 0, 0); /* past the others' caches */
          acc[c] += x[l] * load(w + c * LANES);
        }
      for (int c = 0; c < PANEL / LANES; c++) store(row(j->y, b) + p * PANEL + c * LANES, acc[c]);
    }
}

/* ---- attention ---- */

/* Rotary positions: table [2, n, D] holds cosines and sines. */
static void rotate(float *to, const float *x, const float *table, long n, long place, long D) {
  const float *cosine = table + place * D, *sine = cosine + n * D;
  long quarter = D / 4;
  for (long i = 0; i < quarter; i++) {
    float a = x[i], b = x[quarter + i];
    to[i] = a * cosine[i] + b * sine[i];
    to[quarter + i] = b * cosine[quarter + i] + a * sine[quarter + i];
  }
  memcpy(to + 2 * quarter, x + 2 * quarter, 2 * quarter * sizeof(float));
}

/* found [D] = softmax(scores / sqrt(D)) values [n, D]; scores have room for whole vectors. */
static void weigh(float *found, float *scores, const float *values, long n, long D) {
  float top = -INFINITY, total = 0, root = 1 / sqrtf(D);
  for (long t = 0; t < n; t++) top = scores[t] > top ? scores[t] : top;
  for (long t = n; t % LANES; t++) scores[t] = top;
  for (long t = 0; t < n; t += LANES) store(scores + t, exponential((load(scores + t) - top) * root));
  for (long t = 0; t < n; t++) total += scores[t];
  for (long i = 0; i < D; i += LANES) {
    vec acc = {0};
    for (long t = 0; t < n; t++) acc += scores[t] * load(values + t * D + i);
    store(found + i, acc / total);
  }
}

typedef struct {
  int64_t batch, heads, width, persistent, length;
  rows tokens, recalled, found; /* q, k, v; the memory token's k, v */
  float *keys, *values;         /* [B, heads, N_p + 2 length, D]: [persistent | memory token, token | ...] */
  const float *table;           /* of places 0 ... length - 1 */
} segment_job;

void segment_attention(const segment_job *j, int64_t read, share s) {
  long D = j->width, H = j->heads, inner = H * D, place = read % j->length, n = j->persistent + 2 * (place + 1);
  float q[D], scores[n + LANES];
  for (long g = s.me; g < j->batch * H; g += s.of) {
    const float *token = row(j->tokens, g / H) + g % H * D, *memory = row(j->recalled, g / H) + g % H * D;
    long held = g * (j->persistent + 2 * j->length) * D, last = held + (n - 2) * D;
    rotate(q, token, j->table, j->length, place, D);
    rotate(j->keys + last, memory, j->table, j->length, place, D);
    rotate(j->keys + last + D, token + inner, j->table, j->length, place, D);
    memcpy(j->values + last, memory + inner, D * sizeof(float));
    memcpy(j->values + last + D, token + 2 * inner, D * sizeof(float));
    for (long t = 0; t < n; t++) scores[t] = dot(q, j->keys + held + t * D, D);
    weigh(row(j->found, g / H) + g % H * D, scores, j->values + held, n, D);
  }
}

typedef struct {
  int64_t batch, heads, width, persistent, length;
  rows tokens, found;
  float *keys, *values; /* [B, heads, N_p + length, D]: a ring behind the persistent tokens */
  const float *table;   /* of distances 0 ... length - 1 */
} window_job;

void window_attention(const window_job *j, int64_t read, share s) {
  long D = j->width, H = j->heads, inner = H * D, W = j->length, N = j->persistent, slot = read % W;
  long n = N + (read < W ? read + 1 : W);
  float turned[D], scores[n + LANES];
  for (long g = s.me; g < j->batch * H; g += s.of) {
    const float *q = row(j->tokens, g / H) + g % H * D;
    long held = g * (N + W) * D, last = held + (N + slot) * D;
    memcpy(j->keys + last, q + inner, D * sizeof(float));
    memcpy(j->values + last, q + 2 * inner, D * sizeof(float));
    for (long t = 0; t < n; t++) {
      const float *key = j->keys + held + t * D;
      if (t >= N) rotate(turned, q, j->table, W, (slot + N - t + W) % W, D); /* keys lie as they came */
      scores[t] = dot(t < N ? q : turned, key, D);
    }
    weigh(row(j->found, g / H) + g % H * D, scores, j->values + held, n, D);
  }
}

/* ---- memory ---- */

/* y [width] += x [many] m, of n maps m [many, width] weighted by mix */
INLINE void along_vectors(const int n, const int vectors, float *y, const float *x, long many, long width,
                          const float *m, long apart, const float *mix) {
  vec acc[WIDE];
  for (int c = 0; c < vectors; c++) acc[c] = load(y + c * LANES);
  for (long r = 0; r < many; r++, m += width)
    for (int i = 0; i < n; i++)
      for (int c = 0; c < vectors; c++) acc[c] += mix[i] * x[r] * load(m + i * apart + c * LANES);
  for (int c = 0; c < vectors; c++) store(y + c * LANES, acc[c]);
}

INLINE void along(const int n, float *y, const float *x, long many, long width, const float *m, long apart,
                  const float *mix) {
  long c = 0;
  for (; c + WIDE * LANES <= width; c += WIDE * LANES) along_vectors(n, WIDE, y + c, x, many, width, m + c, apart, mix);
  for (; c + 4 * LANES <= width; c += 4 * LANES) along_vectors(n, 4, y + c, x, many, width, m + c, apart, mix);
  for (; c < width; c += LANES) along_vectors(n, 1, y + c, x, many, width, m + c, apart, mix);
}

/* y [many] = m x [width] */
INLINE void across(const int n, float *y, const float *x, long many, long width, const float *m, long apart,
                   const float *mix) {
  for (long r = 0; r < many; r++, m += width) {
    vec acc[2] = {{0}, {0}};
    for (long c = 0; c < width; c += LANES) {
      vec met = mix[0] * load(m + c);
      for (int i = 1; i < n; i++) met += mix[i] * load(m + i * apart + c);
      acc[c / LANES % 2] += met * load(x + c);
    }
    y[r] = sum(acc[0] + acc[1]);
  }
}

typedef struct {
  int64_t batch, channels, taps;
  rows x, y;
  const float *weight; /* [taps, channels] */
  float *last;         /* [B, taps - 1, channels] */
} convolution_job;

/* The causal convolution's next output, by silu; its last inputs move on. */
void convolution(const convolution_job *j, int64_t read, share s) {
  long kept = j->taps - 1, n = j->channels;
  for (long b = s.me; b < j->batch; b += s.of) {
    float *x = row(j->x, b), *y = row(j->y, b), *last = j->last + b * kept * n;
    for (long i = 0; i < n; i += LANES) {
      vec acc = load(x + i) * load(j->weight + kept * n + i);
      for (long t = 0; t < kept; t++) acc += load(last + t * n + i) * load(j->weight + t * n + i);
      store(y + i, silu(acc));
    }
    if (!kept) continue;
    memmove(last, last + n, (kept - 1) * n * sizeof(float));
    memcpy(last + (kept - 1) * n, x, n * sizeof(float));
  }
}

typedef struct {
  job net;
  int64_t batch, key_heads, chunk, write_gate, forgets;
  rows qkv, out_gate, gates, out; /* gates: from the token; NULL where gates_weight makes them of q, k and v */
  const float *gates_weight, *gates_bias, *skip, *out_norm;
  float *weights, *maps[MAPS], *inputs[MAPS], *signals[MAPS]; /* as Stepper has them */
  double max_lr, max_momentum, eps;
} memory_job;

typedef struct { /* one memory's part of it */
  float *maps[MAPS], *inputs[MAPS], *signals[MAPS], *memory, *surprise;
  affine a;
} held;

static const float ONES[3] = {1, 1, 1};

static held held_of(const memory_job *j, long g) {
  long C = j->chunk, G = j->batch * j->net.heads;
  held m = {.memory = j->weights + g * (3 + C), .surprise = j->weights + (G + g) * (3 + C)};
  m.a = affine_of(j->net.gain, j->net.bias, g, j->net.widths[0]);
  for (int i = 0; i < j->net.depth; i++) {
    long in = j->net.widths[i], out = j->net.widths[i + 1];
    m.maps[i] = j->maps[i] + g * 3 * in * out;
    m.inputs[i] = j->inputs[i] + g * C * in, m.signals[i] = j->signals[i] + g * C * out;
  }
  return m;
}

static void activation(float *y, const float *z, long n, long kind) {
  for (long i = 0; i < n; i += LANES) store(y + i, activate(kind, load(z + i)).value);
}

static long widest(const job *j) {
  long wide = 0;
  for (int i = 0; i <= j->depth; i++) wide = j->widths[i] > wide ? j->widths[i] : wide;
  return wide;
}

/* z = the first n of the i-th map's parts at x, weighted by mix; the first map lies [in, out], the others [out, in] */
INLINE void meet_maps(const int n, float *z, int i, const float *x, const float *maps, const float *mix, const job *j) {
  long in = j->widths[i], out = j->widths[i + 1];
  memset(z, 0, out * sizeof(float));
  if (i) across(n, z, x, out, in, maps, in * out, mix);
  else along(n, z, x, in, out, maps, in * out, mix);
}

/* z = the i-th map at x: M_0, memory and momentum, less what the first n tokens of the open chunk wrote */
static void meet(float *z, int i, const float *x, held m, long n, const job *j) {
  long in = j->widths[i], out = j->widths[i + 1];
  float met[n + 1];
  meet_maps(3, z, i, x, m.maps[i], m.memory, j);
  across(1, met, x, n, in, m.inputs[i], 0, &ONE);
  for (long t = 0; t < n; t++) met[t] *= m.memory[3 + t];
  along(1, z, met, n, out, m.signals[i], 0, &MINUS);
}

/* Input and gradient at every map, in the place of the chunk's next token. */
static void write_token(const float *k, const float *v, held m, long slot, const job *j) {
  long wide = widest(j);
  float z[MAPS][wide], u[wide], unit[wide], error[wide], rstd;
  for (int i = 0; i < j->depth; i++) {
    long in = j->widths[i];
    float *input = m.inputs[i] + slot * in;
    if (i) activation(input, z[i - 1], in, j->activation);
    else memcpy(input, k, in * sizeof(float));
    if (j->online) meet(z[i], i, input, m, slot, j);
    else meet_maps(2, z[i], i, input, m.maps[i], ONES, j);
  }
  long D = j->widths[0];
  float *d = m.signals[j->depth - 1] + slot * D;
  signal(d, (normed){unit, error, &rstd}, z[j->depth - 1], dense((float *)k, D), dense((float *)v, D), m.a, j);
  for (int i = j->depth - 1; i; i--) {
    long in = j->widths[i], out = j->widths[i + 1];
    memset(u, 0, in * sizeof(float));
    along(2, u, m.signals[i] + slot * out, out, in, m.maps[i], in * out, ONES);
    float *to = m.signals[i - 1] + slot * in;
    for (long l = 0; l < in; l += LANES) store(to + l, load(u + l) * activate(j->activation, load(z[i - 1] + l)).slope);
  }
}

static void read_token(float *out, const float *q, held m, long n, const job *j) {
  long wide = widest(j);
  float h[wide], r[wide];
  for (int i = 0; i < j->depth; i++) {
    if (i) activation(h, r, j->widths[i], j->activation);
    meet(r, i, i ? h : q, m, n, j);
  }
  finish(dense(out, j->widths[0]), r, dense((float *)q, j->widths[0]), m.a, j);
}

/* to, laid out like the i-th map: memory or momentum after the chunk's first n tokens, by its row of the weights. */
static void advance(float *to, int i, held m, const float *weights, long n, const job *j) {
  enum { TOKENS = 16 };
  long in = j->widths[i], out = j->widths[i + 1], left = i ? out : in, right = i ? in : out;
  const float *signals = m.signals[i], *inputs = m.inputs[i];
  float weighted[TOKENS * left];
  sum_of kept = {m.maps[i] + in * out, m.maps[i] + 2 * in * out, weights[1], weights[2]};
  for (long t = 0; t < n || !t; t += TOKENS, kept = (sum_of){to, NULL, 1, 0}) {
    long some = n - t < TOKENS ? n - t : TOKENS;
    matrix a = dense((float *)(i ? signals : inputs) + t * left, left);
    matrix b = dense((float *)(i ? inputs : signals) + t * right, right);
    scale(dense(weighted, left), a, (column){weights + 3 + t, 1}, some, left);
    product_onto(NULL, dense(to, right), kept, left, right, some, transposed(dense(weighted, left)), b, MINUS_ALL);
  }
}

/* Moves the full chunk into the maps. */
static void close_chunk(held m, const memory_job *j) {
  for (int i = 0; i < j->net.depth; i++) {
    long in = j->net.widths[i], out = j->net.widths[i + 1], map = in * out;
    advance(m.maps[i] + map, i, m, m.memory, j->chunk, &j->net); /* momentum does not depend on memory */
    advance(m.maps[i] + 2 * map, i, m, m.surprise, j->chunk, &j->net);
  }
  for (int i = 0; i < j->net.depth; i++) {
    memset(m.inputs[i], 0, j->chunk * j->net.widths[i] * sizeof(float));
    memset(m.signals[i], 0, j->chunk * j->net.widths[i + 1] * sizeof(float));
  }
  memset(m.memory + 1, 0, (2 + j->chunk) * sizeof(float));
  memset(m.surprise + 1, 0, (2 + j->chunk) * sizeof(float));
  m.memory[1] = m.surprise[2] = 1;
}

/* What was read, normalised and gated. */
static void gate_read(float *out, float *read, const float *gate, const float *weight, long D, float eps) {
  scaled_norm(read, read, weight, D, eps);
  for (long i = 0; i < D; i += LANES) store(out + i, load(read + i) * silu(load(gate + i)));
}

static void to_sphere(float *to, const float *x, long D) {
  float size = length_of(x, D);
  for (long i = 0; i < D; i += LANES) store(to + i, load(x + i) / size);
}

static float sigmoid(float x) { return 1 / (1 + expf(-x)); }

typedef struct {
  float lr, momentum, retention;
} gates;

/* Of memory g, as NeuralMemory.gate_values has them. */
static gates gates_of(const memory_job *j, long g) {
  long H = j->net.heads, channels = (2 * j->key_heads + H) * j->net.widths[0];
  float z[3];
  for (long i = 0; i < 3; i++) {
    long gate = i * H + g % H;
    const float *qkv = row(j->qkv, g / H), *w = j->gates_weight;
    z[i] = j->gates_bias[gate] + (w ? dot(qkv, w + gate * channels, channels) : row(j->gates, g / H)[gate]);
  }
  gates found = {sigmoid(z[0]), j->max_momentum * sigmoid(z[1]), 1};
  if (j->write_gate) found.lr = fminf(fmaxf(z[0] / 6 + 0.5f, 0), 1);
  if (j->forgets) found.retention = j->write_gate ? fmaxf(1 - sigmoid(z[2]) * found.lr, 0x1p-23f) : sigmoid(-z[2]);
  found.lr *= j->max_lr;
  return found;
}

void memory_token(const memory_job *j, int64_t read, share s) {
  long D = j->net.widths[0], H = j->net.heads, keys = j->key_heads * D, slot = read % j->chunk;
  float q[D], k[D], found[D];
  for (long g = s.me; g < j->batch * H; g += s.of) {
    const float *qkv = row(j->qkv, g / H), *v = qkv + 2 * keys + g % H * D, *own = qkv + g % H * j->key_heads / H * D;
    held m = held_of(j, g);
    gates now = gates_of(j, g);
    to_sphere(q, own, D);
    to_sphere(k, own + keys, D);
    write_token(k, v, m, slot, &j->net);
    for (long t = 1; t < 3 + slot; t++) {
      m.memory[t] = m.memory[t] * now.retention + m.surprise[t] * now.momentum;
      m.surprise[t] *= now.momentum;
    }
    m.memory[3 + slot] = m.surprise[3 + slot] = now.lr;
    read_token(found, q, m, slot + 1, &j->net);
    if (j->skip)
      for (long i = 0; i < D; i += LANES) add(found + i, load(j->skip + g % H * D + i) * load(v + i));
    gate_read(row(j->out, g / H) + g % H * D, found, row(j->out_gate, g / H) + g % H * D, j->out_norm, D, j->eps);
    if (slot + 1 == j->chunk) close_chunk(m, j);
  }
}

typedef struct {
  memory_job memory;
  int64_t heads, width, persistent, length;
  float *keys, *values, *to[MAPS]; /* laid out like the maps */
} end_job;

/* Where a segment ends: its keys and values go, and the memory as it stands is what the next one recalls. */
void end_segment(const end_job *j, int64_t read, share s) {
  const memory_job *memory = &j->memory;
  long room = 2 * j->length * j->width;
  if ((read + 1) % j->length) return;
  for (long g = s.me; g < memory->batch * j->heads; g += s.of) {
    long open = g * (j->persistent * j->width + room) + j->persistent * j->width;
    memset(j->keys + open, 0, room * sizeof(float)), memset(j->values + open, 0, room * sizeof(float));
  }
  for (long g = s.me; g < memory->batch * memory->net.heads; g += s.of) {
    held m = held_of(memory, g);
    for (int i = 0; i < memory->net.depth; i++) {
      long map = memory->net.widths[i] * memory->net.widths[i + 1];
      float *to = j->to[i] + g * map;
      advance(to, i, m, m.memory, (read + 1) % memory->chunk, &memory->net);
      plus(to, to, m.maps[i], map);
    }
  }
}

typedef struct {
  job net;
  int64_t batch, key_heads;
  rows queries, out_gate, out;
  const float *out_norm, *maps[MAPS]; /* laid out like the memory's */
  double eps;
} recall_job;

/* Asks a memory that stands still. */
void recall_token(const recall_job *j, int64_t read, share s) {
  long D = j->net.widths[0], H = j->net.heads, wide = widest(&j->net);
  float q[D], h[wide], r[wide], found[D];
  for (long g = s.me; g < j->batch * H; g += s.of) {
    const float *asked = row(j->queries, g / H) + g % H * j->key_heads / H * D;
    affine a = affine_of(j->net.gain, j->net.bias, g, D);
    for (long i = 0; i < D; i += LANES) store(q + i, silu(load(asked + i)));
    to_sphere(q, q, D);
    for (int i = 0; i < j->net.depth; i++) {
      long in = j->net.widths[i], out = j->net.widths[i + 1];
      if (i) activation(h, r, in, j->net.activation);
      meet_maps(1, r, i, i ? h : q, j->maps[i] + g * in * out, &ONE, &j->net);
    }
    finish(dense(found, D), r, dense(q, D), a, &j->net);
    gate_read(row(j->out, g / H) + g % H * D, found, row(j->out_gate, g / H) + g % H * D, j->out_norm, D, j->eps);
  }
}

/* ---- a list of them ---- */

typedef struct {
  void (*run)(void *job, int64_t read, share s);
  void *job;
} operation;

typedef struct {
  const operation *all;
  int64_t n, size; /* operations; numbers of x and of y */
  float *x;
  const float *y;
} program;

typedef struct {
  const program *p;
  int64_t read;
} replayed;

static void replay_share(const replayed *all, share s) {
  for (long i = 0; i < all->p->n; i++) {
    all->p->all[i].run(all->p->all[i].job, all->read, s);
    if (s.of > 1) GOMP_barrier();
  }
}

/* One thread's part, of as many as there are, which may be fewer than were asked for: all of them are through with an
   operation before the next. */
static void replay_in_team(void *given) {
  replay_share(given, (share){omp_get_thread_num(), omp_get_num_threads()});
}

/* The token x to y; 0, and nothing is done, if it holds NaN or infinity. */
int replay(const program *p, int64_t read, const float *x, float *y, int64_t threads) {
  vec zero = {0};
  for (long i = 0; i < p->size; i += LANES) zero += load(x + i) - load(x + i);
  if (sum(zero) != 0) return 0; /* NaN */
  memcpy(p->x, x, p->size * sizeof(float));
  replayed all = {p, read};
  if (threads > 1 && GOMP_parallel) GOMP_parallel(replay_in_team, &all, threads, 0);
  else replay_share(&all, (share){0, 1});
  memcpy(y, p->y, p->size * sizeof(float));
  return 1;
}
