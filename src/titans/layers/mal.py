"""MAL: memory as a layer, before sliding-window attention (arXiv 2501.00663, eqs. 29-31)."""

from torch import Tensor, nn

from titans.layers.attention import SlidingWindowAttention
from titans.layers.block import Block, prefix_mask
from titans.layers.common import persistent_tokens
from titans.layers.mag import MAGState
from titans.layers.neural_memory import NeuralMemory


class MAL(Block):
    """``y = M([P | x])``, ``o = SW-Attn(y)``, each a residual layer: attention sees ``x + y``.

    Args:
        memory: the neural memory, whose ``dim`` is the block's.
        num_attention_heads, sliding_window: of the attention.
        num_persistent_tokens: N_p, written to the memory before the first token.
        intermediate_size: hidden width of the feed-forward part.
    """

    def __init__(
        self, memory: NeuralMemory, *, num_attention_heads: int, sliding_window: int, num_persistent_tokens: int,
        intermediate_size: int,
    ):  # fmt: skip
        super().__init__(memory.dim, intermediate_size)
        self.memory = memory
        self.persistent = persistent_tokens(num_persistent_tokens, memory.dim)
        self.memory_norm = nn.LayerNorm(memory.dim, eps=1e-6, bias=False)
        self.attention = SlidingWindowAttention(memory.dim, num_attention_heads, sliding_window)

    def initial_state(self, batch: int) -> MAGState:
        return MAGState(self.memory.after(self.persistent, batch), self.attention.initial_state(batch))

    def mix(self, x: Tensor, state: MAGState, lengths: Tensor | None) -> tuple[Tensor, MAGState]:
        y, memory = self.memory(x, state.memory, prefix_mask(x, lengths))  # eq. 30
        o, window = self.attention(self.memory_norm(x + y), state.attention, lengths)  # eq. 31
        return y + o, MAGState(memory, window)
