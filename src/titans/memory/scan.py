"""Whole chunks in a row, with a backward written by hand: the fast path of ``chunked`` (README.md, section 3).

Symbols: x, z inputs and outputs of the maps at the keys, d the loss's gradients at z, u those at x; h, r inputs and
outputs of the XX
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from titans.memory.gates import chunk_masks
from titans.memory.network import MemoryMLP

Tensors = Sequence[Tensor]
KEPT = 32  # chunks whose intermediate results are kept for the backward
GROUP = 8  # in a longer run, chunks between two saved states; the backward recomputes what lies between


def scan(
    q: Tensor, k: Tensor, v: Tensor, gates: Tensor, maps: Tensors, affine, network: MemoryMLP, chunk_size: int
) -> tuple[Tensor, list[Tensor]]:
    """Reads and writes whole chunks.

    Args:
        q, k, v: [G, n * chunk_size, D]; gates: [G, n * chunk_size, 3].
        maps: [G, 2, d_in, d_out] at the first chunk's start; affine: gain and bias [G, 1, D] or None.

    Returns:
        out [G, n * chunk_size, D], and the maps at the end.
    """
    q_, k_, offset, g_ = (
        t.unflatten(1, (-1, chunk_size)).transpose(0, 1).contiguous()
        for t in (q, k, network.offset(k, v, affine), gates)
    )
    masks = chunk_masks(g_)
    # What the first map needs does not wait for the memory: all chunks at once, and autograd's business.
    scores = (q_ @ k_.mT * masks.write).to(q.dtype)
    first = widen(q_, masks.read), scores, k_, widen(k_, masks.to_state)
    out, *end = _Scan.apply(network, *first, offset, *masks, affine and affine[0], *maps)  # type: ignore[misc]
    return network.finish(q, out.transpose(0, 1).flatten(1, 2), affine), end


def widen(x: Tensor, mix: Tensor) -> Tensor:
    """x [..., C, d] times each of its tokens' two weights [..., C, 2], side by side: [..., C, 2 d]."""
    return (x.unsqueeze(-2) * mix.unsqueeze(-1)).flatten(-2).to(x.dtype)


def read(map: Tensor, wide: Tensor, scores: Tensor, d: Tensor) -> Tensor:
    """One linear map of the memory at every token: ``keep h W + carry h S - scores d``, wide = [keep h, carry h]."""
    return torch.baddbmm(torch.bmm(wide, map.flatten(1, 2)), scores, d, alpha=-1)


def advance(map: Tensor, wide: Tensor, d: Tensor, transition: Tensor) -> Tensor:
    """W and S [G, 2, d_in, d_out] after all tokens of a chunk; wide: x weighted for W and for S."""
    new = map * _diagonal(transition)
    new[:, 0].addcmul_(map[:, 1], transition[:, 0, 1, None, None])
    _add_product(new.flatten(1, 2), wide.mT, d, -1)
    return new


def _diagonal(transition: Tensor) -> Tensor:
    """[G, 2, 2] -> [G, 2, 1, 1]"""
    return transition.diagonal(dim1=1, dim2=2)[..., None, None]


class _Chunk(NamedTuple):
    """What one chunk's forward leaves for its backward."""

    maps: Tensors
    x: list[Tensor]
    z: list[Tensor]
    u: list[Tensor]
    d: list[Tensor]
    h: list[Tensor]
    r: list[Tensor]
    wide_x: list[Tensor]
    wide_h: list[Tensor]
    raw_scores: list[Tensor]  # before the mask; of the maps after the first
    scores: list[Tensor]
    norm: tuple[Tensor, ...]


class _Inputs(NamedTuple):
    """Arguments of the scan, or their gradients, [n, G, C, ...]: what the first map does, the offset, the masks."""

    wide_q: Tensor
    scores: Tensor
    k: Tensor
    wide_k: Tensor
    offset: Tensor
    write: Tensor
    read: Tensor
    to_state: Tensor
    transition: Tensor

    def chunks(self) -> list["_Inputs"]:
        return [_Inputs(*tensors) for tensors in zip(*(t.unbind(0) for t in self), strict=True)]


def _forward(network: MemoryMLP, t: _Inputs, gain, maps: Tensors) -> tuple[Tensor, list[Tensor], _Chunk]:
    """Output of the last map at the queries, the maps after the chunk, and its intermediate results."""
    dtype, (value, slope, _) = t.k.dtype, network.functions
    operands = [m.to(dtype) for m in maps]
    W = [m[:, 0] for m in operands]
    x, z = [t.k], []
    for w in W[:-1]:
        z.append(torch.bmm(x[-1], w))
        x.append(value(z[-1]))
    z.append(torch.bmm(x[-1], W[-1]))
    signal, norm = network.output_signal(z[-1], gain, t.offset)
    d, u = [signal], []
    for w, z_i in zip(reversed(W[1:]), reversed(z[:-1]), strict=True):
        u.insert(0, torch.bmm(d[0], w.mT))
        d.insert(0, slope(u[0], z_i))
    h, r, raw, scores, wide_h = [], [read(operands[0], t.wide_q, t.scores, d[0])], [], [t.scores], [t.wide_q]
    for i in range(1, network.depth):
        h.append(value(r[-1]))
        raw.append(torch.bmm(h[-1], x[i].mT))
        scores.append((raw[-1] * t.write).to(dtype))
        wide_h.append(widen(h[-1], t.read))
        r.append(read(operands[i], wide_h[i], scores[i], d[i]))
    wide_x = [t.wide_k, *(widen(x_i, t.to_state) for x_i in x[1:])]
    new = [advance(m, wide, d_i, t.transition) for m, wide, d_i in zip(maps, wide_x, d, strict=True)]
    return r[-1], new, _Chunk(maps, x, z, u, d, h, r[:-1], wide_x, wide_h, raw, scores, norm)


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, network: MemoryMLP, *tensors):  # type: ignore[override]
        inputs, gain, maps = _Inputs(*tensors[:9]), tensors[9], list(tensors[10:])
        out, starts, kept = torch.empty_like(inputs.k), [], []
        needs, short = any(ctx.needs_input_grad), len(out) <= KEPT
        ctx.group = len(out) if short else GROUP
        for c, t in enumerate(inputs.chunks()):
            if needs and c % ctx.group == 0:
                starts.append(maps)
            out[c], maps, chunk = _forward(network, t, gain, maps)
            if needs and short:
                kept.append(chunk)
        ctx.network, ctx.starts, ctx.kept = network, starts, kept
        ctx.save_for_backward(*tensors)
        return (out, *maps)

    @staticmethod
    @once_differentiable
    def backward(ctx, gout, *gmaps):  # type: ignore[override]
        network, tensors = ctx.network, ctx.saved_tensors
        inputs, gain = _Inputs(*tensors[:9]), tensors[9]
        chunks, grads = inputs.chunks(), _Inputs(*(torch.zeros_like(t) for t in inputs))
        ggain = None if gain is None else torch.zeros_like(gain)
        with torch.autocast(gout.device.type, enabled=False):  # as in the forward, wherever backward is called
            for g in reversed(range(len(ctx.starts))):
                first = g * ctx.group
                # taken one by one to free them early; a second pass over the graph recomputes
                kept = ctx.kept or _recompute(network, chunks[first : first + ctx.group], gain, ctx.starts[g])
                for c in reversed(range(first, first + len(kept))):
                    gt = _Inputs(*(grad[c] for grad in grads))
                    gmaps = _backward(network, kept.pop(), chunks[c], gain, gout[c], gmaps, gt, ggain)
        return (None, *grads, ggain, *gmaps)


def _recompute(network: MemoryMLP, inputs: list[_Inputs], gain, maps: Tensors) -> list[_Chunk]:
    chunks = []
    for t in inputs:
        _, maps, chunk = _forward(network, t, gain, maps)
        chunks.append(chunk)
    return chunks


def _backward(network: MemoryMLP, s: _Chunk, t: _Inputs, gain, gr, gmaps: Tensors, gt: _Inputs, ggain) -> list[Tensor]:
    """Gradient of the maps before a chunk, from those of its output (gr) and of the maps after it.

    Adds the gradients of the inputs to ``gt`` and of the gain to ``ggain``.
    """
    operands = [m.to(t.k.dtype) for m in s.maps]
    gx, gd, gmaps = _backward_advance(s, t, gmaps, gt)
    _backward_read(network, s, t, operands, gr, gx, gd, gmaps, gt)
    _backward_keys(network, s, t, [m[:, 0] for m in operands], gain, gx, gd, [m[:, 0] for m in gmaps], gt, ggain)
    return gmaps


def _backward_advance(s: _Chunk, t: _Inputs, gmaps: Tensors, gt: _Inputs):
    """The maps after the chunk: gradients of x, d and the maps before it."""
    dtype, gx, gd, before = t.k.dtype, [], [], []
    for i, (x, d, map, gmap) in enumerate(zip(s.x, s.d, s.maps, gmaps, strict=True)):
        gt.transition.add_(torch.bmm(gmap.flatten(2), map.flatten(2).mT))
        operand = gmap.to(dtype).flatten(1, 2)
        gwide = torch.bmm(d, operand.mT).neg_()
        gd.append(torch.bmm(s.wide_x[i], operand).neg_())
        if i:
            gx.append(_narrow(gwide, x, t.to_state, gt.to_state))
        else:
            gt.wide_k.copy_(gwide)
            gx.append(gt.k)
        gmap_before = gmap * _diagonal(t.transition)
        gmap_before[:, 1].addcmul_(gmap[:, 0], t.transition[:, 0, 1, None, None])
        before.append(gmap_before)
    return gx, gd, before


def _backward_read(network: MemoryMLP, s: _Chunk, t: _Inputs, operands: Tensors, gr, gx, gd, gmaps, gt: _Inputs):
    """The queries, last map first."""
    slope = network.functions[1]
    for i in reversed(range(network.depth)):
        gwide = torch.bmm(gr, operands[i].flatten(1, 2).mT)
        gscores = torch.bmm(gr, s.d[i].mT).neg_()
        _add_product(gmaps[i].flatten(1, 2), s.wide_h[i].mT, gr)
        gd[i].baddbmm_(s.scores[i].mT, gr, alpha=-1)
        if i == 0:
            gt.wide_q.copy_(gwide)
            gt.scores.copy_(gscores)
            return
        h, x = s.h[i - 1], s.x[i]
        gt.write.addcmul_(gscores, s.raw_scores[i - 1])
        gscores = (gscores * t.write).to(h.dtype)
        gh = _narrow(gwide, h, t.read, gt.read).baddbmm_(gscores, x)
        gx[i].baddbmm_(gscores.mT, h)
        gr = slope(gh, s.r[i - 1])


def _backward_keys(network: MemoryMLP, s: _Chunk, t: _Inputs, W: Tensors, gain, gx, gd, gW: Tensors, gt, ggain):
    """The keys' backward (gone through from first map to last), then their forward."""
    _, slope, curvature = network.functions
    gu = []
    for i in range(network.depth - 1):
        gu.append(slope(gd[i], s.z[i]))
        gd[i + 1].baddbmm_(gu[i], W[i + 1])
    gz, goffset, ggain_here = network.output_signal_backward(s.z[-1], gain, t.offset, s.norm, s.d[-1], gd[-1])
    gt.offset.copy_(goffset)
    if ggain is not None:
        ggain += ggain_here
    for i in reversed(range(network.depth)):
        left, right = (torch.cat([s.x[i], gu[i - 1]], 1), torch.cat([gz, s.d[i]], 1)) if i else (s.x[i], gz)
        gW[i].add_(torch.bmm(left.mT, right))
        gx[i].baddbmm_(gz, W[i].mT)
        if i:
            gz = slope(gx[i], s.z[i - 1]).addcmul_(gd[i - 1] * s.u[i - 1], curvature(s.z[i - 1]))


def _narrow(gwide: Tensor, x: Tensor, mix: Tensor, gmix: Tensor) -> Tensor:
    """Backward of ``widen``: the gradient of x; that of mix is added to ``gmix``."""
    pair = gwide.unflatten(-1, (2, -1))
    gmix.add_((pair * x.unsqueeze(-2)).sum(-1, dtype=gmix.dtype))
    return torch.addcmul(pair[..., 0, :] * mix[..., :1], pair[..., 1, :], mix[..., 1:]).to(x.dtype)


def _add_product(state: Tensor, a: Tensor, b: Tensor, sign: int = 1) -> None:
    """``state += sign a b``, summed in the state's dtype."""
    if a.dtype == state.dtype:
        state.baddbmm_(a, b, alpha=sign)
    else:
        state.add_(torch.bmm(a, b), alpha=sign)
