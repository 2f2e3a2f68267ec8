"""Rows of different lengths: align them to the left, cut them where chunks or segments end, put them together again."""

from collections.abc import Callable, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

PIECE = 512  # tokens of a long call that are worked through at a time: on a CPU, in its caches
PIECE_CUDA = 8192  # on a GPU, in fewer calls


def take(x: Tensor, index: Tensor, dim: int = 1) -> Tensor:
    """``x[b, ..., index[b, i], ...]`` along ``dim`` for index [B, n]: one gather, any number of other dimensions."""
    shape = [index.shape[0]] + [1] * (x.dim() - 1)
    shape[dim] = index.shape[1]
    sizes = list(x.shape)
    sizes[dim] = index.shape[1]
    return x.gather(dim, index.view(shape).expand(sizes))


def align(mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Order that moves the real tokens of every row to its left, keeping their order.

    Args:
        mask: [B, T], true (non-zero) at real tokens, anywhere in the row.

    Returns:
        index [B, T] to gather with, lengths [B], and the index [B, T] that undoes the move.
    """
    index = torch.sort(mask.bool().int(), dim=1, descending=True, stable=True).indices
    return index, mask.bool().sum(1), index.argsort(1)


def check_mask(mask: Tensor | None, batch: int, length: int) -> Tensor | None:
    """The mask as bool [B, T], or None where every token is real."""
    if mask is None:
        return None
    if mask.shape != (batch, length):
        raise ValueError(f"mask must be [batch, length] = [{batch}, {length}], got {list(mask.shape)}")
    mask = mask.bool()
    return None if mask.all() else mask


@dataclass
class Piece:
    """Tokens of every row that fall into the same chunk.

    ``width`` columns; the first is at slot ``offset`` of its chunk (an int, or [B] where rows differ); ``valid`` [B]
    says how many columns are real (None: all); ``closes`` whether the chunk is full afterwards (a bool, or [B]).
    """

    width: int
    offset: int | Tensor
    valid: Tensor | None
    closes: bool | Tensor

    def is_whole(self, size: int) -> bool:
        """Whether these are whole chunks, the same slots in every row."""
        return isinstance(self.offset, int) and self.offset == 0 and self.width >= size

    def repeat(self, times: int) -> "Piece":
        """The same piece with every row ``times`` times, copies side by side."""
        rows = (
            t.repeat_interleave(times) if isinstance(t, Tensor) else t for t in (self.offset, self.valid, self.closes)
        )
        return Piece(self.width, *rows)  # type: ignore[arg-type]

    def place(self, new: Tensor, held: Tensor | None, size: int) -> Tensor:
        """The chunk's slots [B, size, ...] with ``new`` [B, width, ...] put behind what is ``held`` (None: zeros)."""
        if isinstance(self.offset, int):
            if self.width == size:
                return new
            if held is None:
                held = new.new_zeros(new.shape[0], size, *new.shape[2:])
            return torch.cat([held[:, : self.offset], new, held[:, self.offset + self.width :]], 1)
        if held is None:
            held = new.new_zeros(new.shape[0], size, *new.shape[2:])
        source = torch.arange(size, device=new.device) - self.offset.unsqueeze(1)
        fits = (source >= 0) & (source < self.valid.unsqueeze(1))  # type: ignore[union-attr]
        moved = take(new, source.clamp(0, self.width - 1))
        return torch.where(fits.view(*fits.shape, *[1] * (new.dim() - 2)), moved, held)

    @property
    def last(self) -> Tensor | None:
        """The last real column of every row [B] (0 in rows without one); None: the last."""
        return None if self.valid is None else (self.valid - 1).clamp(min=0)

    def blank(self, x: Tensor) -> Tensor:
        """x [B, width, ...] with zeros in columns that are not real."""
        if self.valid is None:
            return x
        real = torch.arange(self.width, device=x.device) < self.valid.unsqueeze(1)
        return x.masked_fill(~real.view(*real.shape, *[1] * (x.dim() - 2)), 0)

    def where_read(self, new: Tensor, old: Tensor) -> Tensor:
        """``new`` in the rows that have tokens in this piece, ``old`` in the others; both [B, ...]."""
        if self.valid is None:
            return new
        return torch.where((self.valid > 0).view(-1, *[1] * (new.dim() - 1)), new, old)

    def where_closed(self, new: Tensor, old: Tensor) -> Tensor:
        """``new`` in the rows whose chunk is full after this piece, ``old`` in the others; both [B, ...]."""
        if isinstance(self.closes, bool):
            return new if self.closes else old
        return torch.where(self.closes.view(-1, *[1] * (new.dim() - 1)), new, old)


class Cut:
    """Cuts B rows of T tokens at multiples of ``size``, counted from what each row has read before.

    Args:
        position: tokens read before, [B] or the same number in all rows.
        lengths: [B], real tokens of every left-aligned row; None: T in every row.
        merge: make whole chunks that follow each other one piece, where all rows stand at the same place.
    """

    def __init__(self, position: Tensor | int, lengths: Tensor | None, T: int, size: int, merge: bool = False):
        self.index = self.inverse = None
        offsets = [position % size] if isinstance(position, int) else (position % size).tolist()
        if lengths is None and len(set(offsets)) <= 1:
            self.pieces = list(self._even(offsets[0] if offsets else 0, T, size, merge))
        else:
            lengths = torch.full_like(position, T) if lengths is None else lengths  # type: ignore[arg-type]
            start = torch.full_like(lengths, position) if isinstance(position, int) else position
            self.pieces = self._ragged(start % size, lengths, T, size)
        self.T, self.widths = T, [p.width for p in self.pieces]

    @staticmethod
    def _even(offset: int, T: int, size: int, merge: bool):
        while T > 0:
            width = T // size * size if merge and offset == 0 and size <= T else min(size - offset, T)
            yield Piece(width, offset, None, (offset + width) % size == 0)
            offset, T = 0, T - width

    def _ragged(self, offset: Tensor, lengths: Tensor, T: int, size: int) -> list[Piece]:
        if not lengths.any():
            return []
        count = int(((offset + lengths + size - 1) // size).max())
        columns = torch.arange(T, device=offset.device)
        pieces, indices, inverse, before = [], [], torch.zeros_like(columns).repeat(len(offset), 1), 0
        for p in range(count):
            start = (p * size - offset).clamp(min=0).minimum(lengths)
            stop = ((p + 1) * size - offset).minimum(lengths)
            valid, width = stop - start, int((stop - start).max())
            slot = offset if p == 0 else torch.zeros_like(offset)
            pieces.append(Piece(width, slot, valid, slot + valid == size))
            indices.append((start.unsqueeze(1) + columns[:width]).clamp(max=T - 1))
            inside = (columns >= start.unsqueeze(1)) & (columns < stop.unsqueeze(1))
            inverse = torch.where(inside, columns - start.unsqueeze(1) + before, inverse)
            before += width
        if pieces:
            self.index, self.inverse = torch.cat(indices, 1), inverse
            self.real = columns < lengths.unsqueeze(1)
        return pieces

    def split(self, x: Tensor) -> Sequence[Tensor]:
        """x [B, T, ...] -> the columns [B, width, ...] of every piece (one split: its backward is linear in T)."""
        if self.index is not None:
            x = take(x, self.index)
        return x.split(self.widths, 1) if self.pieces else []

    def join(self, outs: Sequence[Tensor], like: Tensor) -> Tensor:
        """The pieces' outputs [B, width, ...] -> [B, T, ...] in the dtype of ``like``, zero where no token is."""
        if not outs:
            return like.new_zeros(like.shape)
        out = outs[0] if len(outs) == 1 else torch.cat(list(outs), 1)
        if self.inverse is not None:
            out = take(out, self.inverse)
            out = out.masked_fill(~self.real.view(*self.real.shape, *[1] * (out.dim() - 2)), 0)
        return out


in_first_pass = ContextVar("in_first_pass", default=False)  # whether what is kept for the backward is thrown away


@contextmanager
def _first_pass():
    token = in_first_pass.set(True)
    try:
        yield
    finally:
        in_first_pass.reset(token)


def in_pieces(
    step: Callable[..., tuple[Tensor, Any]], inputs: Sequence[Tensor | None], state: Any, chunk_size: int
) -> tuple[Tensor, Any]:
    """``step(*inputs, state) -> (out, state)``, a long call piece by piece: in the caches, in a short one's memory.

    The backward works each piece out again from its inputs and the state it began with, which alone are kept.

    Args:
        inputs: [B, T, ...], or None for every piece.
        chunk_size: pieces are whole chunks.
    """
    tokens, length, outs = PIECE_CUDA if inputs[0].is_cuda else PIECE, inputs[0].shape[1], []  # type: ignore[union-attr]
    size = max(1, tokens // chunk_size) * chunk_size
    if length <= tokens * (1 + torch.is_grad_enabled()):
        return step(*inputs, state)
    cut = [[None] * -(-length // size) if x is None else x.split(size, 1) for x in inputs]
    again: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if not torch.compiler.is_compiling():
        again["context_fn"] = lambda: (_first_pass(), nullcontext())
    for piece in zip(*cut, strict=True):
        if torch.is_grad_enabled():
            out, state = checkpoint(step, *piece, state, **again)  # type: ignore[misc]
        else:
            out, state = step(*piece, state)
        outs.append(out)
    return torch.cat(outs, 1), state
