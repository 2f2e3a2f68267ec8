"""A memory of two maps: one program works through all chunks of one memory (README.md, section 3).

Names: x, z at the keys, d, u the loss's signals there; h, r at the queries; w, s a map and its momentum, g... gradients.
Both maps are held as [2, D, HIDDEN], the second transposed. Their hidden dimension is worked through in blocks: what
all blocks add up to, z2, r2 and gd2, is only [C, D]. In ``slots`` the state is read at chunk c and written at c + 1.
"""

import triton
import triton.language as tl

from titans.memory.kernels.functions import (
    add, advance, advance_backward, cast, curvature, frozen, load, load_masks, mixed, mixed_backward, product, retreat,
    signal, signal_backward, slope, store_masks, tile, token_rows, value,
)  # fmt: skip


@triton.jit
def last_output(k, w1, w2, base1, base2, D, HIDDEN, BLOCK, ACT, BASE):
    """Output of the second map at the keys, [C, D]."""
    z2 = tl.zeros(k.shape, tl.float32)
    for j in range(0, HIDDEN, BLOCK):
        block = j + tile(D, BLOCK, HIDDEN)
        x = value(product(k, frozen(w1 + block, base1 + block, k.dtype, BASE)), ACT)
        z2 += product(cast(x, k.dtype), tl.trans(frozen(w2 + block, base2 + block, k.dtype, BASE)))
    return z2


@triton.jit
def forward(
    q, k, offset, write, read, to_state, transition, gain, base1, base2, slots1, slots2, out, H, chunks, slots, eps,
    C: tl.constexpr, D: tl.constexpr, HIDDEN: tl.constexpr, BLOCK: tl.constexpr, ACT: tl.constexpr, NORM: tl.constexpr,
    BASE: tl.constexpr,
):  # fmt: skip
    memory, map, dtype = tl.program_id(0).to(tl.int64), D * HIDDEN, q.dtype.element_ty
    gain_ = tl.load(gain + memory * D + tl.arange(0, D))[None, :]
    base1 += memory * map
    base2 += memory * map
    for c in range(chunks):
        index, rows = memory * chunks + c, token_rows(memory, c, chunks, H, C, D)
        here, after = (memory * slots + c % slots) * 2 * map, (memory * slots + (c + 1) % slots) * 2 * map
        q_, k_ = tl.load(q + rows), tl.load(k + rows)
        write_, beta, f, to_w, to_s, keep, mix, fade = load_masks(write, read, to_state, transition, index, C)
        z2 = last_output(k_, slots1 + here, slots2 + here, base1, base2, D, HIDDEN, BLOCK, ACT, BASE)
        d2, _, _, _ = signal(z2, tl.load(offset + rows), gain_, eps, NORM)
        d2 = cast(d2, dtype)
        scores1 = cast(product(q_, tl.trans(k_)) * write_, dtype)
        raw, r2 = tl.zeros([C, C], tl.float32), tl.zeros([C, D], tl.float32)
        for j in range(0, HIDDEN, BLOCK):
            block = j + tile(D, BLOCK, HIDDEN)
            w1, w2 = slots1 + here + block, slots2 + here + block
            z = product(k_, frozen(w1, base1 + block, dtype, BASE))
            x, d1 = value(z, ACT), product(d2, frozen(w2, base2 + block, dtype, BASE)) * slope(z, ACT)
            r = mixed(q_, load(w1, dtype), load(w1 + map, dtype), beta, f) - product(scores1, cast(d1, dtype))
            if BASE:
                r += product(q_, load(base1 + block, dtype))
            h = cast(value(r, ACT), dtype)
            raw += product(h, tl.trans(cast(x, dtype)))
            r2 += mixed(h, tl.trans(load(w2, dtype)), tl.trans(load(w2 + map, dtype)), beta, f)
            if BASE:
                r2 += product(h, tl.trans(load(base2 + block, dtype)))
            advance(w1, slots1 + after + block, map, k_, d1, to_w, to_s, keep, mix, fade)
            advance(w2, slots2 + after + block, map, d2, x, to_w, to_s, keep, mix, fade)
        r2 -= product(cast(raw * write_, dtype), d2)
        tl.store(out + rows, cast(r2, dtype))
        tl.debug_barrier()  # what was written is there for the next chunk


@triton.jit
def backward(
    q, k, offset, write, read, to_state, transition, gain, base1, base2, slots1, slots2, gout, gmaps1, gmaps2,
    gq, gk, goffset, gwrite, gread, gto_state, gtransition, ggain, gbase1, gbase2, gz1, H, chunks, slots, eps,
    C: tl.constexpr, D: tl.constexpr, HIDDEN: tl.constexpr, BLOCK: tl.constexpr, ACT: tl.constexpr, NORM: tl.constexpr,
    BASE: tl.constexpr,
):  # fmt: skip
    """``gmaps`` hold the gradients of the maps after chunk c, gz1 [C, HIDDEN] what is known of z1's before gz2 is."""
    memory, map, dtype = tl.program_id(0).to(tl.int64), D * HIDDEN, q.dtype.element_ty
    gain_, ggain_ = tl.load(gain + memory * D + tl.arange(0, D))[None, :], tl.zeros([D], tl.float32)
    base1 += memory * map
    base2 += memory * map
    gbase1 += memory * map
    gbase2 += memory * map
    gmaps1 += memory * 2 * map
    gmaps2 += memory * 2 * map
    gz1 += memory * C * HIDDEN + tile(C, BLOCK, HIDDEN)
    for step in range(chunks):
        c = chunks - 1 - step
        index, rows = memory * chunks + c, token_rows(memory, c, chunks, H, C, D)
        here = (memory * slots + c) * 2 * map
        q_, k_, g_ = tl.load(q + rows), tl.load(k + rows), tl.load(gout + rows)
        write_, beta, f, to_w, to_s, keep, mix, fade = load_masks(write, read, to_state, transition, index, C)
        z2 = last_output(k_, slots1 + here, slots2 + here, base1, base2, D, HIDDEN, BLOCK, ACT, BASE)
        d2_, unit, rstd, error = signal(z2, tl.load(offset + rows), gain_, eps, NORM)
        d2 = cast(d2_, dtype)
        raw1, graw2 = product(q_, tl.trans(k_)), -product(g_, tl.trans(d2))
        scores1, gscores2 = cast(raw1 * write_, dtype), cast(graw2 * write_, dtype)
        raw2, graw1 = tl.zeros([C, C], tl.float32), tl.zeros([C, C], tl.float32)
        gq_, gk_, gd2 = tl.zeros([C, D], tl.float32), tl.zeros([C, D], tl.float32), tl.zeros([C, D], tl.float32)
        gbeta, gf, gto_w, gto_s = (tl.zeros([C], tl.float32),) * 4
        gkeep, gmix, gfade = 0.0, 0.0, 0.0
        for j in range(0, HIDDEN, BLOCK):
            block = j + tile(D, BLOCK, HIDDEN)
            w1, w2 = slots1 + here + block, slots2 + here + block
            # as in the forward
            z = product(k_, frozen(w1, base1 + block, dtype, BASE))
            u = product(d2, frozen(w2, base2 + block, dtype, BASE))
            x_, d1_ = value(z, ACT), u * slope(z, ACT)
            x, d1 = cast(x_, dtype), cast(d1_, dtype)
            r = mixed(q_, load(w1, dtype), load(w1 + map, dtype), beta, f) - product(scores1, d1)
            if BASE:
                r += product(q_, load(base1 + block, dtype))
            h_ = value(r, ACT)
            h = cast(h_, dtype)
            raw2 += product(h, tl.trans(x))
            # the queries, last map first
            gh, a, b = mixed_backward(g_, h_, load(w2, dtype), load(w2 + map, dtype), beta, f)
            gbeta += a
            gf += b
            gh += product(gscores2, x)
            if BASE:
                gh += product(g_, load(base2 + block, dtype))
            gr_ = gh * slope(r, ACT)
            gr = cast(gr_, dtype)
            g, a, b = mixed_backward(
                gr, q_, tl.trans(load(w1, dtype)), tl.trans(load(w1 + map, dtype)), beta, f
            )
            gq_ += g
            gbeta += a
            gf += b
            if BASE:
                gq_ += product(gr, tl.trans(load(base1 + block, dtype)))
            graw1 -= product(gr, tl.trans(d1))
            # the maps after the chunk, and what of the keys does not wait for gz2
            g, gd1, a, b = advance_backward(gmaps1 + block, map, k_, d1_, to_w, to_s)
            gk_ += g
            gto_w += a
            gto_s += b
            g, gx, a, b = advance_backward(gmaps2 + block, map, d2, x_, to_w, to_s)
            gd2 += g
            gto_w += a
            gto_s += b
            gx += product(tl.trans(gscores2), h)
            gd1 -= product(tl.trans(scores1), gr)
            gu = cast(gd1 * slope(z, ACT), dtype)
            gd2 += product(gu, tl.trans(frozen(w2, base2 + block, dtype, BASE)))
            tl.store(gz1 + j, gx * slope(z, ACT) + gd1 * u * curvature(z, ACT))
            gw2 = product(tl.trans(d2), gu)
            if BASE:
                add(gbase1 + block, product(tl.trans(q_), gr))
                add(gbase2 + block, product(tl.trans(g_), h) + gw2)
            a, b, g = retreat(gmaps1 + block, w1, map, q_, gr_, 0.0, beta, f, keep, mix, fade)
            gkeep, gmix, gfade = gkeep + a, gmix + b, gfade + g
            a, b, g = retreat(gmaps2 + block, w2, map, g_, h_, gw2, beta, f, keep, mix, fade)
            gkeep, gmix, gfade = gkeep + a, gmix + b, gfade + g

        gd2 -= product(tl.trans(cast(raw2 * write_, dtype)), g_)
        gz2, goffset_, more = signal_backward(gd2, d2_, gain_, unit, rstd, error, NORM)
        ggain_ += more
        tl.store(goffset + rows, goffset_)
        store_masks(
            gwrite, gread, gto_state, gtransition, index, C,
            graw1 * raw1 + graw2 * raw2, (gbeta, gf), (gto_w, gto_s), (gkeep, gmix, gfade),
        )  # fmt: skip
        gscores1, gz2 = cast(graw1 * write_, dtype), cast(gz2, dtype)
        gk_ += product(tl.trans(gscores1), q_)
        tl.store(gq + rows, cast(gq_ + product(gscores1, k_), dtype))
        tl.debug_barrier()  # what was written is there to be read
        for j in range(0, HIDDEN, BLOCK):
            block = j + tile(D, BLOCK, HIDDEN)
            w1 = frozen(slots1 + here + block, base1 + block, dtype, BASE)
            w2 = frozen(slots2 + here + block, base2 + block, dtype, BASE)
            z = product(k_, w1)
            gz = cast(tl.load(gz1 + j) + product(gz2, w2) * slope(z, ACT), dtype)
            gk_ += product(gz, tl.trans(w1))
            gw1, gw2 = product(tl.trans(k_), gz), product(tl.trans(gz2), cast(value(z, ACT), dtype))
            add(gmaps1 + block, gw1)
            add(gmaps2 + block, gw2)
            if BASE:
                add(gbase1 + block, gw1)
                add(gbase2 + block, gw2)
        tl.store(gk + rows, cast(gk_, dtype))
        tl.debug_barrier()
    tl.store(ggain + memory * D + tl.arange(0, D), ggain_)
