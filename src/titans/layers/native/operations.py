"""The operations of ``layers/operations.py`` in C: a token's way through a block is recorded once, and then replayed.

Where everything lies is settled when it is recorded, so that a token costs a single call.
"""

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titans.layers.common import GatedProduct, require_finite
from titans.layers.native import SOURCE
from titans.layers.neural_memory import NeuralMemory
from titans.layers.operations import Operations, Segment, Window
from titans.memory import MemoryState
from titans.memory.native.build import library
from titans.memory.native.pages import Pages
from titans.memory.native.scan import MAPS, Job, job_of, places

PANEL = 64  # outputs whose weights lie together, as in token.c
GRAIN = 1 << 18  # numbers that a thread reads at least


class _Rows(ctypes.Structure):
    _fields_ = [("at", ctypes.c_void_p), ("step", ctypes.c_int64)]


def _job(name: str, numbers: str, rows: str, tensors: str = "", lists: str = "", reals: str = "", first=()):
    """A structure of token.c, its fields in their order."""
    kinds = (numbers, ctypes.c_int64), (rows, _Rows), (tensors, ctypes.c_void_p), (lists, ctypes.c_void_p * MAPS)
    fields = [(field, kind) for names, kind in (*kinds, (reals, ctypes.c_double)) for field in names.split()]
    return type(name, (ctypes.Structure,), {"_fields_": [*first, *fields]})


_Norm = _job("norm", "batch width", "x y", "weight", reals="eps")
_Sum = _job("sum_rows", "batch width", "a b y")
_SwiGLU = _job("swiglu", "batch width", "x y")
_Product = _job("gated_product", "batch width", "y m out", "norm_y norm_m", reals="eps")
_Linear = _job("linear", "batch in panels", "x y", "weight")
_Segment = _job(
    "segment_attention", "batch heads width persistent length", "tokens recalled found", "keys values table"
)
_Window = _job("window_attention", "batch heads width persistent length", "tokens found", "keys values table")
_Convolution = _job("convolution", "batch channels taps", "x y", "weight last")
_Memory = _job(
    "memory_token", "batch key_heads chunk write_gate forgets", "qkv out_gate gates out",
    "gates_weight gates_bias skip out_norm weights", "maps inputs signals", "max_lr max_momentum eps",
    first=[("net", Job)],
)  # fmt: skip
_End = _job("end_segment", "heads width persistent length", "", "keys values", "to", first=[("memory", _Memory)])
_Recall = _job("recall_token", "batch key_heads", "queries out_gate out", "out_norm", "maps", "eps", [("net", Job)])


class _Operation(ctypes.Structure):
    _fields_ = [("run", ctypes.c_void_p), ("job", ctypes.c_void_p)]


class _Program(ctypes.Structure):
    _fields_ = [
        ("all", ctypes.c_void_p), ("n", ctypes.c_int64), ("size", ctypes.c_int64), ("x", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
    ]  # fmt: skip


def _value(kind: Any, value: Any) -> Any:
    """A field's value: tensors as rows of a batch, or as the place where one lies."""
    if kind is _Rows:
        return _Rows() if value is None else _Rows(value.data_ptr(), value.stride(0))
    if isinstance(value, Tensor):
        assert value.is_contiguous() and value.dtype == torch.float32
        return value.data_ptr()
    return places(value) if isinstance(value, Sequence) else value


class NativeOperations(Operations):
    """The same in C: what it makes is called once, in ``program``, and the calls are kept."""

    def __init__(self, memory: NeuralMemory, state: MemoryState):
        self.pages = Pages()
        super().__init__(memory, state)
        self.batch = self.stepper.shape[0]
        self.steps: list[tuple[int, int]] = []
        self.kept: list[Any] = []  # what the steps point to
        self.written: Any = None  # the memory's part of them

    def keep(self, t: Tensor) -> Tensor:
        """A contiguous copy, in large pages."""
        return self.pages.copy(t)

    def program(self, token: Callable[[Tensor], Tensor], dim: int) -> Callable[[Tensor], Tensor]:
        """``token``, x [batch, dim] -> y, recorded; nothing happens where x holds NaN or infinity, but a ValueError."""
        x = self._room(dim)
        y = token(x)
        steps = (_Operation * len(self.steps))(*self.steps)
        program = _Program(ctypes.cast(steps, ctypes.c_void_p), len(steps), x.numel(), x.data_ptr(), y.data_ptr())
        self.kept += steps, x, y
        replay, at, most = library(SOURCE).replay, ctypes.byref(program), max(1, self.pages.taken // GRAIN)
        replay.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]

        def run(x: Tensor) -> Tensor:
            if x.dtype != torch.float32 or not x.is_cpu:
                found = f"{x.dtype} on {x.device}"
                raise ValueError(f"x is {found}, but its cache in float32 on the CPU; move or cast it like the model")
            y = torch.empty_like(x := x.contiguous())
            if not replay(at, self.stepper.read, x.data_ptr(), y.data_ptr(), min(most, torch.get_num_threads())):
                require_finite(x.unsqueeze(1), None)
            self.stepper.read += 1
            return y

        return run

    def _room(self, width: int) -> Tensor:
        return torch.empty(self.batch, width)

    def _record(self, kind: type[ctypes.Structure], *values: Any) -> ctypes.Structure:
        values = tuple(self.keep(value) if isinstance(value, nn.Parameter) else value for value in values)
        job = kind(*(_value(of, value) for (_, of), value in zip(kind._fields_, values, strict=True)))  # type: ignore[misc]
        run = ctypes.cast(getattr(library(SOURCE), kind.__name__), ctypes.c_void_p).value
        self.steps.append((run, ctypes.addressof(job)))  # type: ignore[arg-type]
        self.kept.append((job, values))
        return job

    def add(self, a: Tensor, b: Tensor) -> Tensor:
        """a + b"""
        y = self._room(a.shape[1])
        self._record(_Sum, *y.shape, a, b, y)
        return y

    def swiglu(self, x: Tensor) -> Tensor:
        """[batch, 2 n] -> [batch, n]"""
        y = self._room(x.shape[1] // 2)
        self._record(_SwiGLU, *y.shape, x, y)
        return y

    def norm(self, norm: nn.LayerNorm) -> Callable[[Tensor], Tensor]:
        """LayerNorm without bias."""

        def run(x: Tensor) -> Tensor:
            y = self._room(x.shape[1])
            self._record(_Norm, *y.shape, x, y, norm.weight, norm.eps)
            return y

        return run

    def product(self, gate: GatedProduct) -> Callable[[Tensor, Tensor], Tensor]:
        """``gate.product``"""

        def run(y: Tensor, m: Tensor) -> Tensor:
            out = self._room(y.shape[1])
            self._record(_Product, *y.shape, y, m, out, gate.norm_y.weight, gate.norm_m.weight, gate.norm_y.eps)
            return out

        return run

    def linear(self, *weights: Tensor) -> Callable[[Tensor], tuple[Tensor, ...]]:
        """Products of one input with several weights [d_out, d_in]."""
        sizes, whole = [len(w) for w in weights], torch.cat(weights)
        panels = F.pad(whole, (0, 0, 0, -len(whole) % PANEL)).view(-1, PANEL, whole.shape[1])
        panels = self.keep(panels.mT)

        def run(x: Tensor) -> tuple[Tensor, ...]:
            y = self._room(len(panels) * PANEL)
            self._record(_Linear, self.batch, x.shape[1], len(panels), x, y, panels)
            return y[:, : sum(sizes)].split_with_sizes(sizes, -1)

        return run

    def segment_attention(self, segment: Segment) -> Callable[[Tensor, Tensor], Tensor]:
        """A token's q, k, v and its memory token's k, v, side by side, to what it finds [batch, heads * head_dim]."""

        def run(qkv: Tensor, recalled: Tensor) -> Tensor:
            found = self._room(segment.heads * segment.head_dim)
            self._record(_Segment, *self._sizes(segment), qkv, recalled, found, *segment.held, segment.table)
            return found

        return run

    def window_attention(self, window: Window) -> Callable[[Tensor], Tensor]:
        """A token's q, k, v, side by side, to what it finds [batch, heads * head_dim]."""

        def run(qkv: Tensor) -> Tensor:
            found = self._room(window.heads * window.head_dim)
            self._record(_Window, *self._sizes(window), qkv, found, *window.held, window.table)
            return found

        return run

    def _sizes(self, held: Segment | Window) -> tuple[int, ...]:
        return self.batch, held.heads, held.head_dim, held.persistent, held.length

    def memory(self, memory: NeuralMemory) -> Callable[..., Tensor]:
        """Writes and reads: what ``qkv_proj``, ``out_gate`` and, if they see the token, the gates made of it; gated."""
        stepper, projection, conv = self.stepper, memory.gates_proj, memory.conv
        sizes = self.batch, memory.key_heads, stepper.chunk_size
        options = memory.gate == "write", memory.forget != "none"

        def run(x: Tensor, out_gate: Tensor, token_gates: Tensor | None = None) -> Tensor:
            qkv, out = self._room(x.shape[1]), self._room(out_gate.shape[1])
            self._record(_Convolution, *x.shape, conv.size, x, qkv, conv.weight, stepper.conv)
            self.written = self._record(
                _Memory, self._net(memory), *sizes, *options, qkv, out_gate, token_gates, out,
                projection.weight if token_gates is None else None, projection.bias, memory.skip,
                memory.out_norm.weight, stepper.weights, stepper.maps, stepper.inputs, stepper.signals, memory.max_lr,
                memory.max_momentum, memory.out_norm.eps,
            )  # fmt: skip
            return out

        return run

    def recall(self, memory: NeuralMemory, maps: Sequence[Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
        """``NeuralMemory.recall`` of projected queries, from maps as the stepper lays them out."""
        sizes = self.batch, memory.key_heads

        def run(queries: Tensor, out_gate: Tensor) -> Tensor:
            out, norm = self._room(out_gate.shape[1]), memory.out_norm
            self._record(_Recall, self._net(memory), *sizes, queries, out_gate, out, norm.weight, maps, norm.eps)
            return out

        return run

    def end_segment(self, segment: Segment, maps: Sequence[Tensor]) -> None:
        """After a segment's last token: empties it, and brings the recalled maps to the memory as it stands."""
        self._record(_End, self.written, *self._sizes(segment)[1:], *segment.held, maps)

    def _net(self, memory: NeuralMemory) -> Job:
        """The memory's network, for one token."""
        net = job_of(memory.network, memory.heads, memory.head_dim, 1, 1)
        if self.stepper.affine:
            net.gain, net.bias = (_value(None, a) for a in self.stepper.affine)
        return net
