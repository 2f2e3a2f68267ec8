"""Memory that training needs: states at the starts of pieces only, never weights for every chunk (trap 8)."""

import pytest
import torch
from memory_cases import OPTIONS, Case, make
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from titans.memory import pieces

C = 4
NETWORK = OPTIONS["plain"]


class Live(TorchDispatchMode):
    """Counts the bytes of all tensors that were made under it and are still alive."""

    def __init__(self):
        super().__init__()
        self.found: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_flatten(out)[0]:
            if isinstance(x, torch.Tensor):
                ref = StorageWeakRef(x.untyped_storage())
                self.found[ref.cdata] = (ref, x.untyped_storage().nbytes())
        self.peak = max(self.peak, self.now())
        return out

    def now(self) -> int:
        self.found = {key: item for key, item in self.found.items() if not item[0].expired()}
        return sum(size for _, size in self.found.values())


def long(chunks: int) -> Case:
    """Narrow tokens, wide memory: one state weighs as much as 100 chunks of tokens."""
    network = type(NETWORK)(expansion=128, residual=False, norm=False)
    return make(network, B=1, T=chunks * C, H=1, D=4, C=C, dtype=torch.float32, lr=1e-3)


def train(case: Case) -> tuple[int, int]:
    """Bytes alive after the forward, and the peak of forward and backward, over the inputs' own."""
    case = case.leaves()
    with Live() as live:
        out = case.run(info=False)[0].square().sum()
        held = live.now()
        out.backward()
    return held, live.peak


def state_bytes(case: Case) -> int:
    return 2 * 4 * sum(w.numel() for w in case.weights)


@pytest.fixture(autouse=True)
def short_pieces(monkeypatch):
    monkeypatch.setattr(pieces, "PIECE", 8 * C)


def test_states_are_kept_at_the_starts_of_pieces_only():
    """Between two long runs, the difference a chunk is far from one state a chunk; it is one state a piece."""
    few, many = long(32), long(96)
    (held_few, peak_few), (held_many, peak_many) = train(few), train(many)
    state = state_bytes(many)
    tokens = sum(x[:, : 64 * C].numel() for x in many.inputs) * 4
    piece_starts = 64 / 8 * state
    assert held_many - held_few <= piece_starts + 12 * tokens
    assert peak_many - peak_few <= piece_starts + 20 * tokens
    assert piece_starts + 20 * tokens < 0.5 * 64 * state, "the bounds would otherwise allow one state a chunk"


def test_nothing_is_held_without_autograd():
    """Reading a long sequence needs the memory of a short one, and its tokens."""
    peaks = []
    for chunks in (8, 64):
        with torch.no_grad(), Live() as live:
            long(chunks).run(info=False)
        peaks.append(live.peak)
    tokens = sum(x.numel() for x in long(64).inputs) * 4
    assert peaks[1] - peaks[0] <= 8 * tokens
    assert 8 * tokens < 28 * state_bytes(long(1))
