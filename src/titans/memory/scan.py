"""Whole chunks in a row, with a backward written by hand: the fast path of ``chunked`` (README.md, section 3).

Symbols: x, d inputs and signals of the keys at every map; u = d W^T before the slope; h inputs of the queries at every
map; a leading g marks a gradient. Everything is [G, C, ...] for one chunk of G memories.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

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
    weighted, dtype = weighted.to(h.dtype), h.dtype
    if w.shape[-2] < w.shape[-1]:  # scale the narrower side
        state = torch.baddbmm(torch.bmm((h * keep).to(dtype), w), (h * carry).to(dtype), s)
    else:
        state = torch.addcmul(torch.bmm(h, w) * keep, torch.bmm(h, s), carry).to(dtype)
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
    @once_differentiable
    def backward(ctx, gout, *gend):  # type: ignore[override]
        network: MemoryMLP = ctx.network
        q, k, v, *rest = ctx.saved_tensors
        L, n = network.depth, len(q)
        masks, affine, _, _ = _unpack(rest, network)
        gW, gS = list(gend[:L]), list(gend[L:])
        gq, gk, gv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        gmasks = ChunkMasks(*(torch.zeros_like(m) for m in rest[:5]))
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
    """Gradients of one chunk's q, k, v, state and affine from those of its output (gz) and of the state after it.

    ``gm`` (zeros) takes the gradients of the masks.
    """
    dtype = k.dtype
    W, S = _cast(W32, dtype), _cast(S32, dtype)
    gx, gd = _backward_advance(t, W32, S32, masks, gW1, gS1, gm)
    gq, products, gS = _backward_read(t, W, S, masks, gz, gW1, gS1, gx, gd, gm)
    gk, gv, gaffine = _backward_keys(network, t, W, k, v, affine, gx, gd, products)
    gW = []
    for g, (left, right) in zip(gW1, products, strict=True):
        gW.append(_add_product(masks.keep[:, -1:] * g, torch.cat(left, 1).mT, torch.cat(right, 1)))
    return gq, gk, gv, gW, gS, gaffine


def _backward_advance(t: _Chunk, W32, S32, masks: ChunkMasks, gW1, gS1, gm: ChunkMasks):
    """The state after the chunk: gradients of x and d."""
    to_w, to_s, dtype = masks.write[:, -1, :, None], masks.momentum_write, t.x[0].dtype
    gx, gd = [], []
    for x, d, w, s, gw, gs in zip(t.x, t.d, W32, S32, gW1, gS1, strict=True):
        gm.keep[:, -1, 0] += (gw * w).sum((-2, -1))
        gm.carry[:, -1, 0] += (gw * s).sum((-2, -1))
        gm.momentum_keep[:, 0, 0] += (gs * s).sum((-2, -1))
        gw, gs = gw.to(dtype), gs.to(dtype)
        xw, xs = torch.bmm(x, gw), torch.bmm(x, gs)
        gm.write[:, -1] -= (xw.to(to_w.dtype) * d).sum(-1)
        gm.momentum_write[..., 0] -= (xs.to(to_w.dtype) * d).sum(-1)
        gd.append(torch.addcmul(xw * to_w, xs, to_s).neg_().to(dtype))
        gx.append(torch.addcmul(torch.bmm(d, gw.mT) * to_w, torch.bmm(d, gs.mT), to_s).neg_().to(dtype))
    return gx, gd


def _backward_read(t: _Chunk, W, S, masks: ChunkMasks, gz, gW1, gS1, gx, gd, gm: ChunkMasks):
    """The queries, last map first: gradient of q, of the momentum, and the factors of the weights' gradients."""
    products, gS, gh = [([], []) for _ in W], [torch.empty(0) for _ in S], gz
    dtype, wide = gz.dtype, masks.write.dtype
    for i in reversed(range(len(W))):
        h, x, d = t.h[i], t.x[i], t.d[i]
        products[i][0].append((h * masks.keep).to(dtype))
        products[i][1].append(gz)
        after = torch.addcmul(masks.carry[:, -1:] * gW1[i], masks.momentum_keep, gS1[i])
        gS[i] = _add_product(after, (h * masks.carry).to(dtype).mT, gz)
        wz, sz = torch.bmm(gz, W[i].mT), torch.bmm(gz, S[i].mT)
        gm.keep.add_((wz.to(wide) * h).sum(-1, keepdim=True))
        gm.carry.add_((sz.to(wide) * h).sum(-1, keepdim=True))
        gp = torch.bmm(gz, d.mT).neg_()
        gd[i].baddbmm_((t.scores[i] * masks.write).to(dtype).mT, gz, alpha=-1)
        gm.write.add_(gp.to(wide) * t.scores[i])
        gp = (gp * masks.write).to(dtype)
        gh = torch.addcmul(wz * masks.keep, sz, masks.carry).to(dtype).baddbmm_(gp, x)
        gx[i].baddbmm_(gp.mT, h)
        if i:
            gz = gh * t.read_slopes[i - 1]
    return gh, products, gS


def _backward_keys(network: MemoryMLP, t: _Chunk, W, k, v, affine, gx, gd, products):
    """The keys' backward (gone through from first map to last), then their forward: gradients of k, v, affine."""
    gslopes = []
    for i in range(len(W) - 1):
        gslopes.append(gd[i] * t.u[i])
        gu = gd[i] * t.slopes[i]
        gd[i + 1].baddbmm_(gu, W[i + 1])
        products[i + 1][0].append(gu)
        products[i + 1][1].append(t.d[i + 1])
    gz, gk, gv, gaffine = network.output_signal_backward(t.preact, affine, k, v, gd[-1])
    for i in reversed(range(len(W))):
        products[i][0].append(t.x[i])
        products[i][1].append(gz)
        gx[i].baddbmm_(gz, W[i].mT)
        if i:
            gz = torch.addcmul(gx[i] * t.slopes[i - 1], gslopes[i - 1], t.curvatures[i - 1])
    return gx[0] + gk, gv, gaffine


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
