"""The chunk-parallel form equals the reference: outputs, states, info and every gradient (test contract, item 2)."""

import pytest
import torch
from memory_cases import MASKS, OPTIONS, PATHS, assert_equal, assert_same, gradients, make
from tolerances import EQUAL, LOW_PRECISION, error

C = 16


paths = pytest.mark.parametrize("info", PATHS.values(), ids=PATHS.keys())


@paths
@pytest.mark.parametrize("depth", [1, 2, 3, 4])
@pytest.mark.parametrize("T", [1, C - 1, C, C + 1, 63, 200])
def test_lengths_and_depths(T, depth, info):
    network = OPTIONS["default"] if depth == 2 else OPTIONS[f"depth{depth}"]
    assert_same(make(network, B=1, T=T, C=C, lr=0.02 if depth < 4 else 0.002), info=info)


@pytest.mark.parametrize("masked", [None, "holes"])
@pytest.mark.parametrize("carried", [0, 6], ids=["from M_0", "carried state"])
@pytest.mark.parametrize("network", OPTIONS)
@paths
def test_network_options(network, carried, masked, info):
    case = make(OPTIONS[network], T=13 + carried)
    state = case.tokens(0, carried).run()[1] if carried else None
    assert_same(case.tokens(carried), state, masked and MASKS[masked](2, 13), info)


@pytest.mark.parametrize("masked", MASKS)
@pytest.mark.parametrize("carried", ["M_0", "even", "ragged"])
def test_masks(masked, carried):
    """Pads anywhere; the state carried into them stands at one place of the chunk, or at another in every row."""
    case, state = make(B=3, T=17), None
    if carried != "M_0":
        state = case.tokens(0, 6).run(mask=MASKS["left"](3, 6) if carried == "ragged" else None)[1]
        case = case.tokens(6)
    assert_same(case, state, MASKS[masked](3, case.q.shape[1]))


def test_ragged_state_without_mask():
    case = make(B=3, T=17)
    state = case.tokens(0, 5).run(mask=MASKS["left"](3, 5))[1]
    assert len(set(state.position.tolist())) == 3
    assert_same(case.tokens(5), state)


@pytest.mark.parametrize("T", [0, 1])
def test_shortest(T):
    case = make(T=6)
    assert_same(case.tokens(0, T), case.tokens(0, 2).run()[1])
    assert_same(case.tokens(0, T))


@paths
@pytest.mark.parametrize("C", [1, 2, 64])
def test_chunk_sizes(C, info):
    assert_same(make(C=C), info=info)


@paths
@pytest.mark.parametrize("limit", ["lr", "log_momentum", "log_retention", "all"])
def test_gates_at_their_limits(limit, info):
    """Nothing written, no momentum, everything forgotten: the same numbers, and finite gradients."""
    case = make(T=13)
    values = {"lr": 0.0, "log_momentum": -torch.inf, "log_retention": -torch.inf}
    where = torch.rand(case.lr.shape, generator=torch.Generator().manual_seed(2)) < 0.4
    for name in values if limit == "all" else [limit]:
        case = case.on(**{name: getattr(case, name).masked_fill(where, values[name])})
    assert_same(case, info=info)


@paths
@pytest.mark.parametrize("network", ["default", "depth1", "depth4", "plain", "relu"])
def test_float32(network, info):
    """float32 against the float64 reference: within 1e-5, or twice the rounding of the float32 reference itself (what
    depth 4 makes of a rounding is chaotic at larger steps)."""
    case = make(OPTIONS[network], T=40, C=C, dtype=torch.float32, lr=0.02 if network != "depth4" else 0.005)
    exact = gradients(case.to(torch.float64), "reference", info=info)
    rounded = gradients(case, "reference", info=info)
    for got, expected, plain in zip(gradients(case, info=info), exact, rounded, strict=True):
        for name in expected:
            bound = max(EQUAL[torch.float32], LOW_PRECISION * error(plain[name], expected[name]))
            assert_equal(got[name], expected[name], bound, name)


@paths
@pytest.mark.parametrize("carried", [0, 8, 6], ids=["M_0", "closed chunk", "open chunk"])
@pytest.mark.parametrize("masked", [None, "holes"])
@pytest.mark.parametrize("network", ["default", "depth1", "depth3", "plain"])
def test_forgetting_towards_the_start(network, masked, carried, info):
    case = make(OPTIONS[network], T=15 + carried).on(forget="start")
    case = case.on(log_retention=3 * case.log_retention)
    state = case.tokens(0, carried).run()[1] if carried else None
    assert_same(case.tokens(carried), state, masked and MASKS[masked](2, 15), info)
