"""The frame of all four architectures: pre-norm, residual, a sequence mixer and a feed-forward part."""

from typing import Any

import torch
from torch import Tensor, nn

from titans.layers.common import FeedForward, require_finite
from titans.memory import State
from titans.memory.pieces import align, check_mask, take


class Block(nn.Module):
    """``x + mix(norm(x))``, then ``x + feed_forward(norm(x))``; subclasses write ``mix``.

    ``forward(x, state=None, mask=None, begins=None) -> (y, state)`` with x, y [B, T, dim], ``state`` what an earlier
    call returned, ``mask`` [B, T] zero at padding, which may stand anywhere and changes nothing, ``begins`` [B] true
    where a row does not go on from ``state`` but begins anew.
    """

    def __init__(self, dim: int, intermediate_size: int):
        super().__init__()
        self.mix_norm = nn.LayerNorm(dim, eps=1e-6, bias=False)
        self.feed_forward_norm = nn.LayerNorm(dim, eps=1e-6, bias=False)
        self.feed_forward = FeedForward(dim, intermediate_size)

    def forward(
        self, x: Tensor, state: Any = None, mask: Tensor | None = None, begins: Tensor | None = None
    ) -> tuple[Tensor, State]:
        mask = check_mask(mask, *x.shape[:2])
        require_finite(x, mask)
        if state is None:
            state = self.initial_state(x.shape[0])
        elif begins is not None:  # also where no row does: whatever is learned has a part in every step
            state = state.where(~begins, self.initial_state(x.shape[0]))
        if mask is None:
            y, state = self.mix(self.mix_norm(x), state, None)
        else:
            index, lengths, undo = align(mask)
            x = x.masked_fill(~mask.unsqueeze(-1), 0)
            y, state = self.mix(take(self.mix_norm(x), index), state, lengths)
            y = take(y, undo)
        x = x + y
        return x + self.feed_forward(self.feed_forward_norm(x)), state

    def initial_state(self, batch: int) -> State:
        """The state before the first token of ``batch`` sequences."""
        raise NotImplementedError

    def mix(self, x: Tensor, state: Any, lengths: Tensor | None) -> tuple[Tensor, State]:
        """Mixes along the sequence: x [B, T, dim] with real tokens to the left, ``lengths`` [B] of them (None: T)."""
        raise NotImplementedError


def prefix_mask(x: Tensor, lengths: Tensor | None) -> Tensor | None:
    """Mask [B, T] of left-aligned rows."""
    if lengths is None:
        return None
    return torch.arange(x.shape[1], device=x.device) < lengths.unsqueeze(1)
