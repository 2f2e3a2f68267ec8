"""Decay masks of one chunk, from gates in log space (README.md, section 2)."""

from typing import NamedTuple

import torch
from torch import Tensor


def segment_sum(x: Tensor) -> Tensor:
    """``out[..., t, j] = x[j+1] + ... + x[t]`` for t >= j, -inf above the diagonal; x [..., C] -> [..., C, C].

    Masks first and accumulates then: differences of one long cumulative sum would lose digits.
    """
    size = x.shape[-1]
    lower = torch.ones(size, size, dtype=torch.bool, device=x.device).tril()
    spread = x.unsqueeze(-1).expand(*x.shape, size).masked_fill(~lower.tril(-1), 0)
    return spread.cumsum(-2).masked_fill(~lower, -torch.inf)


class ChunkMasks(NamedTuple):
    """What a chunk's gates say of its tokens; C is the chunk's length, symbols as in README.md.

    ``write`` A [..., C, C]: weight of the gradient of token s in the memory at token t.
    ``keep`` beta [..., C, 1], ``carry`` f [..., C, 1]: weights of the chunk's first memory and momentum at token t.
    ``momentum_write`` [..., C, 1], ``momentum_keep`` [..., 1, 1]: the same for the momentum at the chunk's end.
    """

    write: Tensor
    keep: Tensor
    carry: Tensor
    momentum_write: Tensor
    momentum_keep: Tensor


def chunk_masks(gates: Tensor) -> ChunkMasks:
    """Masks of one chunk from ``gates`` [..., C, 3] = (lr, log_momentum, log_retention)."""
    lr, log_momentum, log_retention = gates.unbind(-1)
    retention, momentum = segment_sum(log_retention).exp(), segment_sum(log_momentum).exp()
    keep = log_retention.cumsum(-1).exp().unsqueeze(-1)
    kept_momentum = log_momentum.cumsum(-1).exp().unsqueeze(-1)
    both = retention @ torch.cat([momentum, kept_momentum], -1)
    return ChunkMasks(
        write=both[..., :-1] * lr.unsqueeze(-2),
        keep=keep,
        carry=both[..., -1:],
        momentum_write=(momentum[..., -1, :] * lr).unsqueeze(-1),
        momentum_keep=kept_momentum[..., -1:, :],
    )
