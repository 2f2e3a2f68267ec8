"""The exact chunk-parallel form: a chunk's tokens at once, for a memory of any depth (README.md, section 2)."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from titans.memory import online
from titans.memory.activations import at_least_float32
from titans.memory.gates import ChunkMasks, chunk_masks, narrow, widen
from titans.memory.network import MemoryMLP, safe_sqrt
from titans.memory.pieces import Cut
from titans.memory.scan import advance_all, as_held, weights_of
from titans.memory.state import MemoryState

Tensors = Sequence[Tensor]


def chunked(
    q: Tensor, k: Tensor, v: Tensor, gates: Tensor, affine: Tensors, network: MemoryMLP,
    base: Tensors, state: MemoryState, lengths: Tensor | None, info: bool,
    fast: Callable,
) -> tuple[Tensor, MemoryState, tuple[Tensor, ...]]:  # fmt: skip
    """Reads and writes chunk by chunk; nothing of size [tokens, d_in, d_out] ever exists.

    Args:
        q, k, v: [B, T, H, D], real tokens to the left.
        gates: [B, T, H, 3] = (lr, log_momentum, log_retention), in the state's dtype.
        affine: gain and bias [H, D] of the norm, or ().
        base: linear maps [H, d_in, d_out] that the state is relative to, or ().
        lengths: [B], real tokens of each row; None: T in every row.
        info: also work out surprise and loss; without it, whole chunks in a row take the fast path.
        fast: that path, ``scan`` or another with its arguments and results.

    Returns:
        out [B, T, H, D], the state after the last token, and with ``info`` surprise (norm of the gradient) and loss,
        both [B, T, H], else ().
    """
    B, T, H, _ = q.shape
    C, L, dtype = state.chunk_size, network.depth, q.dtype
    cut = Cut(state.place, lengths, T, C, not info)
    flat = _flat(state)  # every memory by itself: [B, H, ...] becomes [G, ...]
    maps, pending = list(flat.maps), flat.pending
    start = [*flat.inputs, *flat.signals]
    held: Sequence[Tensor | None] = start  # the open chunk; None stands for zeros
    nothing, same = torch.zeros_like(pending), torch.eye(2, dtype=gates.dtype, device=q.device).expand(B * H, 2, 2)
    transition = state.since_start().flatten(0, 1)
    alone = [info or not piece.is_whole(C) for piece in cut.pieces]  # what the fast path does not take
    held_base = as_held(base, B) if any(alone) else ()
    norm = (affine[0].repeat(B, 1).unsqueeze(1), affine[1].repeat(B, 1).unsqueeze(1)) if affine else None

    outs, surprises, losses = [], [], []
    split = [cut.split(x) for x in (q, k, v, gates)]
    for piece, is_alone, q_, k_, v_, gates_ in zip(cut.pieces, alone, *split, strict=True):
        if not is_alone:
            out, maps = fast(q_, k_, v_, gates_, maps, base, norm, network, C)
            outs.append(out)
            held, pending, transition = [None for _ in held], nothing, same
            continue
        piece = piece.repeat(H)
        q_, k_, v_, gates_ = (t.transpose(1, 2).flatten(0, 1) for t in (q_, k_, v_, gates_))
        masks = chunk_masks(piece.blank(gates_), piece.last)
        if network.online:
            open_chunk = [torch.zeros_like(s) if h is None else h for h, s in zip(held, start, strict=True)]
            x, d, error = _trace_online(network, maps, held_base, *open_chunk, pending, transition, masks, k_, v_)
        else:
            x, d, error = network.trace(weights_of(maps, held_base, dtype), norm, k_, v_)
        if info:
            surprises.append(_surprise(x, d, error.dtype))
            losses.append(error.square().sum(-1))
        filled = [piece.place(new, old, C) for new, old in zip((*x, *d), held, strict=True)]
        x, d = filled[:L], filled[L:]
        # tokens before this piece: their gradients fade with the memory and the momentum that hold them
        write = piece.place(masks.write.mT, pending @ masks.read.mT, C).mT
        out = network.forward(q_, _reader(maps, held_base, x, d, write, masks.read @ transition), norm)
        outs.append(out.unflatten(0, (B, H)).transpose(1, 2))
        pending = piece.where_read(piece.place(masks.to_state, pending @ masks.transition.mT, C), pending)
        transition = piece.where_read(masks.transition @ transition, transition)
        if piece.closes is not False:
            closed = advance_all(maps, x, d, pending, transition)
            maps = [piece.where_closed(new, old) for new, old in zip(closed, maps, strict=True)]
            pending, transition = piece.where_closed(nothing, pending), piece.where_closed(same, transition)
        held = [None if piece.closes is True else piece.where_closed(torch.zeros_like(f), f) for f in filled]

    zeros = [s.detach() if state.is_between_chunks else torch.zeros_like(s) for s in start]  # there they are zeros, too
    ends = [z if h is None else h.to(z.dtype) for h, z in zip(held, zeros, strict=True)]
    maps, ends = (tuple(t.unflatten(0, (B, H)) for t in ts) for ts in (maps, ends))
    pending, transition = pending.unflatten(0, (B, H)), transition.unflatten(0, (B, H))
    place = state.after(T if lengths is None else lengths)
    end = MemoryState(maps, ends[:L], ends[L:], pending, transition, **place)

    def per_token(pieces: list[Tensor]) -> Tensor:
        return cut.join([x.unflatten(0, (B, H)).transpose(1, 2) for x in pieces], gates[..., 0])

    seen = (per_token(surprises), per_token(losses)) if info else ()
    return cut.join(outs, q), end, seen


def current_maps(state: MemoryState, base: Tensors = ()) -> list[Tensor]:
    """The memory's linear maps [B, H, d_in, d_out] as they stand after the last token, open chunk included.

    ``base``: M_0 [H, d_in, d_out], if the memory forgets towards it.
    """
    now: Sequence[Tensor] = state.weights
    unfinished = state.place % state.chunk_size
    if unfinished if isinstance(unfinished, int) else unfinished.any():
        flat, sizes = _flat(state), state.pending.shape[:2]
        with torch.autocast(state.pending.device.type, enabled=False):
            maps = advance_all(flat.maps, flat.inputs, flat.signals, flat.pending, flat.transition)
        now = [w.unflatten(0, sizes) for w in weights_of(maps, (), maps[0].dtype)]
    return [w + b for w, b in zip(now, base, strict=True)] if base else list(now)


def _flat(state: MemoryState) -> MemoryState:
    """Batch and heads as one dimension."""
    return state.map(lambda t: t.flatten(0, 1) if t.dim() > 3 else t)


def _reader(maps: Tensors, base: Tensors, x: Tensors, d: Tensors, write: Tensor, mix: Tensor):
    """The linear maps of the memory at every token of the piece, applied without being formed."""

    def linear(i: int, h: Tensor) -> Tensor:
        scores, flat = (torch.bmm(h, x[i].to(h.dtype).mT) * write).to(h.dtype), maps[i].to(h.dtype).flatten(1, 2)
        held = narrow(torch.bmm(h, flat.mT), mix) if i else torch.bmm(widen(h, mix), flat)
        if base:
            held = torch.baddbmm(held, h, (base[i].mT if i else base[i]).to(h.dtype))
        return torch.baddbmm(held, scores, d[i].to(h.dtype), alpha=-1)

    return linear


def _trace_online(
    network: MemoryMLP, maps: Tensors, base: Tensors, inputs: Tensor, signals: Tensor, pending: Tensor,
    transition: Tensor, masks: ChunkMasks, k: Tensor, v: Tensor,
) -> tuple[Tensors, Tensors, Tensor]:  # fmt: skip
    """``MemoryMLP.trace`` of an online memory: the keys meet what the queries do, one token earlier."""
    read, inverse = online.before(k, masks)
    reader = _reader(maps, base, [inputs], [signals], (pending @ read.mT).mT, read @ transition)
    signal = network.output_signal(reader(0, k), None, network.offset(k, v, None))[0]
    signal = online.settle(inverse, signal)
    return [k], [signal], 0.5 * at_least_float32(signal)


def _surprise(x: Tensors, d: Tensors, dtype: torch.dtype) -> Tensor:
    """Frobenius norm of every token's gradient, all maps together: [..., T]."""
    squares = [a.to(dtype).square().sum(-1) * b.to(dtype).square().sum(-1) for a, b in zip(x, d, strict=True)]
    return safe_sqrt(torch.stack(squares).sum(0))
