"""What may not change a result: later tokens, other rows, calling again, padding, the autograd mode (item 4)."""

import pytest
import torch
from memory_cases import MASKS, OPTIONS, assert_equal, make, results

from titans.memory import MemoryState, current_maps

BACKENDS = [("reference", True), ("chunked", True), ("chunked", False)]
backends = pytest.mark.parametrize(("backend", "info"), BACKENDS, ids=["reference", "chunked", "scan"])
T = 13


def changed(x, where):
    """x with one token replaced, in every row."""
    x = x.clone()
    x[:, where] = x[:, where] * 0.5 - 0.3
    return x


@backends
@pytest.mark.parametrize("network", ["default", "depth1", "depth4", "plain"])
@pytest.mark.parametrize("where", [1, 4, 6, T - 1])
def test_causality(backend, info, network, where):
    """Trap 1: token t moves no output before t, by not one bit; it does move its own."""
    case = make(OPTIONS[network], T=T)
    out, _, seen = case.run(backend, info=info)
    for i, x in enumerate(case.inputs):
        inputs = list(case.inputs)
        inputs[i] = changed(x, where)
        other, _, other_seen = case.on(*inputs).run(backend, info=info)
        assert torch.equal(other[:, :where], out[:, :where])
        assert not torch.equal(other[:, where], out[:, where])
        if info:
            assert torch.equal(other_seen.loss[:, :where], seen.loss[:, :where])


@backends
def test_one_row_is_alone(backend, info):
    """Trap 2: the same numbers beside other rows, in another order, and without them."""
    case = make(B=3, T=T)
    whole = results(*case.run(backend, info=info))
    swapped = results(*case.on(*(x[[2, 0, 1]] for x in case.inputs)).run(backend, info=info))
    assert_equal(swapped, {name: x[[2, 0, 1]] for name, x in whole.items()})
    for b in range(3):
        alone = results(*case.on(*(x[b : b + 1] for x in case.inputs)).run(backend, info=info))
        assert_equal(alone, {name: x[b : b + 1] for name, x in whole.items()})
    inputs = [x.clone() for x in case.inputs]
    for x in inputs:
        x[1] = 0.7 * x[1] - 0.1
    other = results(*case.on(*inputs).run(backend, info=info))
    assert all(torch.equal(other[name][[0, 2]], x[[0, 2]]) for name, x in whole.items())


@backends
def test_twice_is_the_same(backend, info):
    """Trap 2: nothing is left behind, neither in the arguments nor in the state that was passed."""
    case = make(T=T)
    state = case.tokens(0, 6).run(backend)[1]
    given = [x.clone() for x in (*case.inputs, *case.weights, *state.tensors().values())]
    first, second = (results(*case.tokens(6).run(backend, state, info=info)) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    now = (*case.inputs, *case.weights, *state.tensors().values())
    assert all(torch.equal(a, b) for a, b in zip(given, now, strict=True))


@backends
@pytest.mark.parametrize("name", MASKS)
def test_padding_is_not_there(backend, info, name):
    """Every row with pads equals the same row without them, whatever the pads hold."""
    case, mask = make(B=3, T=T), MASKS[name](3, T)
    filled = [x.masked_fill(~mask.view(*mask.shape, *[1] * (x.dim() - 2)), torch.nan) for x in case.inputs]
    for inputs in (case.inputs, filled):
        out, state, seen = case.on(*inputs).run(backend, mask=mask, info=info)
        assert not out[~mask].any()
        for b in range(3):
            kept, kept_state, kept_seen = case.on(*(x[b : b + 1, mask[b]] for x in case.inputs)).run(backend, info=info)
            assert_equal(out[b : b + 1, mask[b]], kept)
            assert_equal(state.select([b]).tensors(), kept_state.tensors())
            if info:
                assert_equal(seen.loss[b : b + 1, mask[b]], kept_seen.loss)


@backends
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_works_without_autograd(backend, info, mode):
    """The inner gradient does not need the outer one: generation runs under these modes."""
    case = make(T=T).leaves()
    expected = results(*case.run(backend, info=info))
    with mode():
        got = results(*case.run(backend, info=info))
    assert_equal({n: x.clone() for n, x in got.items()}, expected)
    assert not any(x.requires_grad for x in got.values())


@pytest.mark.parametrize("mask", [None, "holes"])
@pytest.mark.parametrize("network", OPTIONS)
def test_current_maps_are_the_running_memory(network, mask):
    """At every position: reading with them is what the next token's read gives if that token writes nothing."""
    case = make(OPTIONS[network], T=10)
    mask = None if mask is None else MASKS[mask](2, 10)
    nothing = torch.zeros_like(case.lr[:, 9:])
    silent = case.tokens(9).on(lr=nothing, log_momentum=nothing - torch.inf, log_retention=nothing)
    for t in range(10):
        state: MemoryState = case.tokens(0, t).run("reference", mask=None if mask is None else mask[:, :t])[1]
        maps = [*current_maps(state), *(a.expand(2, *a.shape) for a in case.weights[case.network.depth :])]
        read = case.network.apply(maps, case.q[:, 9:].transpose(1, 2)).transpose(1, 2)
        assert_equal(read, silent.run("reference", state)[0])
