"""Blocks that read single tokens, their state in place: what generation runs. The same numbers as ``forward``.

What depends on the parameters alone is prepared once: projections of the same input are one matrix, matrices lie as
they are read fastest, M_0 and the persistent tokens' keys are copied. So a decoder holds a copy of its block, and
belongs to one stream: make a new one where parameters have changed.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from titans.layers.attention import SlidingWindowAttention, WindowState, rotary_table, rotate
from titans.layers.block import Block
from titans.layers.common import require_finite
from titans.layers.lmm import LMM
from titans.layers.mac import MAC, MACState
from titans.layers.mag import MAG, MAGState
from titans.layers.mal import MAL
from titans.layers.neural_memory import NeuralMemory
from titans.memory import MemoryState, State
from titans.memory.step import Stepper, near

PANEL = 32  # outputs


class _Linear:
    """The products of one input with several weights [d_out, d_in]: x [B, d_in] -> [B, d_out], all side by side.

    A single row on a CPU takes as long as its weights take to come from memory, and a matrix that lies in panels of a
    few outputs, one after the other, comes two to three times as fast as row by row.
    """

    def __init__(self, batch: int, *weights: Tensor):
        self.weight, self.sizes = weights[0] if len(weights) == 1 else torch.cat(weights), [len(w) for w in weights]
        (d_out, d_in), self.single = self.weight.shape, batch == 1 and self.weight.is_cpu
        if self.single:
            self.spare = -d_out % PANEL
            self.weight = F.pad(self.weight, (0, 0, 0, self.spare)).view(-1, PANEL, d_in).mT.contiguous()
            self.shape = len(self.weight), 1, d_in

    def __call__(self, x: Tensor) -> Tensor:
        if not self.single:
            return F.linear(x, near(self.weight))
        y = torch.bmm(x.expand(self.shape), self.weight).view(1, -1)
        return y[:, : -self.spare] if self.spare else y

    def each(self, x: Tensor) -> tuple[Tensor, ...]:
        """Every weight's product by itself."""
        return self(x).split_with_sizes(self.sizes, -1)


class MemoryDecoder:
    """``NeuralMemory`` for single tokens, x [B, dim] -> [B, dim]."""

    def __init__(self, memory: NeuralMemory, state: MemoryState):
        self.memory, self.stepper = memory, Stepper(state, memory.start(), memory.network, memory.forget)
        B = len(state.position)
        token_gates = [memory.gates_proj.weight] if memory.gate == "sigmoid" else []
        self.project = _Linear(B, memory.qkv_proj.weight, *token_gates, memory.out_gate.weight)
        self.out, self.bias = _Linear(B, memory.out_proj.weight), memory.gates_proj.bias
        self.dtype, self.heads = state.pending.dtype, (B, memory.heads, memory.head_dim)
        self.rows = B * memory.heads, 1, memory.head_dim
        self.skip = None if memory.skip is None else memory.skip.to(self.dtype).repeat(B, 1).unsqueeze(1)

    @property
    def state(self) -> MemoryState:
        """A copy of the state as it is now."""
        return self.stepper.state

    def __call__(self, x: Tensor) -> Tensor:
        memory, stepper = self.memory, self.stepper
        qkv, *token_gates, out_gate = self.project.each(x)
        qkv, stepper.conv = memory.conv(qkv.unsqueeze(1), stepper.conv, None)
        qkv = F.silu(qkv)
        q, k, v = (t.reshape(self.rows) for t in memory.by_head(qkv.to(self.dtype)))
        z = token_gates[0] + self.bias if token_gates else memory.gates_proj(qkv).squeeze(1)
        gates = torch.stack(memory.gate_values(z)).view(3, -1, 1, 1)
        reads = stepper(q, k, v, gates)
        if self.skip is not None:
            reads = torch.addcmul(reads, self.skip, v)
        return self.out(self._gated(reads, out_gate))

    def recall(self, queries: Tensor, out_gate: Tensor, maps: Sequence[Tensor]) -> Tensor:
        """``NeuralMemory.recall`` of projected queries [B, key_heads * head_dim]; maps [B, heads, d_in, d_out]."""
        q = self.memory.as_queries(queries.to(self.dtype))
        return self._gated(self.stepper.recall(q.reshape(self.rows), maps), out_gate)

    def _gated(self, reads: Tensor, out_gate: Tensor) -> Tensor:
        return self.memory.gated(reads.view(self.heads).to(out_gate.dtype), out_gate)


class _LMMDecoder:
    def __init__(self, block: LMM, state: MemoryState):
        self.mix = MemoryDecoder(block.memory, state)

    @property
    def state(self) -> State:
        return self.mix.state


class _WindowDecoder:
    """MAG and MAL: the memory in place; the window is small, and moved."""

    persistent: tuple[Tensor, ...] = ()

    def __init__(self, block: MAG | MAL, state: MAGState):
        self.block, self.memory, window = block, MemoryDecoder(block.memory, state.memory), state.attention
        attention: SlidingWindowAttention = block.attention
        B, W, *self.heads = window.keys.shape
        self.project, self.attended = _Linear(B, attention.qkv_proj.weight), _Linear(B, attention.out_proj.weight)
        self.window, self.count = torch.stack([window.keys, window.values]), int(window.count[0])
        self.table = rotary_table(torch.arange(1, W + 1, device=window.keys.device), window.keys)

    @property
    def state(self) -> State:
        keys, values = self.window.clone()
        count = torch.full(keys.shape[:1], self.count, device=keys.device)
        return MAGState(self.memory.state, WindowState(keys, values, count))

    def attend(self, x: Tensor) -> Tensor:
        qkv = self.project(x).view(1, len(x), 3, *self.heads).transpose(0, 2)  # [3, B, 1, heads, head_dim]
        self.window = torch.cat([self.window[:, :, 1:], qkv[1:]], 2)
        self.count = min(self.count + 1, self.window.shape[2])
        keys, values = self.window[:, :, -self.count :].unbind(0)
        q, keys = rotate(qkv[0], self.table[:, -1:]), rotate(keys, self.table[:, -self.count :])
        if self.persistent:
            keys, values = (torch.cat(pair, 1) for pair in zip(self.persistent, (keys, values), strict=True))
        q, keys, values = (t.transpose(1, 2) for t in (q, keys, values))
        found = F.scaled_dot_product_attention(q, keys, values)
        return self.attended(found.flatten(1))


class _MAGDecoder(_WindowDecoder):
    def __init__(self, block: MAG, state: MAGState):
        super().__init__(block, state)
        self.product, self.gated = block.gate.product, _Linear(len(state.attention.keys), block.gate.out_proj.weight)
        if block.persistent is not None:
            self.persistent = block.attention.persistent(block.persistent, len(state.attention.keys))

    def mix(self, x: Tensor) -> Tensor:
        return self.gated(self.product(x + self.attend(x), self.memory(x)))


class _MALDecoder(_WindowDecoder):
    block: MAL

    def mix(self, x: Tensor) -> Tensor:
        y = self.memory(x)
        return y + self.attend(self.block.memory_norm(x + y))


class _MACDecoder:
    """Keys and values of the open segment stand in the order [persistent | memory token, token | ...]."""

    def __init__(self, block: MAC, state: MACState):
        self.block, self.memory, self.maps = block, MemoryDecoder(block.memory, state.memory), state.maps
        attention, memory, C = block.attention, block.memory, block.segment_length
        B = len(state.held)
        self.project = _Linear(B, attention.qkv_proj.weight, memory.query_map, memory.out_gate.weight)
        self.recalled = _Linear(B, attention.qkv_proj.weight[memory.dim :] @ memory.out_proj.weight)
        self.attended = _Linear(B, attention.out_proj.weight)
        self.gated = _Linear(B, block.gate.out_proj.weight)
        held = state.held.unflatten(2, (2, 2)).flatten(1, 2)  # [B, 2 C, keys and values, heads, head_dim]
        self.table = rotary_table(torch.arange(C, device=held.device), held).unsqueeze(2)
        self.persistent = 0
        if block.persistent is not None:
            self.persistent = len(block.persistent)
            held = torch.cat([torch.stack(attention.persistent(block.persistent, len(held)), 2), held], 1)
        self.held = held.permute(2, 0, 3, 1, 4).contiguous()  # keys and values, each [B, heads, N_p + 2 C, head_dim]

    @property
    def state(self) -> State:
        held = self.held[..., self.persistent :, :].unflatten(3, (-1, 2))  # [2, B, heads, C, 2, head_dim]
        held = held.permute(1, 3, 4, 0, 2, 5).flatten(2, 3)
        return MACState(self.memory.state, tuple(map.clone() for map in self.maps), held)

    def mix(self, x: Tensor) -> Tensor:
        block, heads = self.block, (self.block.attention.heads, self.block.attention.head_dim)
        qkv, queries, gate = self.project.each(x)
        recalled = self.memory.recall(queries, gate, self.maps)
        q, k, v = qkv.view(len(x), 3, *heads).unbind(1)
        mk, mv = self.recalled(recalled).view(len(x), 2, *heads).unbind(1)
        place = self.memory.stepper.read % block.segment_length
        q, mk, k = rotate(torch.stack([q, mk, k]), self.table[:, place]).unbind(0)
        end = self.persistent + 2 * (place + 1)
        new = torch.stack([mk, k, mv, v], 2).view(len(x), heads[0], 2, 2, -1)  # of keys and values two
        self.held[..., end - 2 : end, :] = new.movedim(2, 0)
        keys, values = self.held[:, :, :, :end].unbind(0)
        found = F.scaled_dot_product_attention(q.unsqueeze(2), keys, values)
        y = x + self.attended(found.flatten(1))
        out = self.gated(block.gate.product(y, self.memory(y)))
        if place + 1 == block.segment_length:
            self.maps = tuple(self.memory.stepper.current_maps())
            self.held[..., self.persistent :, :].zero_()
        return out


_MIXERS: dict[type[Block], Callable] = {LMM: _LMMDecoder, MAC: _MACDecoder, MAG: _MAGDecoder, MAL: _MALDecoder}


class Decoder:
    """A block for single tokens: x [B, dim] -> [B, dim], going on from ``state``, whose rows stand at the same place.

    ``state`` is what ``forward`` would have returned; it is a copy.
    """

    @torch.inference_mode()  # here and below: to keep track of views is a tenth of the time of a token
    def __init__(self, block: Block, state: State):
        memory: MemoryState = getattr(state, "memory", state)  # type: ignore[assignment]
        B = len(memory.position)
        self.block, self.mixer = block, _MIXERS[type(block)](block, state)
        self.up = _Linear(B, block.feed_forward.up_proj.weight)
        self.down = _Linear(B, block.feed_forward.down_proj.weight)

    @property
    def state(self) -> State:
        return self.mixer.state

    def __call__(self, x: Tensor) -> Tensor:
        require_finite(x.unsqueeze(1), None)
        with torch.inference_mode():
            x = x + self.mixer.mix(self.block.mix_norm(x))
            gate, up = self.up(self.block.feed_forward_norm(x)).chunk(2, -1)
            y = self.down(F.silu(gate) * up)
        return x + y


def decoder(block: Block, state: State) -> Decoder | None:
    """A decoder where one can go on from ``state``: no gradients, no autocast, all rows at the same place."""
    memory: MemoryState = getattr(state, "memory", state)  # type: ignore[assignment]
    same = memory.read is not None or bool((memory.position == memory.position[0]).all())
    if torch.is_grad_enabled() or torch.is_autocast_enabled(memory.position.device.type) or not same:
        return None
    return Decoder(block, state)
