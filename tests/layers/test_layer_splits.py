"""A layer goes on where it stopped (test contract, item 3)."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layer_cases import CASES, LAYERS, MASKS, SIZES, assert_equal, build, in_pieces, run, tokens

from titans.memory import pieces

cases = pytest.mark.parametrize(("name", "size"), CASES)
T = 21


@pytest.mark.parametrize("name", LAYERS)
@settings(max_examples=25)
@given(data=st.data())
def test_any_split_is_the_whole(name, data):
    layer = build(name, data.draw(st.sampled_from(list(SIZES)), "size"))
    cuts = sorted(data.draw(st.lists(st.integers(0, T), max_size=4), "cuts"))
    mask = data.draw(st.sampled_from([None, *MASKS]), "mask")
    mask, x = None if mask is None else MASKS[mask](3, T), tokens(B=3, T=T)
    with torch.no_grad():
        (y, state), (z, other) = in_pieces(layer, x, cuts, mask), run(layer, x, mask=mask)
    real = torch.ones(3, T, dtype=torch.bool) if mask is None else mask
    assert_equal(y[real], z[real])
    assert_equal(state.tensors(), other.tensors())


@cases
def test_token_by_token_is_the_whole(name, size):
    layer, x = build(name, size), tokens(T=T)
    with torch.no_grad():
        (y, state), (z, other) = in_pieces(layer, x, list(range(1, T))), run(layer, x)
    assert_equal(y, z)
    assert_equal(state.tensors(), other.tensors())


@cases
@pytest.mark.parametrize("cut", [5, 8])
def test_gradients_through_the_state(name, size, cut):
    layer, x = build(name, size), tokens(T=T).requires_grad_()
    leaves = [x, *layer.parameters()]

    def grads(y, state):
        ends = (t for t in state.tensors().values() if t.is_floating_point())
        return torch.autograd.grad(y.square().sum() + sum(t.square().sum() for t in ends), leaves)

    assert_equal(grads(*in_pieces(layer, x, [cut])), grads(*run(layer, x)))


@cases
@pytest.mark.parametrize("mask", [None, "holes"])
def test_a_long_call_is_a_short_one(name, size, mask, monkeypatch):
    """In pieces that the backward works out again, ends of chunks and segments anywhere in them."""
    layer, x = build(name, size), tokens(T=T)
    real = mask and MASKS[mask](2, T)

    def grads():
        y, state = run(layer, x.requires_grad_(), mask=real)
        ends = [t for t in state.tensors().values() if t.is_floating_point()]
        loss = y.square().sum() + sum(t.square().sum() for t in ends)
        return [y, *ends, *torch.autograd.grad(loss, [x, *layer.parameters()])]

    short = grads()
    monkeypatch.setattr(pieces, "PIECE", 4)
    assert_equal(grads(), short)


@cases
@pytest.mark.parametrize("cut", [0, 7, 8])
def test_saved_and_loaded_continues_exactly(name, size, cut, tmp_path):
    """Through a safetensors file, which keeps every bit, with rows at different places."""
    layer, x = build(name, size), tokens(T=T)
    mask = MASKS["left"](2, T)

    def through_a_file(state):
        state.save(tmp_path / "state.safetensors")
        loaded = type(state).load(tmp_path / "state.safetensors")
        assert_equal(loaded.tensors(), state.tensors(), 0.0)
        return loaded

    with torch.no_grad():
        loaded = in_pieces(layer, x, [cut], mask, between=through_a_file)
        carried = in_pieces(layer, x, [cut], mask)
    assert_equal(loaded[0], carried[0])
    assert_equal(loaded[1].tensors(), carried[1].tensors())


@cases
def test_select_and_repeat(name, size):
    """Beams: rows reordered in the middle of a sequence go on as their sources would have."""
    layer, x = build(name, size), tokens(B=2, T=T)
    with torch.no_grad():
        state = run(layer, x[:, :10])[1]
        rows = torch.tensor([1, 0, 1])
        got = run(layer, x[rows, 10:], state.select(rows))
        expected = run(layer, x[:, 10:], state)
        assert_equal(got[0], expected[0][rows])
        doubled = run(layer, x[:, 10:].repeat_interleave(2, 0), state.repeat(2))
        assert_equal(doubled[0], expected[0].repeat_interleave(2, 0))


@cases
def test_state_size_is_constant(name, size):
    """Also of what lies behind its tensors: a view would keep what it was taken from."""
    layer = build(name, size)
    size = layer.initial_state(1).nbytes
    for n in (0, 1, 8, 21, 100):
        with torch.no_grad():
            state = run(layer, tokens(B=1, T=n))[1]
        behind = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in state.tensors().values()}
        assert state.nbytes == size >= sum(behind.values())


@pytest.mark.parametrize("name", LAYERS)
def test_detached_state_stops_gradients(name):
    layer, x = build(name), tokens().requires_grad_()
    state = run(layer, x[:, :10])[1].detach()
    run(layer, x[:, 10:], state)[0].sum().backward()
    assert not x.grad[:, :10].any()
    assert x.grad[:, 10:].any()
