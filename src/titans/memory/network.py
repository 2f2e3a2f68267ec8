"""The memory network: a small MLP whose linear maps are the fast weights."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

Linear = Callable[[int, Tensor], Tensor]


def _gelu(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    cdf = 0.5 * (1 + torch.erf(z * math.sqrt(0.5)))
    pdf = torch.exp(-0.5 * z * z) * (1 / math.sqrt(2 * math.pi))
    return z * cdf, torch.addcmul(cdf, z, pdf), pdf * (2 - z * z)


def _silu(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    s = torch.sigmoid(z)
    return z * s, s * (1 + z * (1 - s)), s * (1 - s) * (2 + z * (1 - 2 * s))


def _relu(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return F.relu(z), (z > 0).to(z.dtype), torch.zeros_like(z)


# name -> (value; value with its first and second derivative)
ACTIVATIONS = {"gelu": (F.gelu, _gelu), "silu": (F.silu, _silu), "relu": (F.relu, _relu)}


class _ActivationAndSlope(torch.autograd.Function):
    """Value and first derivative of an activation, with the second derivative as the backward of the slope."""

    @staticmethod
    def forward(ctx, z: Tensor, name: str):  # type: ignore[override]
        value, slope, _ = ACTIVATIONS[name][1](z)
        ctx.save_for_backward(z)
        ctx.name = name
        return value, slope

    @staticmethod
    def backward(ctx, grad_value: Tensor, grad_slope: Tensor):  # type: ignore[override]
        _, slope, curvature = ACTIVATIONS[ctx.name][1](*ctx.saved_tensors)  # by plain operations: differentiable again
        return torch.addcmul(grad_value * slope, grad_slope, curvature), None


@dataclass(frozen=True)
class MemoryMLP:
    """Shape of the memory network, ``M(x) = x + norm(W_L act(... act(W_1 x)))`` (arXiv 2501.00663, section 3.1).

    Args:
        depth: number of linear maps L, 1 to 4.
        expansion: hidden width over ``head_dim``.
        activation: ``"gelu"`` (exact), ``"silu"`` or ``"relu"``, between the linear maps.
        residual: add the input to the output.
        norm: LayerNorm before the residual; its gain and bias are slow (ordinary learned) parameters.
        norm_eps: added to the variance in that norm.

    Its weights are one tuple: the linear maps ``[..., d_in, d_out]`` in order, then, when ``norm``, optionally gain and
    bias ``[..., D]``.
    """

    depth: int = 2
    expansion: float = 4.0
    activation: str = "gelu"
    residual: bool = True
    norm: bool = True
    norm_eps: float = 1e-5

    def __post_init__(self):
        if not 1 <= self.depth <= 4:
            raise ValueError(f"depth must be 1, 2, 3 or 4, got {self.depth}")
        if self.expansion <= 0:
            raise ValueError(f"expansion must be positive, got {self.expansion}")
        if self.activation not in ACTIVATIONS:
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
        maps have variance 1 / hidden, for small outputs.
        """
        scale = 1.0 if self.norm else max(1, round(dim * self.expansion)) ** -0.5
        maps = [torch.randn(heads, i, o) * scale for i, o in self.shapes(dim)]
        affine = [torch.ones(heads, dim), torch.zeros(heads, dim)] if self.norm else []
        return tuple(maps + affine)

    def split(self, weights: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], tuple[Tensor, Tensor] | None]:
        """The linear maps, and (gain, bias) if they are among ``weights``."""
        maps, affine = tuple(weights[: self.depth]), tuple(weights[self.depth :])
        return maps, (affine if affine else None)  # type: ignore[return-value]

    def forward(self, x: Tensor, linear: Linear, affine: tuple[Tensor, Tensor] | None) -> Tensor:
        """M(x) for x [..., D], where ``linear(i, h)`` applies the i-th linear map however the caller holds it."""
        activation, h = ACTIVATIONS[self.activation][0], x
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
            so that the gradient of token t at map i is the outer product of x^i_t and d^i_t, and the loss [..., T].
        """
        inputs, slopes = [k], []
        for w in maps[:-1]:
            x, slope = _ActivationAndSlope.apply(inputs[-1] @ w, self.activation)  # type: ignore[misc]
            inputs.append(x)
            slopes.append(slope)
        signal, loss = self.output_signal(inputs[-1] @ maps[-1], affine, k, v)
        signals = [signal]
        for w, slope in zip(reversed(maps[1:]), reversed(slopes), strict=True):
            signals.append((signals[-1] @ w.mT) * slope)
        return inputs, signals[::-1], loss

    def output_signal(self, out: Tensor, affine, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Gradient of the loss at the last map's output, and the loss, through residual and LayerNorm."""
        dtype, out, target = k.dtype, _at_least_float32(out), _at_least_float32(v)
        if self.residual:
            target = target - k
        if not self.norm:
            error = out - target
            return (2 * error).to(dtype), error.square().sum(-1)
        centred = out - out.mean(-1, keepdim=True)
        rstd = torch.rsqrt(centred.square().mean(-1, keepdim=True) + self.norm_eps)
        unit = centred * rstd
        error = self._affine(unit, affine) - target
        grad = 2 * error * affine[0] if affine else 2 * error
        grad = grad - grad.mean(-1, keepdim=True) - unit * (grad * unit).mean(-1, keepdim=True)
        return (rstd * grad).to(dtype), error.square().sum(-1)

    def output_signal_backward(
        self, out: Tensor, affine: tuple[Tensor, Tensor] | None, k: Tensor, v: Tensor, gd: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        """Gradients of out, k, v [G, T, D] and affine from the gradient ``gd`` of ``output_signal``'s first result."""
        dtype, out, target, gd = k.dtype, _at_least_float32(out), _at_least_float32(v), _at_least_float32(gd)
        if self.residual:
            target = target - k
        gaffine: list[Tensor] = []
        if not self.norm:
            gout = 2 * gd
            gtarget = -gout
        else:
            centred = out - out.mean(-1, keepdim=True)
            rstd = torch.rsqrt(centred.square().mean(-1, keepdim=True) + self.norm_eps)
            unit = centred * rstd
            error = self._affine(unit, affine) - target
            gain = affine[0] if affine else 1.0
            grad = 2 * error * gain
            share, gshare = (grad * unit).mean(-1, keepdim=True), (gd * unit).mean(-1, keepdim=True)
            ggrad = rstd * (gd - gd.mean(-1, keepdim=True) - unit * gshare)
            gerror = 2 * gain * ggrad
            gunit = gain * gerror - rstd * (share * gd + gshare * grad)
            along = (gd * (grad - unit * share)).mean(-1, keepdim=True) - gd.mean(-1, keepdim=True) * grad.mean(
                -1, keepdim=True
            )
            gout = rstd * (gunit - unit * (rstd * along + (gunit * unit).mean(-1, keepdim=True)))
            gout = gout - gout.mean(-1, keepdim=True)
            gtarget = -gerror
            if affine:
                gaffine = [(gerror * unit + 2 * error * ggrad).sum(1, keepdim=True), gerror.sum(1, keepdim=True)]
        gtarget = gtarget.to(dtype)
        return gout.to(dtype), -gtarget if self.residual else torch.zeros_like(k), gtarget, gaffine

    @staticmethod
    def _affine(x: Tensor, affine: tuple[Tensor, Tensor] | None) -> Tensor:
        return x if affine is None else (x * affine[0] + affine[1]).to(x.dtype)


def _at_least_float32(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def safe_sqrt(x: Tensor) -> Tensor:
    """Square root with gradient 0 at 0."""
    return x.clamp_min(torch.finfo(x.dtype).tiny).sqrt()
