"""MAC: memory as a context of attention, segment by segment (arXiv 2501.00663, eqs. 21-25)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from titans.layers.attention import SegmentAttention
from titans.layers.block import Block, prefix_mask
from titans.layers.common import GatedProduct, persistent_tokens
from titans.layers.neural_memory import NeuralMemory
from titans.memory import MemoryState, State
from titans.memory.pieces import Cut, in_pieces


@dataclass
class MACState(State):
    """A segment half-way through.

    ``memory``: written so far; ``maps``: the memory as it stood when the segment began, read by the memory tokens;
    ``held``: keys and values of the open segment.
    """

    memory: MemoryState
    maps: tuple[Tensor, ...]
    held: Tensor


class MAC(Block):
    """Attention over ``[P | h | segment]`` with h read from the memory of earlier segments; what it finds is written.

    Attention is a residual layer: y is the token and what was found for it. Read literally, the paper would leak the
    future twice: here token i sees memory tokens h_j for j <= i only, and eq. 25 reads the memory as it stands at
    token i.

    Args:
        memory: the neural memory, whose ``dim`` is the block's.
        num_attention_heads: of the attention.
        segment_length: tokens a segment (C in the paper; not the memory's chunk).
        num_persistent_tokens: N_p, visible to every query.
        intermediate_size: hidden width of the feed-forward part.
    """

    def __init__(
        self, memory: NeuralMemory, *, num_attention_heads: int, segment_length: int, num_persistent_tokens: int,
        intermediate_size: int,
    ):  # fmt: skip
        super().__init__(memory.dim, intermediate_size)
        if segment_length < 1:
            raise ValueError(f"segment_length must be at least 1, got {segment_length}")
        self.memory, self.segment_length = memory, segment_length
        self.persistent = persistent_tokens(num_persistent_tokens, memory.dim)
        self.attention = SegmentAttention(memory.dim, num_attention_heads, segment_length)
        self.gate = GatedProduct(memory.dim)

    def initial_state(self, batch: int) -> MACState:
        memory = self.memory.initial_state(batch)
        return MACState(memory, tuple(self.memory.current_maps(memory)), self.attention.initial_state(batch))

    def mix(self, x: Tensor, state: MACState, lengths: Tensor | None) -> tuple[Tensor, MACState]:
        return in_pieces(self._segments, (x, prefix_mask(x, lengths)), state, self.segment_length)

    def _segments(self, x: Tensor, mask: Tensor | None, state: MACState) -> tuple[Tensor, MACState]:
        """Segment by segment; ``mask`` [B, T] of left-aligned rows, None where every token is real."""
        lengths = None if mask is None else mask.sum(1)
        memory, maps, held, ys, reads = state.memory, state.maps, state.held, [], []
        start = self.memory.start()
        # what does not wait for the memory of the segment before, for all segments at once
        tokens = x, self.memory.queries(x), self.memory.out_gate(x), *self.attention.project_at(x, memory.position)
        persistent = () if self.persistent is None else self.attention.persistent(self.persistent, len(x))
        cut = Cut(memory.place, lengths, x.shape[1], self.segment_length)
        for piece, s, q, gate, *qkv in zip(cut.pieces, *map(cut.split, tokens), strict=True):
            h = self.memory.out_proj(self.memory.recall(q, gate, maps))  # eq. 21
            found, held = self.attention(qkv, h, held, piece, persistent)
            ys.append(s + found)  # eqs. 22, 23
            read, memory = self.memory.write(ys[-1], memory, prefix_mask(s, piece.valid), start)  # eq. 24
            reads.append(read)
            if piece.closes is not False:
                now = self.memory.current_maps(memory, start)
                maps = tuple(piece.where_closed(n, o) for n, o in zip(now, maps, strict=True))
                held = piece.where_closed(torch.zeros_like(held), held)
        y = cut.join(ys, x)
        read, values = (cut.join([pair[i] for pair in reads], tokens[1]) for i in (0, 1))
        out = self.gate(y, self.memory.output((read, values), y))  # eq. 25
        return out, MACState(memory, maps, held)
