"""What a memory's layer does head by head before and behind the memory, in PyTorch's operations or in C."""

import torch
import torch.nn.functional as F
from torch import Tensor

from titans.layers.native import heads as native


def convolve(
    x: Tensor, before: Tensor, weight: Tensor, heads: tuple[int, int, int], whole: bool, backend: str
) -> tuple[Tensor, ...]:
    """Causal depthwise convolution and silu, by head; queries and keys on the unit sphere.

    Args:
        x: [B, T, channels], those of the queries' heads, then of the keys' and the values'.
        before: [B, size - 1, channels], the tokens before them.
        weight: [size, channels].
        heads: numbers of heads of queries, keys and values, all of one width D.
        whole: whether what becomes queries, keys and values is wanted, too.
        backend: of the memory; "auto" and "native" take the C code where it fits.

    Returns:
        q, k, v [B, T, its heads, D] in the dtype of x, and, with ``whole``, [B, T, channels] before the unit sphere.
    """
    D = weight.shape[1] // sum(heads)
    if native.supported(backend, D, x):
        return native.convolve(x, before, weight, heads, whole)
    y = F.silu(_correlate(torch.cat([before.to(x.dtype), x], 1), weight.to(x.dtype)))
    q, k, v = y.unflatten(-1, (-1, D)).split(heads, -2)
    return (unit(q), unit(k), v, *([y] if whole else []))


def _correlate(x: Tensor, weight: Tensor) -> Tensor:
    """x [B, T + size - 1, channels] with weight [size, channels] -> [B, T, channels]."""
    if x.shape[1] <= len(weight):  # less than a convolution's own start
        return (x * weight).sum(1, keepdim=True, dtype=x.dtype) if x.shape[1] == len(weight) else x[:, :0]
    kernel = weight.t().view(weight.shape[1], 1, 1, len(weight))
    # over [B, channels, 1, T], channels last: nothing is moved
    return F.conv2d(x.mT.unsqueeze(2), kernel, groups=weight.shape[1]).squeeze(2).mT


def unit(x: Tensor) -> Tensor:
    """x [..., D] on the unit sphere."""
    return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=x.dtype).clamp_min(1e-6)


def gate_reads(
    reads: Tensor, values: Tensor | None, skip: Tensor | None, weight: Tensor, gate: Tensor, eps: float, backend: str
) -> Tensor:
    """``LayerNorm(reads + skip * values) * silu(gate)``, the norm over every head.

    Args:
        reads: [B, T, H, D].
        values: [B, T, H, D], weighted by ``skip`` [H, D], of the same dtype as ``reads``; None for none.
        weight: [D], of the norm, whose ``eps`` is given.
        gate: [B, T, H * D].

    Returns:
        [B, T, H * D] in the dtype of the gate.
    """
    if native.supported(backend, reads.shape[-1], reads, values, gate):
        return native.gate_reads(reads, values, skip, weight, gate, eps)
    if values is not None and skip is not None:
        reads = reads + skip * values
    return (F.layer_norm(reads, weight.shape, weight, None, eps).flatten(-2) * F.silu(gate)).to(gate.dtype)
