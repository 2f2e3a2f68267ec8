"""The neural memory as a layer: projections, short convolution, gates, memory, output norm and gate."""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titans.layers.common import ShortConvolution, require_finite
from titans.layers.heads import convolve, gate_reads, unit
from titans.memory import MemoryMLP, MemoryState, current_maps, neural_memory
from titans.memory.pieces import align, check_mask, in_pieces, take

GATES = ("sigmoid", "write")
FORGET = ("start", "zero", "none")
STABLE_SHARES = (1, 1, 0.25, 0.125)  # depth 1 to 4
Reads = tuple[Tensor, Tensor]  # what was read, and the tokens' own values, both [B, T, heads, head_dim]
NEVER = -1e3  # the logarithm of a gate that is shut: its exponential is 0 in any precision


def stable_lr(network: MemoryMLP, chunk_size: int) -> float:
    """A largest theta whose outer gradient stays small in windows of thousands of tokens (docs/decisions.md).

    A chunk's gradients are taken at the same memory, so where its keys are alike their steps add up: a share of 1 /
    ``chunk_size`` that falls with the depth, a tenth where no norm tames the sum; never above 0.1. One online map sees
    every step before the next: 1/4, with which a token and its momentum replace four fifths of what its key held.
    """
    if network.online:
        return 0.25
    tame = network.norm or network.depth == 1
    return min(0.1, (STABLE_SHARES[network.depth - 1] if tame else 0.1) / chunk_size)


def stable_momentum(network: MemoryMLP, max_lr: float) -> float:
    """A largest eta: 1, as in the paper; for an online map 1 - 5/4 sqrt(``max_lr``).

    Momentum that a write has left goes on when its error is gone, the farther, the larger theta can be. With that bound
    no gates and no keys were found that make an online map grow; with more there are (docs/decisions.md).
    """
    return max(0.0, 1 - 1.25 * max_lr**0.5) if network.online else 1.0


class GateProjection(nn.Linear):
    """Pre-activations of the three gates of every head, [..., width] -> [..., 3 * heads]."""

    def __init__(self, width: int, heads: int, gate: str, forget: str):
        self.heads, self.gate, self.forget = heads, gate, forget
        super().__init__(width, 3 * heads)

    def reset_parameters(self) -> None:
        """The same gates for every token: theta and eta half of their largest (theta 3/4 for ``"write"``).

        Heads forget, alpha, at rates from 10 % to 0.2 % a token, evenly on a logarithmic scale: some hold what is near,
        some what is far. Forgetting towards zero starts at 0.01 % in all of them: it takes M_0 with it.
        """
        place = (torch.arange(self.heads) + 0.5) / self.heads
        alpha = 0.1 ** (1 - place) * 0.002**place if self.forget == "start" else torch.full((self.heads,), 1e-4)
        write = torch.full_like(alpha, 0.0 if self.gate == "sigmoid" else 1.5)
        start = torch.stack([write, torch.zeros_like(alpha), alpha.logit()])
        with torch.no_grad():
            self.weight.zero_()
            self.bias.copy_(start.flatten())


class NeuralMemory(nn.Module):
    """Neural long-term memory (arXiv 2501.00663, section 3): a sequence mixer [B, T, dim] -> [B, T, dim].

    What a token reads, and beside it the token's own value (see ``skip``), is normalised head by head, gated and
    projected.

    Args:
        dim: width of inputs and outputs.
        heads: independent memories, each with its own weights in every sequence.
        key_heads: heads of queries and keys, each for ``heads / key_heads`` memories; default ``heads``. Few leave more
            of a layer's parameters to values and their output gates, as in Mamba2.
        head_dim: width of queries, keys and values; default ``dim // heads``.
        chunk_size: tokens whose gradients are taken at the same memory; smaller is more exact and slower.
        network: shape of each memory.
        gate: how theta (step), eta (momentum) and alpha (forgetting) come from a token.
            ``"sigmoid"``: the paper's, each a sigmoid of its own.
            ``"write"``: one gate g in [0, 1] that reaches 0 and 1 exactly; theta = max_lr g, alpha = sigmoid(.) g, so
            that where nothing is written nothing is forgotten. It sees what the convolution gives, the token and those
            before it: which number is to be kept shows in the words that lead to it.
        max_lr: largest theta; default ``stable_lr(network, chunk_size)``, which holds in long windows. Windows of
            hundreds of tokens take 0.1 and learn a little better with it; to keep a fact that is read once takes more
            (0.3 in ``checkpoints/needle``, with the gate ``"write"``).
        forget: where forgetting leads: "start", to M_0, so that what was written fades and what was learned in training
            stays; "zero", the paper's; "none": nothing is forgotten.
        max_momentum: largest eta, how much of past surprise a token carries on; default ``stable_momentum(network,
            max_lr)``; 0: plain gradient descent.
        skip: whether the token's own value, weighted by what is learned, stands beside what is read; not in the paper.
            Without it a memory whose network has no norm learned recall better (BABILong), one with the norm a little
            worse, and parity was not learned (docs/decisions.md).
        conv_size: length of the causal convolution over queries, keys and values; 1 for none.
        backend: see ``titans.memory.neural_memory``.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 4,
        key_heads: int | None = None,
        head_dim: int | None = None,
        chunk_size: int = 64,
        network: MemoryMLP | None = None,
        gate: str = "sigmoid",
        max_lr: float | None = None,
        forget: str = "start",
        max_momentum: float | None = None,
        skip: bool = True,
        conv_size: int = 4,
        backend: str = "auto",
    ):
        super().__init__()
        if head_dim is None and dim % heads:
            raise ValueError(f"dim={dim} is no multiple of heads={heads}; choose another or give head_dim")
        for name, value, valid in (("gate", gate, GATES), ("forget", forget, FORGET)):
            if value not in valid:
                raise ValueError(f"{name} must be one of {valid}, got {value!r}")
        self.dim, self.heads, self.head_dim = dim, heads, head_dim or dim // heads
        self.key_heads = heads if key_heads is None else key_heads
        if self.key_heads < 1 or heads % self.key_heads:
            raise ValueError(f"key_heads={key_heads} must divide heads={heads}")
        self.chunk_size, self.network, self.backend = chunk_size, network or MemoryMLP(), backend
        self.gate, self.forget = gate, forget
        self.max_lr = stable_lr(self.network, chunk_size) if max_lr is None else max_lr
        self.max_momentum = stable_momentum(self.network, self.max_lr) if max_momentum is None else max_momentum
        if not 0 <= self.max_momentum <= 1:
            raise ValueError(f"max_momentum must be from 0 to 1, got {max_momentum}")
        inner, keys = heads * self.head_dim, self.key_heads * self.head_dim
        self.qkv_proj = nn.Linear(dim, 2 * keys + inner, bias=False)
        self.conv = ShortConvolution(2 * keys + inner, conv_size)
        self.gates_proj = GateProjection(dim if gate == "sigmoid" else 2 * keys + inner, heads, gate, forget)
        # M_0 in units that suit the optimizer: it moves a map of any width by an equal share
        self.units = [i**0.5 if self.network.norm else 1.0 for i, _ in self.network.shapes(self.head_dim)]
        self.units += [1.0] * (2 * self.network.norm)
        start = self.network.init(heads, self.head_dim)
        self.weights = nn.ParameterList(w / unit for w, unit in zip(start, self.units, strict=True))
        # at the start about as long as what is read: values are as long as keys, 1
        self.skip = nn.Parameter(torch.full((heads, self.head_dim), self.head_dim**0.5)) if skip else None
        self.out_norm = nn.LayerNorm(self.head_dim, eps=1e-6, bias=False)
        self.out_gate = nn.Linear(dim, inner, bias=False)
        self.out_proj = nn.Linear(inner, dim, bias=False)

    def start(self) -> tuple[Tensor, ...]:
        """M_0: the linear maps [heads, d_in, d_out], then gain and bias [heads, head_dim] if there is a norm."""
        return tuple(w if unit == 1 else w * unit for w, unit in zip(self.weights, self.units, strict=True))

    def current_maps(self, state: MemoryState, start: Sequence[Tensor] = ()) -> list[Tensor]:
        """The memory's linear maps [B, heads, d_in, d_out] after the last token; ``start`` as in ``write``."""
        return current_maps(state, self._first_maps(start) if self.forget == "start" else ())

    def _first_maps(self, start: Sequence[Tensor] = ()) -> list[Tensor]:
        return [w if w.dtype == torch.float64 else w.float() for w in (start or self.start())[: self.network.depth]]

    def initial_state(self, batch: int) -> MemoryState:
        """The state before the first token of ``batch`` sequences."""
        maps = self._first_maps()
        if self.forget == "start":
            maps = [torch.zeros_like(w) for w in maps]
        state = MemoryState.initial(maps, batch, self.chunk_size)
        return replace(state, conv=self.conv.initial_state(batch))

    def after(self, tokens: Tensor | None, batch: int) -> MemoryState:
        """The state of ``batch`` sequences that begin with ``tokens`` [n, dim], a chunk of their own; None for none."""
        if tokens is None:
            return self.initial_state(batch)
        x, start, n = tokens.unsqueeze(0), self.initial_state(1), len(tokens)
        alone = replace(MemoryState.initial([w[0] for w in start.weights], 1, n), conv=start.conv)
        _, end = self._write(self.qkv_proj(x), self._token_gates(x), None, alone, chunk_size=n)
        return replace(start, maps=end.maps, conv=end.conv).repeat(batch)

    def forward(
        self, x: Tensor, state: MemoryState | None = None, mask: Tensor | None = None, return_info: bool = False
    ) -> tuple[Tensor, MemoryState] | tuple[Tensor, MemoryState, dict[str, Tensor]]:
        """Reads x, learning as it goes.

        Args:
            x: [B, T, dim].
            state: where an earlier call stopped; None starts a new sequence.
            mask: [B, T], zero at padding (anywhere); padding changes no state and gives zeros.
            return_info: also return a dict of [B, T, heads] tensors: ``surprise`` (norm of the gradient), ``loss``
                (before the write), ``lr``, ``momentum``, ``forget`` (theta, eta, alpha).

        Returns:
            y [B, T, dim] and the state after the last token (and the dict).

        Raises:
            ValueError: x has a wrong width or holds NaN or infinity (a memory would keep it for ever). Where gradients
                flow into x, NaN goes through instead, to the loss.
        """
        if x.dim() != 3 or x.shape[-1] != self.dim:
            raise ValueError(f"x must be [batch, length, dim={self.dim}], got {list(x.shape)}")
        mask = check_mask(mask, *x.shape[:2])
        require_finite(x, mask)
        undo = None
        if mask is not None:
            index, _, undo = align(mask)
            mask = take(mask, index)
            x = take(x, index).masked_fill(~mask.unsqueeze(-1), 0)
        end: MemoryState = self.initial_state(x.shape[0]) if state is None else state
        parts = self.qkv_proj(x), self._token_gates(x), self.out_gate(x), mask
        seen: dict[str, Tensor] = {}
        if return_info:
            y, end = self._read(*parts, end, seen)
        else:
            y, end = in_pieces(self._read, parts, end, self.chunk_size)
        y = self.out_proj(y)
        if undo is not None:
            y, seen = take(y, undo), {name: take(t, undo) for name, t in seen.items()}
        return (y, end, seen) if return_info else (y, end)

    def _read(
        self, qkv: Tensor, gates: Tensor | None, out_gate: Tensor, mask: Tensor | None, state: MemoryState,
        seen: dict[str, Tensor] | None = None,
    ) -> tuple[Tensor, MemoryState]:  # fmt: skip
        reads, state = self._write(qkv, gates, mask, state, seen)
        return self.gated(*reads, out_gate), state

    def _write(
        self,
        qkv: Tensor,
        gates: Tensor | None,
        mask: Tensor | None,
        state: MemoryState,
        seen: dict[str, Tensor] | None = None,
        chunk_size: int | None = None,
        start: Sequence[Tensor] = (),
    ) -> tuple[Reads, MemoryState]:
        """Writes and reads, rows left-aligned; fills ``seen`` if it is given.

        ``chunk_size``: another than the layer's, of any size, in plain PyTorch. ``start`` as in ``write``.
        """
        lengths = None if mask is None else mask.sum(1)
        q, k, v, gates, conv = self.by_head(qkv, gates, state.conv, lengths)  # type: ignore[arg-type]
        lr, log_momentum, log_retention = self.gate_values(gates)
        if mask is not None:
            v = v.masked_fill(~mask[..., None, None], 0)
        reads, state, *info = neural_memory(
            q, k, v, lr, log_momentum, log_retention, start or self.start(), network=self.network,
            chunk_size=chunk_size or self.chunk_size, state=state, mask=mask,
            forget="start" if self.forget == "start" else "zero",
            backend="chunked" if chunk_size else self.backend, return_info=seen is not None,
        )  # type: ignore[misc]  # fmt: skip
        if seen is not None:
            seen |= {"lr": lr, "momentum": log_momentum.exp(), "forget": -torch.expm1(log_retention)}
            seen |= info[0]._asdict()
        return (reads, v), replace(state, conv=conv)

    def by_head(
        self, qkv: Tensor, gates: Tensor | None, conv: Tensor, lengths: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """q and k, on the unit sphere, and v [B, T, heads, head_dim], pre-activations of the gates, the new ``conv``.

        Args:
            qkv: what ``qkv_proj`` gave.
            gates: pre-activations of gates that see the token alone, else None.
            conv: the convolution's state; lengths: as in ``ShortConvolution.after``.
        """
        heads = self.key_heads, self.key_heads, self.heads
        q, k, v, *whole = convolve(qkv, conv, self.conv.weight, heads, gates is None, self.backend)
        z = self.gates_proj(*whole) if gates is None else gates
        return self._shared(q), self._shared(k), v, z, self.conv.after(qkv, conv, lengths)

    def _shared(self, x: Tensor) -> Tensor:
        """[..., key_heads, head_dim] -> [..., heads, head_dim]."""
        return x if self.key_heads == self.heads else x.repeat_interleave(self.heads // self.key_heads, -2)

    def write(
        self, x: Tensor, state: MemoryState, mask: Tensor | None, start: Sequence[Tensor] = ()
    ) -> tuple[Reads, MemoryState]:
        """``forward`` without its last part, ``output``; x left-aligned; ``start``: ``self.start()``, made before."""
        return self._write(self.qkv_proj(x), self._token_gates(x), mask, state, start=start)

    def _token_gates(self, x: Tensor) -> Tensor | None:
        """Pre-activations of gates that see the token alone; None for those that see what the convolution gives."""
        return self.gates_proj(x) if self.gate == "sigmoid" else None

    def output(self, reads: Reads, x: Tensor) -> Tensor:
        """Norm, gate and projection of what ``write`` read at the tokens x: [B, T, dim]."""
        return self.out_proj(self.gated(*reads, self.out_gate(x)))

    def queries(self, x: Tensor) -> Tensor:
        """What ``recall`` asks for the tokens x [B, T, dim]: no convolution, its window is the write's."""
        return self.as_queries(F.linear(x, self.query_map))

    @property
    def query_map(self) -> Tensor:
        """The part of ``qkv_proj`` that makes queries, [key_heads * head_dim, dim]."""
        return self.qkv_proj.weight[: self.key_heads * self.head_dim]

    def as_queries(self, projected: Tensor) -> Tensor:
        """Queries [B, T, heads, head_dim] from their projection [B, T, key_heads * head_dim]."""
        return self._shared(unit(F.silu(projected).unflatten(-1, (self.key_heads, self.head_dim))))

    def recall(self, queries: Tensor, out_gate: Tensor, maps: tuple[Tensor, ...]) -> Tensor:
        """Asks a memory that stands still: M*(x W_Q), eq. 21, as ``out_proj`` takes it; nothing is written.

        Args:
            queries: ``queries(x)``; out_gate: ``self.out_gate(x)``.
            maps: linear maps [B, heads, d_in, d_out], e.g. ``self.current_maps(state)``.
        """
        affine = [a.to(queries.dtype) for a in self.weights[self.network.depth :]]
        y = self.network.apply((*(w.to(queries.dtype) for w in maps), *affine), queries.transpose(1, 2))
        return self.gated(y.transpose(1, 2), None, out_gate)

    def gate_values(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """theta, log eta and log(1 - alpha) from what ``gates_proj`` gave."""
        z = z if z.dtype == torch.float64 else z.float()
        write, momentum, forget = z.unflatten(-1, (3, self.heads)).unbind(-2)
        log_momentum = F.logsigmoid(momentum) + (math.log(self.max_momentum) if self.max_momentum else NEVER)
        if self.gate == "sigmoid":
            lr, log_retention = torch.sigmoid(write), F.logsigmoid(-forget)
        else:
            lr = writes(z)
            # never all: where both factors round to 1, the logarithm would be -inf and its gradient NaN
            alpha = (torch.sigmoid(forget) * lr).clamp_max(1 - torch.finfo(lr.dtype).eps)
            log_retention = torch.log1p(-alpha)
        return self.max_lr * lr, log_momentum, torch.zeros_like(forget) if self.forget == "none" else log_retention

    def gated(self, reads: Tensor, values: Tensor | None, out_gate: Tensor) -> Tensor:
        """What was read [B, T, heads, head_dim], ``skip`` of the values beside it, as ``out_proj`` takes it."""
        values = None if self.skip is None else values
        norm = self.out_norm
        return gate_reads(reads, values, self.skip, norm.weight, out_gate, norm.eps, self.backend)


def writes(z: Tensor) -> Tensor:
    """The write gate g [..., heads] of what ``gates_proj`` gave; exactly 0 below -3, exactly 1 above 3."""
    return F.hardsigmoid(z[..., : z.shape[-1] // 3])
