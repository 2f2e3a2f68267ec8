"""Single tokens through a block on a CPU, in C (``token.c``), compiled where it is first taken."""

from pathlib import Path
from typing import Any

import torch

from titans.layers.block import Block
from titans.layers.neural_memory import NeuralMemory
from titans.memory import MemoryState, native
from titans.memory.native import unbuilt

SOURCE = Path(__file__).with_name("token.c")


def unsupported(block: Block, state: MemoryState) -> str | None:
    """What keeps the C code from a block that goes on from ``state``; None: nothing does."""
    memory: NeuralMemory = block.memory  # type: ignore[assignment]
    attention: Any = getattr(block, "attention", None)
    widths = {
        "dim": memory.dim,
        "head_dim": memory.head_dim,
        "the memory's hidden width": memory.network.shapes(memory.head_dim)[0][1],
        "intermediate_size": block.feed_forward.down_proj.in_features,
        "the attention's head_dim": attention.head_dim if attention else 0,
    }
    if memory.backend not in ("auto", "native"):
        return f"the memory's backend is {memory.backend!r}"
    if any(p.dtype != torch.float32 or p.device.type != "cpu" for p in (*block.parameters(), state.pending)):
        return "parameters or state are not float32 on a CPU"
    for name, width in widths.items():
        if width % native.MULTIPLE:
            return f"{name}={width} is no multiple of {native.MULTIPLE}"
    return unbuilt(SOURCE)
