"""What both kernels are made of: addresses, products, the activation and the loss's signal, as in ``network.py``."""

import triton
import triton.language as tl
from triton import knobs

INTERPRETED = tl.constexpr(bool(knobs.runtime.interpret))


@triton.jit
def product(a, b):
    """a b, summed in float32; float32 operands as three of TF32, which keep their digits."""
    if INTERPRETED:  # it multiplies the bit patterns of bfloat16
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="tf32x3")


@triton.jit
def cast(x, dtype: tl.constexpr):
    """float32 to ``dtype``, rounded to nearest."""
    if INTERPRETED and dtype == tl.bfloat16:  # it cuts off what does not fit
        bits = x.to(tl.int32, bitcast=True)
        x = (bits + 0x7FFF + ((bits >> 16) & 1)).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def tile(rows: tl.constexpr, columns: tl.constexpr, width):
    """Offsets [rows, columns] in a matrix of that width."""
    return tl.arange(0, rows)[:, None] * width + tl.arange(0, columns)[None, :]


@triton.jit
def token_rows(memory, chunk, chunks, H, C: tl.constexpr, D: tl.constexpr):
    """Offsets [C, D] of a chunk's rows in [B, T, H, D], memory = b H + h."""
    return ((memory // H * chunks + chunk) * C * H + memory % H) * D + tile(C, D, H * D)


@triton.jit
def load_pair(columns, index, C: tl.constexpr):
    """The columns of a chunk's [C, 2] as two [C, 1]."""
    columns += index * 2 * C + 2 * tl.arange(0, C)[:, None]
    return tl.load(columns), tl.load(columns + 1)


@triton.jit
def load_masks(read, to_state, transition, index, C: tl.constexpr):
    """Of a chunk's ``ChunkMasks``: two pairs, and (beta, f, m) of the transition."""
    transition += index * 4
    entries = tl.load(transition), tl.load(transition + 1), tl.load(transition + 3)
    return load_pair(read, index, C), load_pair(to_state, index, C), entries


@triton.jit
def store_pair(columns, index, pair, C: tl.constexpr):
    """Two [C] as the columns of a chunk's [C, 2]."""
    columns += index * 2 * C + 2 * tl.arange(0, C)
    tl.store(columns, pair[0])
    tl.store(columns + 1, pair[1])


@triton.jit
def store_transition(transition, index, entries):
    transition += index * 4
    tl.store(transition, entries[0])
    tl.store(transition + 1, entries[1])
    tl.store(transition + 2, 0.0)
    tl.store(transition + 3, entries[2])


@triton.jit
def total(x, exchange, counter, round, PARTS: tl.constexpr):
    """The sum of x over the programs of a memory: each leaves its own and waits for the others'.

    exchange [G, 2, PARTS, *x.shape] is used in turn: who leaves a round's x has read all of the round before.
    """
    if PARTS > 1:
        C: tl.constexpr = x.shape[0]
        D: tl.constexpr = x.shape[1]
        memory, part = tl.program_id(0).to(tl.int64) // PARTS, tl.program_id(0) % PARTS
        counter += memory
        place = exchange + (2 * memory + round % 2) * PARTS * C * D + tile(C, D, D)
        tl.store(place + part * C * D, x)
        tl.debug_barrier()  # all threads' stores come before the one thread's addition
        tl.atomic_add(counter, 1, sem="release")
        while tl.atomic_add(counter, 0, sem="acquire") < (round + 1) * PARTS:
            pass
        tl.debug_barrier()
        x = tl.zeros([C, D], tl.float32)
        for i in tl.static_range(PARTS):  # type: ignore[misc]
            x += tl.load(place + i * C * D, cache_modifier=".cg")  # not from the first-level cache
    return x


@triton.jit
def add_pairs(a, b):
    return a[0] + b[0], a[1] + b[1]


@triton.jit
def load(at, dtype: tl.constexpr):
    return cast(tl.load(at), dtype)


@triton.jit
def frozen(held, base, dtype: tl.constexpr, BASE: tl.constexpr):
    """The map at which a chunk's gradients are taken."""
    w = tl.load(held)
    if BASE:
        w += tl.load(base)
    return cast(w, dtype)


@triton.jit
def add(at, x):
    old = tl.load(at)
    tl.debug_barrier()  # a thread may store what another one loads
    tl.store(at, old + x)


@triton.jit
def mixed(x, w, s, read):
    """What x [C, ...] reads from a map and its momentum."""
    return read[0] * product(x, w) + read[1] * product(x, s)


@triton.jit
def mixed_backward(g, x, w, s, read):
    """Gradients of x and read from that of ``mixed``; w and s are transposed against it."""
    gw, gs = product(g, w), product(g, s)
    return read[0] * gw + read[1] * gs, (tl.sum(x * gw, 1), tl.sum(x * gs, 1))


@triton.jit
def advance(old, new, map, a, b, to_state, transition):
    """A map and its momentum after the chunk: a token's gradient is its narrow side a times its wide side b."""
    w, s = tl.load(old), tl.load(old + map)
    written, felt = cast(b * to_state[0], a.dtype), cast(b * to_state[1], a.dtype)
    tl.store(new, transition[0] * w + transition[1] * s - product(tl.trans(a), written))
    tl.store(new + map, transition[2] * s - product(tl.trans(a), felt))


@triton.jit
def advance_backward(after, map, a, b, to_state):
    """Gradients of a, b and to_state from those of map and momentum after the chunk."""
    gw, gs, operand = load(after, a.dtype), load(after + map, a.dtype), cast(b, a.dtype)
    bw, bs = product(a, gw), product(a, gs)
    ga, gb = mixed(operand, tl.trans(gw), tl.trans(gs), to_state), to_state[0] * bw + to_state[1] * bs
    return -ga, -gb, (tl.sum(-b * bw, 1), tl.sum(-b * bs, 1))


@triton.jit
def retreat(after, held, map, a, b, more, read, transition, gtransition):
    """Gradients of map and momentum before the chunk, in place of those after it; adds the transition's.

    a [C, D] times b [C, BLOCK], mixed by ``read``, came from the reads; ``more`` is the frozen map's gradient.
    """
    gw, gs, w, s = tl.load(after), tl.load(after + map), tl.load(held), tl.load(held + map)
    tl.debug_barrier()  # a thread may store what another one loads
    through_w, through_s = cast(b * read[0], a.dtype), cast(b * read[1], a.dtype)
    tl.store(after, transition[0] * gw + product(tl.trans(a), through_w) + more)
    tl.store(after + map, transition[1] * gw + transition[2] * gs + product(tl.trans(a), through_s))
    return gtransition[0] + tl.sum(gw * w), gtransition[1] + tl.sum(gw * s), gtransition[2] + tl.sum(gs * s)


@triton.jit
def mean(x):
    """Of every row, [C, 1]."""
    return (tl.sum(x, 1) / x.shape[1])[:, None]


@triton.jit
def norm_backward(grad, unit, rstd):
    return rstd * (grad - mean(grad) - unit * mean(grad * unit))


@triton.jit
def signal(z, offset, gain, eps, NORM: tl.constexpr):
    """Gradient of the loss at the last map's output z [C, D]; and unit, rstd, error for its own backward."""
    if NORM:
        centred = z - mean(z)
        rstd = 1 / tl.sqrt(mean(centred * centred) + eps)
        unit = centred * rstd
        error = offset + unit * gain
        d = norm_backward(2 * gain * error, unit, rstd)
    else:
        unit, rstd, error = z, 1.0, offset + z
        d = 2 * error
    return d, unit, rstd, error


@triton.jit
def signal_backward(gd, d, gain, unit, rstd, error, NORM: tl.constexpr):
    """Gradients of z and offset [C, D], and of gain [D], from that of the signal d."""
    if NORM:
        grad, ggrad = 2 * gain * error, norm_backward(gd, unit, rstd)
        gerror = 2 * gain * ggrad
        gunit = gain * gerror - rstd * (mean(grad * unit) * gd + mean(gd * unit) * grad)
        gz = norm_backward(gunit, unit, rstd) - unit * rstd * mean(gd * d)
        ggain = tl.sum(gerror * unit + 2 * error * ggrad, 0)
    else:
        gerror, ggain = 2 * gd, tl.zeros([gd.shape[1]], tl.float32)
        gz = gerror
    return gz, gerror, ggain


@triton.jit
def value(z, ACT: tl.constexpr):
    """f(z)"""
    if ACT == "gelu":
        f = 0.5 * z * (1 + tl.erf(z * 0.7071067811865476))
    elif ACT == "silu":
        f = z * tl.sigmoid(z)
    else:
        f = tl.maximum(z, 0.0)
    return f


@triton.jit
def slope(z, ACT: tl.constexpr):
    """f'(z)"""
    if ACT == "gelu":
        f = 0.5 * (1 + tl.erf(z * 0.7071067811865476)) + z * tl.exp(-0.5 * z * z) * 0.3989422804014327
    elif ACT == "silu":
        s = tl.sigmoid(z)
        f = s * (1 + z * (1 - s))
    else:
        f = tl.where(z > 0, 1.0, 0.0)
    return f


@triton.jit
def curvature(z, ACT: tl.constexpr):
    """f''(z)"""
    if ACT == "gelu":
        f = tl.exp(-0.5 * z * z) * (2 - z * z) * 0.3989422804014327
    elif ACT == "silu":
        s = tl.sigmoid(z)
        f = s * (1 - s) * (2 + z * (1 - 2 * s))
    else:
        f = tl.zeros_like(z)
    return f
