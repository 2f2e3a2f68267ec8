"""Runs of whole chunks: the hand-written backward of ``memory/scan.py``, in short calls and in pieces of long ones."""

import pytest
import torch
from memory_cases import MASKS, OPTIONS, assert_equal, assert_same, gradients, in_pieces, make, results
from tolerances import EQUAL

from titans.memory import pieces, scan

GROUP, C = 4, 2
PIECE = GROUP * C // 2
COUNTS = [1, GROUP - 1, GROUP, GROUP + 1, 2 * GROUP, 2 * GROUP + 3]


@pytest.fixture(autouse=True)
def short_pieces(monkeypatch):
    """More than GROUP chunks are long."""
    monkeypatch.setattr(pieces, "PIECE", PIECE)


@pytest.fixture
def calls(monkeypatch):
    """Number of chunks of every run that took the fast path."""
    seen, forward = [], scan._Scan.forward

    def spy(ctx, network, wide_q, *rest):
        seen.append(len(wide_q))
        return forward(ctx, network, wide_q, *rest)

    monkeypatch.setattr(scan._Scan, "forward", staticmethod(spy))
    return seen


@pytest.mark.parametrize("carried", [0, 2 * C, 1], ids=["M_0", "closed chunk", "open chunk"])
@pytest.mark.parametrize("chunks", COUNTS)
def test_chunks_on_both_sides_of_a_piece(chunks, carried, calls):
    case = make(T=chunks * C + carried, C=C)
    state = case.tokens(0, carried).run()[1] if carried else None
    assert_same(case.tokens(carried), state, info=False)
    size = PIECE if chunks > GROUP else chunks * C
    lengths = [min(size, chunks * C - start) for start in range(0, chunks * C, size)]
    forward = [n for n in ((length - carried % C) // C for length in lengths) if n]
    assert calls == (forward + forward[::-1] if chunks > GROUP else forward)


@pytest.mark.parametrize("network", OPTIONS)
def test_chunks_of_one_token_with_every_network(network):
    assert_same(make(OPTIONS[network], B=1, T=4, C=1, lr=0.005).on(forget="start"), info=False)


@pytest.mark.parametrize("network", OPTIONS)
def test_recomputation_with_every_network(network):
    assert_same(make(OPTIONS[network], B=1, T=(GROUP + 2) * C + 1, C=C, lr=0.005), info=False)


def test_recomputation_where_forgetting_leads_to_the_start():
    assert_same(make(T=(GROUP + 2) * C + 1, C=C).on(forget="start"), info=False)


@pytest.mark.parametrize("limit", [{"lr": 0.0}, {"log_momentum": -torch.inf}, {"log_retention": -torch.inf}])
def test_recomputation_at_the_limits_of_the_gates(limit):
    case = make(T=(GROUP + 2) * C, C=C)
    where = torch.rand(case.lr.shape, generator=torch.Generator().manual_seed(2)) < 0.4
    changes = {name: getattr(case, name).masked_fill(where, value) for name, value in limit.items()}
    assert_same(case.on(**changes), info=False)


def test_default_gain_and_bias_are_ones_and_zeros():
    case = make(T=2 * C, C=C)
    maps = case.weights[:2]
    ones = (torch.ones(2, 4, dtype=torch.float64), torch.zeros(2, 4, dtype=torch.float64))
    for info in (True, False):
        absent, given = (case.on(weights=w).run(info=info) for w in (maps, (*maps, *ones)))
        assert_equal(results(*absent), results(*given))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_same_as_chunk_by_chunk(dtype):
    """Both paths of the chunked backend give the same numbers at a size that takes several pieces."""
    case = make(B=2, T=10 * 16 + 5, D=8, C=16, dtype=dtype, lr=0.005)
    slow, fast = gradients(case.on(), info=True)[0], gradients(case.on(), info=False)[0]
    assert_equal(fast, {name: slow[name] for name in fast}, EQUAL[dtype])


@pytest.mark.parametrize("wanted", ["q", "v", "lr", "weights", "state"])
def test_gradient_of_one_input_alone(wanted):
    """What needs no gradient takes none of its own, and changes nothing in the others."""
    full = make(T=(GROUP + 1) * C, C=C).leaves()
    state = full.tokens(0, 2).run()[1].detach()

    def grad(case, state, leaf):
        out, end, _ = case.run(state=state, info=False)
        return torch.autograd.grad(out.square().sum() + sum(w.square().sum() for w in end.weights), leaf)[0]

    def pick(case, state):
        if wanted == "state":
            return state.maps[0]
        return case.weights[-1] if wanted == "weights" else getattr(case, wanted)

    bare = full.on(*(x.detach() for x in full.inputs), weights=tuple(w.detach() for w in full.weights))
    live = state.map(lambda x: x.clone().requires_grad_(x.is_floating_point()))
    expected = grad(full, live, pick(full, live))
    carried = live if wanted == "state" else state
    leaf = pick(bare, carried)
    assert_equal(grad(bare, carried, leaf.requires_grad_()), expected)


@pytest.mark.parametrize("chunks", [2, GROUP + 1])
def test_two_backward_passes_agree(chunks):
    """The first pass leaves what the second needs as it was."""
    case = make(T=chunks * C, C=C).leaves()
    loss = case.run(info=False)[0].square().sum()
    leaves = [*case.inputs, *case.weights]
    first, second = (torch.autograd.grad(loss, leaves, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("info", [False, True])
@pytest.mark.parametrize("chunks", [1, GROUP + 1])
def test_second_order_gradients_are_right_or_refused(chunks, info):
    """A gradient of a gradient, were it wrong, would be wrong in silence."""
    case = make(B=1, T=chunks * C, H=1, C=C)

    def penalty(backend):
        leaf = case.leaves()
        out = leaf.run(backend, info=info)[0]
        (inner,) = torch.autograd.grad(out.square().sum(), leaf.k, create_graph=True)
        return torch.autograd.grad(inner.square().sum(), leaf.v)[0]

    try:
        got = penalty("chunked")
    except RuntimeError as refused:
        assert any(
            reason in str(refused)
            for reason in ("once_differentiable", "does not require grad", "not have been used in the graph")
        )
        return
    assert_equal(got, penalty("reference"))


def test_gradient_flows_through_many_calls():
    """Training over a long sequence in pieces without detaching equals training on the whole."""
    cuts = [3 * C, (GROUP + 5) * C, (GROUP + 5) * C + 1]
    case = make(T=(GROUP + 8) * C, C=C).leaves()
    leaves = [*case.inputs, *case.weights]

    def grads(out, end, _):
        return torch.autograd.grad(out.square().sum() + sum(w.sum() for w in end.weights), leaves)

    assert_equal(grads(*in_pieces(case, cuts, info=False)), grads(*case.run("reference")))


@pytest.mark.parametrize("mask", MASKS)
def test_masked_runs(mask):
    assert_same(make(B=3, T=(GROUP + 2) * C, C=C), mask=MASKS[mask](3, (GROUP + 2) * C), info=False)
