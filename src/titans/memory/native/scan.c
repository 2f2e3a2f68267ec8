/* Whole chunks in a row on a CPU, one memory after the other: its maps stay in the core's own cache.

   README.md, sections 2 and 3; names as in memory/scan.py: x, z inputs and outputs of the maps at the keys, d the
   loss's gradients at z, u those at x; h, r at the queries; w, s a map and its momentum; g... gradients. */

#include "job.h"
#include "masks.h"
#include "pointwise.h"
#include "product.h"
#include "threads.h"

typedef struct {
  long in, out, map;
} sizes;

INLINE sizes sizes_of(const job *j, int i) {
  long in = j->widths[i], out = j->widths[i + 1];
  return (sizes){in, out, in * out};
}

/* ---- memory ---- */

/* What a chunk leaves for its backward: but for the first chunk's maps, which came with the call. */
typedef struct {
  float *maps[MAPS], *z[MAPS], *r[MAPS], *u[MAPS], *raw[MAPS]; /* map and momentum before it; raw: scores, no mask */
} record;

typedef struct {
  float *spare, *maps;                               /* of a record: where there is no tape, first and last maps */
  float *q, *k, *v, *out, *gq, *gv;
  float *x[MAPS], *d[MAPS], *h[MAPS];                /* x, h: from the second map on */
  float *slope[MAPS], *curvature[MAPS], *read_slope[MAPS];
  float *gw[MAPS], *gx[MAPS], *gd[MAPS], *gu[MAPS];
  float *frozen[MAPS], *other;                       /* other: any map */
  float *narrow, *one, *two, *gr[2], *minus;         /* rows of tokens */
  float *scores, *gscores;
  float *before, *gbefore, *met, *system;            /* online: read one token earlier; see settle */
  normed normed;
  masks masks, gmasks;
  operands operands;
} scratch;

static float *take(float **at, long n) {
  float *here = *at;
  *at += (n + 15) / 16 * 16;
  return here;
}

static long lay_maps(const job *j, float *from, record *r) {
  float *at = from;
  for (int i = 0; i < j->depth; i++) r->maps[i] = take(&at, 2 * sizes_of(j, i).map);
  return at - from;
}

static long lay_rest(const job *j, float *from, record *r) {
  float *at = from;
  long C = j->size;
  for (int i = 0; i < j->depth; i++) {
    sizes m = sizes_of(j, i);
    r->z[i] = take(&at, C * m.out), r->r[i] = take(&at, C * m.out);
    r->raw[i] = take(&at, C * C), r->u[i] = i ? take(&at, C * m.in) : NULL;
  }
  return at - from;
}

/* Of one memory. */
int64_t tape_size(const job *j) {
  record unused;
  return j->chunks * lay_rest(j, NULL, &unused) + (j->chunks - 1) * lay_maps(j, NULL, &unused);
}

static masks lay_masks(float **at, long C) {
  masks m = {.lr = take(at, C), .keep = take(at, C), .kept = take(at, C)};
  m.retention = take(at, C * C), m.momentum = take(at, C * C), m.both = take(at, C * C), m.write = take(at, C * C);
  m.read = take(at, 2 * C), m.to_state = take(at, 2 * C);
  return m;
}

static long lay_scratch(const job *j, float *from, scratch *s) {
  float *at = from;
  long C = j->size, D = j->widths[0], wide = C, map = 0;
  s->q = take(&at, C * D), s->k = take(&at, C * D), s->v = take(&at, C * D), s->out = take(&at, C * D);
  s->gq = take(&at, C * D), s->gv = take(&at, C * D);
  for (int i = 0; i < j->depth; i++) {
    sizes m = sizes_of(j, i);
    wide = m.in > wide ? m.in : wide, map = m.map > map ? m.map : map;
    s->frozen[i] = take(&at, m.map), s->gw[i] = take(&at, 2 * m.map);
    s->x[i] = take(&at, C * m.in), s->h[i] = take(&at, C * m.in), s->gx[i] = take(&at, C * m.in);
    s->d[i] = take(&at, C * m.out), s->gd[i] = take(&at, C * m.out), s->gu[i] = take(&at, C * m.out);
    s->slope[i] = take(&at, C * m.out), s->curvature[i] = take(&at, C * m.out), s->read_slope[i] = take(&at, C * m.out);
  }
  record unused;
  s->spare = take(&at, lay_rest(j, NULL, &unused)), s->maps = take(&at, lay_maps(j, NULL, &unused));
  s->gr[0] = take(&at, C * wide), s->gr[1] = take(&at, C * wide);
  map = map > C * wide ? map : C * wide;
  s->operands = (operands){take(&at, map), take(&at, map), j->low};
  s->other = take(&at, map), s->narrow = take(&at, C * wide);
  s->one = take(&at, C * wide), s->two = take(&at, C * wide), s->minus = take(&at, 2 * C);
  s->scores = take(&at, C * C), s->gscores = take(&at, C * C);
  s->before = take(&at, 2 * C), s->gbefore = take(&at, 2 * C), s->met = take(&at, C * C), s->system = take(&at, C * C);
  s->normed = (normed){take(&at, C * D), take(&at, C * D), take(&at, C)};
  s->masks = lay_masks(&at, C), s->gmasks = lay_masks(&at, C);
  return at - from;
}

/* ---- one chunk ---- */

/* A memory's inputs and output, or their gradients: rows, and gates [C, 3]. */
typedef struct {
  matrix q, k, v, out, gates;
} inputs;

typedef struct {
  const job *j;
  scratch *s;
  const operands *o;
  record now;
  float *base[MAPS], *gbase[MAPS];
  inputs t, gt;
  affine a, ga;
  matrix x[MAPS], d[MAPS], h[MAPS];
} chunk;

INLINE column first_of(const float *pairs) { return (column){pairs, 2}; }
INLINE column second_of(const float *pairs) { return (column){pairs + 1, 2}; }

/* Where rows of chunk c of memory g lie, in numbers: from a token to the next it is H D. */
INLINE long first_row(const job *j, long g, long c) {
  long H = j->heads;
  return ((g / H * j->chunks + c) * j->size * H + g % H) * j->widths[0];
}

/* Those rows, in place; of bfloat16 a copy, where there is something to read. */
static matrix rows_of(const job *j, long g, long c, const void *x, float *copy) {
  long D = j->widths[0], step = j->heads * D, first = first_row(j, g, c);
  if (!j->low) return (matrix){(float *)x + first, step, 1};
  for (long t = 0; x && t < j->size; t++)
    for (long i = 0; i < D; i += LANES) store(copy + t * D + i, get(1, x, first + t * step + i));
  return dense(copy, D);
}

/* Puts what was made elsewhere back there. */
static void put_rows(const job *j, long g, long c, void *x, matrix from) {
  long D = j->widths[0], step = j->heads * D, first = first_row(j, g, c);
  for (long t = 0; t < j->size; t++)
    for (long i = 0; i < D; i += LANES) put(j->low, x, first + t * step + i, load(from.at + t * from.row + i));
}

static record record_of(const job *j, scratch *s, long g, long c) {
  record r;
  long rest = lay_rest(j, NULL, &r), maps = lay_maps(j, NULL, &r);
  float *tape = j->tape && c < j->chunks ? j->tape + g * tape_size(j) : NULL;
  lay_rest(j, tape ? tape + c * rest : s->spare, &r);
  lay_maps(j, tape && c ? tape + j->chunks * rest + (c - 1) * maps : s->maps, &r);
  return r;
}

/* Chunk n of memory g, its masks made. */
static chunk chunk_of(const job *j, scratch *s, long g, long n) {
  long D = j->widths[0];
  chunk c = {.j = j, .s = s, .o = &s->operands, .now = record_of(j, s, g, n)};
  long gates = first_row(j, g, n) / D * 3;
  c.t = (inputs){.gates = {(float *)j->gates + gates, j->heads * 3, 1}};
  c.gt = (inputs){.gates = {j->ggates + gates, j->heads * 3, 1}};
  c.t.q = rows_of(j, g, n, j->q, s->q), c.t.k = rows_of(j, g, n, j->k, s->k), c.t.v = rows_of(j, g, n, j->v, s->v);
  c.gt.out = rows_of(j, g, n, j->gout, s->out);
  c.t.out = dense(s->out, D), c.gt.q = dense(s->gq, D), c.gt.v = dense(s->gv, D);
  c.a = affine_of(j->gain, j->bias, g, D), c.ga = affine_of(j->ggain, j->gbias, g, D);
  for (int i = 0; i < j->depth; i++) {
    sizes m = sizes_of(j, i);
    c.x[i] = i ? dense(s->x[i], m.in) : c.t.k, c.h[i] = i ? dense(s->h[i], m.in) : c.t.q;
    c.d[i] = dense(s->d[i], m.out);
    if (j->base[i]) c.base[i] = (float *)j->base[i] + g % j->heads * m.map, c.gbase[i] = j->gbase[i] + g * m.map;
  }
  make_masks(&s->masks, c.t.gates, j);
  s->before[0] = 1, s->before[1] = 0;
  memcpy(s->before + 2, s->masks.read, 2 * (j->size - 1) * sizeof(float));
  return c;
}

/* The map at which a chunk's gradients are taken. */
static matrix frozen(const chunk *c, int i) {
  sizes m = sizes_of(c->j, i);
  if (!c->base[i]) return dense(c->now.maps[i], m.out);
  plus(c->s->frozen[i], c->now.maps[i], c->base[i], m.map);
  return dense(c->s->frozen[i], m.out);
}

/* r: what rows h read from a map and its momentum, with two weights a row, and from the base. */
static void meet(const chunk *c, int i, matrix h, const float *read, matrix r) {
  sizes m = sizes_of(c->j, i);
  long C = c->j->size;
  product(c->o, r, C, m.out, m.in, h, dense(c->now.maps[i], m.out), first_of(read));
  add_product(c->o, r, C, m.out, m.in, h, dense(c->now.maps[i] + m.map, m.out), second_of(read));
  if (c->base[i]) add_product(c->o, r, C, m.out, m.in, h, dense(c->base[i], m.out), PLUS_ALL);
}

/* An online memory's signals from those of a memory without the chunk's tokens (online.py): the keys meet it one token
   earlier than queries would, and d_t + sum_{s<t} system[t, s] d_s is what they ask for. */
static void settle(const chunk *c) {
  scratch *s = c->s;
  long C = c->j->size, D = c->j->widths[0];
  product(c->o, dense(s->met, C), C, C, D, c->t.k, transposed(c->t.k), PLUS_ALL);
  for (long t = 0; t < C; t++) {
    float *row = s->system + t * C, *d = s->d[0];
    for (long l = 0; l < t; l++) row[l] = 2 * s->masks.write[(t - 1) * C + l] * s->met[t * C + l];
    for (long i = 0; i < D; i += LANES) {
      vec sums[4] = {{0}}; /* each by itself: one waits for its last addend */
      long l = 0;
      for (; l + 4 <= t; l += 4)
        for (int n = 0; n < 4; n++) sums[n] += row[l + n] * load(d + (l + n) * D + i);
      for (; l < t; l++) sums[0] += row[l] * load(d + l * D + i);
      add(d + t * D + i, -(sums[0] + sums[1] + sums[2] + sums[3]));
    }
  }
}

static void read_keys_online(const chunk *c) {
  scratch *s = c->s;
  meet(c, 0, c->t.k, s->before, dense(c->now.z[0], c->j->widths[1]));
  signal(s->d[0], s->normed, c->now.z[0], c->t.k, c->t.v, c->a, c->j);
  settle(c);
}

static void read_keys(const chunk *c) {
  const job *j = c->j;
  scratch *s = c->s;
  long C = j->size, L = j->depth;
  matrix w[MAPS];
  for (int i = 0; i < L; i++) {
    sizes m = sizes_of(j, i);
    float *z = c->now.z[i];
    product(c->o, dense(z, m.out), C, m.out, m.in, c->x[i], w[i] = frozen(c, i), PLUS_ALL);
    for (long l = 0; i < L - 1 && l < C * m.out; l += LANES) {
      point p = activate(j->activation, load(z + l));
      store(s->x[i + 1] + l, p.value);
      store(s->slope[i] + l, p.slope);
    }
  }
  signal(s->d[L - 1], s->normed, c->now.z[L - 1], c->t.k, c->t.v, c->a, j);
  for (int i = L - 1; i > 0; i--) {
    sizes m = sizes_of(j, i);
    product(c->o, dense(c->now.u[i], m.in), C, m.in, m.out, c->d[i], transposed(w[i]), PLUS_ALL);
    times(s->d[i - 1], c->now.u[i], s->slope[i - 1], C * m.in);
  }
}

static void read_queries(const chunk *c) {
  const job *j = c->j;
  scratch *s = c->s;
  long C = j->size, L = j->depth;
  for (int i = 0; i < L; i++) {
    sizes m = sizes_of(j, i);
    matrix r = dense(c->now.r[i], m.out), h = c->h[i];
    meet(c, i, h, s->masks.read, r);
    product(c->o, dense(c->now.raw[i], C), C, C, m.in, h, transposed(c->x[i]), PLUS_ALL);
    times(s->scores, c->now.raw[i], s->masks.write, C * C);
    add_lower_product(c->o, r, C, m.out, dense(s->scores, C), c->d[i], MINUS_ALL);
    for (long l = 0; i < L - 1 && l < C * m.out; l += LANES)
      store(s->h[i + 1] + l, activate(j->activation, load(r.at + l)).value);
  }
  finish(c->t.out, c->now.r[L - 1], c->t.q, c->a, j);
}

/* Both sides of what tokens write to a map, or of what reads give to its gradient, the narrower weighted by token. */
typedef struct {
  matrix left, right;
} sides;

static sides weighted(const chunk *c, matrix x, matrix d, column weight, sizes m) {
  int left = m.in <= m.out;
  matrix narrow = dense(c->s->narrow, left ? m.in : m.out);
  scale(narrow, left ? x : d, weight, c->j->size, narrow.row);
  return (sides){transposed(left ? narrow : x), left ? d : narrow};
}

/* The maps after the chunk; where they are not kept, in place. */
static void write_maps(const chunk *c, float *const *next) {
  const float *T = c->s->masks.transition, *to_state = c->s->masks.to_state;
  for (int i = 0; i < c->j->depth; i++) {
    sizes m = sizes_of(c->j, i);
    float *w = c->now.maps[i], *momentum = w + m.map;
    sides p = weighted(c, c->x[i], c->d[i], first_of(to_state), m);
    matrix to = dense(next[i], m.out);
    product_onto(c->o, to, (sum_of){w, momentum, T[0], T[1]}, m.in, m.out, c->j->size, p.left, p.right, MINUS_ALL);
    p = weighted(c, c->x[i], c->d[i], second_of(to_state), m), to.at += m.map;
    product_onto(c->o, to, (sum_of){momentum, NULL, T[3], 0}, m.in, m.out, c->j->size, p.left, p.right, MINUS_ALL);
  }
}

/* ---- its backward, as scan.py divides it ---- */

/* Everything of the forward that the record leaves out. */
static void recall(const chunk *c) {
  const job *j = c->j;
  scratch *s = c->s;
  for (int i = 0; i < j->depth - 1; i++)
    for (long l = 0; l < j->size * j->widths[i + 1]; l += LANES) {
      point p = activate(j->activation, load(c->now.z[i] + l)), read = activate(j->activation, load(c->now.r[i] + l));
      store(s->x[i + 1] + l, p.value);
      store(s->slope[i] + l, p.slope);
      store(s->curvature[i] + l, p.curvature);
      store(s->d[i] + l, load(c->now.u[i + 1] + l) * p.slope);
      store(s->h[i + 1] + l, read.value);
      store(s->read_slope[i] + l, read.slope);
    }
  signal(s->d[j->depth - 1], s->normed, c->now.z[j->depth - 1], c->t.k, c->t.v, c->a, j);
  if (j->online) settle(c);
}

/* From the gradients of the maps after the chunk: those of x, d, to_state and the transition. */
static void write_maps_backward(const chunk *c) {
  scratch *s = c->s;
  long C = c->j->size;
  float *to_state = s->masks.to_state, *gto_state = s->gmasks.to_state, *gT = s->gmasks.transition;
  memset(gto_state, 0, 2 * C * sizeof(float));
  memset(gT, 0, 4 * sizeof(float));
  for (long l = 0; l < 2 * C; l++) s->minus[l] = -to_state[l];
  for (int i = 0; i < c->j->depth; i++) {
    sizes m = sizes_of(c->j, i);
    float *gw = s->gw[i], *w = c->now.maps[i];
    gT[0] += dot(gw, w, m.map);
    gT[1] += dot(gw, w + m.map, m.map);
    gT[3] += dot(gw + m.map, w + m.map, m.map);
    /* the narrower of x and d: its products are wanted by themselves, too */
    int left = m.in <= m.out;
    long n = left ? m.in : m.out, wide = left ? m.out : m.in;
    matrix x = left ? c->x[i] : c->d[i], d = left ? c->d[i] : c->x[i];
    matrix gx = dense(left ? s->gx[i] : s->gd[i], n), gd = dense(left ? s->gd[i] : s->gx[i], wide);
    for (int half = 0; half < 2; half++) {
      matrix straight = dense(gw + half * m.map, m.out), turned = transposed(straight);
      product(c->o, dense(half ? s->two : s->one, n), C, n, wide, d, left ? turned : straight, PLUS_ALL);
      if (half) add_product(c->o, gd, C, wide, n, x, left ? straight : turned, second_of(s->minus));
      else product(c->o, gd, C, wide, n, x, left ? straight : turned, first_of(s->minus));
    }
    add_weights_grad(gto_state, -1, s->one, s->two, x, C, n);
    mix(gx, s->one, s->two, s->minus, C, n);
  }
}

/* From the gradient of what meet gave: those of h, and, added, of the weights, the base, and map and momentum, which
   the transition T carries to before the chunk. */
static void meet_backward(const chunk *c, int i, matrix h, const float *read, matrix gr, matrix gh, float *gread,
                          const float *T) {
  scratch *s = c->s;
  sizes m = sizes_of(c->j, i);
  long C = c->j->size;
  float *gw = s->gw[i], *gmomentum = gw + m.map;
  for (int half = 1; half >= 0; half--) {
    matrix w = dense(c->now.maps[i] + half * m.map, m.out);
    product(c->o, dense(half ? s->two : s->one, m.in), C, m.in, m.out, gr, transposed(w), PLUS_ALL);
  }
  add_weights_grad(gread, 1, s->one, s->two, h, C, m.in);
  mix(gh, s->one, s->two, read, C, m.in);
  if (c->base[i]) {
    add_product(c->o, gh, C, m.in, m.out, gr, transposed(dense(c->base[i], m.out)), PLUS_ALL);
    add_product(c->o, dense(c->gbase[i], m.out), m.in, m.out, C, transposed(h), gr, PLUS_ALL);
  }
  sides p = weighted(c, h, gr, second_of(read), m);
  sum_of to = {gw, gmomentum, T[1], T[3]};
  product_onto(c->o, dense(gmomentum, m.out), to, m.in, m.out, C, p.left, p.right, PLUS_ALL);
  p = weighted(c, h, gr, first_of(read), m);
  product_onto(c->o, dense(gw, m.out), (sum_of){gw, NULL, T[0], 0}, m.in, m.out, C, p.left, p.right, PLUS_ALL);
}

/* The queries, last map first; gradients of the maps before the chunk, what the keys give excepted. */
static void read_queries_backward(const chunk *c) {
  const job *j = c->j;
  scratch *s = c->s;
  long C = j->size, D = j->widths[0];
  const float *write = s->masks.write;
  float *gwrite = s->gmasks.write, *gread = s->gmasks.read;
  matrix gr = dense(s->gr[j->depth % 2], D);
  memset(gread, 0, 2 * C * sizeof(float));
  memset(gwrite, 0, C * C * sizeof(float));
  finish_backward(gr.at, c->now.r[j->depth - 1], c->gt.out, c->a, c->ga, j);
  for (int i = j->depth - 1; i >= 0; i--) {
    sizes m = sizes_of(j, i);
    matrix h = c->h[i], gh = i ? dense(s->gr[i % 2], m.in) : c->gt.q, scores = dense(s->scores, C);
    matrix gscores = dense(s->gscores, C);
    meet_backward(c, i, h, s->masks.read, gr, gh, gread, s->masks.transition);
    product(c->o, gscores, C, C, m.out, gr, transposed(c->d[i]), MINUS_ALL);
    for (long l = 0; l < C * C; l++) {
      gwrite[l] += gscores.at[l] * c->now.raw[i][l];
      gscores.at[l] *= write[l];
      scores.at[l] = c->now.raw[i][l] * write[l];
    }
    add_lower_product(c->o, gh, C, m.in, gscores, c->x[i], PLUS_ALL);
    add_upper_product(c->o, dense(s->gx[i], m.in), C, m.in, transposed(gscores), h, PLUS_ALL);
    add_upper_product(c->o, dense(s->gd[i], m.out), C, m.out, transposed(scores), gr, MINUS_ALL);
    if (i) times(gh.at, gh.at, s->read_slope[i - 1], C * m.in);
    gr = gh;
  }
  if (j->residual) add_rows(c->gt.q, c->gt.out, C, D);
}

/* The keys' backward, gone through from first map to last, then their forward. */
static void read_keys_backward(const chunk *c) {
  const job *j = c->j;
  scratch *s = c->s;
  long C = j->size, L = j->depth;
  matrix w[MAPS];
  for (int i = 0; i < L; i++) w[i] = frozen(c, i);
  for (int i = 1; i < L; i++) {
    sizes m = sizes_of(j, i);
    times(s->gu[i - 1], s->gd[i - 1], s->slope[i - 1], C * m.in);
    add_product(c->o, dense(s->gd[i], m.out), C, m.out, m.in, dense(s->gu[i - 1], m.in), w[i], PLUS_ALL);
  }
  matrix gz = dense(s->one, j->widths[L]);
  signal_backward(gz.at, s->gx[0], c->gt.v, c->ga, s->gd[L - 1], s->d[L - 1], s->normed, c->a, j);
  for (int i = L - 1; i >= 0; i--) {
    sizes m = sizes_of(j, i);
    matrix gw = dense(c->base[i] ? s->other : s->gw[i], m.out), gx = dense(s->gx[i], m.in);
    sum_of to = c->base[i] ? (sum_of){0} : (sum_of){gw.at, NULL, 1, 0};
    product_onto(c->o, gw, to, m.in, m.out, C, transposed(c->x[i]), gz, PLUS_ALL);
    if (i) add_product(c->o, gw, m.in, m.out, C, transposed(dense(s->gu[i - 1], m.in)), c->d[i], PLUS_ALL);
    if (c->base[i]) { /* the gradient is twice wanted */
      plus(s->gw[i], s->gw[i], gw.at, m.map);
      plus(c->gbase[i], c->gbase[i], gw.at, m.map);
    }
    add_product(c->o, gx, C, m.in, m.out, gz, transposed(w[i]), PLUS_ALL);
    if (!i) break;
    gz = dense(gz.at == s->one ? s->two : s->one, m.in);
    for (long l = 0; l < C * m.in; l++)
      gz.at[l] = gx.at[l] * s->slope[i - 1][l] + s->gd[i - 1][l] * c->now.u[i][l] * s->curvature[i - 1][l];
  }
}

static void read_keys_online_backward(const chunk *c) {
  static const float SAME[4] = {1, 0, 0, 1};
  scratch *s = c->s;
  long C = c->j->size, D = c->j->widths[0];
  matrix gz = dense(s->gu[0], D), gk = dense(s->gx[0], D), gmet = dense(s->gscores, C);
  float *gd = s->gd[0];
  for (long t = C - 1; t > 0; t--) /* the system, transposed */
    for (long l = 0; l < t; l++)
      for (long i = 0; i < D; i += LANES) add(gd + l * D + i, -s->system[t * C + l] * load(gd + t * D + i));
  product(c->o, gmet, C, C, D, dense(gd, D), transposed(c->d[0]), MINUS_ALL);
  signal_backward(gz.at, gk.at, c->gt.v, c->ga, gd, s->d[0], s->normed, c->a, c->j);
  for (long t = 0; t < C; t++) {
    float *row = gmet.at + t * C;
    for (long l = 0; l < t; l++) {
      float g = 2 * row[l];
      s->gmasks.write[(t - 1) * C + l] += g * s->met[t * C + l];
      row[l] = g * s->masks.write[(t - 1) * C + l];
    }
    memset(row + t, 0, (C - t) * sizeof(float));
  }
  add_lower_product(c->o, gk, C, D, gmet, c->t.k, PLUS_ALL);
  add_upper_product(c->o, gk, C, D, transposed(gmet), c->t.k, PLUS_ALL);
  memset(s->gbefore, 0, 2 * C * sizeof(float));
  meet_backward(c, 0, c->t.k, s->before, gz, dense(s->gr[0], D), s->gbefore, SAME);
  add_rows(gk, dense(s->gr[0], D), C, D);
  for (long l = 2; l < 2 * C; l++) s->gmasks.read[l - 2] += s->gbefore[l];
}

/* ---- all chunks of a memory ---- */

/* A map and its momentum as held to [in, out] or back: all but the first are held the other way round. */
static void turn(const job *j, int i, float *to, const float *from, int back) {
  sizes m = sizes_of(j, i);
  for (int half = 0; half < 2; half++, to += m.map, from += m.map)
    if (!i) memcpy(to, from, m.map * sizeof(float));
    else if (back) transpose(to, dense((float *)from, m.out), m.in, m.out);
    else transpose(to, dense((float *)from, m.in), m.out, m.in);
}

static void forward_memory(const job *j, scratch *s, long g) {
  record first = record_of(j, s, g, 0), last = record_of(j, s, g, j->chunks);
  for (int i = 0; i < j->depth; i++)
    turn(j, i, first.maps[i], j->start[i] + g * 2 * sizes_of(j, i).map, 0);
  for (long n = 0; n < j->chunks; n++) {
    chunk c = chunk_of(j, s, g, n);
    if (j->online) read_keys_online(&c);
    else read_keys(&c);
    read_queries(&c);
    put_rows(j, g, n, j->out, c.t.out);
    write_maps(&c, record_of(j, s, g, n + 1).maps);
  }
  for (int i = 0; i < j->depth; i++)
    turn(j, i, j->end[i] + g * 2 * sizes_of(j, i).map, last.maps[i], 1);
}

static void backward_memory(const job *j, scratch *s, long g) {
  long D = j->widths[0];
  record first = record_of(j, s, g, 0);
  for (int i = 0; i < j->depth; i++) {
    sizes m = sizes_of(j, i);
    turn(j, i, first.maps[i], j->start[i] + g * 2 * m.map, 0);
    turn(j, i, s->gw[i], j->gend[i] + g * 2 * m.map, 0);
    if (j->base[i]) memset(j->gbase[i] + g * m.map, 0, m.map * sizeof(float));
  }
  for (long n = j->chunks - 1; n >= 0; n--) {
    chunk c = chunk_of(j, s, g, n);
    recall(&c);
    write_maps_backward(&c);
    read_queries_backward(&c);
    if (j->online) read_keys_online_backward(&c);
    else read_keys_backward(&c);
    put_rows(j, g, n, j->gq, c.gt.q), put_rows(j, g, n, j->gk, dense(s->gx[0], D)), put_rows(j, g, n, j->gv, c.gt.v);
    make_masks_backward(c.gt.gates, &s->gmasks, &s->masks, s->other, j);
  }
  for (int i = 0; i < j->depth; i++)
    turn(j, i, j->gstart[i] + g * 2 * sizes_of(j, i).map, s->gw[i], 1);
}

/* ---- all memories ---- */

typedef struct {
  const job *j;
  void (*memory)(const job *, scratch *, long);
  long memories, next;
  int failed;
} work;

/* One thread: the next memory, until there is none. */
static void share(void *given, long i, long of) {
  work *all = given;
  scratch s;
  float *room = aligned_alloc(64, (lay_scratch(all->j, NULL, &s) + 15) / 16 * 64);
  if (!room) {
    all->failed = 1;
    return;
  }
  lay_scratch(all->j, room, &s);
  for (long g; (g = __atomic_fetch_add(&all->next, 1, __ATOMIC_RELAXED)) < all->memories;) all->memory(all->j, &s, g);
  free(room);
}

/* 0, or 1 for want of memory */
static int run(const job *j, int64_t memories, int64_t threads, void (*memory)(const job *, scratch *, long)) {
  work all = {j, memory, memories, 0, 0};
  share_out(share, &all, threads);
  return all.failed;
}

int forward(const job *j, int64_t memories, int64_t threads) { return run(j, memories, threads, forward_memory); }
int backward(const job *j, int64_t memories, int64_t threads) { return run(j, memories, threads, backward_memory); }
