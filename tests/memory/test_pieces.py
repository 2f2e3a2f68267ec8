"""Cutting rows at chunk borders and putting them together again."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from titans.memory.pieces import Cut, align, check_mask, take


@st.composite
def rows(draw):
    """(positions, lengths or None, T, size) of a batch."""
    B, T, size = draw(st.integers(1, 4)), draw(st.integers(0, 20)), draw(st.integers(1, 7))
    same = draw(st.booleans())
    positions = [draw(st.integers(0, 30))] * B if same else draw(st.lists(st.integers(0, 30), min_size=B, max_size=B))
    lengths = draw(st.none() | st.lists(st.integers(0, T), min_size=B, max_size=B))
    return torch.tensor(positions), None if lengths is None else torch.tensor(lengths), T, size


def tokens(B, T, *more):
    """Numbers that say which token they are; never zero."""
    return torch.arange(1, B * T + 1, dtype=torch.float64).view(B, T, *[1] * len(more)).expand(B, T, *more).clone()


@given(rows(), st.booleans())
def test_split_then_join_is_the_identity(row, merge):
    positions, lengths, T, size = row
    cut = Cut(positions, lengths, T, size, merge)
    for x in (tokens(len(positions), T), tokens(len(positions), T, 2, 3)):
        whole = cut.join(cut.split(x), x)
        real = torch.ones(x.shape[:2]) if lengths is None else torch.arange(T) < lengths.unsqueeze(1)
        assert torch.equal(whole, x * real.view(*x.shape[:2], *[1] * (x.dim() - 2)))


@given(rows(), st.booleans())
def test_pieces_end_at_borders_and_hold_every_token_once(row, merge):
    positions, lengths, T, size = row
    B = len(positions)
    x = tokens(B, T)
    cut = Cut(positions, lengths, T, size, merge)
    place, seen = positions.clone(), [[] for _ in range(B)]
    for piece, part in zip(cut.pieces, cut.split(x), strict=True):
        valid = piece.valid if piece.valid is not None else torch.full((B,), piece.width)
        offset = piece.offset if isinstance(piece.offset, torch.Tensor) else torch.full((B,), piece.offset)
        closes = piece.closes if isinstance(piece.closes, torch.Tensor) else torch.full((B,), piece.closes)
        assert part.shape[1] == piece.width
        whole = isinstance(piece.offset, int) and piece.is_whole(size)
        for b in range(B):
            n = int(valid[b])
            if n:
                assert offset[b] == place[b] % size
                assert whole or offset[b] + n <= size
            if n or not isinstance(piece.offset, torch.Tensor):
                assert bool(closes[b]) == (n > 0 and int(place[b] + n) % size == 0)
            seen[b] += part[b, :n].tolist()
            place[b] += n
    for b in range(B):
        assert seen[b] == x[b, : T if lengths is None else int(lengths[b])].tolist()


@given(rows())
def test_whole_chunks_are_merged(row):
    """With ``merge`` a long sequence is at most three pieces, where all rows stand at the same place."""
    positions, _, T, size = row
    assert len(Cut(positions[:1], None, T, size, merge=True).pieces) <= 3


@given(rows())
def test_place_puts_a_piece_behind_what_was_held(row):
    positions, lengths, T, size = row
    x = tokens(len(positions), T, 2)
    cut, held = Cut(positions, lengths, T, size), torch.full((len(positions), size, 2), -1.0, dtype=torch.float64)
    for piece, part in zip(cut.pieces, cut.split(x), strict=True):
        placed = piece.place(part, held, size)
        for b in range(len(positions)):
            n = piece.width if piece.valid is None else int(piece.valid[b])
            first = piece.offset if isinstance(piece.offset, int) else int(piece.offset[b])
            assert torch.equal(placed[b, first : first + n], part[b, :n])
            assert not piece.blank(part)[b, n:].any()
            assert torch.equal(placed[b, :first], held[b, :first])
            assert (placed[b, first + n :] == -1).all()


@given(st.integers(0, 2**24 - 1), st.integers(1, 3), st.integers(1, 8))
def test_align_moves_real_tokens_left_and_back(bits, B, T):
    mask = torch.tensor([bits >> i & 1 for i in range(B * T)], dtype=torch.bool).view(B, T)
    index, lengths, undo = align(mask)
    x = tokens(B, T)
    moved = take(x, index)
    for b in range(B):
        assert moved[b, : lengths[b]].tolist() == x[b, mask[b]].tolist()
    assert torch.equal(take(moved, undo), x)


def test_check_mask():
    assert check_mask(None, 2, 3) is None
    assert check_mask(torch.ones(2, 3), 2, 3) is None
    assert torch.equal(check_mask(torch.tensor([[0, 1]]), 1, 2), torch.tensor([[False, True]]))
