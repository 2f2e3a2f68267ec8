"""bfloat16 against plain PyTorch code in bfloat16 (test contract, item 2)."""

from collections import Counter

import pytest
import torch
from memory_cases import OPTIONS, Case, assert_equal, make
from tolerances import LOW_PRECISION

SIZES = {"B": 2, "T": 64, "H": 2, "D": 16, "C": 16, "lr": 0.01}
NETWORKS = ["default", "depth1", "depth3", "plain", "silu", "no residual", "online"]


def plain(case: Case) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The rule as one would write it: the network in the inputs' dtype, its gradient by autograd, memory in float32."""
    (B, T, _, _), network, dtype = case.q.shape, case.network, case.q.dtype
    maps, affine = network.split(case.weights)
    memory = [w.float().expand(B, *w.shape) for w in maps]
    momentum, outs = [torch.zeros_like(w) for w in memory], []
    norm = tuple(a.to(dtype).expand(B, *a.shape) for a in affine or ())
    gates = [x.float()[..., None, None].unbind(1) for x in (case.lr, case.log_momentum.exp(), case.log_retention.exp())]
    for t in range(T):
        if t % case.chunk_size == 0:
            frozen = memory
        k, v, q = (x[:, t].unsqueeze(2) for x in (case.k, case.v, case.q))
        at = memory if network.online else frozen
        here = [w.to(dtype).clone() for w in at]  # the memory itself does not change with these
        loss = (network.apply((*here, *norm), k) - v).square().sum()
        grads = torch.autograd.grad(loss, here, create_graph=True)
        theta, eta, retention = (g[t] for g in gates)
        momentum = [eta * s - theta * g.float() for s, g in zip(momentum, grads, strict=True)]
        memory = [retention * w + s for w, s in zip(memory, momentum, strict=True)]
        outs.append(network.apply((*(w.to(dtype) for w in memory), *norm), q).squeeze(2))
    return torch.stack(outs, 1), memory


def run(case: Case, how: str) -> dict[str, torch.Tensor]:
    """Output, last weights and all gradients."""
    case = case.leaves()
    if how == "plain":
        out, memory = plain(case)
    else:
        out, state, _ = case.run(info=how == "info")
        memory = list(state.weights)
    leaves = [*case.inputs, *case.weights]
    total = out.float().square().sum() + sum(w.square().sum() for w in memory)
    grads = torch.autograd.grad(total, leaves)
    found = {"out": out, **{f"weights.{i}": w for i, w in enumerate(memory)}}
    return found | {f"d {i}": g for i, g in enumerate(grads)}


def distances(got: dict, expected: dict) -> dict[str, float]:
    """Squared error by name."""
    return {n: float((got[n].detach().double() - x.detach().double()).square().mean()) for n, x in expected.items()}


@pytest.mark.parametrize("network", NETWORKS)
def test_bfloat16_errs_at_most_twice_as_much_as_plain_code(network):
    """Root mean square over four draws, so that one unlucky rounding decides nothing."""
    errors = {"plain": Counter(), "info": Counter(), "scan": Counter()}
    for seed in range(4):
        low = make(OPTIONS[network], dtype=torch.bfloat16, seed=seed, **SIZES)
        low = low.on(lr=low.lr.float(), log_momentum=low.log_momentum.float(), log_retention=low.log_retention.float())
        exact = run(low.to(torch.float32), "plain")
        for how, total in errors.items():
            total.update(distances(run(low, how), exact))
    for how in ("info", "scan"):
        ratios = {name: (errors[how][name] / errors["plain"][name]) ** 0.5 for name in exact}
        assert max(ratios.values()) <= LOW_PRECISION, f"{how}: {ratios}"


@pytest.mark.parametrize("network", NETWORKS)
def test_plain_code_is_right(network):
    """The yardstick itself, in float32, equals the library."""
    case = make(OPTIONS[network], dtype=torch.float32, **SIZES)
    assert_equal(run(case, "scan"), run(case, "plain"), 1e-4)
