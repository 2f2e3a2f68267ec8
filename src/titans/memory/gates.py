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
    ``read`` (beta, f) [..., C, 2]: weights of the chunk's first memory and momentum in the memory at token t.
    ``to_state`` [..., C, 2]: weight of the gradient of token s in memory and momentum at the chunk's end.
    ``end`` (beta_C, f_C, m_C) [..., 3]: what the end keeps of the memory, takes of the momentum, keeps of the momentum.
    """

    write: Tensor
    read: Tensor
    to_state: Tensor
    end: Tensor


def chunk_masks(gates: Tensor) -> ChunkMasks:
    """Masks of one chunk from ``gates`` [..., C, 3] = (lr, log_momentum, log_retention)."""
    lr, log_momentum, log_retention = gates.unbind(-1)
    retention, momentum = segment_sum(log_retention).exp(), segment_sum(log_momentum).exp()
    keep = log_retention.cumsum(-1).exp().unsqueeze(-1)
    kept_momentum = log_momentum.cumsum(-1).exp().unsqueeze(-1)
    both = retention @ torch.cat([momentum, kept_momentum], -1)
    write, read = both[..., :-1] * lr.unsqueeze(-2), torch.cat([keep, both[..., -1:]], -1)
    return ChunkMasks(
        write=write,
        read=read,
        to_state=torch.stack([write[..., -1, :], momentum[..., -1, :] * lr], -1),
        end=torch.cat([read[..., -1, :], kept_momentum[..., -1, :]], -1),
    )
