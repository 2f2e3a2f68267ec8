"""The definition: the recurrence token by token, its gradient by automatic differentiation (README.md, section 1)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import grad, vmap

from titans.memory.network import MemoryMLP, safe_sqrt
from titans.memory.state import MemoryState, hold


def reference(
    q: Tensor, k: Tensor, v: Tensor, gates: Tensor, affine: Sequence[Tensor], network: MemoryMLP,
    base: Sequence[Tensor], state: MemoryState, mask: Tensor | None,
) -> tuple[Tensor, MemoryState, tuple[Tensor, ...]]:  # fmt: skip
    """Reads and writes one token after the other; as ``chunked``, but any mask [B, T] will do."""
    B, T, _, _ = q.shape
    like, (q, k, v) = q, (t.to(gates.dtype) for t in (q, k, v))
    C = state.chunk_size
    real = torch.ones(B, T, dtype=torch.bool, device=q.device) if mask is None else mask

    def loss(maps, affine, k, v):
        return (network.apply((*maps, *affine), k) - v).square().sum()

    def of_heads(fn):  # over heads, then over the batch; the norm's gain and bias differ by head only
        return vmap(vmap(fn), in_dims=(0, None, 0, 0))

    inner_gradient = of_heads(grad(loss))
    inner_loss = of_heads(loss)
    row, head = torch.arange(B, device=q.device).unsqueeze(1), torch.arange(q.shape[2], device=q.device)

    base = tuple(base) or tuple(torch.zeros_like(w[0]) for w in state.weights)  # forgetting goes there
    frozen, start_momentum = tuple(w + b for w, b in zip(state.weights, base, strict=True)), state.momentum
    memory, momentum = _as_it_stands(state)
    memory = tuple(m + b for m, b in zip(memory, base, strict=True))
    inputs, signals, position = state.inputs, state.signals, state.position
    pending, transition = state.pending, state.since_start()
    same = torch.eye(2, dtype=gates.dtype, device=q.device)
    outs, surprises, losses = [], [], []
    for t in range(T):
        here = real[:, t]
        lr, eta, retention = gates[:, t, :, 0], gates[:, t, :, 1].exp(), gates[:, t, :, 2].exp()
        at = memory if network.online else frozen
        gradient = inner_gradient(at, tuple(affine), k[:, t], v[:, t])
        new_momentum = tuple(_times(eta, s) - _times(lr, g) for s, g in zip(momentum, gradient, strict=True))
        new_memory = tuple(
            _times(retention, m) + _times(1 - retention, b) + s
            for m, b, s in zip(memory, base, new_momentum, strict=True)
        )
        memory, momentum = _where(here, new_memory, memory), _where(here, new_momentum, momentum)
        out = network.apply((*memory, *affine), q[:, t].unsqueeze(2)).squeeze(2)
        outs.append(_where(here, out, torch.zeros_like(out)))
        surprises.append(safe_sqrt(torch.stack([g.square().sum((-2, -1)) for g in gradient]).sum(0)))
        losses.append(inner_loss(at, tuple(affine), k[:, t], v[:, t]))

        # the open chunk, kept as layer inputs and signals, is what the state carries
        x, d, _ = network.trace(at, _affine(affine), k[:, t].unsqueeze(2), v[:, t].unsqueeze(2))
        slot = (row, head, (position % C).unsqueeze(1))
        inputs = _where(here, tuple(_put(b, slot, n.squeeze(2)) for b, n in zip(inputs, x, strict=True)), inputs)
        signals = _where(here, tuple(_put(b, slot, n.squeeze(2)) for b, n in zip(signals, d, strict=True)), signals)
        step = torch.stack([torch.stack([retention, eta], -1), torch.stack([torch.zeros_like(eta), eta], -1)], -2)
        pending = _where(here, _put(pending @ step.mT, slot, torch.stack([lr, lr], -1)), pending)
        transition = _where(here, step @ transition, transition)
        position = position + here
        border = here & (position % C == 0)
        frozen, start_momentum = _where(border, memory, frozen), _where(border, momentum, start_momentum)
        inputs = _where(border, tuple(torch.zeros_like(b) for b in inputs), inputs)
        signals = _where(border, tuple(torch.zeros_like(b) for b in signals), signals)
        pending = _where(border, torch.zeros_like(pending), pending)
        transition = _where(border, same.expand_as(transition), transition)
    relative = [w - b for w, b in zip(frozen, base, strict=True)]
    end = MemoryState(hold(relative, start_momentum, 2), inputs, signals, pending, transition, position)
    if not outs:
        empty = gates.new_zeros(gates.shape[:-1])
        return torch.zeros_like(like), end, (empty, empty)
    real = real.unsqueeze(-1)
    return torch.stack(outs, 1).to(like.dtype), end, (torch.stack(surprises, 1) * real, torch.stack(losses, 1) * real)


def _as_it_stands(state: MemoryState) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Memory and momentum after the open chunk's tokens, whose gradients are products of inputs and signals."""
    start, now = zip(state.weights, state.momentum, strict=True), []
    for pair, x, d in zip(start, state.inputs, state.signals, strict=True):
        started = torch.einsum("bhpq,bhqio->bhpio", state.since_start(), torch.stack(pair, 2))
        now.append(started - torch.einsum("bhcp,bhci,bhco->bhpio", state.pending, x, d))
    return tuple(m[:, :, 0] for m in now), tuple(m[:, :, 1] for m in now)


def _times(scalar: Tensor, x: Tensor) -> Tensor:
    return scalar[..., None, None] * x


def _affine(affine: Sequence[Tensor]):
    return (affine[0].unsqueeze(-2), affine[1].unsqueeze(-2)) if affine else None


def _put(buffer: Tensor, slot: tuple[Tensor, ...], new: Tensor) -> Tensor:
    return buffer.index_put(slot, new.to(buffer.dtype))


def _where(rows: Tensor, new: Any, old: Any) -> Any:
    if isinstance(new, tuple):
        return tuple(_where(rows, n, o) for n, o in zip(new, old, strict=True))
    return torch.where(rows.view(-1, *[1] * (new.dim() - 1)), new, old)
