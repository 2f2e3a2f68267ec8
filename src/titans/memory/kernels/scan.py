"""``scan`` by the kernels: the same arguments and results as ``memory/scan.py``, whole chunks in a row."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import gcd
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from titans.memory import online
from titans.memory.gates import chunk_masks
from titans.memory.kernels import one_map, two_maps
from titans.memory.network import MemoryMLP
from titans.memory.scan import as_held

Tensors = Sequence[Tensor]
FIXED = 8  # inputs of every kernel, up to gain
BLOCK = 16  # hidden units at a time: more spills registers
RESIDENT = 2  # programs of a memory wait for one another: so many a multiprocessor runs at once, whatever their size


def scan(
    q: Tensor, k: Tensor, v: Tensor, gates: Tensor, maps: Tensors, base: Tensors, affine, network: MemoryMLP,
    chunk_size: int,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    """See ``titans.memory.scan.scan``; queries and keys stay as they lie, masks are [G, n, C, ...]."""
    (B, _, H, D), base = q.shape, as_held(base, q.shape[0])
    masks = chunk_masks(gates.unflatten(1, (-1, chunk_size)).permute(0, 3, 1, 2, 4).flatten(0, 1))
    by_head: Any = affine and [a.view(B, H, 1, D).transpose(1, 2) for a in affine]
    offset, gain = network.offset(k, v, by_head), affine[0] if affine else torch.ones_like(maps[0][:, 0, :1, :D])
    parts, before = parts_of(q, network), ()
    if network.online:
        before = online.before(k.unflatten(1, (-1, chunk_size)).permute(0, 3, 1, 2, 4).flatten(0, 1), masks)
        if base:
            offset = offset + torch.einsum("bthd,bhde->bthe", k, base[0].unflatten(0, (B, H)).to(k.dtype))
    shares = [_cut(m, parts) for m in (*base, *maps)]
    out, *end = _Scan.apply(network, chunk_size, parts, q, k, offset, *masks, gain, *before, *shares)  # type: ignore[misc]
    return network.finish(q, out, by_head), [_join(m, parts) for m in end]


def parts_of(q: Tensor, network: MemoryMLP) -> int:
    """How many programs share the hidden units of a memory: as many as a GPU runs at once, a block each at least."""
    if network.depth == 1 or not q.is_cuda:
        return 1
    hidden, parts = network.shapes(q.shape[-1])[0][1], 1
    free = RESIDENT * torch.cuda.get_device_properties(q.device).multi_processor_count // (q.shape[0] * q.shape[2])
    while 2 * parts <= free and hidden % (2 * parts * BLOCK) == 0:
        parts *= 2
    return parts


def _cut(m: Tensor, parts: int) -> Tensor:
    """[G, ..., HIDDEN] -> [G * parts, ..., HIDDEN / parts]"""
    return m.unflatten(-1, (parts, -1)).movedim(-2, 1).flatten(0, 1)


def _join(m: Tensor, parts: int) -> Tensor:
    return m.unflatten(0, (-1, parts)).movedim(1, -2).flatten(-2)


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, network: MemoryMLP, chunk_size: int, parts: int, *tensors):  # type: ignore[override]
        inputs, maps = [t.contiguous() for t in tensors[: -network.depth]], tensors[-network.depth :]
        chunks = inputs[0].shape[1] // chunk_size
        slots = chunks + 1 if any(ctx.needs_input_grad) else 2  # the start of every chunk, or of two in turn
        held = [m.new_empty(len(m), slots, *m.shape[1:]) for m in maps]
        for slot, m in zip(held, maps, strict=True):
            slot[:, 0] = m
        if network.depth == 2:  # z of the second map
            held.append(maps[0].new_empty(len(maps[0]) // parts, slots, chunk_size, inputs[0].shape[-1]))
        out = _partial(inputs[0], parts)
        _launch("forward", network, chunk_size, parts, inputs, held, [out])
        ctx.network, ctx.chunk_size, ctx.parts = network, chunk_size, parts
        ctx.save_for_backward(*inputs, *held)
        return _whole(out, inputs[0]), *(h[:, chunks % slots].clone() for h in held[: network.depth])

    @staticmethod
    @once_differentiable
    def backward(ctx, gout, *gmaps):  # type: ignore[override]
        network, C, parts, saved = ctx.network, ctx.chunk_size, ctx.parts, ctx.saved_tensors  # to be asked for once
        count = len(saved) - 2 * network.depth + 1
        inputs, held = saved[:count], saved[count:]
        gmaps = [g.clone(memory_format=torch.contiguous_format) for g in gmaps]
        shared = {2, 7}  # offset and gain: their gradients need the whole signal, which every program has
        given, unused, base = _arguments(network, inputs)
        grads = [torch.empty_like(t) if i in shared else _partial(t, parts) for i, t in enumerate(given)]
        gbase = [torch.zeros_like(t) for t in base]
        passed = []  # from loop to loop over the hidden dimension
        if network.depth == 2:
            wide = (len(held[0]), C, held[0].shape[-1])
            passed = [held[0].new_empty(wide), *(gout.new_empty(wide) for _ in range(3))]
        # gbase: not touched without base
        others = [gout.contiguous(), *gmaps, *grads, *unused, *(gbase or gmaps), *passed]
        _launch("backward", network, C, parts, inputs, held, others)
        grads = [g if i in shared else _whole(g, t) for i, (g, t) in enumerate(zip(grads, given, strict=True))]
        return None, None, None, *grads, *gbase, *gmaps


def _arguments(network: MemoryMLP, inputs: Tensors) -> tuple[Tensors, Tensors, Tensors]:
    """The inputs before ``base``, what stands for those of an online memory where one map is not online, and base."""
    count = FIXED + 2 * network.online
    return inputs[:count], inputs[3:5] if network.depth == 1 and not network.online else [], inputs[count:]


def _partial(like: Tensor, parts: int) -> Tensor:
    """What every part adds to a result, [parts, ...]."""
    return like.new_empty((parts, *like.shape), dtype=like.dtype if parts == 1 else torch.float32)


def _whole(partial: Tensor, like: Tensor) -> Tensor:
    return partial[0] if len(partial) == 1 else partial.sum(0).to(like.dtype)


def _launch(
    kernel: str, network: MemoryMLP, C: int, parts: int, inputs: Tensors, held: Tensors, others: Tensors
) -> None:
    """``parts`` programs for every memory."""
    q, (given, unused, base), (D, HIDDEN) = inputs[0], _arguments(network, inputs), held[0].shape[-2:]
    module, sizes, exchange = one_map, {"C": C, "D": D, "NORM": network.norm, "BASE": bool(base)}, []
    if network.depth == 1:
        sizes["ONLINE"] = network.online
    else:
        sizes |= {"HIDDEN": HIDDEN, "BLOCK": gcd(HIDDEN, BLOCK), "ACT": network.activation, "PARTS": parts}
        module = two_maps
        memories = len(held[0]) // parts
        counter = torch.zeros(memories, dtype=torch.int32, device=q.device)
        exchange = [held[0].new_empty(memories, 2, parts, C, D), counter]
    with torch.cuda.device_of(q), _without_wgmma():
        getattr(module, kernel)[(len(held[0]),)](
            *given, *unused, *(base or held[: network.depth]), *held, *others, *exchange, q.shape[2], q.shape[1] // C,
            held[0].shape[1], network.norm_eps, num_warps=4 if C <= 64 else 8, num_stages=1,
            enable_fp_fusion=True, **sizes,
        )  # fmt: skip


@contextmanager
def _without_wgmma() -> Iterator[None]:
    """Products by ``mma.sync``, where a kernel is compiled: in blocks of 32, Hopper's ``wgmma`` gets wrong addresses.

    Seen on an H200 with Triton 3.6; Triton's issue 11366 has it for 3.7.
    """
    name, before = "DISABLE_MMA_V3", os.environ.get("DISABLE_MMA_V3")
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
