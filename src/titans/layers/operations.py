"""What a single token meets in a block, in PyTorch's operations; ``native/operations.py`` has the same in C."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titans.layers.attention import SegmentAttention, SlidingWindowAttention, WindowState, rotary_table, rotate
from titans.layers.common import GatedProduct, require_finite
from titans.layers.neural_memory import NeuralMemory
from titans.memory import MemoryState
from titans.memory.step import Stepper, turned

Keep = Callable[[Tensor], Tensor]  # makes contiguous copies


class Segment:
    """Keys and values of MAC's open segment, ``held`` [2, B, heads, N_p + 2 C, head_dim]; what is rotary is rotated.

    They stand in the order [persistent | memory token, token | memory token, token | ...].
    """

    def __init__(self, attention: SegmentAttention, persistent: Tensor | None, held: Tensor, keep: Keep):
        C, self.heads, self.head_dim = attention.segment_length, attention.heads, attention.head_dim
        self.length, self.persistent = C, 0 if persistent is None else len(persistent)
        held = held.unflatten(2, (2, 2)).flatten(1, 2)  # [B, 2 C, keys and values, heads, head_dim]
        self.table = rotary_table(torch.arange(C, device=held.device), held).squeeze(2)
        if persistent is not None:
            held = torch.cat([torch.stack(attention.persistent(persistent, len(held)), 2), held], 1)
        self.held = keep(held.permute(2, 0, 3, 1, 4))

    @property
    def state(self) -> Tensor:
        """As ``SegmentAttention`` takes it."""
        held = self.held[..., self.persistent :, :].unflatten(3, (-1, 2))  # [2, B, heads, C, 2, head_dim]
        return held.permute(1, 3, 4, 0, 2, 5).flatten(2, 3)


class Window:
    """Keys and values of a window's tokens in a ring after the persistent ones, [2, B, heads, N_p + W, head_dim].

    The n-th token of a row stands in slot n % W, its key as it came: positions count from the window's first slot.
    """

    def __init__(
        self, attention: SlidingWindowAttention, persistent: Tensor | None, state: WindowState, read: int, keep: Keep
    ):
        self.length, self.heads, self.head_dim = attention.window, attention.heads, attention.head_dim
        self.persistent = 0 if persistent is None else len(persistent)
        held = torch.stack([state.keys, state.values]).roll(read, 2)
        self.table = rotary_table(torch.arange(self.length, device=held.device), held).squeeze(2)
        if persistent is not None:
            held = torch.cat([torch.stack(attention.persistent(persistent, held.shape[1])), held], 2)
        self.held = keep(held.transpose(2, 3))

    def state(self, read: int) -> WindowState:
        """As ``SlidingWindowAttention`` takes it, after ``read`` tokens."""
        keys, values = self.held[..., self.persistent :, :].transpose(2, 3).roll(-read, 2)
        count = torch.full(keys.shape[:1], min(read, self.length), device=keys.device)
        return WindowState(keys, values, count)


class Operations:
    """Makes functions of a token's values [batch, width] from what depends on the parameters alone.

    ``stepper`` is the memory's, and knows how many tokens were read.
    """

    def __init__(self, memory: NeuralMemory, state: MemoryState):
        self.stepper = Stepper(state, memory.start(), memory.network, memory.forget, self.keep)

    def keep(self, t: Tensor) -> Tensor:
        """A contiguous copy."""
        return t.clone(memory_format=torch.contiguous_format)

    def program(self, token: Callable[[Tensor], Tensor], dim: int) -> Callable[[Tensor], Tensor]:
        """``token``, x [batch, dim] -> y, ready to be run; ValueError where x holds NaN or infinity."""

        def run(x: Tensor) -> Tensor:
            require_finite(x.unsqueeze(1), None)
            with torch.inference_mode():  # to keep track of views would be a tenth of the time
                y = token(x)
                self.stepper.advance()
            return y.clone()

        return run

    def add(self, a: Tensor, b: Tensor) -> Tensor:
        """a + b"""
        return a + b

    def swiglu(self, x: Tensor) -> Tensor:
        """[batch, 2 n] -> [batch, n]"""
        gate, up = x.chunk(2, -1)
        return F.silu(gate) * up

    def norm(self, norm: nn.LayerNorm) -> Callable[[Tensor], Tensor]:
        """LayerNorm."""
        return norm

    def product(self, gate: GatedProduct) -> Callable[[Tensor, Tensor], Tensor]:
        """``gate.product``"""
        return gate.product

    def linear(self, *weights: Tensor) -> Callable[[Tensor], tuple[Tensor, ...]]:
        """Products of one input with several weights [d_out, d_in]."""
        weight, sizes = torch.cat(weights), [len(w) for w in weights]
        return lambda x: F.linear(x, weight).split_with_sizes(sizes, -1)

    def segment_attention(self, segment: Segment) -> Callable[[Tensor, Tensor], Tensor]:
        """A token's q, k, v and its memory token's k, v, side by side, to what it finds [batch, heads * head_dim]."""

        def run(qkv: Tensor, recalled: Tensor) -> Tensor:
            q, k, v = qkv.unflatten(1, (3, segment.heads, -1)).unbind(1)
            mk, mv = recalled.unflatten(1, (2, segment.heads, -1)).unbind(1)
            place = self.stepper.read % segment.length
            q, mk, k = rotate(torch.stack([q, mk, k]), segment.table[:, place]).unbind(0)
            end = segment.persistent + 2 * (place + 1)
            new = torch.stack([mk, k, mv, v], 2).unflatten(2, (2, 2))  # of keys and values two
            segment.held[..., end - 2 : end, :] = new.movedim(2, 0)
            return _found(q, *segment.held[:, :, :, :end])

        return run

    def window_attention(self, window: Window) -> Callable[[Tensor], Tensor]:
        """A token's q, k, v, side by side, to what it finds [batch, heads * head_dim]."""

        def run(qkv: Tensor) -> Tensor:
            q, *new = qkv.unflatten(1, (3, window.heads, -1)).unbind(1)
            slot, first = self.stepper.read % window.length, window.persistent
            window.held[:, :, :, first + slot] = torch.stack(new)
            end = first + min(self.stepper.read + 1, window.length)
            keys, values = window.held[:, :, :, :end].unbind(0)
            table = window.table.roll(slot + 1, 1)[:, : end - first]  # the newest at the last place
            moved = rotate(keys[:, :, first:].transpose(1, 2), table.unsqueeze(2)).transpose(1, 2)
            q = rotate(q, window.table[:, -1:])
            return _found(q, torch.cat([keys[:, :, :first], moved], 2), values)

        return run

    def memory(self, memory: NeuralMemory) -> Callable[..., Tensor]:
        """Writes and reads: what ``qkv_proj``, ``out_gate`` and, if they see the token, the gates made of it; gated."""
        stepper, (B, _) = self.stepper, self.stepper.shape
        bias, rows = memory.gates_proj.bias, (B * memory.heads, 1, memory.head_dim)
        dtype = stepper.weights.dtype
        skip = None if memory.skip is None else memory.skip.to(dtype).repeat(B, 1).unsqueeze(1)

        def run(qkv: Tensor, out_gate: Tensor, token_gates: Tensor | None = None) -> Tensor:
            seen = None if token_gates is None else (token_gates + bias).unsqueeze(1)
            *qkv_, z, stepper.conv = memory.by_head(qkv.unsqueeze(1), seen, stepper.conv, None)  # type: ignore[arg-type]
            q, k, v = (t.to(dtype).reshape(rows) for t in qkv_)
            reads = stepper(q, k, v, torch.stack(memory.gate_values(z)).view(3, -1, 1, 1))
            return self._gated(memory, reads if skip is None else torch.addcmul(reads, skip, v), out_gate)

        return run

    def recall(self, memory: NeuralMemory, maps: Sequence[Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
        """``NeuralMemory.recall`` of projected queries, from maps as the stepper lays them out."""
        dtype, rows = self.stepper.weights.dtype, (-1, 1, memory.head_dim)

        def run(queries: Tensor, out_gate: Tensor) -> Tensor:
            q = memory.as_queries(queries.to(dtype)).reshape(rows)
            return self._gated(memory, self.stepper.recall(q, turned(maps)), out_gate)

        return run

    def end_segment(self, segment: Segment, maps: Sequence[Tensor]) -> None:
        """After a segment's last token: empties it, and brings the recalled maps to the memory as it stands."""
        if (self.stepper.read + 1) % segment.length == 0:
            segment.held[..., segment.persistent :, :].zero_()
            for held, now in zip(maps, turned(self.stepper.current_maps()), strict=True):
                held.copy_(now)

    def _gated(self, memory: NeuralMemory, reads: Tensor, out_gate: Tensor) -> Tensor:
        reads = reads.view(self.stepper.shape[0], 1, memory.heads, -1).to(out_gate.dtype)
        return memory.gated(reads, None, out_gate.unsqueeze(1)).squeeze(1)


def _found(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q.unsqueeze(2), keys, values).flatten(1)
