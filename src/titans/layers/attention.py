"""Attention of bounded reach: inside a segment, or in a sliding window; work a token does not grow with the sequence.

Half of each head's dimensions carry rotary positions, the other half none. Positions count from the start of the
segment or block, so that they stay small after millions of tokens. Persistent tokens have no position: their keys are
zero in the rotary half, and every query sees them.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titans.memory import State
from titans.memory.pieces import Piece, take


def rotary_table(positions: Tensor, like: Tensor, base: float = 10_000.0) -> Tensor:
    """What ``rotate`` takes for tokens at ``positions`` [..., n]: cosines and sines, [2, ..., n, 1, head_dim]."""
    quarter, precise = like.shape[-1] // 4, torch.promote_types(like.dtype, torch.float32)
    frequencies = base ** (-torch.arange(quarter, device=positions.device, dtype=precise) / quarter)
    angles = (positions.unsqueeze(-1) * frequencies).unsqueeze(-2)
    cos, sin, none = angles.cos(), angles.sin(), torch.zeros_like(angles)
    return torch.stack([torch.cat([cos, cos, none + 1, none + 1], -1), torch.cat([-sin, sin, none, none], -1)])


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Rotary positions on the first half of the last axis: x [..., n, heads, head_dim]."""
    quarter, (cos, sin) = x.shape[-1] // 4, table.to(x.dtype).unbind(0)
    turned = torch.cat([x[..., quarter : 2 * quarter], x[..., :quarter], x[..., 2 * quarter :]], -1)
    return torch.addcmul(x * cos, turned, sin)


class _Attention(nn.Module):
    """Projections into heads and back, and keys and values of the persistent tokens."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        if dim % heads or (dim // heads) % 4:
            raise ValueError(f"dim={dim} must be heads={heads} times a multiple of 4, for rotary halves")
        self.heads, self.head_dim = heads, dim // heads
        self.qkv_proj = nn.Linear(dim, 3 * dim, bias=False)
        self.out_proj = nn.Linear(dim, dim, bias=False)

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        """x [B, T, dim] -> q, k, v [B, T, heads, head_dim]."""
        return self.qkv_proj(x).unflatten(-1, (3, self.heads, self.head_dim)).unbind(-3)

    def keys_values(self, x: Tensor) -> tuple[Tensor, ...]:
        """k, v alone."""
        kv = F.linear(x, self.qkv_proj.weight[self.heads * self.head_dim :])
        return kv.unflatten(-1, (2, self.heads, self.head_dim)).unbind(-3)

    def persistent(self, tokens: Tensor, batch: int) -> tuple[Tensor, Tensor]:
        """Keys and values [batch, N_p, heads, head_dim] of the persistent tokens [N_p, dim]."""
        k, v = (t.expand(batch, *t.shape) for t in self.keys_values(tokens))
        half = self.head_dim // 2
        return torch.cat([torch.zeros_like(k[..., :half]), k[..., half:]], -1), v

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        """q [B, n, heads, d], k, v [B, m, heads, d], mask [B or 1, n, m] -> [B, n, dim]."""
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.unsqueeze(1))
        return self.out_proj(y.transpose(1, 2).flatten(-2))


@dataclass
class WindowState(State):
    """Keys and values [B, window, heads, head_dim] of the last tokens, newest last; ``count`` [B] are real."""

    keys: Tensor
    values: Tensor
    count: Tensor


class SlidingWindowAttention(_Attention):
    """Every token sees itself, the ``window - 1`` tokens before it and the persistent tokens."""

    def __init__(self, dim: int, heads: int, window: int):
        super().__init__(dim, heads)
        if window < 1:
            raise ValueError(f"sliding_window must be at least 1, got {window}")
        self.window = window

    def initial_state(self, batch: int) -> WindowState:
        """Nothing seen yet."""
        weight = self.qkv_proj.weight
        empty = weight.new_zeros(batch, self.window, self.heads, self.head_dim)
        return WindowState(empty, empty, torch.zeros(batch, dtype=torch.long, device=weight.device))

    def forward(
        self, x: Tensor, state: WindowState, lengths: Tensor | None, persistent: Tensor | None = None
    ) -> tuple[Tensor, WindowState]:
        """x [B, T, dim], left-aligned -> [B, T, dim]; ``persistent`` [N_p, dim]."""
        (B, T, _), W = x.shape, self.window
        if T == 0:
            return x, state
        q, k, v = self.project(x)
        keys, values = torch.cat([state.keys, k], 1), torch.cat([state.values, v], 1)
        size = min(W, T)  # blocks of queries; each sees its own keys and the W before them
        blocks, pad = -(-T // size), -T % size

        def windows(t: Tensor) -> Tensor:  # [B, W + T, heads, d] -> [B * blocks, W + size, heads, d]
            t = F.pad(t, (0, 0, 0, 0, 0, pad)) if pad else t
            return t.unfold(1, W + size, size).movedim(-1, 2).flatten(0, 1)

        slots = torch.arange(W + size, device=x.device)
        q_ = F.pad(q, (0, 0, 0, 0, 0, pad)).unflatten(1, (blocks, size)).flatten(0, 1)
        table = rotary_table(slots, q)
        q_, k_, v_ = rotate(q_, table[:, W:]), rotate(windows(keys), table), windows(values)
        mask = self._mask(state.count, blocks, size)
        if persistent is not None:
            pk, pv = self.persistent(persistent, len(k_))
            k_, v_, mask = torch.cat([pk, k_], 1), torch.cat([pv, v_], 1), F.pad(mask, (len(persistent), 0), value=True)
        y = self.attend(q_, k_, v_, mask).unflatten(0, (B, blocks)).flatten(1, 2)[:, :T]
        return y, self._next(state, keys, values, T, lengths)

    def _mask(self, count: Tensor, blocks: int, size: int) -> Tensor:
        """[B * blocks, size, W + size]: inside the window, and not an empty slot of the state."""
        W, device = self.window, count.device
        i, j = torch.arange(size, device=device).unsqueeze(1), torch.arange(W + size, device=device)
        near = (j > i) & (j <= i + W)
        filled = torch.arange(blocks, device=device).unsqueeze(1) * size + j >= W - count.view(-1, 1, 1)
        return (near & filled.unsqueeze(2)).flatten(0, 1)

    def _next(self, state: WindowState, keys: Tensor, values: Tensor, T: int, lengths: Tensor | None) -> WindowState:
        W = self.window
        if lengths is None:
            keys, values = keys[:, T:].clone(), values[:, T:].clone()  # views would keep all of them
            return WindowState(keys, values, (state.count + T).clamp(max=W))
        last = lengths.unsqueeze(1) + torch.arange(W, device=keys.device)
        return WindowState(take(keys, last), take(values, last), (state.count + lengths).clamp(max=W))


class SegmentAttention(_Attention):
    """Attention inside one segment over [persistent | memory tokens | tokens], causal in both."""

    def __init__(self, dim: int, heads: int, segment_length: int):
        super().__init__(dim, heads)
        self.segment_length = segment_length

    def initial_state(self, batch: int) -> Tensor:
        """Empty keys and values of memory tokens and tokens: [batch, segment, 4, heads, head_dim]."""
        return self.qkv_proj.weight.new_zeros(batch, self.segment_length, 4, self.heads, self.head_dim)

    def project_at(self, x: Tensor, position: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v of tokens x [B, T, dim] of which the first is the ``position`` [B]-th of its row, q and k rotated."""
        q, k, v = self.project(x)
        table = rotary_table(self._places(position, x.shape[1]), q)
        return rotate(q, table), rotate(k, table), v

    def _places(self, position: Tensor, length: int) -> Tensor:
        """Places [B, length] of tokens inside their segments."""
        return (position.unsqueeze(1) + torch.arange(length, device=position.device)) % self.segment_length

    def forward(
        self, qkv: tuple[Tensor, ...], memory: Tensor, held: Tensor, piece: Piece, persistent: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor]:
        """Tokens of one piece of a segment, ``qkv`` as from ``project_at``, and their memory tokens [B, n, dim].

        ``persistent`` is what the method of that name returned, or (). Returns [B, n, dim], and the segment's keys and
        values so far, ``held`` of the next call.
        """
        C, (q, k, v) = self.segment_length, qkv
        first = torch.as_tensor(piece.offset, device=q.device).view(-1)
        places = self._places(first, piece.width)
        mk, mv = self.keys_values(memory)
        mk = rotate(mk, rotary_table(places, mk))
        held = piece.place(torch.stack([mk, mv, k, v], 2), held, C)
        mk, mv, k, v = held.unbind(2)
        earlier = torch.arange(C, device=q.device) <= places.unsqueeze(-1)
        mask, keys, values = torch.cat([earlier, earlier], -1), [mk, k], [mv, v]
        if persistent:
            keys, values = [persistent[0], *keys], [persistent[1], *values]
            mask = F.pad(mask, (persistent[0].shape[1], 0), value=True)
        return self.attend(q, torch.cat(keys, 1), torch.cat(values, 1), mask), held
