"""State that belongs to the caller: everything needed to go on reading where a call stopped."""

import os
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor


@dataclass
class State:
    """Base of all states: dataclasses of tensors (batch first), tuples of tensors, other states, or None."""

    def map(self, fn: Callable[[Tensor], Tensor]) -> Self:
        """The same state with ``fn`` applied to every tensor."""

        def visit(value):
            if isinstance(value, Tensor):
                return fn(value)
            if isinstance(value, State):
                return value.map(fn)
            return tuple(visit(item) for item in value) if isinstance(value, tuple) else value

        return type(self)(**{f.name: visit(getattr(self, f.name)) for f in fields(self)})

    def select(self, rows: Tensor | Sequence[int]) -> Self:
        """Rows of the batch, in the order given; a row may come more than once (selection, beam reordering)."""
        rows = torch.as_tensor(rows, dtype=torch.long)
        return self.map(lambda t: t.index_select(0, rows.to(t.device)))

    def repeat(self, times: int) -> Self:
        """Every row ``times`` times, copies side by side."""
        return self.map(lambda t: t.repeat_interleave(times, 0))

    def where(self, rows: Tensor, other: Self) -> Self:
        """The rows of the batch where ``rows`` [B] is true; those of ``other`` elsewhere."""
        theirs = other.tensors()

        def choose(name: str, mine: Tensor) -> Tensor:
            return torch.where(rows.view(-1, *[1] * (mine.dim() - 1)), mine, theirs[name])

        return self.from_tensors({name: choose(name, t) for name, t in self.tensors().items()})

    @classmethod
    def cat(cls, states: Sequence[Self]) -> Self:
        """The rows of several states, one after the other."""
        tensors = [state.tensors() for state in states]
        return cls.from_tensors({name: torch.cat([t[name] for t in tensors]) for name in tensors[0]})

    def detach(self) -> Self:
        """The same numbers without their history: gradients stop here."""
        return self.map(Tensor.detach)

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> Self:
        """On another device, or with floating-point tensors in another dtype."""
        return self.map(lambda t: t.to(device=device, dtype=dtype if t.is_floating_point() else None))

    @property
    def nbytes(self) -> int:
        """Size of all tensors in bytes; constant, however much was read."""
        return sum(t.numel() * t.element_size() for t in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by dotted name, e.g. ``weights.0``."""
        found: dict[str, Tensor] = {}

        def visit(name: str, value):
            if isinstance(value, Tensor):
                found[name] = value
            elif isinstance(value, State):
                for f in fields(value):
                    visit(f"{name}.{f.name}" if name else f.name, getattr(value, f.name))
            elif isinstance(value, tuple):
                for i, item in enumerate(value):
                    visit(f"{name}.{i}", item)

        visit("", self)
        return found

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> Self:
        """The inverse of ``tensors``; a missing one is a ValueError that names it."""
        hints, values = typing.get_type_hints(cls), {}
        for f in fields(cls):
            inner = {k[len(f.name) + 1 :]: t for k, t in tensors.items() if k.startswith(f.name + ".")}
            options = [o for o in (typing.get_args(hints[f.name]) or [hints[f.name]]) if isinstance(o, type)]
            nested = next((o for o in options if issubclass(o, State)), None)
            if f.name in tensors:
                values[f.name] = tensors[f.name]
            elif inner:
                values[f.name] = nested.from_tensors(inner) if nested else _tuple(cls.__name__, f.name, inner)
            elif type(None) in typing.get_args(hints[f.name]):
                values[f.name] = None
            else:
                raise ValueError(_missing(cls.__name__, f.name))
        return cls(**values)

    def save(self, path: str | os.PathLike) -> None:
        """Writes a safetensors file, whole or not at all."""
        save_tensors(self.tensors(), path, {"titans": type(self).__name__})

    @classmethod
    def load(cls, path: str | os.PathLike, device: Any = "cpu") -> Self:
        """Reads what ``save`` wrote. ValueError if the file is broken or holds something else."""
        tensors, metadata = load_tensors(path, device)
        if metadata.get("titans") != cls.__name__:
            raise ValueError(f"{path} holds {metadata.get('titans', 'no titans state')!r}, expected {cls.__name__!r}")
        try:
            return cls.from_tensors(tensors)
        except ValueError as error:
            raise ValueError(f"{path} is damaged: {error}") from error


def _tuple(owner: str, name: str, items: dict[str, Tensor]) -> tuple[Tensor, ...]:
    for i in range(len(items)):
        if str(i) not in items:
            raise ValueError(_missing(owner, f"{name}.{i}"))
    return tuple(items[str(i)] for i in range(len(items)))


def _missing(owner: str, name: str) -> str:
    return f"{owner} needs the tensor {name!r}, which is missing; was it saved by another version?"


def save_tensors(tensors: dict[str, Tensor], path: str | os.PathLike, metadata: dict[str, str]) -> None:
    """safetensors through a temporary file and a rename, so that a crash leaves no half-written file."""
    from safetensors.torch import save_file

    part = f"{os.fspath(path)}.part"
    save_file({k: t.detach().contiguous().clone() for k, t in tensors.items()}, part, metadata)
    os.replace(part, path)


def load_tensors(path: str | os.PathLike, device: Any = "cpu") -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file; a broken file is a ValueError that names it."""
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise FileNotFoundError(f"no file {path}")
    try:
        with safe_open(os.fspath(path), "pt", device=str(device)) as file:  # type: ignore[no-untyped-call]
            return {k: file.get_tensor(k) for k in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or no safetensors file ({error}); restore it from a copy") from error


def hold(weights: Sequence[Tensor], momentum: Sequence[Tensor], dim: int) -> tuple[Tensor, ...]:
    """Linear maps and their momentum, each [..., d_in, d_out], as ``MemoryState.maps``; stacked at ``dim``."""
    pairs = zip(weights, momentum, strict=True)
    return tuple(torch.stack([w.mT, s.mT] if i else [w, s], dim) for i, (w, s) in enumerate(pairs))


@dataclass
class MemoryState(State):
    """A neural memory in the middle of a sequence: C is the chunk size, one entry of the tuples per linear map.

    Where forgetting leads to M_0 (``forget="start"``), it holds M - M_0.

    Args:
        maps: memory and momentum as they were at the open chunk's first token: the first map [B, H, 2, d_in, d_out],
            the others transposed, [B, H, 2, d_out, d_in] (``scan.py`` says why).
        inputs [B, H, C, d_in], signals [B, H, C, d_out]: inputs and gradients of the open chunk's tokens, then zeros.
        pending: [B, H, C, 2], weights of those gradients in memory and momentum as they stand now.
        transition: [B, H, 2, 2], weights of the first memory and momentum in those that stand now.
        position: [B] int64, tokens read so far; ``position % C`` of them are in the open chunk.
        conv: [B, kernel - 1, channels], last inputs of a layer's short convolution (None for the bare memory).
        read: ``position`` where it is known to be the same in all rows: no device has to be asked for it.
    """

    maps: tuple[Tensor, ...]
    inputs: tuple[Tensor, ...]
    signals: tuple[Tensor, ...]
    pending: Tensor
    transition: Tensor
    position: Tensor
    conv: Tensor | None = None
    read: int | None = None

    def __post_init__(self):
        depths = {name: len(getattr(self, name)) for name in ("maps", "inputs", "signals")}
        for name, depth in depths.items():
            if depth < max(depths.values()):
                raise ValueError(_missing("MemoryState", f"{name}.{depth}"))

    @classmethod
    def initial(cls, maps: Sequence[Tensor], batch: int, chunk_size: int) -> "MemoryState":
        """Before the first token: M_0 = ``maps`` (each [H, d_in, d_out]) for every row, no momentum."""
        H = maps[0].shape[0]
        start = hold(maps, [torch.zeros_like(w) for w in maps], 1)

        def zeros(*shape: int) -> Tensor:
            return maps[0].new_zeros(batch, H, *shape)

        return cls(
            maps=tuple(m.expand(batch, -1, -1, -1, -1) for m in start),
            inputs=tuple(zeros(chunk_size, w.shape[-2]) for w in maps),
            signals=tuple(zeros(chunk_size, w.shape[-1]) for w in maps),
            pending=zeros(chunk_size, 2),
            transition=torch.eye(2, dtype=maps[0].dtype, device=maps[0].device).expand(batch, H, 2, 2),
            position=torch.zeros(batch, dtype=torch.long, device=maps[0].device),
            read=0,
        )

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> "MemoryState":
        """The inverse of ``tensors``; ``read`` is known again where all rows have read as much."""
        state = super().from_tensors(tensors)
        places = set(state.position.flatten().tolist())
        return replace(state, read=places.pop()) if len(places) == 1 else state

    @property
    def weights(self) -> tuple[Tensor, ...]:
        """The memory [B, H, d_in, d_out] at the open chunk's first token; less M_0, where forgetting leads there."""
        return tuple(m[:, :, 0].mT if i else m[:, :, 0] for i, m in enumerate(self.maps))

    @property
    def momentum(self) -> tuple[Tensor, ...]:
        """The momentum [B, H, d_in, d_out] at the open chunk's first token."""
        return tuple(m[:, :, 1].mT if i else m[:, :, 1] for i, m in enumerate(self.maps))

    @property
    def place(self) -> Tensor | int:
        """Tokens read so far: one number, where it is known to be the same in all rows, else [B]."""
        return self.position if self.read is None else self.read

    @property
    def is_between_chunks(self) -> bool:
        """Whether it is known that no row has an open chunk."""
        return self.read is not None and self.read % self.chunk_size == 0

    def after(self, tokens: Tensor | int) -> dict[str, Any]:
        """``position`` and ``read`` after so many more tokens, [B] or the same number in all rows."""
        read = self.read + tokens if self.read is not None and isinstance(tokens, int) else None
        return {"position": self.position + tokens, "read": read}

    def since_start(self) -> Tensor:
        """``transition``, its constants made sure of: the identity where no chunk is open, zero below the diagonal."""
        same = torch.eye(2, dtype=self.transition.dtype, device=self.transition.device)
        if self.is_between_chunks:
            return same.expand_as(self.transition)
        closed = (self.position % self.chunk_size == 0).view(-1, 1, 1, 1)
        return torch.where(closed, same, self.transition.triu())

    @property
    def chunk_size(self) -> int:
        """Tokens a chunk."""
        return self.pending.shape[2]
