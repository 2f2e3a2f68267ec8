"""A memory of one linear map, held as [2, D, D]: as ``two_maps``, without a hidden dimension."""

import triton
import triton.language as tl

from titans.memory.kernels.functions import (
    add, advance, advance_backward, cast, frozen, load, load_masks, mixed, mixed_backward, product, retreat, signal,
    signal_backward, store_masks, tile, token_rows,
)  # fmt: skip


@triton.jit
def forward(
    q, k, offset, write, read, to_state, transition, gain, base, slots_, out, H, chunks, slots, eps,
    C: tl.constexpr, D: tl.constexpr, NORM: tl.constexpr, BASE: tl.constexpr,
):  # fmt: skip
    memory, map, dtype = tl.program_id(0).to(tl.int64), D * D, q.dtype.element_ty
    gain_ = tl.load(gain + memory * D + tl.arange(0, D))[None, :]
    whole = tile(D, D, D)
    base += memory * map + whole
    for c in range(chunks):
        index, rows = memory * chunks + c, token_rows(memory, c, chunks, H, C, D)
        w = slots_ + (memory * slots + c % slots) * 2 * map + whole
        after = slots_ + (memory * slots + (c + 1) % slots) * 2 * map + whole
        q_, k_ = tl.load(q + rows), tl.load(k + rows)
        write_, beta, f, to_w, to_s, keep, mix, fade = load_masks(write, read, to_state, transition, index, C)
        z = product(k_, frozen(w, base, dtype, BASE))
        d, _, _, _ = signal(z, tl.load(offset + rows), gain_, eps, NORM)
        scores = cast(product(q_, tl.trans(k_)) * write_, dtype)
        r = mixed(q_, load(w, dtype), load(w + map, dtype), beta, f) - product(scores, cast(d, dtype))
        if BASE:
            r += product(q_, load(base, dtype))
        tl.store(out + rows, cast(r, dtype))
        advance(w, after, map, k_, d, to_w, to_s, keep, mix, fade)
        tl.debug_barrier()  # what was written is there for the next chunk


@triton.jit
def backward(
    q, k, offset, write, read, to_state, transition, gain, base, slots_, gout, gmaps,
    gq, gk, goffset, gwrite, gread, gto_state, gtransition, ggain, gbase, H, chunks, slots, eps,
    C: tl.constexpr, D: tl.constexpr, NORM: tl.constexpr, BASE: tl.constexpr,
):  # fmt: skip
    memory, map, dtype = tl.program_id(0).to(tl.int64), D * D, q.dtype.element_ty
    gain_, ggain_ = tl.load(gain + memory * D + tl.arange(0, D))[None, :], tl.zeros([D], tl.float32)
    whole = tile(D, D, D)
    base += memory * map + whole
    gbase += memory * map + whole
    gmaps += memory * 2 * map + whole
    for step in range(chunks):
        c = chunks - 1 - step
        index, rows = memory * chunks + c, token_rows(memory, c, chunks, H, C, D)
        held = slots_ + (memory * slots + c) * 2 * map + whole
        q_, k_, g_ = tl.load(q + rows), tl.load(k + rows), tl.load(gout + rows)
        write_, beta, f, to_w, to_s, keep, mix, fade = load_masks(write, read, to_state, transition, index, C)
        w = frozen(held, base, dtype, BASE)
        d, unit, rstd, error = signal(product(k_, w), tl.load(offset + rows), gain_, eps, NORM)
        raw, graw = product(q_, tl.trans(k_)), -product(g_, tl.trans(cast(d, dtype)))
        scores, gscores = cast(raw * write_, dtype), cast(graw * write_, dtype)
        gq_, gbeta, gf = mixed_backward(
            g_, q_, tl.trans(load(held, dtype)), tl.trans(load(held + map, dtype)), beta, f
        )
        if BASE:
            gq_ += product(g_, tl.trans(load(base, dtype)))
        gk_, gd, gto_w, gto_s = advance_backward(gmaps, map, k_, d, to_w, to_s)
        gd -= product(tl.trans(scores), g_)
        gz, goffset_, more = signal_backward(gd, d, gain_, unit, rstd, error, NORM)
        gz = cast(gz, dtype)
        ggain_ += more
        gw = product(tl.trans(k_), gz)
        if BASE:
            add(gbase, product(tl.trans(q_), g_) + gw)
        gtransition_ = retreat(gmaps, held, map, q_, g_.to(tl.float32), gw, beta, f, keep, mix, fade)
        store_masks(
            gwrite, gread, gto_state, gtransition, index, C, graw * raw, (gbeta, gf), (gto_w, gto_s), gtransition_
        )
        tl.store(goffset + rows, goffset_)
        tl.store(gq + rows, cast(gq_ + product(gscores, k_), dtype))
        tl.store(gk + rows, cast(gk_ + product(tl.trans(gscores), q_) + product(gz, tl.trans(w)), dtype))
        tl.debug_barrier()  # what was written is there for the next chunk
    tl.store(ggain + memory * D + tl.arange(0, D), ggain_)
