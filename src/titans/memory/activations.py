"""What stands between and behind a memory's maps, with the derivatives that a chunk's backward asks for."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Activation(NamedTuple):
    """f between two maps, number by number."""

    value: Callable[[Tensor], Tensor]  # z -> f(z)
    slope: Callable[[Tensor, Tensor], Tensor]  # g, z -> g f'(z)
    second: Callable[[Tensor], Tensor]  # z -> f''(z)


def _gelu_second(z: Tensor) -> Tensor:
    return torch.exp(-0.5 * z * z) * (2 - z * z) * (1 / math.sqrt(2 * math.pi))


def _silu_slope(g: Tensor, z: Tensor) -> Tensor:
    s = torch.sigmoid(z)  # aten's own cannot be differentiated again
    return g * s * (1 + z * (1 - s))


def _silu_second(z: Tensor) -> Tensor:
    s = torch.sigmoid(z)
    return s * (1 - s) * (2 + z * (1 - 2 * s))


ACTIVATIONS = {
    "gelu": Activation(F.gelu, torch.ops.aten.gelu_backward, _gelu_second),
    "silu": Activation(F.silu, _silu_slope, _silu_second),
    "relu": Activation(F.relu, lambda g, z: torch.ops.aten.threshold_backward(g, z, 0), torch.zeros_like),
}


def at_least_float32(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def layer_norm(x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """x [..., D] with mean 0 and variance 1; its mean and one over its deviation."""
    return torch.native_layer_norm(x, x.shape[-1:], None, None, eps)


def norm_slope(g: Tensor, x: Tensor, norm: Sequence[Tensor]) -> Tensor:
    """J g of ``layer_norm`` at x; J is symmetric."""
    mean, rstd = norm[1:]
    wanted = [True, False, False]
    return torch.ops.aten.native_layer_norm_backward(g, x, x.shape[-1:], mean, rstd, None, None, wanted)[0]


def norm_curvature(t: Tensor, g: Tensor, x: Tensor, norm: Sequence[Tensor], signal: Tensor, gunit: Tensor) -> Tensor:
    """Gradient of t . J g of ``layer_norm`` at x; ``signal``: J g; ``gunit``: what comes to its result besides."""
    unit, _, rstd = norm
    share, t_share = (g * unit).mean(-1, keepdim=True), (t * unit).mean(-1, keepdim=True)
    gx = norm_slope(gunit - rstd * torch.addcmul(share * t, t_share, g), x, norm)
    return gx.addcmul_(unit, rstd * (t * signal).mean(-1, keepdim=True), value=-1)
