"""What may not change a layer's output (test contract, item 4), for the memory layer and the four blocks."""

import pytest
import torch
from layer_cases import CASES, LAYERS, MASKS, assert_equal, build, run, tokens

cases = pytest.mark.parametrize(("name", "size"), CASES)
T = 21


@cases
@pytest.mark.parametrize("where", [1, 7, 8, 13, T - 1])
def test_causality(name, size, where):
    """Token t moves no earlier output by one bit, and its own; this covers symmetric padding and MAC's two leaks."""
    layer, x = build(name, size), tokens(T=T)
    other = x.clone()
    other[:, where] = -other[:, where]
    y, z = run(layer, x)[0], run(layer, other)[0]
    assert torch.equal(y[:, :where], z[:, :where])
    assert not torch.equal(y[:, where], z[:, where])


@cases
def test_gradients_are_causal(name, size):
    """The same in reverse: an output has no gradient for any later token, and one for every token its memory holds."""
    layer, x = build(name, size), tokens(B=1, T=T).requires_grad_()
    for t in (0, 6, 8, 15):
        (gradient,) = torch.autograd.grad(run(layer, x)[0][:, t].square().sum(), x)
        assert not gradient[:, t + 1 :].any()
        assert gradient[:, : t + 1].abs().sum(-1).gt(0).all()


@cases
def test_rows_are_independent(name, size):
    layer, x = build(name, size), tokens(B=3, T=T)
    y, state = run(layer, x)
    other = x.clone()
    other[1] = other[1].flip(0) * 2
    z, other_state = run(layer, other)
    assert torch.equal(z[[0, 2]], y[[0, 2]])
    assert not torch.equal(z[1], y[1])
    for (key, got), expected in zip(other_state.tensors().items(), state.tensors().values(), strict=True):
        assert torch.equal(got[[0, 2]], expected[[0, 2]]), key
    for b in range(3):
        alone, alone_state = run(layer, x[b : b + 1])
        assert_equal(alone, y[b : b + 1])
        assert_equal(alone_state.tensors(), state.select([b]).tensors())


@cases
def test_twice_is_the_same(name, size):
    """Nothing stays in the module, in the input or in the state that was passed."""
    layer, x = build(name, size), tokens(T=T)
    state = run(layer, x[:, :10])[1]
    before = {n: t.clone() for n, t in (*layer.state_dict().items(), *state.tensors().items())}
    first, second = (run(layer, x[:, 10:], state) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert_equal(first[1].tensors(), second[1].tensors(), 0.0)
    after = {**layer.state_dict(), **state.tensors()}
    assert all(torch.equal(after[n], t) for n, t in before.items())


@cases
@pytest.mark.parametrize("mask", MASKS)
def test_padding_changes_nothing(name, size, mask):
    """Pads anywhere, whatever they hold (NaN too): every row equals the row without them, and so does its state."""
    layer, x, mask = build(name, size), tokens(B=3, T=T), MASKS[mask](3, T)
    poisoned = x.masked_fill(~mask.unsqueeze(-1), torch.nan)
    (y, state), (z, other) = run(layer, x, mask=mask), run(layer, poisoned, mask=mask)
    assert torch.equal(y[mask], z[mask])
    assert z.isfinite().all()
    assert_equal(other.tensors(), state.tensors(), 0.0)
    for b in range(3):
        if mask[b].any():
            alone, alone_state = run(layer, x[b : b + 1, mask[b]])
            assert_equal(y[b : b + 1, mask[b]], alone)
            assert_equal(state.select([b]).tensors(), alone_state.tensors())
        else:
            assert_equal(state.select([b]).tensors(), layer.initial_state(1).tensors())


@pytest.mark.parametrize("name", LAYERS)
def test_nan_in_padding_leaves_gradients_finite(name):
    layer, mask = build(name), MASKS["left"](2, T)
    x = tokens(T=T).masked_fill(~mask.unsqueeze(-1), torch.nan).requires_grad_()
    y, state = run(layer, x, mask=mask)
    loss = y[mask].square().sum() + sum(t.square().sum() for t in state.tensors().values() if t.is_floating_point())
    loss.backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())
    assert x.grad[mask].isfinite().all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", LAYERS)
def test_nan_in_the_input_is_refused(name, value):
    """Issue 1, item 6: before the memory is spoilt, with the place."""
    layer, x = build(name), tokens()
    x[1, 7, 3] = value
    with pytest.raises(ValueError, match="x holds NaN or infinity, first in row 1 at token 7"):
        run(layer, x)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_works_without_autograd(name, mode):
    layer, x = build(name), tokens(T=T)
    expected = run(layer, x)[0]
    with mode():
        first, state = run(layer, x[:, :9])
        second, _ = run(layer, x[:, 9:], state)
        assert_equal(torch.cat([first, second], 1), expected.detach())


@pytest.mark.parametrize("name", LAYERS)
def test_backends_agree(name):
    layers = [build(name, backend=backend) for backend in ("chunked", "reference")]
    (y, state), (z, other) = (run(layer, tokens(T=T)) for layer in layers)
    assert_equal(y, z)
    assert_equal(state.tensors(), other.tensors())
