"""The Triton kernels equal the reference and ``chunked``: on a GPU, or in Triton's interpreter on a CPU."""

import os
import subprocess
import sys
from collections import Counter
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from memory_cases import MASKS, assert_equal, gradients, make
from tolerances import EQUAL, LOW_PRECISION, error

from titans.memory import MemoryMLP, dispatch, pieces

pytest.importorskip("triton", reason="triton is not installed; pip install 'titans[kernels]'")
kernels = import_module("titans.memory.kernels.scan")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
waiting = pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter runs one program after the other, and these wait")
C = 16
NETWORKS = {  # and hidden units at a time
    "depth1": (MemoryMLP(depth=1), 32),
    "depth1 plain": (MemoryMLP(depth=1, residual=False, norm=False), 32),
    "online": (MemoryMLP(depth=1, norm=False, online=True), 32),
    "expansion 1": (MemoryMLP(expansion=1), 64),
    "expansion 2, in blocks": (MemoryMLP(expansion=2), 16),
    "expansion 3, in blocks": (MemoryMLP(expansion=3, activation="silu", residual=False), 64),
    "expansion 4": (MemoryMLP(expansion=4), 128),
    "plain": (MemoryMLP(expansion=2, activation="relu", residual=False, norm=False), 64),
}


@pytest.fixture(autouse=True)
def launches(monkeypatch):
    """The kernels that ran."""
    seen, launch = [], kernels._launch

    def spy(kernel, *arguments):
        seen.append(kernel)
        launch(kernel, *arguments)

    monkeypatch.setattr(kernels, "_launch", spy)
    return seen


def small(network, dtype=torch.float32, T=2 * C, seed=0, **changes):
    """Two memories; ``lr`` small enough for two chunks without norm."""
    return make(network, B=1, T=T, D=16, C=C, dtype=dtype, seed=seed, lr=0.01).on(**changes).to(DEVICE)


def assert_near(case, state=None, mask=None):
    """Outputs, state, all gradients: within 1e-5 of the exact reference, or twice the float32 reference's rounding."""
    exact = gradients(case.to(torch.float64), "reference", state and state.to(dtype=torch.float64), mask, info=False)
    rounded, chunked, fused = (gradients(case, b, state, mask, info=False) for b in ("reference", "chunked", "triton"))
    for expected, plain, middle, got in zip(exact, rounded, chunked, fused, strict=True):
        for name in expected:
            bound = max(EQUAL[torch.float32], LOW_PRECISION * error(plain[name], expected[name]))
            assert_equal(got[name], expected[name], bound, name)
            assert_equal(got[name], middle[name], 2 * bound, name)


@pytest.mark.parametrize("forget", ["zero", "start"])
@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name, forget, monkeypatch, launches):
    """Whole chunks, then a part of one, from a state that momentum has reached."""
    network, block = NETWORKS[name]
    monkeypatch.setattr(kernels, "BLOCK", block)
    case = small(network, T=3 * C + 3, forget=forget)
    assert_near(case.tokens(C), case.tokens(0, C).run()[1].detach())
    assert launches == ["forward", "backward"]


@waiting
@pytest.mark.parametrize("name", ["expansion 4", "plain"])
def test_programs_that_share_a_memory(name, monkeypatch):
    monkeypatch.setattr(kernels, "parts_of", lambda q, network: 2)
    case = small(NETWORKS[name][0], T=5 * C, forget="start")
    assert_near(case.tokens(C), case.tokens(0, C).run()[1].detach())


@waiting
def test_sharing_changes_bfloat16_by_its_rounding_alone(monkeypatch):
    """At the size of a model, 32 chunks."""
    case = make(MemoryMLP(expansion=4), B=2, T=2048, H=8, D=64, C=64, dtype=torch.float32, lr=0.01).to(DEVICE)
    case = case.on(*(x.bfloat16() for x in case.inputs[:3]), *case.inputs[3:])
    exact = gradients(case.to(torch.float32), "chunked", info=False)
    plain, shared = gradients(case, "chunked", info=False), gradients(case, "triton", info=False)
    monkeypatch.setattr(kernels, "parts_of", lambda q, network: 1)
    alone = gradients(case, "triton", info=False)
    for found in (alone, shared):
        for got, middle, expected in zip(found, plain, exact, strict=True):
            for name, x in expected.items():
                if x.is_floating_point():
                    bound = LOW_PRECISION * error(middle[name].float(), x) + 1e-3
                    assert_equal(got[name].float(), x, bound, name)


@waiting
def test_a_hundred_runs_are_alike():
    """Programs that wait for one another, at the size of a model: the same bits each time."""
    case = make(MemoryMLP(expansion=4), B=2, T=2048, H=16, D=64, C=64, dtype=torch.float32, lr=0.01).to(DEVICE)
    case = case.on(*(x.bfloat16() for x in case.inputs[:3]), *case.inputs[3:])
    first = gradients(case, "triton", info=False)
    for _ in range(100):
        for got, expected in zip(gradients(case, "triton", info=False), first, strict=True):
            assert all(torch.equal(got[name], x) for name, x in expected.items())


@pytest.mark.parametrize("carried", [0, 5], ids=["from M_0", "open chunk"])
@pytest.mark.parametrize("masked", [None, "right"])
def test_masks_and_open_chunks(carried, masked, launches):
    case = small(MemoryMLP(expansion=1), T=2 * C + 3 + carried, forget="start")
    state = case.tokens(0, carried).run()[1].detach() if carried else None
    assert_near(case.tokens(carried), state, masked and MASKS[masked](1, 2 * C + 3).to(DEVICE))
    assert launches == ([] if masked else ["forward", "backward"])


@pytest.mark.parametrize("heads_first", [True, False])
def test_batch_and_heads(heads_first):
    """Every memory gets its own numbers, whatever its row and head, and however the inputs lie."""
    case = make(MemoryMLP(expansion=1), B=2, T=2 * C, H=2, D=16, C=C, dtype=torch.float32).to(DEVICE)
    if heads_first:
        case = case.on(*(x.transpose(1, 2).contiguous().transpose(1, 2) for x in case.inputs))
    (out, end, _), (expected, expected_end, _) = (case.run(b, info=False) for b in ("triton", "chunked"))
    assert_equal((out, end.maps), (expected, expected_end.maps))


def test_long_call_without_gradients(launches):
    """Without autograd the state goes back and forth between two places: the same numbers."""
    case = small(MemoryMLP(expansion=1), T=5 * C)
    with torch.no_grad():
        fast = case.run("triton", info=False)
    kept = case.leaves().run("triton", info=False)
    assert_equal((fast[0], fast[1].maps), (kept[0].detach(), tuple(m.detach() for m in kept[1].maps)), 0.0)
    assert launches == ["forward", "forward"]


def test_pieces_of_a_long_call(monkeypatch, launches):
    """Every piece is worked out again for its backward."""
    monkeypatch.setattr(pieces, "PIECE_CUDA" if DEVICE == "cuda" else "PIECE", C)
    assert_near(small(MemoryMLP(expansion=1), T=3 * C, forget="start"))
    assert launches == ["forward"] * 3 + ["forward", "backward"] * 3


def test_two_backward_passes_agree():
    case = small(MemoryMLP(expansion=1)).leaves()
    loss = case.run("triton", info=False)[0].square().sum()
    leaves = [*case.inputs, *case.weights]
    first, second = (torch.autograd.grad(loss, leaves, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("name", ["depth1", "online", "expansion 2, in blocks", "plain"])
def test_bfloat16_errs_at_most_twice_as_much_as_chunked(name):
    """Root mean square over two draws, so that one unlucky rounding decides nothing."""
    errors = {"chunked": Counter(), "triton": Counter()}
    for seed in range(2):
        case = small(NETWORKS[name][0], torch.bfloat16, seed=seed, forget="start")
        case = case.on(**{gate: getattr(case, gate).float() for gate in ("lr", "log_momentum", "log_retention")})
        exact = gradients(case.to(torch.float32), "chunked", info=False)
        for backend, total in errors.items():
            for got, expected in zip(gradients(case, backend, info=False), exact, strict=True):
                total.update({n: float((got[n].float() - x).square().mean()) for n, x in expected.items()})
    ratios = {n: (errors["triton"][n] / e) ** 0.5 for n, e in errors["chunked"].items() if e}
    assert max(ratios.values()) <= LOW_PRECISION, ratios


BAD = {
    "float64": ({"dtype": torch.float64}, "q is torch.float64; use float32"),
    "depth": ({"network": MemoryMLP(depth=3)}, "network.depth=3; use 1 or 2"),
    "head dim": ({"D": 8}, "q has head dim 8; use one of"),
    "expansion": ({"network": MemoryMLP(expansion=1.5)}, "network.expansion=1.5 makes 24 hidden units"),
    "chunk size": ({"C": 12}, "chunk_size=12; use one of"),
    "shared memory": ({"C": 128, "D": 128}, "chunk_size=128 is too much for shared memory in float32"),
}


@pytest.mark.parametrize("name", BAD)
def test_refusals_say_why(name):
    sizes, message = BAD[name]
    case = make(**({"T": 3, "D": 16, "C": C, "dtype": torch.float32} | sizes)).to(DEVICE)
    with pytest.raises(ValueError, match=f"backend='triton' cannot be taken: {message}"):
        case.run("triton")


def test_cpu_without_the_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=r"q is on cpu; move it to a GPU .*TRITON_INTERPRET=1"):
        small(MemoryMLP()).to("cpu").run("triton")


ON_GPU = SimpleNamespace(is_cuda=True, device="cuda", dtype=torch.bfloat16, shape=(1, C, 1, 16))


def test_auto_on_a_gpu_takes_the_kernels(monkeypatch):
    monkeypatch.setattr("triton.__version__", "3.10.0")
    assert dispatch._fast_path("auto", ON_GPU, MemoryMLP(), C) is kernels.scan  # type: ignore[arg-type]
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert dispatch._fast_path("auto", ON_GPU, MemoryMLP(), C) is dispatch.scan  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "triton, network, chunk, reason",
    [
        ("3.6.0", MemoryMLP(), C, "and 3.6.0 is"),
        ("3.9.0", MemoryMLP(), 8, "chunk"),
        ("3.9.0", NETWORKS["online"][0], C, "of an online memory they have not run on a GPU"),
    ],
)
def test_auto_on_a_gpu_says_once_why_not(triton, network, chunk, reason, monkeypatch):
    monkeypatch.setattr("triton.__version__", triton)
    dispatch._warn_once.cache_clear()
    with pytest.warns(UserWarning, match=f"'auto' takes 'chunked', not the faster 'triton': .*{reason}") as seen:
        for _ in range(2):
            assert dispatch._fast_path("auto", ON_GPU, network, chunk) is dispatch.scan  # type: ignore[arg-type]
    assert len(seen) == 1


def test_auto_on_a_cpu_leaves_them(launches):
    small(MemoryMLP()).to("cpu").run("auto", info=False)
    assert not launches


def test_without_triton():
    code = """
import sys; sys.modules["triton"] = None
import torch
from titans.memory import MemoryMLP
from titans.memory.kernels import unsupported
assert "pip install 'titans[kernels]'" in unsupported(torch.zeros(1, 16, 1, 16), MemoryMLP(), 16)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_they_compile_for_a_gpu(tmp_path):
    """The interpreter takes what the compiler refuses."""
    environment = {n: x for n, x in os.environ.items() if n != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("compile_kernels.py")
    run = subprocess.run(
        [sys.executable, script], env=environment | {"TRITON_CACHE_DIR": str(tmp_path)}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.split() == ["forward", "backward"] * 3
