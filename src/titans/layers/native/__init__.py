"""What layers do on a CPU in C, compiled where it is first taken: single tokens through a block (``token.c``)."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from titans.memory import MemoryState
from titans.memory.native import MULTIPLE, unbuilt

if TYPE_CHECKING:
    from titans.layers.block import Block
    from titans.layers.neural_memory import NeuralMemory

SOURCE = Path(__file__).with_name("token.c")


def supported(block: "Block", state: MemoryState) -> bool:
    """Whether the C code takes the block from ``state`` on: float32 on a CPU, widths that are multiples of 16."""
    memory: NeuralMemory = block.memory  # type: ignore[assignment]
    attention: Any = getattr(block, "attention", None)
    hidden = memory.network.shapes(memory.head_dim)[0][1]
    widths = [memory.dim, memory.head_dim, hidden, block.feed_forward.down_proj.in_features]
    widths += [attention.head_dim] if attention else []
    tensors = (*block.parameters(), state.pending)
    return (
        memory.backend in ("auto", "native")
        and all(t.dtype == torch.float32 and t.is_cpu for t in tensors)
        and not any(width % MULTIPLE for width in widths)
        and unbuilt(SOURCE) is None
    )
