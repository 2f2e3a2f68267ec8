"""MAG: memory as a gate, beside sliding-window attention (arXiv 2501.00663, eqs. 26-28)."""

from dataclasses import dataclass

from torch import Tensor

from titans.layers.attention import SlidingWindowAttention, WindowState
from titans.layers.block import Block, prefix_mask
from titans.layers.common import GatedProduct, persistent_tokens
from titans.layers.neural_memory import NeuralMemory
from titans.memory import MemoryState, State


@dataclass
class MAGState(State):
    """Where both branches stopped."""

    memory: MemoryState
    attention: WindowState


class MAG(Block):
    """``y = x + SW-Attn([P | x])``, ``o = y (x) M([P | x])``.

    Args:
        memory: the neural memory, whose ``dim`` is the block's.
        num_attention_heads, sliding_window: of the attention.
        num_persistent_tokens: N_p; written to the memory first, and visible to every query of the attention.
        intermediate_size: hidden width of the feed-forward part.
    """

    def __init__(
        self, memory: NeuralMemory, *, num_attention_heads: int, sliding_window: int, num_persistent_tokens: int,
        intermediate_size: int,
    ):  # fmt: skip
        super().__init__(memory.dim, intermediate_size)
        self.memory = memory
        self.persistent = persistent_tokens(num_persistent_tokens, memory.dim)
        self.attention = SlidingWindowAttention(memory.dim, num_attention_heads, sliding_window)
        self.gate = GatedProduct(memory.dim)

    def initial_state(self, batch: int) -> MAGState:
        return MAGState(self.memory.after(self.persistent, batch), self.attention.initial_state(batch))

    def mix(self, x: Tensor, state: MAGState, lengths: Tensor | None) -> tuple[Tensor, MAGState]:
        found, window = self.attention(x, state.attention, lengths, self.persistent)  # eq. 27
        m, memory = self.memory(x, state.memory, prefix_mask(x, lengths))
        return self.gate(x + found, m), MAGState(memory, window)  # eq. 28
