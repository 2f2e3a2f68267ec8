"""The exact chunk-parallel form: a chunk's tokens at once, for a memory of any depth (README.md, section 2)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from titans.memory.gates import ChunkMasks, chunk_masks
from titans.memory.network import MemoryMLP, safe_sqrt
from titans.memory.pieces import Cut, Piece
from titans.memory.scan import advance, read, scan, widen
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
    maps = [torch.stack(pair, 2).flatten(0, 1) for pair in zip(state.weights, state.momentum, strict=True)]
    start = [h.flatten(0, 1) for h in (*state.inputs, *state.signals, state.gates)]
    held: list[Tensor | None] = list(start)  # the open chunk; None stands for zeros
    norm = (affine[0].repeat(B, 1).unsqueeze(1), affine[1].repeat(B, 1).unsqueeze(1)) if affine else None

    outs, surprises, losses = [], [], []
    for piece, q_, k_, v_, gates_ in zip(cut.pieces, *split, strict=True):
        if not info and piece.is_whole(C):
            out, maps = scan(q_, k_, v_, gates_, maps, norm, network, C)
            outs.append(out)
            held = [None] * len(held)
            continue
        operands = [m.to(dtype) for m in maps]
        x, d, loss = network.trace([m[:, 0] for m in operands], norm, k_, v_)
        if info:
            surprises.append(_surprise(x, d, loss.dtype))
            losses.append(loss)
        filled = [piece.place(new, old, C) for new, old in zip((*x, *d, gates_), held, strict=True)]
        x, d, masks = filled[:L], filled[L:-1], chunk_masks(filled[-1])
        outs.append(network.forward(q_, _reader(operands, x, d, masks, piece), norm))
        if piece.closes is not False:
            closed = _advance(maps, x, d, masks)
            maps = [piece.where_closed(new, old) for new, old in zip(closed, maps, strict=True)]
        held = [None if piece.closes is True else piece.where_closed(torch.zeros_like(f), f) for f in filled]

    ends = [torch.zeros_like(s) if h is None else h.to(s.dtype) for h, s in zip(held, start, strict=True)]
    w, s = zip(*(m.unflatten(0, (B, H)).unbind(2) for m in maps), strict=True)
    ends = tuple(t.unflatten(0, (B, H)) for t in ends)
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
    maps = [torch.stack(pair, 2).flatten(0, 1) for pair in zip(state.weights, state.momentum, strict=True)]
    x, d = ([t.flatten(0, 1) for t in ts] for ts in (state.inputs, state.signals))
    with torch.autocast(state.gates.device.type, enabled=False):
        maps = _advance(maps, x, d, chunk_masks(gates.flatten(0, 1)))
    return [m[:, 0].unflatten(0, state.gates.shape[:2]) for m in maps]


def _reader(maps: Tensors, x: Tensors, d: Tensors, masks: ChunkMasks, piece: Piece):
    """The linear maps of the memory at every token of the piece, applied without being formed."""
    write, mix = piece.rows(masks.write), piece.rows(masks.read)

    def linear(i: int, h: Tensor) -> Tensor:
        scores = (torch.bmm(h, x[i].to(h.dtype).mT) * write).to(h.dtype)
        return read(maps[i], widen(h, mix), scores, d[i].to(h.dtype))

    return linear


def _advance(maps: Tensors, x: Tensors, d: Tensors, masks: ChunkMasks) -> list[Tensor]:
    """The maps after all tokens of a chunk."""
    return [advance(m, widen(x_i, masks.to_state), d_i, masks.end) for m, x_i, d_i in zip(maps, x, d, strict=True)]


def _surprise(x: Tensors, d: Tensors, dtype: torch.dtype) -> Tensor:
    """Frobenius norm of every token's gradient, all maps together: [..., T]."""
    squares = [a.to(dtype).square().sum(-1) * b.to(dtype).square().sum(-1) for a, b in zip(x, d, strict=True)]
    return safe_sqrt(torch.stack(squares).sum(0))
