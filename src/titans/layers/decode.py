"""Blocks that read single tokens, their state in place: what generation runs. The same numbers as ``forward``.

What depends on the parameters alone is prepared once: projections of the same input are one matrix, M_0 and the
persistent tokens' keys are copied. So a decoder holds a copy of its block, and belongs to one stream: make a new one
where parameters have changed.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from titans.layers import native
from titans.layers.block import Block
from titans.layers.lmm import LMM
from titans.layers.mac import MAC, MACState
from titans.layers.mag import MAG, MAGState
from titans.layers.mal import MAL
from titans.layers.native.operations import NativeOperations
from titans.layers.neural_memory import NeuralMemory
from titans.layers.operations import Operations, Segment, Window
from titans.memory import MemoryState, State
from titans.memory.step import turned


class _Memory:
    """``NeuralMemory``, x [B, dim] -> [B, dim]."""

    def __init__(self, operations: Operations, memory: NeuralMemory):
        token_gates = [memory.gates_proj.weight] if memory.gate == "sigmoid" else []
        self.project = operations.linear(memory.qkv_proj.weight, memory.out_gate.weight, *token_gates)
        self.read, self.out = operations.memory(memory), operations.linear(memory.out_proj.weight)

    def __call__(self, x: Tensor) -> Tensor:
        return self.out(self.read(*self.project(x)))[0]


class _Mixer:
    """A block's ``mix`` for single tokens; ``stepper`` goes on from the memory's state."""

    def __init__(self, operations: Operations, block: Block, state: State):
        self.operations, self.stepper = operations, operations.stepper
        self.memory = _Memory(operations, block.memory)  # type: ignore[arg-type]

    def mix(self, x: Tensor) -> Tensor:
        """x [B, dim] -> [B, dim]"""
        return self.memory(x)

    @property
    def state(self) -> State:
        """A copy of the block's state as it is now."""
        return self.stepper.state


class _Window(_Mixer):
    def __init__(self, operations: Operations, block: MAG | MAL, state: MAGState, persistent: Tensor | None = None):
        super().__init__(operations, block, state)
        self.window = Window(block.attention, persistent, state.attention, self.stepper.read, operations.keep)
        self.project = operations.linear(block.attention.qkv_proj.weight)
        self.attention = operations.window_attention(self.window)
        self.attended = operations.linear(block.attention.out_proj.weight)

    def attend(self, x: Tensor) -> Tensor:
        return self.attended(self.attention(*self.project(x)))[0]

    @property
    def state(self) -> State:
        return MAGState(self.stepper.state, self.window.state(self.stepper.read))


class _MAG(_Window):
    def __init__(self, operations: Operations, block: MAG, state: MAGState):
        super().__init__(operations, block, state, block.persistent)
        self.product = operations.product(block.gate)
        self.gated = operations.linear(block.gate.out_proj.weight)

    def mix(self, x: Tensor) -> Tensor:
        y = self.operations.add(x, self.attend(x))
        return self.gated(self.product(y, self.memory(x)))[0]


class _MAL(_Window):
    def __init__(self, operations: Operations, block: MAL, state: MAGState):
        super().__init__(operations, block, state)
        self.norm = operations.norm(block.memory_norm)

    def mix(self, x: Tensor) -> Tensor:
        y = self.memory(x)
        return self.operations.add(y, self.attend(self.norm(self.operations.add(x, y))))


class _MAC(_Mixer):
    def __init__(self, operations: Operations, block: MAC, state: MACState):
        super().__init__(operations, block, state)
        attention, memory = block.attention, block.memory
        self.maps = [operations.keep(map) for map in turned(state.maps)]
        self.segment = Segment(attention, block.persistent, state.held, operations.keep)
        self.project = operations.linear(attention.qkv_proj.weight, memory.query_map, memory.out_gate.weight)
        self.recall = operations.recall(memory, self.maps)
        self.recalled = operations.linear(attention.qkv_proj.weight[memory.dim :] @ memory.out_proj.weight)
        self.attention = operations.segment_attention(self.segment)
        self.attended = operations.linear(attention.out_proj.weight)
        self.product = operations.product(block.gate)
        self.gated = operations.linear(block.gate.out_proj.weight)

    def mix(self, x: Tensor) -> Tensor:
        qkv, queries, gate = self.project(x)
        found = self.attention(qkv, *self.recalled(self.recall(queries, gate)))
        y = self.operations.add(x, *self.attended(found))
        out = self.gated(self.product(y, self.memory(y)))[0]
        self.operations.end_segment(self.segment, self.maps)
        return out

    @property
    def state(self) -> State:
        return MACState(self.stepper.state, tuple(map.clone() for map in turned(self.maps)), self.segment.state)


_MIXERS: dict[type[Block], Callable[..., _Mixer]] = {LMM: _Mixer, MAC: _MAC, MAG: _MAG, MAL: _MAL}


class Decoder:
    """A block for single tokens: x [B, dim] -> [B, dim], going on from ``state``, whose rows stand at the same place.

    ``state`` is what ``forward`` would have returned; it is a copy.
    """

    @torch.inference_mode()
    def __init__(self, block: Block, state: State):
        memory: NeuralMemory = block.memory  # type: ignore[assignment]
        held: MemoryState = getattr(state, "memory", state)  # type: ignore[assignment]
        kind = NativeOperations if native.supported(block, held) else Operations
        self.operations = operations = kind(memory, held)
        self.mixer = _MIXERS[type(block)](operations, block, state)
        self.mix_norm, self.feed_forward_norm = map(operations.norm, (block.mix_norm, block.feed_forward_norm))
        self.up = operations.linear(block.feed_forward.up_proj.weight)
        self.down = operations.linear(block.feed_forward.down_proj.weight)
        self.run: Callable[[Tensor], Tensor] = operations.program(self._token, memory.dim)

    def __call__(self, x: Tensor) -> Tensor:
        return self.run(x)

    @property
    def state(self) -> State:
        """A copy of the state as it is now."""
        return self.mixer.state

    def _token(self, x: Tensor) -> Tensor:
        add, swiglu = self.operations.add, self.operations.swiglu
        x = add(x, self.mixer.mix(self.mix_norm(x)))
        return add(x, *self.down(swiglu(*self.up(self.feed_forward_norm(x)))))


def decoder(block: Block, state: State) -> Decoder | None:
    """A decoder where one can go on from ``state``: no gradients, no autocast, all rows at the same place."""
    memory: MemoryState = getattr(state, "memory", state)  # type: ignore[assignment]
    same = memory.read is not None or bool((memory.position == memory.position[0]).all())
    if torch.is_grad_enabled() or torch.is_autocast_enabled(memory.position.device.type) or not same:
        return None
    return Decoder(block, state)
