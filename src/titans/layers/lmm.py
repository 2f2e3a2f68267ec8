"""LMM: the neural memory alone as the sequence mixer (arXiv 2501.00663, section 4.4)."""

from torch import Tensor

from titans.layers.block import Block, prefix_mask
from titans.layers.neural_memory import NeuralMemory
from titans.memory import MemoryState


class LMM(Block):
    """A block whose only mixer is the memory.

    Args:
        memory: the neural memory, whose ``dim`` is the block's.
        intermediate_size: hidden width of the feed-forward part.
    """

    def __init__(self, memory: NeuralMemory, *, intermediate_size: int):
        super().__init__(memory.dim, intermediate_size)
        self.memory = memory

    def initial_state(self, batch: int) -> MemoryState:
        return self.memory.initial_state(batch)

    def mix(self, x: Tensor, state: MemoryState, lengths: Tensor | None) -> tuple[Tensor, MemoryState]:
        return self.memory(x, state, prefix_mask(x, lengths))
