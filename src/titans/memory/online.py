"""Signals of the last map at the memory as it stands, ``MemoryMLP(online=True)`` (README.md, section 2).

With the last map's inputs x at the keys, its signals d0 at the memory M with which the chunk began and M_{t-1} before
token t, the signals d are d_t = d0_t + 2 x_t (M_{t-1} - M). What the chunk's own tokens have written is in M_{t-1}, so
this is a triangular system.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from titans.memory.gates import ChunkMasks, narrow, weights_grad, widen


class Since(NamedTuple):
    """The memory before each token is written, less that with which the chunk began.

    ``write`` [..., C, C]: weights of these tokens' gradients in it.
    ``read`` [..., C, 2]: weights of the map and the momentum with which the chunk began.
    """

    write: Tensor
    read: Tensor


def before(masks: ChunkMasks) -> tuple[Tensor, Tensor]:
    """``write`` and ``read`` one token earlier: of the memory before each token is written."""
    nothing, untouched = torch.zeros_like(masks.write[..., :1, :]), torch.zeros_like(masks.read[..., :1, :])
    untouched[..., 0] = 1
    write = torch.cat([nothing, masks.write[..., :-1, :]], -2)
    return write, torch.cat([untouched, masks.read[..., :-1, :]], -2)


def since_start(write: Tensor, read: Tensor) -> Since:
    """Of ``before``'s results, ``read`` counted from the chunk's start."""
    return Since(write, torch.cat([read[..., :1] - 1, read[..., 1:]], -1))


def solve(system: Tensor, right: Tensor, transposed: bool = False) -> Tensor:
    """y [G, C, D] of (1 + system) y = right, system [G, C, C] strictly lower triangular, or of its transpose."""
    system = system.mT if transposed else system
    return torch.linalg.solve_triangular(system, right.to(system.dtype), upper=transposed, unitriangular=True)


class Kept(NamedTuple):
    """What ``settle`` leaves for its backward."""

    both: Tensor  # the first map: its inputs widened; another: its inputs through map and momentum
    raw: Tensor  # products of the inputs
    settled: Tensor


def settle(x: Tensor, signal: Tensor, flat: Tensor, first: bool, since: Since) -> tuple[Tensor, Kept]:
    """The signals [G, C, D] as they stand, from those at the chunk's start.

    ``flat``: the last map with its momentum as ``scan`` holds it, [G, 2 d_in, D] if it is the first, [G, 2 D, d_in].
    """
    if first:
        both = widen(x, since.read)
        moved = torch.bmm(both, flat)
    else:
        both = torch.bmm(x, flat.mT)
        moved = narrow(both, since.read)
    raw = torch.bmm(x, x.mT)
    settled = solve(2 * since.write * raw, signal + 2 * moved)
    return settled.to(signal.dtype), Kept(both, raw, settled)


def settle_backward(
    gsignal: Tensor, x: Tensor, flat: Tensor, first: bool, since: Since, kept: Kept, gx: Tensor, gflat: Tensor
) -> tuple[Tensor, Since]:
    """Gradients of the signals at the chunk's start and of ``since``; adds those of ``x`` and ``flat``."""
    dtype = x.dtype
    g = solve(2 * since.write * kept.raw, gsignal, transposed=True)
    gsystem = -2 * torch.bmm(g, kept.settled.mT)
    graw = (gsystem * since.write).to(dtype)
    gx.baddbmm_(graw + graw.mT, x)
    gmoved = (2 * g).to(dtype)
    if first:
        gwide = torch.bmm(gmoved, flat.mT)
        gx += narrow(gwide, since.read)
        gread = weights_grad(gwide, x)
        gflat += torch.bmm(kept.both.mT, gmoved)
    else:
        gread = weights_grad(kept.both, gmoved)
        gwide = widen(gmoved, since.read)
        gx.baddbmm_(gwide, flat)
        gflat += torch.bmm(gwide.mT, x)
    return g, Since(gsystem * kept.raw, gread)
