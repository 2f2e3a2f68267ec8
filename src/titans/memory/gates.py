"""Decay masks of one chunk, from gates in log space, and how a token's two weights meet it (README.md, section 2)."""

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
    """What the gates of C tokens in a row say of them; symbols as in README.md.

    ``write`` A [..., C, C]: weight of the gradient of token s in the memory at token t.
    ``read`` (beta, f) [..., C, 2]: weights of the first memory and momentum in the memory at token t.
    ``to_state`` [..., C, 2]: weight of the gradient of token s in memory and momentum after the last token.
    ``transition`` ((beta, f), (0, m)) [..., 2, 2]: what first memory and momentum become after the last token.
    """

    write: Tensor
    read: Tensor
    to_state: Tensor
    transition: Tensor


def chunk_masks(gates: Tensor, last: Tensor | None = None) -> ChunkMasks:
    """Masks of ``gates`` [..., C, 3] = (lr, log_momentum, log_retention).

    ``last`` [...] is the last real token, where those behind it are padding.
    """
    lr, log_momentum, log_retention = gates.unbind(-1)
    if gates.shape[-2] == 1:  # one token: the recurrence itself
        write, read = lr.unsqueeze(-1), torch.stack([log_retention, log_momentum], -1).exp()
        to_state, kept = write.expand(*lr.shape, 2), read[..., 0, 1:]
    else:
        retention, momentum = segment_sum(log_retention).exp(), segment_sum(log_momentum).exp()
        keep, kept_momentum = (g.cumsum(-1).exp().unsqueeze(-1) for g in (log_retention, log_momentum))
        both = retention @ torch.cat([momentum, kept_momentum], -1)
        write, read = both[..., :-1] * lr.unsqueeze(-2), torch.cat([keep, both[..., -1:]], -1)
        to_state = torch.stack([_row(write, last), _row(momentum, last) * lr], -1)
        kept = _row(kept_momentum, last)
    first = _row(read, last)
    transition = torch.stack([first, torch.cat([torch.zeros_like(kept), kept], -1)], -2)
    return ChunkMasks(write, read, to_state, transition)


def widen(x: Tensor, mix: Tensor) -> Tensor:
    """x [..., C, d] times each of its tokens' two weights [..., C, 2], side by side: [..., C, 2 d]."""
    return (x.unsqueeze(-2) * mix.unsqueeze(-1)).flatten(-2).to(x.dtype)


def narrow(pair: Tensor, mix: Tensor) -> Tensor:
    """The transpose of ``widen``: [..., C, 2 d] -> [..., C, d], the two halves weighted and added."""
    a, b = pair.chunk(2, -1)
    return torch.addcmul(a * mix[..., :1], b, mix[..., 1:]).to(pair.dtype)


def weights_grad(pair: Tensor, x: Tensor) -> Tensor:
    """Gradient of the two weights [..., C, 2], where x [..., C, d] met the pair [..., C, 2 d] through them."""
    return (pair.unflatten(-1, (2, -1)) * x.unsqueeze(-2)).sum(-1, dtype=torch.promote_types(x.dtype, torch.float32))


def _row(x: Tensor, index: Tensor | None) -> Tensor:
    """``x[..., index, :]`` for x [..., C, n]; the last row for None."""
    if index is None:
        return x[..., -1, :]
    return x.gather(-2, index[..., None, None].expand(*index.shape, 1, x.shape[-1])).squeeze(-2)
