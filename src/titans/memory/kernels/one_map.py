"""A memory of one linear map, held as [2, D, D]: as ``two_maps``, without a hidden dimension.

ONLINE (memory/online.py): keys meet memory and momentum weighted by ``before``, and ``inverse`` makes their signals.
"""

import triton
import triton.language as tl

from titans.memory.kernels.functions import (
    add,
    advance,
    advance_backward,
    cast,
    frozen,
    load,
    load_masks,
    load_pair,
    mixed,
    mixed_backward,
    product,
    retreat,
    signal,
    signal_backward,
    store_pair,
    store_transition,
    tile,
    token_rows,
)


@triton.jit
def forward(
    q, k, offset, write, read, to_state, transition, gain, before, inverse, base, slots1, out, H, chunks, slots, eps,
    C: tl.constexpr, D: tl.constexpr, NORM: tl.constexpr, BASE: tl.constexpr, ONLINE: tl.constexpr,
):  # fmt: skip
    memory, whole = tl.program_id(0).to(tl.int64), tile(D, D, D)
    map: tl.constexpr = D * D
    dtype: tl.constexpr = q.dtype.element_ty
    base += memory * map + whole
    gain_ = tl.load(gain + memory * D + tl.arange(0, D))[None, :]
    for c in range(chunks):
        index, rows = memory * chunks + c, token_rows(memory, c, chunks, H, C, D)
        w = slots1 + (memory * slots + c % slots) * 2 * map + whole
        after = slots1 + (memory * slots + (c + 1) % slots) * 2 * map + whole
        q_, k_ = tl.load(q + rows), tl.load(k + rows)
        write_ = tl.load(write + index * C * C + tile(C, C, C))
        read_, to_state_, transition_ = load_masks(read, to_state, transition, index, C)
        if ONLINE:
            z = mixed(k_, load(w, dtype), load(w + map, dtype), load_pair(before, index, C))
        else:
            z = product(k_, frozen(w, base, dtype, BASE))
        d = signal(z, tl.load(offset + rows), gain_, eps, NORM)[0]
        if ONLINE:
            d = product(tl.load(inverse + index * C * C + tile(C, C, C)), d)
        scores = cast(product(q_, tl.trans(k_)) * write_, dtype)
        r = mixed(q_, load(w, dtype), load(w + map, dtype), read_) - product(scores, cast(d, dtype))
        if BASE:
            r += product(q_, load(base, dtype))
        tl.store(out + rows, cast(r, dtype))
        advance(w, after, map, k_, d, to_state_, transition_)
        tl.debug_barrier()  # what was stored is there for the next chunk


@triton.jit
def backward(
    q, k, offset, write, read, to_state, transition, gain, before, inverse, base, slots1, gout, gmaps,
    gq, gk, goffset, gwrite, gread, gto_state, gtransition, ggain, gbefore, ginverse, gbase, H, chunks, slots, eps,
    C: tl.constexpr, D: tl.constexpr, NORM: tl.constexpr, BASE: tl.constexpr, ONLINE: tl.constexpr,
):  # fmt: skip
    memory, whole = tl.program_id(0).to(tl.int64), tile(D, D, D)
    map: tl.constexpr = D * D
    dtype: tl.constexpr = q.dtype.element_ty
    base += memory * map + whole
    gbase += memory * map + whole
    gmaps += memory * 2 * map + whole
    gain_, ggain_ = tl.load(gain + memory * D + tl.arange(0, D))[None, :], tl.zeros([D], tl.float32)
    for step in range(chunks):
        c = chunks - 1 - step
        index, rows = memory * chunks + c, token_rows(memory, c, chunks, H, C, D)
        held = slots1 + (memory * slots + c) * 2 * map + whole
        q_, k_, g_ = tl.load(q + rows), tl.load(k + rows), tl.load(gout + rows)
        write_ = tl.load(write + index * C * C + tile(C, C, C))
        read_, to_state_, transition_ = load_masks(read, to_state, transition, index, C)
        if ONLINE:
            w, s, before_ = load(held, dtype), load(held + map, dtype), load_pair(before, index, C)
            z, inverse_ = mixed(k_, w, s, before_), tl.load(inverse + index * C * C + tile(C, C, C))
        else:
            w = frozen(held, base, dtype, BASE)
            z = product(k_, w)
        right, unit, rstd, error = signal(z, tl.load(offset + rows), gain_, eps, NORM)
        d = product(inverse_, right) if ONLINE else right
        raw, graw = product(q_, tl.trans(k_)), -product(g_, tl.trans(cast(d, dtype)))
        scores, gscores = cast(raw * write_, dtype), cast(graw * write_, dtype)
        gq_, gread_ = mixed_backward(g_, q_, tl.trans(load(held, dtype)), tl.trans(load(held + map, dtype)), read_)
        if BASE:
            gq_ += product(g_, tl.trans(load(base, dtype)))
        tl.store(gq + rows, cast(gq_ + product(gscores, k_), dtype))
        tl.store(gwrite + index * C * C + tile(C, C, C), graw * raw)
        store_pair(gread, index, gread_, C)

        gk_, gd, gto_state_ = advance_backward(gmaps, map, k_, d, to_state_)
        gd -= product(tl.trans(scores), g_)
        if ONLINE:
            tl.store(ginverse + index * C * C + tile(C, C, C), product(gd, tl.trans(right)))
            gd = product(tl.trans(inverse_), gd)
        gz, goffset_, more = signal_backward(gd, right, gain_, unit, rstd, error, NORM)
        gz = cast(gz, dtype)
        ggain_ += more
        tl.store(goffset + rows, goffset_)
        store_pair(gto_state, index, gto_state_, C)

        gk_ += product(tl.trans(gscores), q_)
        gbase_ = product(tl.trans(q_), g_)
        if ONLINE:
            more_gk, gbefore_ = mixed_backward(gz, k_, tl.trans(w), tl.trans(s), before_)
            gk_ += more_gk
            gw = product(tl.trans(k_), cast(gz * before_[0], dtype))
            store_pair(gbefore, index, gbefore_, C)
        else:
            gk_ += product(gz, tl.trans(w))
            gw = product(tl.trans(k_), gz)
            gbase_ += gw
        tl.store(gk + rows, cast(gk_, dtype))
        if BASE:
            add(gbase, gbase_)
        g_, none = g_.to(tl.float32), (0.0, 0.0, 0.0)
        store_transition(gtransition, index, retreat(gmaps, held, map, q_, g_, gw, read_, transition_, none))
        if ONLINE:
            tl.debug_barrier()
            add(gmaps + map, product(tl.trans(k_), cast(gz * before_[1], dtype)))
        tl.debug_barrier()  # what was stored is there for the next chunk
    tl.store(ggain + memory * D + tl.arange(0, D), ggain_)
