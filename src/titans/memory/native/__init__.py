"""Whole chunks in a row on a CPU, in C (``scan.c``), compiled where it is first taken."""

from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from titans.memory.native.build import library
from titans.memory.network import MemoryMLP

SOURCE = Path(__file__).with_name("scan.c")
MULTIPLE = 16  # of every width, and of the chunk: one vector of the widest CPUs


def unsupported(q: Tensor, network: MemoryMLP, chunk_size: int) -> str | None:
    """What keeps the C code from queries q [B, T, H, D] in such memories, and the mend; None: nothing does."""
    widths = [q.shape[-1], network.shapes(q.shape[-1])[0][1]]
    if q.device.type != "cpu":
        return f"q is on {q.device}; move it to the CPU"
    if q.dtype == torch.float64:
        return f"q is {q.dtype}; use float32"
    if any(width % MULTIPLE for width in widths):
        return f"the maps have widths {widths}; use multiples of {MULTIPLE}"
    if chunk_size % MULTIPLE:
        return f"chunk_size={chunk_size}; use a multiple of {MULTIPLE}"
    return None


def unproven(network: MemoryMLP) -> str | None:
    """What keeps this machine from compiling it, and the mend; None: it is compiled."""
    return unbuilt(SOURCE)


@cache
def unbuilt(source: Path) -> str | None:
    """What keeps this machine from compiling C; tried once: a compiler that fails takes its time."""
    try:
        library(source)
    except (OSError, RuntimeError) as error:  # the latter: nobody's home, where the cache would be
        return str(error)
    return None
