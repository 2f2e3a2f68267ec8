"""``scan`` by the kernels: the same arguments and results as ``memory/scan.py``, whole chunks in a row."""

from collections.abc import Sequence
from math import gcd
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from titans.memory.gates import chunk_masks
from titans.memory.kernels import one_map, two_maps
from titans.memory.network import MemoryMLP

Tensors = Sequence[Tensor]
FIXED = 8  # inputs of every kernel, up to gain; base follows
BLOCK = 32  # hidden units at a time, in float32 half as many: more spills registers


def scan(
    q: Tensor, k: Tensor, v: Tensor, gates: Tensor, maps: Tensors, base: Tensors, affine, network: MemoryMLP,
    chunk_size: int,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    """See ``titans.memory.scan.scan``; queries and keys stay as they lie, masks are [G, n, C, ...]."""
    B, _, H, D = q.shape
    masks = chunk_masks(gates.unflatten(1, (-1, chunk_size)).permute(0, 3, 1, 2, 4).flatten(0, 1))
    by_head: Any = affine and [a.view(B, H, 1, D).transpose(1, 2) for a in affine]
    offset, gain = network.offset(k, v, by_head), affine[0] if affine else torch.ones_like(maps[0][:, 0, :1, :D])
    out, *end = _Scan.apply(network, chunk_size, q, k, offset, *masks, gain, *base, *maps)  # type: ignore[misc]
    return network.finish(q, out, by_head), end


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, network: MemoryMLP, chunk_size: int, *tensors):  # type: ignore[override]
        inputs, maps = [t.contiguous() for t in tensors[: -network.depth]], tensors[-network.depth :]
        chunks = inputs[0].shape[1] // chunk_size
        slots = chunks + 1 if any(ctx.needs_input_grad) else 2  # the start of every chunk, or of two in turn
        held = [m.new_empty(len(m), slots, *m.shape[1:]) for m in maps]
        for slot, m in zip(held, maps, strict=True):
            slot[:, 0] = m
        out = torch.empty_like(inputs[0])
        _launch("forward", network, chunk_size, inputs, held, [out])
        ctx.network, ctx.chunk_size = network, chunk_size
        ctx.save_for_backward(*inputs, *held)
        return out, *(h[:, chunks % slots].clone() for h in held)

    @staticmethod
    @once_differentiable
    def backward(ctx, gout, *gmaps):  # type: ignore[override]
        network, C, saved = ctx.network, ctx.chunk_size, ctx.saved_tensors  # to be asked for once
        inputs, held = saved[: -network.depth], saved[-network.depth :]
        gmaps = [g.clone(memory_format=torch.contiguous_format) for g in gmaps]
        grads = [torch.empty_like(t) for t in inputs[:FIXED]] + [torch.zeros_like(t) for t in inputs[FIXED:]]
        gbase = grads[FIXED:] or gmaps  # not touched without base
        passed = []  # from loop to loop over the hidden dimension
        if network.depth == 2:
            wide = (len(held[0]), C, held[0].shape[-1])
            passed = [held[0].new_empty(wide), *(gout.new_empty(wide) for _ in range(3))]
        _launch("backward", network, C, inputs, held, [gout.contiguous(), *gmaps, *grads[:FIXED], *gbase, *passed])
        return None, None, *grads, *gmaps


def _launch(kernel: str, network: MemoryMLP, C: int, inputs: Tensors, held: Tensors, others: Tensors) -> None:
    """One program for every memory."""
    q, base, (D, HIDDEN) = inputs[0], inputs[FIXED:], held[0].shape[-2:]
    module, sizes = one_map, {"C": C, "D": D, "NORM": network.norm, "BASE": bool(base)}
    if network.depth == 2:
        block = gcd(HIDDEN, BLOCK * 2 // q.element_size())
        module, sizes = two_maps, sizes | {"HIDDEN": HIDDEN, "BLOCK": block, "ACT": network.activation}
    with torch.cuda.device_of(q):
        getattr(module, kernel)[(len(held[0]),)](
            *inputs[:FIXED], *(base or held), *held, *others, q.shape[2], q.shape[1] // C, held[0].shape[1],
            network.norm_eps, num_warps=4 if C <= 64 else 8, num_stages=1, **sizes,
        )  # fmt: skip
