"""What a memory of one map needs to be online in chunks, ``MemoryMLP(online=True)`` (README.md, section 2)."""

import torch
from torch import Tensor

from titans.memory.gates import ChunkMasks


def before(masks: ChunkMasks) -> tuple[Tensor, Tensor]:
    """``write`` and ``read`` one token earlier: the memory before each token is written."""
    nothing, untouched = torch.zeros_like(masks.write[..., :1, :]), torch.zeros_like(masks.read[..., :1, :])
    untouched[..., 0] = 1
    write = torch.cat([nothing, masks.write[..., :-1, :]], -2)
    return write, torch.cat([untouched, masks.read[..., :-1, :]], -2)


def settle(inverse: Tensor, signal: Tensor) -> Tensor:
    """The signals [G, C, D] that solve the system, from those on its right."""
    return torch.bmm(inverse, signal.to(inverse.dtype)).to(signal.dtype)


def inverse(k: Tensor, write: Tensor) -> Tensor:
    """[..., C, C], of the system that a chunk's signals d solve: d_t + 2 sum_{s<t} write[t, s] (k_t . k_s) d_s.

    On the right of it stand the signals that token t has from a memory without the chunk's tokens.
    """
    system = 2 * write * (k @ k.mT)
    unit = torch.eye(system.shape[-1], dtype=system.dtype, device=system.device).expand_as(system)
    return torch.linalg.solve_triangular(system, unit, upper=False, unitriangular=True)
