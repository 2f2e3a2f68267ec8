"""The memory network: a small MLP whose linear maps are the fast weights."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from titans.memory.activations import (
    ACTIVATIONS,
    Activation,
    at_least_float32,
    layer_norm,
    norm_curvature,
    norm_slope,
)

Linear = Callable[[int, Tensor], Tensor]


@dataclass(frozen=True)
class MemoryMLP:
    """The memory network, ``M(x) = x + norm(W_L act(... act(W_1 x)))`` (arXiv 2501.00663, section 3.1), and its errors.

    Args:
        depth: number of linear maps L, 1 to 4.
        expansion: hidden width over ``head_dim``.
        activation: ``"gelu"`` (exact), ``"silu"`` or ``"relu"``, between the linear maps.
        residual: add the input to the output.
        norm: LayerNorm before the residual; its gain and bias are slow (ordinary learned) parameters.
        norm_eps: added to the variance in that norm.
        online: take every gradient at the memory as it stands, not as its chunk began: any ``chunk_size`` gives, in
            parallel, what 1 gives. Needs ``depth=1`` and ``norm=False``.

    To keep facts apart (docs/decisions.md): ``depth=1, residual=False, norm=False, online=True``, in a ``NeuralMemory``
    with ``skip=False``, whose defaults of the largest theta and eta keep it from swinging up beyond all bounds.

    Its weights are one tuple: the linear maps ``[..., d_in, d_out]`` in order, then, when ``norm``, optionally gain and
    bias ``[..., D]``.
    """

    depth: int = 2
    expansion: float = 4.0
    activation: str = "gelu"
    residual: bool = True
    norm: bool = True
    norm_eps: float = 1e-5
    online: bool = False

    def __post_init__(self):
        if not isinstance(self.depth, int) or not 1 <= self.depth <= 4:
            raise ValueError(f"depth must be 1, 2, 3 or 4, got {self.depth!r}")
        for name in ("expansion", "norm_eps"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not 0 < value < math.inf:
                raise ValueError(f"{name} must be positive, got {value!r}; use a number")
        for name in ("residual", "norm", "online"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if self.online and (self.norm or self.depth > 1):
            got = f"depth={self.depth} and norm={self.norm}"
            raise ValueError(f"online=True needs a memory that is linear, depth=1 and norm=False, got {got}")
        if self.activation not in list(ACTIVATIONS):
            raise ValueError(f"activation must be one of {sorted(ACTIVATIONS)}, got {self.activation!r}")

    def shapes(self, dim: int) -> list[tuple[int, int]]:
        """(d_in, d_out) of every linear map for inputs of width ``dim``."""
        hidden = max(1, round(dim * self.expansion))
        widths = [dim] + [hidden] * (self.depth - 1) + [dim]
        return list(pairwise(widths))

    def init(self, heads: int, dim: int) -> tuple[Tensor, ...]:
        """A start M_0 for ``heads`` memories: maps [heads, d_in, d_out], then gain and bias [heads, dim] with ``norm``.

        The norm makes the network blind to the scale of its maps, so that their scale sets how fast they learn: with
        unit variance, one token's step moves the output by a fraction of theta, whatever the widths. Without norm the
        last map is 0, so that what is read is what was written (docs/decisions.md), and the others have variance
        1 / hidden, for small results.
        """
        scale = 1.0 if self.norm else max(1, round(dim * self.expansion)) ** -0.5
        maps = [torch.randn(heads, i, o) * scale for i, o in self.shapes(dim)]
        if not self.norm:
            maps[-1].zero_()
            return tuple(maps)
        return (*maps, torch.ones(heads, dim), torch.zeros(heads, dim))

    def split(self, weights: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], tuple[Tensor, Tensor] | None]:
        """The linear maps, and (gain, bias) if they are among ``weights``."""
        maps, affine = tuple(weights[: self.depth]), tuple(weights[self.depth :])
        return maps, (affine if affine else None)  # type: ignore[return-value]

    @property
    def functions(self) -> Activation:
        """The activation and its derivatives."""
        return ACTIVATIONS[self.activation]

    def forward(self, x: Tensor, linear: Linear, affine: tuple[Tensor, Tensor] | None) -> Tensor:
        """M(x) for x [..., D], where ``linear(i, h)`` applies the i-th linear map however the caller holds it."""
        activation, h = self.functions.value, x
        for layer in range(self.depth - 1):
            h = activation(linear(layer, h))
        out = linear(self.depth - 1, h)
        return self.finish(x, out, affine)

    def finish(self, x: Tensor, out: Tensor, affine: tuple[Tensor, Tensor] | None) -> Tensor:
        """Norm and residual after the last linear map: its output ``out`` at the input ``x``, both [..., D]."""
        if self.norm:
            out = self._affine(F.layer_norm(out, out.shape[-1:], eps=self.norm_eps), affine)
        return x + out if self.residual else out

    def apply(self, weights: Sequence[Tensor], x: Tensor) -> Tensor:
        """M(x) for x [..., T, D] and weights [..., d_in, d_out] (gain and bias [..., D])."""
        maps, affine = self.split(weights)
        affine = affine and (affine[0].unsqueeze(-2), affine[1].unsqueeze(-2))
        return self.forward(x, lambda i, h: h @ maps[i], affine)

    def trace(
        self, maps: Sequence[Tensor], affine: tuple[Tensor, Tensor] | None, k: Tensor, v: Tensor
    ) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Forward of the keys and backward of ``||M(k) - v||^2``, all tokens at the same weights, in closed form.

        Args:
            maps: linear maps [..., d_in, d_out]; affine: gain and bias, broadcastable to k.
            k, v: keys and values [..., T, D].

        Returns:
            The inputs x^i [..., T, d_in] of every map, the loss's gradients d^i [..., T, d_out] at every map's output,
            so that the gradient of token t at map i is the outer product of x^i_t and d^i_t, and ``M(k) - v``.
        """
        value, slope, _ = self.functions
        inputs, outputs = [k], []
        for w in maps[:-1]:
            outputs.append(inputs[-1] @ w)
            inputs.append(value(outputs[-1]))
        offset, gain = self.offset(k, v, affine), affine and affine[0]
        signal, error, _ = self.output_signal(inputs[-1] @ maps[-1], gain, offset)
        signals = [signal]
        for w, z in zip(reversed(maps[1:]), reversed(outputs), strict=True):
            signals.append(slope(signals[-1] @ w.mT, z))
        return inputs, signals[::-1], error

    def offset(self, k: Tensor, v: Tensor, affine: tuple[Tensor, Tensor] | None) -> Tensor:
        """What the error ``M(k) - v`` holds besides the (normalised, scaled) output of the last map."""
        offset = at_least_float32(k) - at_least_float32(v) if self.residual else -at_least_float32(v)
        return offset if affine is None else offset + affine[1]

    def _error(self, out: Tensor, gain: Tensor | None, offset: Tensor, norm: Sequence[Tensor]) -> Tensor:
        unit = norm[0] if self.norm else at_least_float32(out)
        return offset + unit if gain is None else torch.addcmul(offset, unit, gain)

    def output_signal(
        self, out: Tensor, gain: Tensor | None, offset: Tensor
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """Gradient of the loss at the last map's output ``out`` [..., D], the error, and what the norm made of that."""
        wide = at_least_float32(out)
        norm = layer_norm(wide, self.norm_eps) if self.norm else ()
        error = self._error(out, gain, offset, norm)
        grad = 2 * error
        if self.norm:
            grad = norm_slope(grad if gain is None else grad * gain, wide, norm)
        return grad.to(out.dtype), error, norm

    def output_signal_backward(
        self, out: Tensor, gain: Tensor | None, offset: Tensor, norm: Sequence[Tensor], signal: Tensor,
        gsignal: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
        """Gradients of out, offset [G, T, D] and gain [G, 1, D] from that of ``output_signal``'s first result."""
        wide, signal, gsignal = (at_least_float32(t) for t in (out, signal, gsignal))
        if not self.norm:
            gout = 2 * gsignal
            return gout.to(out.dtype), gout, None
        error, scale = self._error(out, gain, offset, norm), 2.0 if gain is None else 2 * gain
        grad, ggrad = scale * error, norm_slope(gsignal, wide, norm)
        gerror = scale * ggrad
        gout = norm_curvature(gsignal, grad, wide, norm, signal, gerror if gain is None else gain * gerror)
        ggain = None if gain is None else torch.addcmul(gerror * norm[0], error, ggrad, value=2).sum(1, keepdim=True)
        return gout.to(out.dtype), gerror, ggain

    @staticmethod
    def _affine(x: Tensor, affine: tuple[Tensor, Tensor] | None) -> Tensor:
        return x if affine is None else (x * affine[0] + affine[1]).to(x.dtype)


def safe_sqrt(x: Tensor) -> Tensor:
    """Square root with gradient 0 at 0."""
    return x.clamp_min(torch.finfo(x.dtype).tiny).sqrt()
