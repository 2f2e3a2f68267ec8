"""``neural_memory`` at drawn shapes, networks, gates, masks, splits and dtypes, and at what does not fit."""

import math

import torch
import torch.nn.functional as F
from fuzzing import fuzz, refused
from hypothesis import strategies as st
from tolerances import EQUAL
from torch import Tensor

from titans.memory import MemoryMLP, MemoryState, neural_memory

GATES = ("lr", "log_momentum", "log_retention")
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
NETWORKS = st.builds(
    lambda depth, norm, online, **shape: MemoryMLP(
        depth=1 if online else depth, norm=norm and not online, online=online, **shape
    ),
    depth=st.integers(1, 4),
    expansion=st.sampled_from([0.1, 0.5, 1, 1.5, 2]),
    activation=st.sampled_from(["gelu", "silu", "relu"]),
    residual=st.booleans(),
    norm=st.booleans(),
    online=st.booleans(),
    norm_eps=st.sampled_from([1e-5, 1e-2]),
)


def draw_case(data, length: st.SearchStrategy, dtype=torch.float64, scale=1.0, unit=1) -> dict:
    """Arguments of ``neural_memory``: unit keys and queries, gates that are often exactly at their limits.

    ``unit``: what head dim and chunk are multiples of.
    """
    T = data.draw(length, "length")
    B, H, D, C = (data.draw(st.integers(1, most)) for most in (3, 2, max(2, 5 // unit), max(3, 8 // unit)))
    D, C = D * unit, C * unit
    network, generator = data.draw(NETWORKS), torch.Generator().manual_seed(data.draw(st.integers(0, 999), "seed"))
    limits = data.draw(st.sampled_from([0, 0.3, 1]), "share of gates at a limit")

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def gate(usual: Tensor, *ends: float) -> Tensor:
        chosen = torch.tensor(ends, dtype=torch.float64)[torch.randint(len(ends), usual.shape, generator=generator)]
        return torch.where(torch.rand(usual.shape, generator=generator) < limits, chosen, usual)

    q, k = (F.normalize(normal(B, T, H, D), dim=-1) for _ in range(2))
    largest = 0.01 / C  # small enough for a chunk's sum to be no chaos at any depth
    weights = [normal(H, i, o) * i**-0.5 for i, o in network.shapes(D)]
    if network.norm and data.draw(st.booleans(), "gain and bias"):
        weights += [1 + 0.2 * normal(H, D), 0.2 * normal(H, D)]
    case = {
        "q": q, "k": k, "v": scale * normal(B, T, H, D),
        "lr": gate(largest * torch.sigmoid(normal(B, T, H)), 0.0, largest),
        "log_momentum": gate(F.logsigmoid(normal(B, T, H)), 0.0, -1e3, -math.inf),
        "log_retention": gate(F.logsigmoid(4 + normal(B, T, H)), 0.0, -1e3, -math.inf),
        "weights": weights,
    }  # fmt: skip
    case = {n: [w.to(dtype) for w in x] if n == "weights" else x.to(dtype) for n, x in case.items()}
    forget = data.draw(st.sampled_from(["zero", "start"]), "forget")
    mask = data.draw(st.none() | st.lists(st.lists(st.booleans(), min_size=T, max_size=T), min_size=B, max_size=B))
    mask = None if mask is None else torch.tensor(mask, dtype=torch.bool).view(B, T)
    return case | {"mask": mask, "network": network, "chunk_size": C, "forget": forget}


def tokens(case: dict, start: int, stop: int | None) -> dict:
    """The arguments for a stretch of the sequence."""
    cut = [n for n in ("q", "k", "v", *GATES, "mask") if case[n] is not None]
    return case | {n: case[n][:, start:stop] for n in cut}


def results(out: Tensor, state: MemoryState, *info) -> dict[str, Tensor]:
    return {"out": out, **state.tensors(), **(info[0]._asdict() if info else {})}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Relative to 1 at least, the size of what comes in: M - M_0 may be nothing but rounding."""
    for name, want in expected.items():
        assert found[name].shape == want.shape, name
        difference, size = (max(x.abs().flatten().tolist(), default=0) for x in (found[name] - want, want))
        assert difference <= EQUAL.get(want.dtype, 0) * max(1, size), f"{name} differs by {difference:.1e}"


def assert_finite(found: dict[str, Tensor]) -> None:
    for name, t in found.items():
        assert t.isfinite().all(), f"{name} is not finite"


@fuzz(few=40, many=3500)
def test_chunked_is_the_reference(data):
    case = draw_case(data, st.integers(0, 10))
    place, info = data.draw(st.integers(0, 10), "cut"), data.draw(st.booleans(), "info")
    state = neural_memory(**tokens(case, 0, place))[1]
    rest = tokens(case, place, None)
    want = results(*neural_memory(**rest, state=state, backend="reference", return_info=True))
    got = results(*neural_memory(**rest, state=state, return_info=info))
    assert_finite(want)
    assert_equal(got, {n: want[n] for n in got})


@fuzz(few=15, many=3500)
def test_c_is_chunked(data):
    """Where its widths fit: outputs, state and gradients are right to 1e-5, or to ten times the error of PyTorch's."""
    case = draw_case(data, st.integers(1, 90), torch.float32, unit=16)

    def found(backend: str, dtype: torch.dtype) -> list[Tensor]:
        inputs = [case[n].to(dtype).requires_grad_() for n in ("q", "k", "v", *GATES)]
        weights = [w.to(dtype).requires_grad_() for w in case["weights"]]
        others = {n: case[n] for n in ("mask", "network", "chunk_size", "forget")}
        out, state = neural_memory(*inputs, weights, **others, backend=backend)
        total = out.square().sum() + inputs[0].sum() + sum(w.square().sum() for w in state.weights)
        grads = torch.autograd.grad(total, [*inputs, *weights], allow_unused=True, materialize_grads=True)
        return [t.double() for t in (out, *state.weights, *grads)]

    exact, plain, got = (
        found(*how) for how in (("chunked", torch.float64), ("chunked", torch.float32), ("auto", torch.float32))
    )
    for wanted, rounded, x in zip(exact, plain, got, strict=True):
        size = max(1, wanted.abs().max().item()) if wanted.numel() else 1
        bound = 1e-5 * size + 10 * (rounded - wanted).norm()
        assert (x - wanted).norm() <= bound, f"{(x - wanted).norm():.1e} off"


@fuzz(few=60, many=3500)
def test_any_split_is_the_whole(data):
    """Finite in every dtype; the same in those that tell a split from an error."""
    dtype = data.draw(st.sampled_from(DTYPES), "dtype")
    case = draw_case(data, st.integers(0, 24), dtype)
    info = data.draw(st.booleans(), "info")
    cuts = sorted(data.draw(st.lists(st.integers(0, 24), max_size=4), "cuts"))
    outs, state = [], None
    for start, stop in zip([0, *cuts], [*cuts, None], strict=True):
        out, state = neural_memory(**tokens(case, start, stop), state=state, return_info=info)[:2]
        outs.append(out)
    found = results(torch.cat(outs, 1), state)  # type: ignore[arg-type]
    assert_finite(found)
    assert found["out"].dtype == dtype
    if dtype in (torch.float64, torch.float32):
        assert_equal(found, results(*neural_memory(**case, return_info=info)[:2]))


@fuzz(few=40, many=1000)
def test_outliers_stay_finite(data):
    """Where the network has a norm: values, keys and queries of any size."""
    dtype = data.draw(st.sampled_from(DTYPES[:3]), "dtype")
    case = draw_case(data, st.integers(1, 24), dtype, data.draw(st.sampled_from([0.0, 1e-4, 1e4]), "values"))
    sizes = st.sampled_from([0.0, 1e-4, 1.0, 1e4])
    if case["network"].norm:
        case |= {n: data.draw(sizes, n) * case[n] for n in ("q", "k")}
        assert_finite(results(*neural_memory(**case, return_info=data.draw(st.booleans(), "info"))))


SPOILT_TENSORS = {
    "an axis less": lambda x: x[0],
    "an axis more": lambda x: x.unsqueeze(0),
    "a row more": lambda x: torch.cat([x, x[:1]]),
    "nothing": lambda x: x[:0],
    "a column less": lambda x: x[..., 1:],
    "integers": lambda x: x.long(),
    "booleans": lambda x: x.bool(),
    "complex": lambda x: x.to(torch.complex64),
    "float16": lambda x: x.half(),
    "float32": lambda x: x.float(),
}
SPOILT_VALUES = {
    "chunk_size": [0, -1, 2.5, "4", None, True, math.nan],
    "forget": ["none", "", None, 1, ["zero"]],
    "backend": ["cuda", "", None, 0, ["chunked"]],
    "network": [MemoryMLP(depth=4, expansion=3), MemoryMLP(depth=1), MemoryMLP(norm=False)],
    "weights": [[]],
}


@fuzz(few=120, many=2500)
def test_what_does_not_fit_is_refused(data):
    case = draw_case(data, st.integers(1, 4)) | {"backend": "auto"}
    case["mask"] = torch.ones(case["q"].shape[:2]) if case["mask"] is None else case["mask"]
    case["state"] = neural_memory(**case)[1] if data.draw(st.booleans(), "carried") else None
    any_name = st.sampled_from(["q", "k", "v", *GATES, "mask", "map", *SPOILT_VALUES])
    names = data.draw(st.lists(any_name, min_size=1, max_size=2, unique=True))
    for name in names:
        if name in SPOILT_VALUES:
            case[name] = data.draw(st.sampled_from(SPOILT_VALUES[name]), name)
            continue
        spoil = SPOILT_TENSORS[data.draw(st.sampled_from([*SPOILT_TENSORS]), name)]
        if name != "map":
            case[name] = spoil(case[name])
        elif case["weights"]:
            case["weights"] = [spoil(case["weights"][0]), *case["weights"][1:]]
    refused(lambda: neural_memory(**case), *case)


@fuzz(few=40, many=500)
def test_a_state_that_does_not_fit_is_refused(data):
    """A tensor of a state has another shape or dtype, as a changed file may hold it."""
    case = draw_case(data, st.integers(1, 4))
    held = neural_memory(**case)[1].tensors()
    name = data.draw(st.sampled_from([*held]), "tensor")
    spoil = data.draw(st.sampled_from([*SPOILT_TENSORS]), "how")
    held[name] = SPOILT_TENSORS[spoil](held[name])

    def go_on():
        neural_memory(**case, state=MemoryState.from_tensors(held))

    refused(go_on, name, name.partition(".")[0], "state")


@fuzz(few=60, many=500)
def test_networks_are_refused(data):
    """Any value of any field: a network, or a message that names the field."""
    garbage = st.sampled_from([-1, 0, 5, 2.5, math.nan, math.inf, "2", "tanh", None, True, [1]])
    fields = [*MemoryMLP.__dataclass_fields__]
    changes = data.draw(st.dictionaries(st.sampled_from(fields), garbage, min_size=1), "network")

    def use():
        network = MemoryMLP(**changes)
        network.apply(network.init(1, 2), torch.ones(1, 3, 2))

    refused(use, *changes)
