"""``layers/heads.py`` in C (``heads.c``), with backwards by hand."""

import ctypes
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from titans.memory.native import MULTIPLE, unbuilt
from titans.memory.native.build import library

SOURCE = Path(__file__).with_name("heads.c")
DTYPES = (torch.float32, torch.bfloat16)
PARTS = 3


def supported(backend: str, width: int, *tensors: Tensor | None) -> bool:
    """Whether the C code takes heads of this width: one of its dtypes on a CPU, a width that is a multiple of 16."""
    given = [t for t in tensors if t is not None]
    return (
        backend in ("auto", "native")
        and not torch.compiler.is_compiling()
        and all(t.is_cpu and t.dtype == given[0].dtype for t in given)
        and given[0].dtype in DTYPES
        and width % MULTIPLE == 0
        and unbuilt(SOURCE) is None
    )


def _fields(numbers: str, places: str, **lists: Any) -> list[tuple[str, Any]]:
    kinds = [(name, lists.get(name, ctypes.c_int64)) for name in numbers.split()]
    return kinds + [(name, lists.get(name, ctypes.c_void_p)) for name in places.split()]


class _Job(ctypes.Structure):
    def fill(self, **values: Any) -> None:
        for name, value in values.items():
            if isinstance(value, (list, tuple)):
                getattr(self, name)[:] = [v.data_ptr() if isinstance(v, Tensor) else v for v in value]
            else:
                setattr(self, name, value.data_ptr() if isinstance(value, Tensor) else value)

    def run(self, step: str) -> None:
        getattr(library(SOURCE), step)(ctypes.byref(self), ctypes.c_int64(torch.get_num_threads()))


class _ConvolveJob(_Job):
    """``convolve_job`` of heads.c."""

    _fields_ = _fields(
        "batch length taps width heads step low", "x before weight whole part gwhole gpart gx gbefore gweight",
        heads=ctypes.c_int64 * PARTS, part=ctypes.c_void_p * PARTS, gpart=ctypes.c_void_p * PARTS,
    )  # fmt: skip


class _GateJob(_Job):
    """``gate_job`` of heads.c."""

    _fields_ = _fields(
        "batch length heads width low eps", "reads values gate skip weight out gout greads gvalues ggate gskip gweight",
        eps=ctypes.c_double,
    )  # fmt: skip


def convolve(x: Tensor, before: Tensor, weight: Tensor, heads: tuple[int, int, int], whole: bool) -> tuple[Tensor, ...]:
    """See ``layers.heads.convolve``."""
    x = x if x[0].is_contiguous() else x.contiguous()  # rows may lie apart
    return _Convolve.apply(x, before.to(x.dtype).contiguous(), weight.float(), heads, whole)  # type: ignore[return-value]


class _Convolve(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, before: Tensor, weight: Tensor, heads, whole: bool):  # type: ignore[override]
        (B, T, channels), width = x.shape, x.shape[2] // sum(heads)
        parts = [x.new_empty(B, T, n, width) for n in heads]
        all = [x.new_empty(B, T, channels)] if whole else []
        job = ctx.job = _ConvolveJob()
        job.fill(batch=B, length=T, taps=len(weight), width=width, heads=heads, step=x.stride(0))
        job.fill(low=x.dtype == torch.bfloat16, part=parts, whole=all[0] if whole else None)
        job.fill(x=x, before=before, weight=weight)
        job.run("convolve")
        ctx.save_for_backward(x, before, weight)
        return (*parts, *all)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor):  # type: ignore[override]
        given = x, before, weight = ctx.saved_tensors
        made = gx, gbefore, gweight = x.new_empty(x.shape), *map(torch.empty_like, given[1:])
        job, grads = ctx.job, tuple(g.contiguous() for g in grads)
        job.fill(x=x, before=before, weight=weight, gx=gx, gbefore=gbefore, gweight=gweight)
        job.fill(gpart=grads[:PARTS], gwhole=grads[PARTS] if grads[PARTS:] else None)
        job.run("convolve_backward")
        return (*made, None, None)


def gate_reads(
    reads: Tensor, values: Tensor | None, skip: Tensor | None, weight: Tensor, gate: Tensor, eps: float
) -> Tensor:
    """See ``layers.heads.gate_reads``."""
    own = (None, None) if values is None or skip is None else (values.contiguous(), skip.float())
    return _Gate.apply(reads.contiguous(), *own, weight.float(), gate.contiguous(), eps)  # type: ignore[return-value]


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, reads: Tensor, values, skip, weight: Tensor, gate: Tensor, eps: float):  # type: ignore[override]
        B, T, H, D = reads.shape
        job, out = _GateJob(), torch.empty_like(gate)
        job.fill(batch=B, length=T, heads=H, width=D, low=reads.dtype == torch.bfloat16, eps=eps)
        job.fill(reads=reads, values=values, skip=skip, weight=weight, gate=gate, out=out)
        job.run("gate")
        ctx.job = job
        ctx.save_for_backward(reads, values, skip, weight, gate)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, gout: Tensor):  # type: ignore[override]
        reads, values, skip, weight, gate = ctx.saved_tensors
        greads, gvalues, gskip, ggate = (
            None if t is None else torch.empty_like(t) for t in (reads, values, skip, gate)
        )
        job, gout, gweight = ctx.job, gout.contiguous(), weight.new_empty(reads.shape[2:])
        job.fill(reads=reads, values=values, skip=skip, weight=weight, gate=gate, gout=gout)
        job.fill(greads=greads, gvalues=gvalues, gskip=gskip, ggate=ggate, gweight=gweight)
        job.run("gate_backward")
        return greads, gvalues, gskip, gweight.sum(0), ggate, None
