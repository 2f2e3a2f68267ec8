"""Outer gradients through the inner updates, against finite differences (test contract, item 1)."""

import pytest
import torch
from memory_cases import OPTIONS, PATHS, make

from titans.memory import pieces

NETWORKS = [
    "default",
    "depth1",
    "depth3",
    "depth4",
    "silu",
    "no residual",
    "no norm",
    "online",
]


def check(case, backend, info, state=None):
    """Finite differences of the output and the end's weights and momentum, for every input, map, gain and bias."""
    maps = len(case.weights)
    extra = () if state is None else tuple(state.tensors().values())
    names = () if state is None else tuple(state.tensors())

    def function(*leaves):
        here = case.on(*leaves[:6], weights=leaves[6 : 6 + maps])
        start = None if state is None else type(state).from_tensors(dict(zip(names, leaves[6 + maps :], strict=True)))
        out, end, seen = here.run(backend, start, info=info)
        return (out, *end.weights, *end.momentum, *(seen or ()))

    leaves = [*case.inputs, *case.weights, *extra]
    leaves = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in leaves]
    assert torch.autograd.gradcheck(function, leaves, eps=1e-6, atol=1e-6, rtol=1e-4, fast_mode=True)


def smooth(network="default", **sizes):
    """A case with every gate inside its range: finite differences cannot step over a limit."""
    case = make(OPTIONS[network], **{"B": 1, "H": 1, "D": 3, "C": 2, **sizes})
    return case.on(
        lr=case.lr.clamp(min=1e-3), log_momentum=case.log_momentum.clamp(max=-0.1),
        log_retention=case.log_retention.clamp(max=-1e-3),
    )  # fmt: skip


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize(("backend", "info"), [("reference", True), ("chunked", True), ("chunked", False)])
def test_gradcheck(backend, info, network):
    check(smooth(network, T=5), backend, info)


@pytest.mark.parametrize("info", PATHS.values(), ids=PATHS.keys())
@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_gradcheck_of_a_carried_state(backend, info):
    case = smooth(T=8)
    check(case.tokens(3), backend, info, case.tokens(0, 3).run()[1].detach())


@pytest.mark.parametrize("network", NETWORKS)
def test_gradcheck_with_recomputation(network, monkeypatch):
    monkeypatch.setattr(pieces, "PIECE", 4)
    check(smooth(network, T=10), "chunked", False)


def test_gradcheck_where_forgetting_leads_to_the_start():
    check(smooth(T=10).on(forget="start"), "chunked", False)


def test_every_entry_of_the_jacobian():
    """Once without gradcheck's random projections."""
    case = smooth(T=4, D=2)
    leaves = [x.detach().clone().requires_grad_() for x in (*case.inputs, *case.weights)]

    def function(*leaves):
        out, end, _ = case.on(*leaves[:6], weights=leaves[6:]).run(info=False)
        return (out, *end.weights)

    assert torch.autograd.gradcheck(function, leaves, eps=1e-6, atol=1e-7, rtol=1e-5)
