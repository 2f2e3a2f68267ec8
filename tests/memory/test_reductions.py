"""Special cases with a name of their own, each against a loop written out by hand (equations.md, section 3)."""

import pytest
import torch
import torch.nn.functional as F
from memory_cases import OPTIONS, assert_equal, make

from titans.memory.state import hold

BACKENDS = [("reference", True), ("chunked", True), ("chunked", False)]
backends = pytest.mark.parametrize(("backend", "info"), BACKENDS, ids=["reference", "chunked", "scan"])
MINUS_INFINITY = -torch.inf


def gates(case, **values):
    return case.on(**{name: torch.full_like(case.lr, value) for name, value in values.items()})


@backends
@pytest.mark.parametrize(("network", "C"), [("plain depth1", 1), ("plain online", 4), ("plain online", 12)])
def test_depth_1_online_without_momentum_is_the_gated_delta_rule(backend, info, network, C):
    """beta = 2 theta / (1 - alpha), v' = (1 - alpha) v (the 2 is the loss's)."""
    case = gates(make(OPTIONS[network], T=12, C=C, lr=0.3), log_momentum=MINUS_INFINITY)
    out, state, _ = case.run(backend, info=info)
    (start,) = case.weights
    for b in range(2):
        for h in range(2):
            S, alpha = start[h].clone(), 1 - case.log_retention[b, :, h].exp()
            for t in range(12):
                k, v = case.k[b, t, h], (1 - alpha[t]) * case.v[b, t, h]
                beta = 2 * case.lr[b, t, h] / (1 - alpha[t])
                S = (1 - alpha[t]) * S
                S = S + beta * torch.outer(k, v - k @ S)
                assert_equal(out[b, t, h], case.q[b, t, h] @ S)
            assert_equal(state.weights[0][b, h], S)


@backends
@pytest.mark.parametrize("forget", ["zero", "start"])
def test_an_online_memory_does_not_depend_on_the_chunk(backend, info, forget):
    """Momentum and forgetting included, it is the rule of chunk 1."""
    case = make(OPTIONS["plain online"], T=15, C=1, lr=0.3).on(forget=forget)
    exact = case.on(network=OPTIONS["plain depth1"], chunk_size=1)
    for C in (1, 3, 5, 15):
        out, state, _ = case.on(chunk_size=C).run(backend, info=info)
        expected, end, _ = exact.run("reference")
        assert_equal(out, expected)
        assert_equal(state.weights, end.weights)


@backends
def test_neither_forgetting_nor_momentum_is_ttt_mlp(backend, info):
    """Mini-batch gradient descent on ||W_2 gelu(W_1 k) - v||^2, gradients at the chunk's first weights."""
    case = gates(make(OPTIONS["plain"], B=1, H=1, T=12), log_momentum=MINUS_INFINITY, log_retention=0.0)
    out, state, _ = case.run(backend, info=info)
    w1, w2 = (w[0].clone() for w in case.weights)
    for t in range(12):
        if t % 4 == 0:
            a1, a2 = w1.clone().requires_grad_(), w2.clone().requires_grad_()
        loss = (F.gelu(case.k[0, t, 0] @ a1) @ a2 - case.v[0, t, 0]).square().sum()
        g1, g2 = torch.autograd.grad(loss, (a1, a2))
        w1, w2 = w1 - case.lr[0, t, 0] * g1, w2 - case.lr[0, t, 0] * g2
        assert_equal(out[0, t, 0], F.gelu(case.q[0, t, 0] @ w1) @ w2)
    assert_equal([w[0, 0] for w in state.weights], [w1, w2])


@backends
def test_momentum_and_forgetting_by_hand(backend, info):
    """The rule of section 2, one head, nothing left out: S is not decayed by alpha, the read follows the write."""
    case = make(OPTIONS["default"], B=1, H=1, T=12)
    out, state, _ = case.run(backend, info=info)
    *maps, gain, bias = (w[0] for w in case.weights)

    def memory(w, x):
        return x + F.layer_norm(F.gelu(x @ w[0]) @ w[1], (4,), gain, bias)

    momentum = [torch.zeros_like(w) for w in maps]
    for t in range(12):
        if t % 4 == 0:
            frozen = [w.clone().requires_grad_() for w in maps]
        loss = (memory(frozen, case.k[0, t, 0]) - case.v[0, t, 0]).square().sum()
        grads = torch.autograd.grad(loss, frozen)
        eta, theta = case.log_momentum[0, t, 0].exp(), case.lr[0, t, 0]
        momentum = [eta * s - theta * g for s, g in zip(momentum, grads, strict=True)]
        maps = [case.log_retention[0, t, 0].exp() * w + s for w, s in zip(maps, momentum, strict=True)]
        assert_equal(out[0, t, 0], memory(maps, case.q[0, t, 0]))
    assert_equal([w[0, 0] for w in (*state.weights, *state.momentum)], [*maps, *momentum])


@backends
@pytest.mark.parametrize("network", ["default", "depth1", "depth4", "plain"])
def test_no_step_is_a_static_mlp(backend, info, network):
    case = gates(make(OPTIONS[network]), lr=0.0, log_retention=0.0)
    out, state, _ = case.run(backend, info=info)
    maps = [w.expand(2, *w.shape) for w in case.weights]
    assert_equal(out, case.network.apply(maps, case.q.transpose(1, 2)).transpose(1, 2))
    assert all(torch.equal(got, w) for got, w in zip(state.weights, maps, strict=False))


@backends
@pytest.mark.parametrize("momentum", [MINUS_INFINITY, -0.7])
def test_lr_zero_writes_exactly_nothing(backend, info, momentum):
    """Float32, and a memory in the middle of its life: weights and momentum keep every bit over many tokens."""
    case = make(T=8 + 64, dtype=torch.float32)
    _, state, _ = case.tokens(0, 8).run()
    maps = hold(state.weights, [torch.zeros_like(w) for w in state.weights], 2)
    state = type(state)(**{**vars(state), "maps": maps})
    still = gates(case.tokens(8), lr=0.0, log_retention=0.0, log_momentum=momentum)
    end = still.run(backend, state, info=info)[1]
    assert all(torch.equal(a, b) for a, b in zip(end.weights, state.weights, strict=True))
    assert all(not s.any() for s in end.momentum)


@backends
@pytest.mark.parametrize("network", ["default", "depth1"])
@pytest.mark.parametrize("where", [0, 5, 11])
def test_alpha_one_forgets_everything(backend, info, where, network):
    """The memory is exactly zero, nothing that follows depends on what was before, and all gradients are finite."""
    case = gates(make(OPTIONS[network], T=12, C=1), log_momentum=MINUS_INFINITY)
    case.lr[:, where], case.log_retention[:, where] = 0.0, MINUS_INFINITY
    assert not any(w.any() for w in case.tokens(0, where + 1).run(backend, info=info)[1].weights)
    case = case.leaves()
    out, end, _ = case.run(backend, info=info)
    total = out[:, where:].square().sum() + sum(w.square().sum() for w in end.weights)
    grads = torch.autograd.grad(total, [*case.inputs, *case.weights])
    assert all(g.isfinite().all() for g in grads)
    assert not any(g[:, :where].any() for g in grads[:6])
    assert not any(g.any() for g in grads[6 : 6 + case.network.depth]), "M_0 is forgotten"
    if network == "depth1" and where < 11:
        assert end.weights[0].any(), "and it learns again"


@backends
def test_inner_gradients_are_taken_where_the_chunk_began(backend, info):
    """Trap 3: the second chunk corrects the first one's error, at the memory as it stands then, not at M_0."""
    case = gates(
        make(OPTIONS["plain depth1"], B=1, H=1, T=2, C=1), lr=0.5, log_momentum=MINUS_INFINITY, log_retention=0.0
    )
    case = case.on(
        k=case.k[:, :1].repeat(1, 2, 1, 1), q=case.k[:, :1].repeat(1, 2, 1, 1), v=case.v[:, :1].repeat(1, 2, 1, 1)
    )
    out, _, _ = case.run(backend, info=info)
    assert_equal(
        out, case.v
    )  # theta = 1/2 and a unit key: one step writes the value exactly; the second finds no error


@backends
def test_forgetting_everything_leads_to_the_start(backend, info):
    """alpha = 1 and nothing written: M_0 again, whatever was written before; alpha = 0: both rules are one."""
    case = make(T=13).on(forget="start")
    _, state, _ = case.run(backend, info=info)
    again = gates(case, lr=0.0, log_retention=-torch.inf, log_momentum=-torch.inf)
    assert all(not w.any() for w in again.run(backend, state, info=info)[1].weights)
    maps = [w.expand(2, *w.shape) for w in case.weights]
    read = case.network.apply(maps, case.q.transpose(1, 2)).transpose(1, 2)
    assert_equal(again.run(backend, state, info=info)[0][:, 1:], read[:, 1:])
    kept = case.on(log_retention=torch.zeros_like(case.log_retention))
    assert_equal(kept.run(backend, info=info)[0], kept.on(forget="zero").run(backend, info=info)[0])
