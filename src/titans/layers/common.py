"""What several layers share."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titans.memory.pieces import take


def require_finite(x: Tensor, mask: Tensor | None) -> None:
    """ValueError that names the first NaN or infinity among the real tokens of x [B, T, dim].

    Not where gradients are recorded: there the loss tells, and processes that train together must not part ways.
    """
    if x.requires_grad:
        return
    if torch.compiler.is_compiling() or (x.is_cuda and torch.cuda.is_current_stream_capturing()):
        return
    if math.isfinite(x.detach().sum(dtype=torch.promote_types(x.dtype, torch.float32)).item()):
        return  # one pass; only where the sum is not finite it matters why
    finite = torch.isfinite(x).all(-1)
    if mask is not None:
        finite = finite | ~mask
    if not finite.all():
        row, token = (~finite).nonzero()[0].tolist()
        raise ValueError(
            f"x holds NaN or infinity, first in row {row} at token {token}; a memory would keep it for ever. "
            "Look for a diverged layer before this one, or mask the token."
        )


class ShortConvolution(nn.Module):
    """Weight and state, its last inputs, of a causal depthwise convolution; ``heads.convolve`` is the convolution."""

    def __init__(self, channels: int, size: int):
        super().__init__()
        if size < 1:
            raise ValueError(f"conv_size must be at least 1, got {size}")
        self.channels, self.size = channels, size
        # No tap before the others: near the identity, key and value of a write would be about the same token
        self.weight = nn.Parameter(torch.empty(size, channels).uniform_(-(size**-0.5), size**-0.5))

    def initial_state(self, batch: int) -> Tensor:
        """Zeros [batch, size - 1, channels]: nothing came before."""
        return self.weight.new_zeros(batch, self.size - 1, self.channels)

    def after(self, x: Tensor, state: Tensor, lengths: Tensor | None) -> Tensor:
        """The state behind x [B, T, channels], rows left-aligned, ``lengths`` [B] of them real (None: all)."""
        tail, state = self.size - 1, state.to(x.dtype)
        if lengths is None:
            recent = torch.cat([state, x[:, max(x.shape[1] - tail, 0) :]], 1)
            return recent[:, recent.shape[1] - tail :].clone()  # no view of more than it holds
        return take(torch.cat([state, x], 1), lengths.unsqueeze(1) + torch.arange(tail, device=x.device))


class FeedForward(nn.Module):
    """SwiGLU, [..., dim] -> [..., dim]."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.up_proj = nn.Linear(dim, 2 * hidden, bias=False)
        self.down_proj = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.up_proj(x).chunk(2, -1)
        return self.down_proj(F.silu(gate) * up)


class GatedProduct(nn.Module):
    """y (x) m of eqs. 25 and 28: both normalised with learned weights, a non-linearity, the product, a projection."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm_y, self.norm_m = nn.LayerNorm(dim, eps=1e-6, bias=False), nn.LayerNorm(dim, eps=1e-6, bias=False)
        self.out_proj = nn.Linear(dim, dim, bias=False)

    def forward(self, y: Tensor, m: Tensor) -> Tensor:
        return self.out_proj(self.product(y, m))

    def product(self, y: Tensor, m: Tensor) -> Tensor:
        """What is projected."""
        return self.norm_y(y) * F.silu(self.norm_m(m))


def persistent_tokens(number: int, dim: int) -> nn.Parameter | None:
    """Learned tokens [number, dim] that stand before every sequence (section 3.3); None for none."""
    if number < 0:
        raise ValueError(f"num_persistent_tokens must be 0 or more, got {number}")
    return nn.Parameter(torch.randn(number, dim)) if number else None
