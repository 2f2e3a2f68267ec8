"""What a memory of one map needs to be online in chunks, ``MemoryMLP(online=True)`` (README.md, section 2)."""

import torch
from torch import Tensor

from titans.memory.gates import ChunkMasks


def before(k: Tensor, masks: ChunkMasks) -> tuple[Tensor, Tensor]:
    """What a chunk's keys k [..., C, D] meet: the memory before each token is written.

    Returns:
        ``masks.read`` one token earlier [..., C, 2], which gives each key's signal from a memory without the chunk's
        tokens; and the inverse [..., C, C] of the system that makes signals d of these, whose rows are
        d_t + 2 sum_{s<t} A[t-1, s] (k_t . k_s) d_s.
    """
    nothing, untouched = torch.zeros_like(masks.write[..., :1, :]), torch.zeros_like(masks.read[..., :1, :])
    untouched[..., 0] = 1
    write = torch.cat([nothing, masks.write[..., :-1, :]], -2)
    system = 2 * write * (k @ k.mT)
    unit = torch.eye(system.shape[-1], dtype=system.dtype, device=system.device).expand_as(system)
    inverse = torch.linalg.solve_triangular(system, unit, upper=False, unitriangular=True)
    return torch.cat([untouched, masks.read[..., :-1, :]], -2), inverse


def settle(inverse: Tensor, signal: Tensor) -> Tensor:
    """The signals [G, C, D] as they stand, from those without the chunk's tokens."""
    return torch.bmm(inverse, signal.to(inverse.dtype)).to(signal.dtype)
