"""The exact chunk-parallel form: a chunk's tokens at once, for a memory of any depth (README.md, section 2)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from titans.memory.gates import ChunkMasks, chunk_masks
from titans.memory.network import MemoryMLP, safe_sqrt
from titans.memory.pieces import Cut, Piece
from titans.memory.scan import advance, dual, scan
from titans.memory.state import MemoryState

Tensors = Sequence[Tensor]


def chunked(
    q: Tensor, k: Tensor, v: Tensor, gates: Tensor, affine: Tensors, network: MemoryMLP,
    state: MemoryState, lengths: Tensor | None, info: bool,
) -> tuple[Tensor, MemoryState, tuple[Tensor, ...]]:  # fmt: skip
    """Reads and writes chunk by chunk; nothing of size [tokens, d_in, d_out] ever exists.

    Args:
        q, k, v: [B, T, H, D], real tokens to the left.
        gates: [B, T, H, 3] = (lr, log_momentum, log_retention), in the state's dtype.
        affine: gain and bias [H, D] of the norm, or ().
        lengths: [B], real tokens of each row; None: T in every row.
        info: also work out surprise and loss; without it, whole chunks take the fast path.

    Returns:
        out [B, T, H, D], the state after the last token, and with ``info`` surprise (norm of the gradient) and loss,
        both [B, T, H], else ().
    """
    B, T, H, _ = q.shape
    C, L, dtype = state.chunk_size, network.depth, q.dtype
    G = B * H  # every memory by itself: [B, T, H, ...] becomes [G, T, ...]

    cut = Cut(
        state.position.repeat_interleave(H), None if lengths is None else lengths.repeat_interleave(H), T, C, not info
    )
    split = [cut.split(x.transpose(1, 2).flatten(0, 1)) for x in (q, k, v, gates)]
    weights, momentum = [w.flatten(0, 1) for w in state.weights], [s.flatten(0, 1) for s in state.momentum]
    start = [h.flatten(0, 1) for h in (*state.inputs, *state.signals, state.gates)]
    held: list[Tensor | None] = list(start)  # the open chunk; None stands for zeros
    norm = (affine[0].repeat(B, 1).unsqueeze(1), affine[1].repeat(B, 1).unsqueeze(1)) if affine else None

    outs, surprises, losses = [], [], []
    for piece, q_, k_, v_, gates_ in zip(cut.pieces, *split, strict=True):
        if not info and piece.is_whole(C):
            out, weights, momentum = scan(q_, k_, v_, gates_, weights, momentum, norm, network, C)
            outs.append(out)
            held = [None] * len(held)
            continue
        operands = [w.to(dtype) for w in weights]
        x, d, loss = network.trace(operands, norm, k_, v_)
        if info:
            surprises.append(_surprise(x, d, loss.dtype))
            losses.append(loss)
        filled = [piece.place(new, old, C) for new, old in zip((*x, *d, gates_), held, strict=True)]
        x, d, masks = filled[:L], filled[L:-1], chunk_masks(filled[-1])
        read = _reader(operands, [s.to(dtype) for s in momentum], x, d, masks, piece)
        outs.append(network.forward(q_, read, norm))
        if piece.closes is not False:
            closed = advance(weights, momentum, x, d, masks)
            weights = [piece.where_closed(new, old) for new, old in zip(closed[0], weights, strict=True)]
            momentum = [piece.where_closed(new, old) for new, old in zip(closed[1], momentum, strict=True)]
        held = [None if piece.closes is True else piece.where_closed(torch.zeros_like(f), f) for f in filled]

    ends = [torch.zeros_like(s) if h is None else h.to(s.dtype) for h, s in zip(held, start, strict=True)]
    w, s, ends = (tuple(t.unflatten(0, (B, H)) for t in ts) for ts in (weights, momentum, ends))
    end = MemoryState(w, s, ends[:L], ends[L:-1], ends[-1], state.position + (T if lengths is None else lengths))

    def whole(pieces: list[Tensor], like: Tensor) -> Tensor:
        joined = cut.join(pieces, like.transpose(1, 2).reshape(G, T, *like.shape[3:]))
        return joined.unflatten(0, (B, H)).transpose(1, 2)

    seen = tuple(whole(pieces, gates[..., 0]) for pieces in (surprises, losses)) if info else ()
    return whole(outs, q), end, seen


def current_maps(state: MemoryState) -> list[Tensor]:
    """The memory's linear maps [B, H, d_in, d_out] as they stand after the last token, open chunk included."""
    slots = torch.arange(state.chunk_size, device=state.gates.device)
    empty = (slots >= (state.position % state.chunk_size).unsqueeze(1)).view(-1, 1, state.chunk_size)
    lr, log_momentum, log_retention = state.gates.unbind(-1)
    # momentum moves the memory at every step: it has to end with the last token, or empty slots would add it again
    gates = torch.stack([lr, log_momentum.masked_fill(empty, -torch.inf), log_retention], -1)
    w, s, x, d = ([t.flatten(0, 1) for t in ts] for ts in (state.weights, state.momentum, state.inputs, state.signals))
    with torch.autocast(state.gates.device.type, enabled=False):
        maps, _ = advance(w, s, x, d, chunk_masks(gates.flatten(0, 1)))
    return [m.unflatten(0, state.gates.shape[:2]) for m in maps]


def _reader(weights: Tensors, momentum: Tensors, x: Tensors, d: Tensors, masks: ChunkMasks, piece: Piece):
    """The linear maps of the memory at every token of the piece, applied without being formed."""
    write, keep, carry = (piece.rows(m) for m in (masks.write, masks.keep, masks.carry))

    def linear(i: int, h: Tensor) -> Tensor:
        x_i, d_i = x[i].to(h.dtype), d[i].to(h.dtype)
        return dual(h, torch.bmm(h, x_i.mT) * write, weights[i], momentum[i], d_i, keep, carry)

    return linear


def _surprise(x: Tensors, d: Tensors, dtype: torch.dtype) -> Tensor:
    """Frobenius norm of every token's gradient, all maps together: [..., T]."""
    squares = [a.to(dtype).square().sum(-1) * b.to(dtype).square().sum(-1) for a, b in zip(x, d, strict=True)]
    return safe_sqrt(torch.stack(squares).sum(0))
