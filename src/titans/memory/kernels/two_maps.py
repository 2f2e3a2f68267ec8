"""A memory of two maps: one program works through all chunks of one memory (README.md, section 3).

Names: x, z at the keys, d, u the loss's signals there; h, r at the queries; w, s a map and its momentum, g... gradients.
Both maps are held as [2, D, HIDDEN], the second transposed. The hidden dimension is worked through in blocks: what all
blocks add up to is [C, D] or [C, C]. A single block keeps w and s on chip; otherwise they wait in global memory, in
``slots`` that are read at chunk c and written at c + 1, in turn.
"""

import triton
import triton.language as tl

from titans.memory.kernels.functions import (
    cast, columns, curvature, product, signal, signal_backward, slope, store_columns, tile, token_rows, value,
)  # fmt: skip


@triton.jit
def forward(
    q, k, offset, write, read, to_state, transition, gain, base1, base2, slots1, slots2, out, H, chunks, slots, eps,
    C: tl.constexpr, D: tl.constexpr, HIDDEN: tl.constexpr, BLOCK: tl.constexpr, ACT: tl.constexpr, NORM: tl.constexpr,
    BASE: tl.constexpr,
):  # fmt: skip
    memory = tl.program_id(0).to(tl.int64)
    RESIDENT: tl.constexpr = BLOCK == HIDDEN
    dtype: tl.constexpr = q.dtype.element_ty
    map: tl.constexpr = D * HIDDEN
    square, block = tile(C, C, C), tile(D, BLOCK, HIDDEN)
    gain_ = tl.load(gain + memory * D + tl.arange(0, D))[None, :]
    base1 += memory * map
    base2 += memory * map
    slots1 += memory * slots * 2 * map
    slots2 += memory * slots * 2 * map
    if RESIDENT:
        w1, s1 = tl.load(slots1 + block), tl.load(slots1 + map + block)
        w2, s2 = tl.load(slots2 + block), tl.load(slots2 + map + block)
    for c in range(chunks):
        index, rows = memory * chunks + c, token_rows(memory, c, chunks, H, C, D)
        here, after = c % slots * 2 * map, (c + 1) % slots * 2 * map
        q_, k_, write_ = tl.load(q + rows), tl.load(k + rows), tl.load(write + index * C * C + square)
        beta, f = columns(read + index * 2 * C, C)
        to_w, to_s = columns(to_state + index * 2 * C, C)
        keep, mix, fade = (
            tl.load(transition + index * 4), tl.load(transition + index * 4 + 1), tl.load(transition + index * 4 + 3)
        )  # fmt: skip

        z2 = tl.zeros([C, D], tl.float32)
        for j in range(0, HIDDEN, BLOCK):
            if not RESIDENT:
                w1, w2 = tl.load(slots1 + here + j + block), tl.load(slots2 + here + j + block)
            m1, m2 = w1, w2
            if BASE:
                m1 += tl.load(base1 + j + block)
                m2 += tl.load(base2 + j + block)
            x = value(product(k_, cast(m1, dtype)), ACT)
            z2 += product(cast(x, dtype), tl.trans(cast(m2, dtype)))
        d2, _, _, _ = signal(z2, tl.load(offset + rows), gain_, eps, NORM)

        d2c = cast(d2, dtype)
        q_w, q_s = cast(q_ * beta, dtype), cast(q_ * f, dtype)
        k_w, k_s = tl.trans(cast(k_ * to_w, dtype)), tl.trans(cast(k_ * to_s, dtype))
        d_w, d_s = tl.trans(cast(d2 * to_w, dtype)), tl.trans(cast(d2 * to_s, dtype))
        scores1 = cast(product(q_, tl.trans(k_)) * write_, dtype)
        raw, r2 = tl.zeros([C, C], tl.float32), tl.zeros([C, D], tl.float32)
        for j in range(0, HIDDEN, BLOCK):
            if not RESIDENT:
                w1, s1 = tl.load(slots1 + here + j + block), tl.load(slots1 + here + map + j + block)
                w2, s2 = tl.load(slots2 + here + j + block), tl.load(slots2 + here + map + j + block)
            m1, m2 = w1, w2
            if BASE:
                m1 += tl.load(base1 + j + block)
                m2 += tl.load(base2 + j + block)
            z = product(k_, cast(m1, dtype))
            x = cast(value(z, ACT), dtype)
            d1 = cast(product(d2c, cast(m2, dtype)) * slope(z, ACT), dtype)
            r = product(q_w, cast(w1, dtype)) + product(q_s, cast(s1, dtype)) - product(scores1, d1)
            if BASE:
                r += product(q_, cast(tl.load(base1 + j + block), dtype))
            h = value(r, ACT)
            hc = cast(h, dtype)
            raw += product(hc, tl.trans(x))
            r2 += product(cast(h * beta, dtype), tl.trans(cast(w2, dtype)))
            r2 += product(cast(h * f, dtype), tl.trans(cast(s2, dtype)))
            if BASE:
                r2 += product(hc, tl.trans(cast(tl.load(base2 + j + block), dtype)))
            w1, s1 = keep * w1 + mix * s1 - product(k_w, d1), fade * s1 - product(k_s, d1)
            w2, s2 = keep * w2 + mix * s2 - product(d_w, x), fade * s2 - product(d_s, x)
            tl.store(slots1 + after + j + block, w1)
            tl.store(slots1 + after + map + j + block, s1)
            tl.store(slots2 + after + j + block, w2)
            tl.store(slots2 + after + map + j + block, s2)
        r2 -= product(cast(raw * write_, dtype), d2c)
        tl.store(out + rows, cast(r2, dtype))
        tl.debug_barrier()  # what was stored is seen by the next chunk's loads
