"""A sequence cut anywhere continues exactly (test contract, item 3)."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_cases import MASKS, OPTIONS, PATHS, assert_equal, gradients, in_pieces, make, results

from titans.memory import MemoryState
from titans.memory.state import hold

paths = pytest.mark.parametrize("info", PATHS.values(), ids=PATHS.keys())
T = 23


@paths
@settings(max_examples=40)
@given(data=st.data())
def test_any_split_is_the_whole(info, data):
    C = data.draw(st.integers(1, 7), "chunk")
    cuts = sorted(data.draw(st.lists(st.integers(0, T), max_size=5), "cuts"))
    name = data.draw(st.sampled_from([None, *MASKS]), "mask")
    network = OPTIONS[data.draw(st.sampled_from(["default", "depth1", "depth3", "plain"]), "network")]
    case, mask = make(network, B=3, T=T, C=C, lr=0.005), name and MASKS[name](3, T)
    split = in_pieces(case, cuts, mask=mask, info=info)
    assert_equal(results(*split), results(*case.run(mask=mask, info=info)))


@pytest.mark.parametrize("backend", ["chunked", "reference"])
@pytest.mark.parametrize("network", OPTIONS)
def test_token_by_token_is_the_whole(network, backend):
    case = make(OPTIONS[network], T=13)
    steps = in_pieces(case, list(range(1, 13)), backend, info=backend == "reference")
    assert_equal(results(*steps), results(*case.run(backend, info=backend == "reference")))


@paths
@pytest.mark.parametrize("cut", [0, 1, 4, 6, 13])
def test_gradients_through_the_carried_state(cut, info):
    """Backpropagation through the cut gives the gradients of the whole."""
    case = make(T=13).leaves()
    leaves = [*case.inputs, *case.weights]

    def grads(out, end, _):
        total = out.square().sum() + sum(
            (w.square().sum() + s.sum()) for w, s in zip(end.weights, end.momentum, strict=True)
        )
        return torch.autograd.grad(total, leaves)

    assert_equal(grads(*in_pieces(case, [cut], info=info)), grads(*case.run(info=info)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cut", [3, 8])
def test_saved_and_loaded_continues_exactly(cut, dtype, tmp_path):
    """Bit for bit, wherever the state was saved."""
    case = make(T=13).to(dtype)

    def through_a_file(state):
        state.save(tmp_path / "memory.safetensors")
        return MemoryState.load(tmp_path / "memory.safetensors")

    loaded = in_pieces(case, [cut], info=False, between=through_a_file)
    carried = in_pieces(case, [cut], info=False)
    assert_equal(results(*loaded), results(*carried), tolerance=0.0)


def test_a_call_shorter_than_a_chunk_writes():
    """Trap 6: three tokens of a chunk of 64 are read back by the next call."""
    case = make(T=5, C=64)
    _, state, _ = case.tokens(0, 3).run()
    after = case.tokens(3).run(state=state)[0]
    forgotten = case.tokens(3).run()[0]
    assert (after - forgotten).abs().max() > 1e-3


@pytest.mark.parametrize("piece", ["momentum", "inputs", "signals", "pending", "transition"])
def test_nothing_in_the_state_is_superfluous(piece):
    """Trap 7: a carried state without its momentum or its open chunk gives other numbers."""
    case = make(T=13)
    state = case.tokens(0, 6).run()[1]
    if piece == "momentum":
        piece, empty = "maps", hold(state.weights, [torch.zeros_like(w) for w in state.weights], 2)
    else:
        value = getattr(state, piece)
        empty = tuple(map(torch.zeros_like, value)) if isinstance(value, tuple) else torch.zeros_like(value)
    broken = type(state)(**{**vars(state), piece: empty})
    whole = case.tokens(6).run(state=state)[0]
    assert (case.tokens(6).run(state=broken)[0] - whole).abs().max() > 1e-3


@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_one_backend_continues_what_the_other_began(backend):
    other = {"chunked": "reference", "reference": "chunked"}[backend]
    case = make(T=13)
    state = case.tokens(0, 6).run(backend)[1].detach()
    for got, expected in zip(
        gradients(case.tokens(6), other, state), gradients(case.tokens(6), backend, state), strict=True
    ):
        assert_equal(got, expected)
