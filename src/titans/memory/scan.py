"""Whole chunks in a row, with a backward written by hand: the fast path of ``chunked`` (README.md, section 3).

Symbols: x, d inputs and signals of the keys at every map; u = d W^T before the slope; h inputs of the queries at every map;
a leading g marks a gradient. Everything is [G, C, ...] for one chunk of G memories.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from titans.memory.gates import ChunkMasks, chunk_masks
from titans.memory.network import ACTIVATIONS, MemoryMLP

Tensors = Sequence[Tensor]
GROUP = 32  # chunks between two saved states; a longer run recomputes what lies between in its backward


def scan(
    q: Tensor, k: Tensor, v: Tensor, gates: Tensor, weights: Tensors, momentum: Tensors, affine, network: MemoryMLP,
    chunk_size: int,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:  # fmt: skip
    """Reads and writes whole chunks.

    Args:
        q, k, v: [G, n * chunk_size, D]; gates: [G, n * chunk_size, 3].
        weights, momentum: [G, d_in, d_out] at the first chunk's start; affine: gain and bias [G, 1, D] or None.

    Returns:
        out [G, n * chunk_size, D], and weights and momentum at the end.
    """
    q_, k_, v_, g_ = (t.unflatten(1, (-1, chunk_size)).transpose(0, 1).contiguous() for t in (q, k, v, gates))
    flat = (q_, k_, v_, *chunk_masks(g_), *(affine or ()), *weights, *momentum)
    out, *end = _Scan.apply(network, *flat)  # type: ignore[misc]
    out = out.transpose(0, 1).flatten(1, 2)
    return network.finish(q, out, affine), end[: network.depth], end[network.depth :]


class _Chunk(NamedTuple):
    """What one chunk's forward leaves for its backward."""

    x: list[Tensor]
    slopes: list[Tensor]
    curvatures: list[Tensor]
    preact: Tensor  # the keys' output of the last map
    u: list[Tensor]
    d: list[Tensor]
    h: list[Tensor]
    read_slopes: list[Tensor]
    scores: list[Tensor]


def _forward(network: MemoryMLP, q, k, v, masks: ChunkMasks, affine, W: Tensors, S: Tensors) -> tuple[Tensor, _Chunk]:
    """Output of the last map at the queries, and the chunk's intermediate results."""
    act, L = ACTIVATIONS[network.activation][1], network.depth
    x, slopes, curvatures = [k], [], []
    for w in W[:-1]:
        value, slope, curvature = act(torch.bmm(x[-1], w))
        x.append(value)
        slopes.append(slope)
        curvatures.append(curvature)
    preact = torch.bmm(x[-1], W[-1])
    d, u = [network.output_signal(preact, affine, k, v)[0]], []
    for w, slope in zip(reversed(W[1:]), reversed(slopes), strict=True):
        u.insert(0, torch.bmm(d[0], w.mT))
        d.insert(0, u[0] * slope)
    h, read_slopes, scores, z = [q], [], [], q
    for i in range(L):
        scores.append(torch.bmm(h[i], x[i].mT))
        z = dual(h[i], scores[i] * masks.write, W[i], S[i], d[i], masks.keep, masks.carry)
        if i < L - 1:
            value, slope, _ = act(z)
            h.append(value)
            read_slopes.append(slope)
    return z, _Chunk(x, slopes, curvatures, preact, u, d, h, read_slopes, scores)


def dual(h: Tensor, weighted: Tensor, w: Tensor, s: Tensor, d: Tensor, keep: Tensor, carry: Tensor) -> Tensor:
    """One linear map of the memory at every token, applied to h [G, C, d_in]: ``keep h W + carry h S - weighted d``."""
    weighted, keep, carry = weighted.to(h.dtype), keep.to(h.dtype), carry.to(h.dtype)
    if w.shape[-2] < w.shape[-1]:  # scale the narrower side
        state = torch.baddbmm(torch.bmm(h * keep, w), h * carry, s)
    else:
        state = torch.addcmul(torch.bmm(h, w) * keep, torch.bmm(h, s), carry)
    return torch.baddbmm(state, weighted, d, alpha=-1)


def advance(W: Tensors, S: Tensors, x: Tensors, d: Tensors, masks: ChunkMasks) -> tuple[list[Tensor], list[Tensor]]:
    """Weights and momentum [G, d_in, d_out] after all tokens of a chunk."""
    to_w, to_s = masks.write[:, -1, :, None], masks.momentum_write
    new_w, new_s = [], []
    for w, s, x_i, d_i in zip(W, S, x, d, strict=True):
        w = (masks.keep[:, -1:] * w).addcmul_(masks.carry[:, -1:], s)
        new_w.append(_add_product(w, (x_i * to_w).to(x_i.dtype).mT, d_i, -1))
        new_s.append(_add_product(masks.momentum_keep * s, (x_i * to_s).to(x_i.dtype).mT, d_i, -1))
    return new_w, new_s


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, network: MemoryMLP, q, k, v, *rest):  # type: ignore[override]
        n = len(q)
        masks, affine, W, S = _unpack(rest, network)
        out, saved, kept = torch.empty_like(q), [], []
        small = n <= GROUP
        needs = any(ctx.needs_input_grad)
        for c in range(n):
            if needs and c % GROUP == 0:
                saved.append((W, S))
            operands = _cast(W, q.dtype), _cast(S, q.dtype)
            z, chunk = _forward(network, q[c], k[c], v[c], _at(masks, c), affine, *operands)
            out[c] = z
            if needs and small:
                kept.append((W, S, chunk))
            W, S = advance(W, S, chunk.x, chunk.d, _at(masks, c))
        ctx.network, ctx.states, ctx.kept = network, saved, kept
        ctx.save_for_backward(q, k, v, *rest)
        return (out, *W, *S)

    @staticmethod
    def backward(ctx, gout, *gend):  # type: ignore[override]
        network: MemoryMLP = ctx.network
        q, k, v, *rest = ctx.saved_tensors
        L, n = network.depth, len(q)
        masks, affine, _, _ = _unpack(rest, network)
        gW, gS = list(gend[:L]), list(gend[L:])
        gq, gk, gv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        gmasks = ChunkMasks(*(torch.empty_like(m) for m in rest[:5]))
        gaffine = [torch.zeros_like(a) for a in affine] if affine else []
        for g in reversed(range(len(ctx.states))):
            chunks = ctx.kept or _recompute(ctx.states[g], network, q, k, v, masks, affine, g * GROUP)
            for c in reversed(range(g * GROUP, min(n, (g + 1) * GROUP))):
                W, S, chunk = chunks[c - g * GROUP]
                here = _at(gmasks, c)
                gq[c], gk[c], gv[c], gW, gS, ga = _backward(
                    network, chunk, W, S, k[c], v[c], _at(masks, c), affine, gout[c], gW, gS, here
                )
                for total, part in zip(gaffine, ga, strict=True):
                    total += part
        return (None, gq, gk, gv, *gmasks, *gaffine, *gW, *gS)


def _recompute(start, network, q, k, v, masks, affine, first: int) -> list:
    (W, S), chunks = start, []
    for c in range(first, min(len(q), first + GROUP)):
        _, chunk = _forward(network, q[c], k[c], v[c], _at(masks, c), affine, _cast(W, q.dtype), _cast(S, q.dtype))
        chunks.append((W, S, chunk))
        W, S = advance(W, S, chunk.x, chunk.d, _at(masks, c))
    return chunks


def _backward(network: MemoryMLP, t: _Chunk, W32, S32, k, v, masks: ChunkMasks, affine, gz, gW1, gS1, gm: ChunkMasks):
    """Gradients of one chunk's inputs from those of its output (gz) and of the state after it (gW1, gS1)."""
    L, dtype = network.depth, k.dtype
    W, S = _cast(W32, dtype), _cast(S32, dtype)
    keep_end, momentum_keep = masks.keep[:, -1:], masks.momentum_keep
    carry_end, masks = masks.carry[:, -1:], ChunkMasks(*_cast(masks, dtype))
    to_w, to_s = masks.write[:, -1, :, None], masks.momentum_write
    gx, gd = [], []
    gto_w = gto_s = gkeep_end = gcarry_end = gmomentum_keep = 0
    for i in range(L):  # the state update
        a, b = gW1[i].to(dtype), gS1[i].to(dtype)
        xa, xb = torch.bmm(t.x[i], a), torch.bmm(t.x[i], b)
        gto_w = gto_w - (xa * t.d[i]).sum(-1, keepdim=True)
        gto_s = gto_s - (xb * t.d[i]).sum(-1, keepdim=True)
        gd.append(torch.addcmul(xa * to_w, xb, to_s).neg_())
        da, db = torch.bmm(t.d[i], a.mT), torch.bmm(t.d[i], b.mT)
        gx.append(torch.addcmul(da * to_w, db, to_s).neg_())
        gkeep_end = gkeep_end + (gW1[i] * W32[i]).sum((-2, -1))
        gcarry_end = gcarry_end + (gW1[i] * S32[i]).sum((-2, -1))
        gmomentum_keep = gmomentum_keep + (gS1[i] * S32[i]).sum((-2, -1))
    gW, gS = [], []
    gwrite = gkeep = gcarry = 0
    left, right = [[] for _ in range(L)], [[] for _ in range(L)]
    gh = gz
    for i in reversed(range(L)):  # the queries
        h, x, d = t.h[i], t.x[i], t.d[i]
        left[i].append(h * masks.keep)
        right[i].append(gz)
        gS.insert(0, _add_product(torch.addcmul(carry_end * gW1[i], momentum_keep, gS1[i]), (h * masks.carry).mT, gz))
        wz, sz = torch.bmm(gz, W[i].mT), torch.bmm(gz, S[i].mT)
        gkeep = gkeep + (wz * h).sum(-1, keepdim=True)
        gcarry = gcarry + (sz * h).sum(-1, keepdim=True)
        gp = torch.bmm(gz, d.mT).neg_()
        gd[i].baddbmm_((t.scores[i] * masks.write).mT, gz, alpha=-1)
        gwrite = gwrite + gp * t.scores[i]
        gp = gp * masks.write
        gh = torch.addcmul(wz * masks.keep, sz, masks.carry).baddbmm_(gp, x)
        gx[i].baddbmm_(gp.mT, h)
        if i:
            gz = gh * t.read_slopes[i - 1]
    gslopes = []
    for i in range(L - 1):  # the keys' backward, backwards: from the first map's signal to the last's
        gslopes.append(gd[i] * t.u[i])
        gu = gd[i] * t.slopes[i]
        gd[i + 1].baddbmm_(gu, W[i + 1])
        left[i + 1].append(gu)
        right[i + 1].append(t.d[i + 1])
    gz, gk, gv, gaffine = network.output_signal_backward(t.preact, affine, k, v, gd[-1])
    for i in reversed(range(L)):  # the keys' forward
        left[i].append(t.x[i])
        right[i].append(gz)
        gx[i].baddbmm_(gz, W[i].mT)
        if i:
            gz = torch.addcmul(gx[i] * t.slopes[i - 1], gslopes[i - 1], t.curvatures[i - 1])
    for i in range(L):
        gW.append(_add_product(keep_end * gW1[i], torch.cat(left[i], 1).mT, torch.cat(right[i], 1)))
    gm.write.copy_(gwrite)
    gm.write[:, -1] += gto_w[..., 0]
    gm.keep.copy_(gkeep)
    gm.keep[:, -1, 0] += gkeep_end
    gm.carry.copy_(gcarry)
    gm.carry[:, -1, 0] += gcarry_end
    gm.momentum_write.copy_(gto_s)
    gm.momentum_keep[:, 0, 0] = gmomentum_keep
    return gh, gx[0] + gk, gv, gW, gS, gaffine


def _add_product(state: Tensor, a: Tensor, b: Tensor, sign: int = 1) -> Tensor:
    """``state + sign a b`` in the state's dtype, in place."""
    if a.dtype == state.dtype:
        return state.baddbmm_(a, b, alpha=sign)
    return state.add_(torch.bmm(a, b), alpha=sign)


def _unpack(rest: Tensors, network: MemoryMLP):
    """Masks, affine, weights and momentum out of the flat arguments."""
    masks, rest = ChunkMasks(*rest[:5]), rest[5:]
    split = len(rest) - 2 * network.depth
    affine = (rest[0], rest[1]) if split else None
    return masks, affine, list(rest[split : split + network.depth]), list(rest[split + network.depth :])


def _at(masks: ChunkMasks, c: int) -> ChunkMasks:
    return ChunkMasks(*(m[c] for m in masks))


def _cast(tensors: Tensors, dtype: torch.dtype) -> list[Tensor]:
    return [t.to(dtype) for t in tensors]
