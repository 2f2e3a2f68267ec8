"""A memory of two maps: PARTS programs work through all its chunks, a share of the hidden units each (README.md, 3).

x, z are of the keys, d, u the loss's signals there; h, r of the queries; w, s a map and its momentum; g... gradients.
Both maps are held as [2, D, HIDDEN], a program's share of them, the second transposed. It is worked through in blocks:
what all blocks add up to, as z2, r2 and gd2, is only [C, D]. z2 and gd2 are needed as a whole, by every program of the
memory (``total``); where the rest is linear in them, each leaves its part of a result, to be added up afterwards.
Chunk c finds the state in slot c and leaves it in c + 1.
"""

import triton
import triton.language as tl

from titans.memory.kernels.functions import (
    add,
    add_pairs,
    advance,
    advance_backward,
    cast,
    curvature,
    frozen,
    load,
    load_masks,
    mixed,
    mixed_backward,
    product,
    retreat,
    signal,
    signal_backward,
    slope,
    store_pair,
    store_transition,
    tile,
    token_rows,
    total,
    value,
)


@triton.jit
def last_output(k, state, block, HIDDEN: tl.constexpr, BLOCK: tl.constexpr, ACT: tl.constexpr, BASE: tl.constexpr):
    """z2 [C, D] at the keys."""
    w1, w2, base1, base2 = state
    z2 = tl.zeros(k.shape, tl.float32)
    for j in range(0, HIDDEN, BLOCK):
        here = j + block
        x = value(product(k, frozen(w1 + here, base1 + here, k.dtype, BASE)), ACT)
        z2 += product(cast(x, k.dtype), tl.trans(frozen(w2 + here, base2 + here, k.dtype, BASE)))
    return z2


@triton.jit
def keys(k, d2, state, here, ACT: tl.constexpr, BASE: tl.constexpr):
    """A block of z, u, x and d of the first map's output."""
    w1, w2, base1, base2 = state
    z = product(k, frozen(w1 + here, base1 + here, k.dtype, BASE))
    u = product(d2, frozen(w2 + here, base2 + here, k.dtype, BASE))
    return z, u, value(z, ACT), u * slope(z, ACT)


@triton.jit
def first_read(q, d1, scores1, w1, base1, map, read, BASE: tl.constexpr):
    """A block of r."""
    r = mixed(q, load(w1, q.dtype), load(w1 + map, q.dtype), read) - product(scores1, cast(d1, q.dtype))
    if BASE:
        r += product(q, load(base1, q.dtype))
    return r


@triton.jit
def forward(
    q, k, offset, write, read, to_state, transition, gain, base1, base2, slots1, slots2, signals, out,
    exchange, counter, H, chunks, slots, eps,
    C: tl.constexpr, D: tl.constexpr, HIDDEN: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr, ACT: tl.constexpr,
    NORM: tl.constexpr, BASE: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    memory, part = program // PARTS, program % PARTS
    map: tl.constexpr = D * HIDDEN
    dtype: tl.constexpr = q.dtype.element_ty
    block = tile(D, BLOCK, HIDDEN)
    base1 += program * map
    base2 += program * map
    out += part * (tl.num_programs(0) // PARTS) * chunks * C * D
    gain_ = tl.load(gain + memory * D + tl.arange(0, D))[None, :]
    for c in range(chunks):
        index, rows = memory * chunks + c, token_rows(memory, c, chunks, H, C, D)
        before, after = (program * slots + c % slots) * 2 * map, (program * slots + (c + 1) % slots) * 2 * map
        state = (slots1 + before, slots2 + before, base1, base2)
        q_, k_, square = tl.load(q + rows), tl.load(k + rows), index * C * C + tile(C, C, C)
        read_, to_state_, transition_ = load_masks(read, to_state, transition, index, C)
        z2 = total(last_output(k_, state, block, HIDDEN, BLOCK, ACT, BASE), exchange, counter, c, PARTS)
        if part == 0:
            tl.store(signals + (memory * slots + c % slots) * C * D + tile(C, D, D), z2)
        d2 = cast(signal(z2, tl.load(offset + rows), gain_, eps, NORM)[0], dtype)
        scores1 = cast(product(q_, tl.trans(k_)) * tl.load(write + square), dtype)
        raw2, r2 = tl.zeros([C, C], tl.float32), tl.zeros([C, D], tl.float32)
        for j in range(0, HIDDEN, BLOCK):
            here = j + block
            w1, w2 = state[0] + here, state[1] + here
            _, _, x, d1 = keys(k_, d2, state, here, ACT, BASE)
            h = cast(value(first_read(q_, d1, scores1, w1, base1 + here, map, read_, BASE), ACT), dtype)
            raw2 += product(h, tl.trans(cast(x, dtype)))
            r2 += mixed(h, tl.trans(load(w2, dtype)), tl.trans(load(w2 + map, dtype)), read_)
            if BASE:
                r2 += product(h, tl.trans(load(base2 + here, dtype)))
            advance(w1, slots1 + after + here, map, k_, d1, to_state_, transition_)
            advance(w2, slots2 + after + here, map, d2, x, to_state_, transition_)
        scores2 = cast(raw2 * tl.load(write + square), dtype)
        tl.store(out + rows, cast(r2 - product(scores2, d2), out.dtype.element_ty))
        tl.debug_barrier()  # what was stored is there for the next chunk


@triton.jit
def backward(
    q, k, offset, write, read, to_state, transition, gain, base1, base2, slots1, slots2, signals,
    gout, gmaps1, gmaps2, gq, gk, goffset, gwrite, gread, gto_state, gtransition, ggain, gbase1, gbase2,
    gz1, gr, h, gu, exchange, counter, H, chunks, slots, eps,
    C: tl.constexpr, D: tl.constexpr, HIDDEN: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr, ACT: tl.constexpr,
    NORM: tl.constexpr, BASE: tl.constexpr,
):  # fmt: skip
    """``gmaps``: after the last chunk, then before the first; gz1, gr, h, gu [C, HIDDEN] pass from loop to loop."""
    program = tl.program_id(0).to(tl.int64)
    memory, part = program // PARTS, program % PARTS
    map: tl.constexpr = D * HIDDEN
    dtype: tl.constexpr = q.dtype.element_ty
    block = tile(D, BLOCK, HIDDEN)
    wide = program * C * HIDDEN + tile(C, BLOCK, HIDDEN)
    passed = (gz1 + wide, gr + wide, h + wide, gu + wide)
    base1 += program * map
    base2 += program * map
    ends = (gmaps1 + program * 2 * map, gmaps2 + program * 2 * map, gbase1 + program * map, gbase2 + program * map)
    others = part * (tl.num_programs(0) // PARTS) * chunks  # chunks of the parts before this one
    gq += others * C * D
    gk += others * C * D
    gain_, ggain_ = tl.load(gain + memory * D + tl.arange(0, D))[None, :], tl.zeros([D], tl.float32)
    for step in range(chunks):
        c = chunks - 1 - step
        index, rows = memory * chunks + c, token_rows(memory, c, chunks, H, C, D)
        before, mine = (program * slots + c) * 2 * map, others + index
        state = (slots1 + before, slots2 + before, base1, base2)
        square, wanted = index * C * C + tile(C, C, C), (signals + (memory * slots + c) * C * D + tile(C, D, D))
        q_, k_, g_ = tl.load(q + rows), tl.load(k + rows), tl.load(gout + rows)
        read_, to_state_, transition_ = load_masks(read, to_state, transition, index, C)
        d2 = cast(signal(tl.load(wanted), tl.load(offset + rows), gain_, eps, NORM)[0], dtype)
        scores1 = cast(product(q_, tl.trans(k_)) * tl.load(write + square), dtype)
        gscores2 = cast(-product(g_, tl.trans(d2)) * tl.load(write + square), dtype)
        gq_, gread_, raw2, graw1 = reads_backward(
            q_, k_, g_, d2, scores1, gscores2, state, block, passed, read_, HIDDEN, BLOCK, ACT, BASE
        )
        tl.debug_barrier()  # what was stored is there for the next loop
        # What was needed before is loaded and worked out again: what stays alive through a loop spills registers.
        q_, k_, g_, write_ = tl.load(q + rows), tl.load(k + rows), tl.load(gout + rows), tl.load(write + square)
        gscores1 = cast(graw1 * write_, dtype)
        tl.store(gq + rows, cast(gq_ + product(gscores1, k_), gq.dtype.element_ty))
        gwrite_ = graw1 * product(q_, tl.trans(k_)) - raw2 * product(g_, tl.trans(d2))
        tl.store(gwrite + others * C * C + square, gwrite_)
        store_pair(gread, mine, gread_, C)

        gd2 = -product(tl.trans(cast(raw2 * write_, dtype)), g_)
        gk_, gd2, gto_state_ = signals_backward(
            k_, d2, gd2, scores1, gscores2, state, ends, block, passed, to_state_, HIDDEN, BLOCK, ACT, BASE
        )
        store_pair(gto_state, mine, gto_state_, C)
        gk_ += product(tl.trans(gscores1), q_)
        gd2 = total(gd2, exchange, counter, step, PARTS)
        d2_, unit, rstd, error = signal(tl.load(wanted), tl.load(offset + rows), gain_, eps, NORM)
        gz2, goffset_, more = signal_backward(gd2, d2_, gain_, unit, rstd, error, NORM)
        ggain_ += more
        if part == 0:
            tl.store(goffset + rows, goffset_)
        tl.debug_barrier()

        more, gtransition_ = maps_backward(
            tl.load(q + rows), k_, tl.load(gout + rows), d2, cast(gz2, dtype), state, ends, block, passed, read_,
            transition_, HIDDEN, BLOCK, ACT, BASE,
        )  # fmt: skip
        tl.store(gk + rows, cast(gk_ + more, gk.dtype.element_ty))
        store_transition(gtransition, mine, gtransition_)
        tl.debug_barrier()
    if part == 0:
        tl.store(ggain + memory * D + tl.arange(0, D), ggain_)


@triton.jit
def reads_backward(
    q, k, g, d2, scores1, gscores2, state, block, passed, read,
    HIDDEN: tl.constexpr, BLOCK: tl.constexpr, ACT: tl.constexpr, BASE: tl.constexpr,
):  # fmt: skip
    """The queries, last map first: gradients of q and read, the second map's scores, and the first one's gradient."""
    w1, w2, base1, base2 = state
    C: tl.constexpr = q.shape[0]
    map: tl.constexpr = q.shape[1] * HIDDEN
    gq, gread = tl.zeros(q.shape, tl.float32), (tl.zeros([C], tl.float32), tl.zeros([C], tl.float32))
    raw2, graw1 = tl.zeros([C, C], tl.float32), tl.zeros([C, C], tl.float32)
    for j in range(0, HIDDEN, BLOCK):
        here = j + block
        _, _, x, d1 = keys(k, d2, state, here, ACT, BASE)
        r = first_read(q, d1, scores1, w1 + here, base1 + here, map, read, BASE)
        h, x = value(r, ACT), cast(x, q.dtype)
        tl.store(passed[2] + j, cast(h, q.dtype))
        raw2 += product(cast(h, q.dtype), tl.trans(x))
        gh, more = mixed_backward(g, h, load(w2 + here, q.dtype), load(w2 + map + here, q.dtype), read)
        gread = add_pairs(gread, more)
        gh += product(gscores2, x)
        if BASE:
            gh += product(g, load(base2 + here, q.dtype))
        gr = cast(gh * slope(r, ACT), q.dtype)
        tl.store(passed[1] + j, gr)
        transposed = (tl.trans(load(w1 + here, q.dtype)), tl.trans(load(w1 + map + here, q.dtype)))
        gq_, more = mixed_backward(gr, q, transposed[0], transposed[1], read)
        gread = add_pairs(gread, more)
        gq += gq_
        if BASE:
            gq += product(gr, tl.trans(load(base1 + here, q.dtype)))
        graw1 -= product(gr, tl.trans(cast(d1, q.dtype)))
    return gq, gread, raw2, graw1


@triton.jit
def signals_backward(
    k, d2, gd2, scores1, gscores2, state, ends, block, passed, to_state,
    HIDDEN: tl.constexpr, BLOCK: tl.constexpr, ACT: tl.constexpr, BASE: tl.constexpr,
):  # fmt: skip
    """The maps after the chunk, and the keys' backward, first map first: gradients of k, d2 and to_state."""
    C: tl.constexpr = k.shape[0]
    map: tl.constexpr = k.shape[1] * HIDDEN
    gk, gto_state = tl.zeros(k.shape, tl.float32), (tl.zeros([C], tl.float32), tl.zeros([C], tl.float32))
    for j in range(0, HIDDEN, BLOCK):
        here = j + block
        z, u, x, d1 = keys(k, d2, state, here, ACT, BASE)
        gk_, gd1, more = advance_backward(ends[0] + here, map, k, d1, to_state)
        gto_state = add_pairs(gto_state, more)
        gk += gk_
        gd2_, gx, more = advance_backward(ends[1] + here, map, d2, x, to_state)
        gto_state = add_pairs(gto_state, more)
        gd2 += gd2_
        gx += product(tl.trans(gscores2), tl.load(passed[2] + j))
        gd1 -= product(tl.trans(scores1), tl.load(passed[1] + j))
        gu = cast(gd1 * slope(z, ACT), k.dtype)
        tl.store(passed[3] + j, gu)
        tl.store(passed[0] + j, gx * slope(z, ACT) + gd1 * u * curvature(z, ACT))
        gd2 += product(gu, tl.trans(frozen(state[1] + here, state[3] + here, k.dtype, BASE)))
    return gk, gd2, gto_state


@triton.jit
def maps_backward(
    q, k, g, d2, gz2, state, ends, block, passed, read, transition,
    HIDDEN: tl.constexpr, BLOCK: tl.constexpr, ACT: tl.constexpr, BASE: tl.constexpr,
):  # fmt: skip
    """The keys' forward, and everything that met the maps: gradients of k, of the transition, and those in ``ends``."""
    w1, w2, base1, base2 = state
    map: tl.constexpr = k.shape[1] * HIDDEN
    gk, gtransition = tl.zeros(k.shape, tl.float32), (0.0, 0.0, 0.0)
    for j in range(0, HIDDEN, BLOCK):
        here = j + block
        first = frozen(w1 + here, base1 + here, k.dtype, BASE)
        z = product(k, first)
        gx = product(gz2, frozen(w2 + here, base2 + here, k.dtype, BASE))
        gz1 = cast(tl.load(passed[0] + j) + gx * slope(z, ACT), k.dtype)
        gk += product(gz1, tl.trans(first))
        gw1 = product(tl.trans(k), gz1)
        gw2 = product(tl.trans(gz2), cast(value(z, ACT), k.dtype)) + product(tl.trans(d2), tl.load(passed[3] + j))
        gr, h = tl.load(passed[1] + j), tl.load(passed[2] + j)
        if BASE:
            add(ends[2] + here, gw1 + product(tl.trans(q), gr))
            add(ends[3] + here, gw2 + product(tl.trans(g), h))
        gtransition = retreat(ends[0] + here, w1 + here, map, q, gr.to(tl.float32), gw1, read, transition, gtransition)
        gtransition = retreat(ends[1] + here, w2 + here, map, g, h.to(tl.float32), gw2, read, transition, gtransition)
    return gk, gtransition
