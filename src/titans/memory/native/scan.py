"""``scan`` in C: the same arguments and results as ``memory/scan.py``, whole chunks in a row."""

import ctypes
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from titans.memory.native import SOURCE
from titans.memory.native.build import library
from titans.memory.native.pages import room
from titans.memory.network import MemoryMLP
from titans.memory.pieces import in_first_pass

Tensors = Sequence[Tensor]
MAPS = 4
ACTIVATIONS = ("gelu", "silu", "relu")  # as job.h numbers them
INPUTS = ("q", "k", "v", "gates", "gain", "bias")
AFFINE = slice(4, 6)  # their gradients are added up


class Job(ctypes.Structure):
    """``job`` of job.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("depth", "heads", "chunks", "size")),
        ("widths", ctypes.c_int64 * (MAPS + 1)),
        *((name, ctypes.c_int64) for name in ("activation", "norm", "residual", "online", "low")),
        ("eps", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in INPUTS),
        *((name, ctypes.c_void_p * MAPS) for name in ("base", "start", "end")),
        *((name, ctypes.c_void_p) for name in ("out", "tape", "gout")),
        *((name, ctypes.c_void_p * MAPS) for name in ("gend", "gstart", "gbase")),
        *((f"g{name}", ctypes.c_void_p) for name in INPUTS),
    ]

    def place(self, tensors: Sequence[Any], prefix: str = "") -> None:
        """Inputs, base and maps, or, with the prefix "g", their gradients."""
        for name, t in zip(INPUTS, tensors, strict=False):
            setattr(self, prefix + name, None if t is None else t.data_ptr())
        setattr(self, f"{prefix}base", places(tensors[len(INPUTS) : -self.depth]))
        setattr(self, f"{prefix}start", places(tensors[-self.depth :]))

    def run(self, step: str, memories: int) -> None:
        """``forward`` or ``backward`` of scan.c, a share of the memories in every thread."""
        threads = max(1, min(torch.get_num_threads(), memories))
        if getattr(library(SOURCE), step)(ctypes.byref(self), ctypes.c_int64(memories), ctypes.c_int64(threads)):
            raise MemoryError("no memory is left for one chunk of a memory; use a smaller chunk_size or expansion")


def scan(
    q: Tensor, k: Tensor, v: Tensor, gates: Tensor, maps: Tensors, base: Tensors, affine, network: MemoryMLP,
    chunk_size: int,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    """See ``titans.memory.scan.scan``; products are of float32 but for bfloat16, where the processor multiplies it."""
    dtype = q.dtype if q.dtype == torch.bfloat16 else torch.float32
    inputs = (t.to(dtype) for t in (q, k, v))
    out, *end = _Scan.apply(network, chunk_size, *inputs, gates, *(affine or (None, None)), *base, *maps)  # type: ignore[misc]
    return out.to(q.dtype), end


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, network: MemoryMLP, chunk_size: int, *given):  # type: ignore[override]
        tensors: list[Any] = [None if t is None else t.contiguous() for t in given]
        ctx.job = partial(_job, network, chunk_size)
        job, maps = ctx.job(tensors), tensors[-network.depth :]
        out, end, tape = torch.empty_like(tensors[0]), [torch.empty_like(m) for m in maps], None
        if any(ctx.needs_input_grad):
            tape_size = library(SOURCE).tape_size
            tape_size.restype = ctypes.c_int64
            tape = room(len(maps[0]) * tape_size(ctypes.byref(job)))
            # checkpointing wants tensors of the same sizes from both passes; untouched, they take no memory
            job.tape = None if in_first_pass.get() else tape.data_ptr()
        job.out, job.end = out.data_ptr(), places(end)
        job.run("forward", len(maps[0]))
        ctx.save_for_backward(tape, *tensors)
        return (out, *end)

    @staticmethod
    @once_differentiable
    def backward(ctx, gout, *gend):  # type: ignore[override]
        tape, *tensors = ctx.saved_tensors
        job, (gout, *gend) = ctx.job(tensors), [g.contiguous() for g in (gout, *gend)]
        grads: list[Any] = [None if t is None else torch.empty_like(t) for t in tensors]
        base, memories = slice(AFFINE.stop, -len(gend)), len(gend[0])
        grads[base] = [t.new_empty(memories, *t.shape[1:]) for t in tensors[base]]
        for g in grads[AFFINE]:
            if g is not None:
                g.zero_()
        job.tape, job.gout, job.gend = tape.data_ptr(), gout.data_ptr(), places(gend)
        job.place(grads, "g")
        job.run("backward", memories)
        if memories > job.heads:  # rows of the batch share it
            grads[base] = [g.unflatten(0, (-1, job.heads)).sum(0) for g in grads[base]]
        return None, None, *grads


def job_of(network: MemoryMLP, heads: int, dim: int, chunks: int, size: int) -> Job:
    """What is said of ``heads`` memories a row and of their chunks, in numbers; no places."""
    widths = (ctypes.c_int64 * (MAPS + 1))(dim, *(width for _, width in network.shapes(dim)))
    options = ACTIVATIONS.index(network.activation), network.norm, network.residual, network.online
    return Job(network.depth, heads, chunks, size, widths, *options, False, network.norm_eps)


def _job(network: MemoryMLP, chunk_size: int, tensors: Sequence[Any]) -> Job:
    _, T, H, D = tensors[0].shape
    job = job_of(network, H, D, T // chunk_size, chunk_size)
    job.low = tensors[0].dtype == torch.bfloat16
    job.place(tensors)
    return job


def places(tensors: Sequence[Any]):
    return (ctypes.c_void_p * MAPS)(*(t.data_ptr() for t in tensors))
