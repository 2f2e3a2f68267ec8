"""Room in large pages: to touch many small ones first costs more than what is written there, and reading them time.

It is the caller's own, and given back when it is freed, where the heap would keep holes.
"""

import mmap

import torch
from torch import Tensor

LARGE_PAGE = 1 << 21  # bytes
BLOCK = 1 << 22  # numbers; of a block no more is taken than is touched


def room(size: int) -> Tensor:
    """float32 [size], not initialised."""
    if 4 * size < LARGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(size)
    whole = -(-4 * size // LARGE_PAGE) * LARGE_PAGE
    pages = mmap.mmap(-1, whole, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=torch.float32)[:size]


class Pages:
    """Tensors one after the other, ``taken`` numbers in all."""

    def __init__(self):
        self.free, self.taken = torch.empty(0), 0

    def copy(self, t: Tensor) -> Tensor:
        """A contiguous copy of ``t`` in float32."""
        size = -(-t.numel() // 16) * 16
        if size > len(self.free):
            self.free = room(max(size, BLOCK))
        self.taken += size
        new, self.free = self.free[: t.numel()].view(t.shape), self.free[size:]
        return new.copy_(t)
