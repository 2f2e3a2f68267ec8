"""Whole chunks in a row, with a backward written by hand: the fast path of ``chunked`` (README.md, section 3).

Symbols: x, z inputs and outputs of the maps at the keys, d the loss's gradients at z, u those at x; h, r inputs and
outputs of the maps at the queries. G = batch x heads.

A map is held together with its momentum, the first as [G, 2, d_in, d_out], the others transposed, [G, 2, d_out, d_in]:
the two weights of a token then always meet the narrow side, in one product for memory and momentum.
"""

from collections.abc import Sequence
from itertools import islice, repeat
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from titans.memory import online
from titans.memory.gates import chunk_masks, narrow, weights_grad, widen
from titans.memory.network import MemoryMLP

Tensors = Sequence[Tensor]


def scan(
    q: Tensor, k: Tensor, v: Tensor, gates: Tensor, maps: Tensors, base: Tensors, affine, network: MemoryMLP,
    chunk_size: int,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    """Reads and writes whole chunks.

    Args:
        q, k, v: [B, n * chunk_size, H, D]; gates: [B, n * chunk_size, H, 3].
        maps: as held (see above), at the first chunk's start; affine: gain and bias [G, 1, D] or None.
        base: linear maps [H, d_in, d_out] that the memory is held relative to; () for nothing.

    Returns:
        out [B, n * chunk_size, H, D], and the maps at the end.
    """
    q_, k_, v_, g_ = (  # [n, G, C, ...]
        t.unflatten(1, (-1, chunk_size)).permute(1, 0, 3, 2, 4).flatten(1, 2) for t in (q, k, v, gates)
    )
    masks, base = chunk_masks(g_), as_held(base, q.shape[0])
    # What the first map needs does not wait for the memory: all chunks at once, and autograd's business.
    scores = (q_ @ k_.mT * masks.write).to(q.dtype)
    base_q = torch.einsum("ngcd,gdh->ngch", q_, base[0].to(q.dtype)) if base else None
    first = widen(q_, masks.read), base_q, scores, k_, widen(k_, masks.to_state)
    offset, gain = network.offset(k_, v_, affine), affine and affine[0]
    before: Sequence[Tensor | None] = (None, None)
    if network.online:
        read, inverse = online.before(k_, masks)
        before = widen(k_, read), inverse
        if base:
            offset = offset + torch.einsum("ngcd,gdh->ngch", k_, base[0].to(k_.dtype))
    out, *end = _Scan.apply(network, *first, offset, *masks, *before, gain, *base, *maps)  # type: ignore[misc]
    out = network.finish(q_, out, affine).unflatten(1, (q.shape[0], -1))
    return out.permute(1, 0, 3, 2, 4).flatten(1, 2), end


def as_held(base: Tensors, batch: int) -> list[Tensor]:
    """Linear maps [H, d_in, d_out] as one half of what is held, [G, ...]."""
    return [(w.mT if i else w).repeat(batch, 1, 1) for i, w in enumerate(base)]


def weights_of(maps: Tensors, base: Tensors, dtype: torch.dtype) -> list[Tensor]:
    """The memory's linear maps [G, d_in, d_out], out of what is held."""
    half = [m[:, 0] + b for m, b in zip(maps, base, strict=True)] if base else [m[:, 0] for m in maps]
    return [w.to(dtype).mT if i else w.to(dtype) for i, w in enumerate(half)]


def factors(i: int, x: Tensor, d: Tensor, mix: Tensor) -> tuple[Tensor, Tensor]:
    """What ``advance`` takes of the i-th map: the tokens' inputs x and signals d, weighted on the narrow side."""
    return (widen(d, mix), x) if i else (widen(x, mix), d)


def advance(map: Tensor, left: Tensor, right: Tensor, transition: Tensor) -> Tensor:
    """A map and its momentum after all tokens of a chunk."""
    new = map * _diagonal(transition)
    new[:, 0].addcmul_(map[:, 1], transition[:, 0, 1, None, None])
    _add_product(new.flatten(1, 2), left.mT, right, -1)
    return new


def advance_all(maps: Tensors, x: Tensors, d: Tensors, mix: Tensor, transition: Tensor) -> list[Tensor]:
    """``advance`` of every map by tokens with inputs x and signals d, weighted by mix [G, C, 2]."""
    each = enumerate(zip(maps, x, d, strict=True))
    return [advance(map, *factors(i, x_i, d_i, mix), transition) for i, (map, x_i, d_i) in each]


def _diagonal(transition: Tensor) -> Tensor:
    """[G, 2, 2] -> [G, 2, 1, 1]"""
    return transition.diagonal(dim1=1, dim2=2)[..., None, None]


class _Chunk(NamedTuple):
    """What one chunk's forward leaves for its backward, tensors alone; u, h, both, raw, scores begin with map 2."""

    maps: Tensors
    x: Tensors
    z: Tensors
    u: Tensors
    d: Tensors
    h: Tensors
    r: Tensors  # of all maps but the last
    both: Tensors  # h through memory and momentum
    raw: Tensors  # scores before the mask
    scores: Tensors
    left: Tensors
    right: Tensors
    norm: Tensors


class _Inputs(NamedTuple):
    """Arguments of the scan, or their gradients, [n, G, C, ...]: what the first map does, the offset, the masks."""

    wide_q: Tensor
    base_q: Tensor | None  # through the first map of the base
    scores: Tensor
    k: Tensor
    wide_k: Tensor
    offset: Tensor
    write: Tensor
    read: Tensor
    to_state: Tensor
    transition: Tensor
    wide_before: Tensor  # of an online memory, else None: its keys, as queries that come one token earlier
    inverse: Tensor  # else None

    def chunks(self) -> list["_Inputs"]:
        each = (repeat(None, len(self.k)) if t is None else t.unbind(0) for t in self)
        return [_Inputs(*tensors) for tensors in zip(*each, strict=True)]

    def like(self) -> "_Inputs":
        """Places for their gradients: zeros where several are added up."""
        summed = {"k", "write", "read", "to_state", "transition"}

        def make(name: str, t: Tensor) -> Tensor:
            return (torch.zeros if name in summed else torch.empty)(t.shape, dtype=t.dtype, device=t.device)

        return _Inputs(*(None if t is None else make(name, t) for name, t in self._asdict().items()))  # type: ignore[arg-type]


def _forward(network: MemoryMLP, t: _Inputs, gain, base: Tensors, maps: Tensors) -> tuple[Tensor, Tensors, _Chunk]:
    """Output of the last map at the queries, the maps after the chunk, and its intermediate results."""
    dtype, (value, slope, _) = t.k.dtype, network.functions
    flat = [m.to(dtype).flatten(1, 2) for m in maps]
    # the keys: at the chunk's first memory, or those of an online memory at the one before each token
    W = [flat[0]] if network.online else weights_of(maps, base, dtype)
    x, z = [t.k], []
    for w in W[:-1]:
        z.append(torch.bmm(x[-1], w))
        x.append(value(z[-1]))
    z.append(torch.bmm(t.wide_before if network.online else x[-1], W[-1]))
    signal, _, norm = network.output_signal(z[-1], gain, t.offset)
    d, u = [online.settle(t.inverse, signal) if network.online else signal], []
    for w, z_i in zip(reversed(W[1:]), reversed(z[:-1]), strict=True):
        u.insert(0, torch.bmm(d[0], w.mT))
        d.insert(0, slope(u[0], z_i))
    r = [torch.bmm(t.wide_q, flat[0]) if t.base_q is None else torch.baddbmm(t.base_q, t.wide_q, flat[0])]
    _add_product(r[0], t.scores, d[0], -1)
    h, both, raw, scores = [], [], [], []
    for i in range(1, network.depth):
        h.append(value(r[-1]))
        raw.append(torch.bmm(h[-1], x[i].mT))
        scores.append((raw[-1] * t.write).to(dtype))
        both.append(torch.bmm(h[-1], flat[i].mT))
        r.append(narrow(both[-1], t.read))
        _add_product(r[-1], scores[-1], d[i], -1)
        if base:
            r[-1].baddbmm_(h[-1], base[i].to(dtype).mT)
    sides = [(t.wide_k, d[0]), *(factors(i, x[i], d[i], t.to_state) for i in range(1, network.depth))]
    new = [advance(m, *side, t.transition) for m, side in zip(maps, sides, strict=True)]
    left, right = zip(*sides, strict=True)
    return r[-1], new, _Chunk(maps, x, z, u, d, h, r[:-1], both, raw, scores, left, right, norm)


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, network: MemoryMLP, *tensors):  # type: ignore[override]
        fixed = iter(tensors)
        inputs, gain = _Inputs(*islice(fixed, len(_Inputs._fields))), next(fixed)
        base: Tensors = () if inputs.base_q is None else tuple(islice(fixed, network.depth))
        maps: Tensors = tuple(fixed)
        out, kept, needs = torch.empty_like(inputs.k), [], any(ctx.needs_input_grad)
        for c, t in enumerate(inputs.chunks()):
            out[c], maps, chunk = _forward(network, t, gain, base, maps)
            if needs:
                kept += [x for part in chunk for x in part]
                ctx.sizes = [len(part) for part in chunk]
        ctx.network = network
        ctx.save_for_backward(*inputs, gain, *base, *kept)
        return (out, *maps)

    @staticmethod
    @once_differentiable
    def backward(ctx, gout, *gmaps):  # type: ignore[override]
        network, saved = ctx.network, iter(ctx.saved_tensors)
        inputs, gain = _Inputs(*islice(saved, len(_Inputs._fields))), next(saved)
        base: Tensors = () if inputs.base_q is None else tuple(islice(saved, network.depth))
        chunks = [(t, _Chunk(*(tuple(islice(saved, n)) for n in ctx.sizes))) for t in inputs.chunks()]
        grads, gbase = inputs.like(), [torch.zeros_like(b) for b in base]
        gmaps = [g.contiguous() for g in gmaps]  # added to in place, which is one call a memory in any other layout
        ggain = None if gain is None else torch.zeros_like(gain)
        with torch.autocast(gout.device.type, enabled=False):  # as in the forward, wherever backward is called
            for (t, s), gt, gr in zip(chunks[::-1], grads.chunks()[::-1], gout.unbind(0)[::-1], strict=True):
                gx, gd, gmaps = _backward_advance(s, t, gmaps, gt)
                _backward_read(network, s, t, base, gr, gx, gd, gmaps, gbase, gt)
                if network.online:
                    _backward_online_keys(network, s, t, gd[0], gmaps[0], gt)
                else:
                    _backward_keys(network, s, t, gain, base, gx, gd, gmaps, gbase, gt, ggain)
        return (None, *grads, ggain, *gbase, *gmaps)


# Backward of one chunk, from the gradients of its output (gr) and of the maps after it (gmaps). The three parts put the
# gradients of the chunk's inputs into ``gt``, and add those of gain and base to ``ggain`` and ``gbase``.


def _backward_advance(s: _Chunk, t: _Inputs, gmaps: Tensors, gt: _Inputs):
    """The maps after the chunk: gradients of x, d and the maps before it."""
    dtype, gx, gd, before = t.k.dtype, [], [], []
    for i, (left, right, map, gmap) in enumerate(zip(s.left, s.right, s.maps, gmaps, strict=True)):
        gt.transition.add_(torch.bmm(gmap.flatten(2), map.flatten(2).mT))
        operand = gmap.to(dtype).flatten(1, 2)
        gleft = torch.bmm(right, operand.mT, out=None if i else gt.wide_k).neg_()
        gright = torch.bmm(left, operand).neg_()
        if i:
            gx.append(gright)
            gd.append(narrow(gleft, t.to_state))
            gt.to_state.add_(weights_grad(gleft, s.d[i]))
        else:
            gx.append(gt.k)
            gd.append(gright)
        gmap_before = gmap * _diagonal(t.transition)
        gmap_before[:, 1].addcmul_(gmap[:, 0], t.transition[:, 0, 1, None, None])
        before.append(gmap_before)
    return gx, gd, before


def _backward_read(network: MemoryMLP, s: _Chunk, t: _Inputs, base: Tensors, gr, gx, gd, gmaps, gbase, gt: _Inputs):
    """The queries, last map first."""
    slope, dtype = network.functions.slope, t.k.dtype
    flat = [m.to(dtype).flatten(1, 2) for m in s.maps]
    for i in reversed(range(1, network.depth)):
        h, x, both, raw, scores = s.h[i - 1], s.x[i], s.both[i - 1], s.raw[i - 1], s.scores[i - 1]
        gscores, gboth = torch.bmm(gr, s.d[i].mT).neg_(), widen(gr, t.read)
        _add_product(gd[i], scores.mT, gr, -1)
        gt.read.add_(weights_grad(both, gr))
        _add_product(gmaps[i].flatten(1, 2), gboth.mT, h)
        gt.write.addcmul_(gscores, raw)
        gscores = (gscores * t.write).to(dtype)
        gh = torch.bmm(gboth, flat[i]).baddbmm_(gscores, x)
        if base:
            _add_product(gbase[i], gr.mT, h)
            gh.baddbmm_(gr, base[i].to(dtype))
        _add_product(gx[i], gscores.mT, h)
        gr = slope(gh, s.r[i - 1])
    if gt.base_q is not None:
        gt.base_q.copy_(gr)
    torch.bmm(gr, flat[0].mT, out=gt.wide_q)
    torch.bmm(gr, s.d[0].mT, out=gt.scores).neg_()
    _add_product(gmaps[0].flatten(1, 2), t.wide_q.mT, gr)
    _add_product(gd[0], t.scores.mT, gr, -1)


def _backward_keys(network: MemoryMLP, s: _Chunk, t: _Inputs, gain, base: Tensors, gx, gd, gmaps, gbase, gt, ggain):
    """The keys' backward (gone through from first map to last), then their forward."""
    f = network.functions
    W, gu = weights_of(s.maps, base, t.k.dtype), []
    for i in range(network.depth - 1):
        gu.append(f.slope(gd[i], s.z[i]))
        gd[i + 1].baddbmm_(gu[i], W[i + 1])
    gz, goffset, ggain_here = network.output_signal_backward(s.z[-1], gain, t.offset, s.norm, s.d[-1], gd[-1])
    gt.offset.copy_(goffset)
    if ggain is not None:
        ggain += ggain_here
    for i in reversed(range(network.depth)):
        gW = _product(gz.mT, s.x[i]) if i else _product(s.x[0].mT, gz)
        if i:
            _add_product(gW, s.d[i].mT, gu[i - 1])
        gmaps[i][:, 0].add_(gW)
        if base:
            gbase[i].add_(gW)
        gx[i].baddbmm_(gz, W[i].mT)
        if i:
            gz = f.slope(gx[i], s.z[i - 1]).addcmul_(gd[i - 1] * s.u[i - 1], f.second(s.z[i - 1]))


def _backward_online_keys(network: MemoryMLP, s: _Chunk, t: _Inputs, gd: Tensor, gmap: Tensor, gt: _Inputs):
    """The keys of an online memory."""
    g, dtype = gd.to(t.inverse.dtype), t.k.dtype
    signal, _, norm = network.output_signal(s.z[0], None, t.offset)
    torch.bmm(g, signal.to(g.dtype).mT, out=gt.inverse)
    gsignal = torch.bmm(t.inverse.mT, g)
    gz, goffset, _ = network.output_signal_backward(s.z[0], None, t.offset, norm, signal, gsignal)
    gt.offset.copy_(goffset)
    torch.bmm(gz, s.maps[0].to(dtype).flatten(1, 2).mT, out=gt.wide_before)
    _add_product(gmap.flatten(1, 2), t.wide_before.mT, gz)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """``a b``; of single columns and rows without a matrix product, which is up to 16 times slower at it."""
    return a * b if a.shape[-1] == 1 else torch.bmm(a, b)


def _add_product(state: Tensor, a: Tensor, b: Tensor, sign: int = 1) -> None:
    """``state += sign a b``, summed in the state's dtype."""
    if a.shape[-1] == 1:
        state.addcmul_(a, b, value=sign)
    elif a.dtype == state.dtype:
        state.baddbmm_(a, b, alpha=sign)
    else:
        state.add_(torch.bmm(a, b), alpha=sign)
