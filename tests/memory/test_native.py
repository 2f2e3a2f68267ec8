"""The C code equals the reference and ``chunked``, and is built, refused and left alone as it says."""

import os
import subprocess
import sys
from collections import Counter

import pytest
import torch
from memory_cases import MASKS, assert_equal, gradients, make
from tolerances import EQUAL, LOW_PRECISION, error

from titans.memory import MemoryMLP, dispatch, pieces
from titans.memory import native as c_code
from titans.memory.native import build
from titans.memory.native import scan as native

try:
    build.library(c_code.SOURCE)
except OSError as error_:
    pytest.skip(str(error_), allow_module_level=True)

C = 16
NETWORKS = {
    "default": MemoryMLP(),
    "depth1": MemoryMLP(depth=1),
    "depth1 plain": MemoryMLP(depth=1, residual=False, norm=False),
    "depth3, narrow": MemoryMLP(depth=3, expansion=0.5, activation="silu"),
    "depth4, plain": MemoryMLP(depth=4, expansion=1, activation="relu", residual=False, norm=False),
    "online": MemoryMLP(depth=1, norm=False, online=True),
    "plain online": MemoryMLP(depth=1, norm=False, residual=False, online=True),
    "no residual, large eps": MemoryMLP(expansion=3, activation="silu", residual=False, norm_eps=0.1),
}
SIZES = [(16, 16, 1), (48, 16, 5), (64, 64, 4), (112, 80, 1)]


@pytest.fixture
def unbuilt(monkeypatch):
    """As on a machine that has not tried to compile it."""
    for where in ("titans.memory.native.library", "titans.memory.native.scan.library"):
        monkeypatch.setattr(where, build.library.__wrapped__)
    forget = [dispatch._warn_once.cache_clear, c_code.unbuilt.cache_clear]
    for clear in forget:
        clear()
    yield
    for clear in forget:
        clear()


@pytest.fixture(autouse=True)
def runs(monkeypatch):
    """What ran of the C code."""
    seen, run = [], native.Job.run

    def spy(job, step, memories):
        seen.append(step)
        run(job, step, memories)

    monkeypatch.setattr(native.Job, "run", spy)
    return seen


def small(network=NETWORKS["default"], B=2, T=2 * C, H=2, D=32, C=C, dtype=torch.float32, lr=0.01, **changes):
    return make(network, B=B, T=T, H=H, D=D, C=C, dtype=dtype, lr=lr).on(**changes)


def assert_near(case, state=None, mask=None):
    """Outputs, state, all gradients: within 1e-5 of the exact reference, or twice the float32 reference's rounding."""
    exact = gradients(case.to(torch.float64), "reference", state and state.to(dtype=torch.float64), mask, info=False)
    rounded, got = (gradients(case, backend, state, mask, info=False) for backend in ("reference", "native"))
    for expected, plain, found in zip(exact, rounded, got, strict=True):
        for name, x in expected.items():
            bound = max(EQUAL[torch.float32], LOW_PRECISION * error(plain[name], x))
            assert_equal(found[name], x, bound, name)


@pytest.mark.parametrize("forget", ["zero", "start"])
@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name, forget, runs):
    """Whole chunks, then a part of one, from a state that momentum has reached."""
    case = small(NETWORKS[name], T=3 * C + 3, forget=forget)
    assert_near(case.tokens(C), case.tokens(0, C).run()[1].detach())
    assert runs == ["forward", "backward"]


@pytest.mark.parametrize("chunk, D, expansion", SIZES)
def test_sizes(chunk, D, expansion):
    """Every width of a product's tiles, and what is left of rows and columns beside them."""
    assert_near(small(MemoryMLP(expansion=expansion), B=1, T=2 * chunk, H=1, C=chunk, D=D, forget="start"))


def test_gates_at_their_limits():
    """Nothing kept, everything kept, nothing written, and what has faded below the smallest number."""
    case = small(T=3 * C)
    momentum, retention = case.log_momentum.clone(), case.log_retention.clone()
    momentum[:, ::5], retention[:, ::7] = -200.0, -90.0
    momentum[:, 1::5], retention[:, 1::7] = 0.0, 0.0
    assert_near(case.on(log_momentum=momentum, log_retention=retention))


def test_values_far_out():
    """The activation's tails."""
    for name in ("default", "depth3, narrow"):
        case = small(NETWORKS[name], lr=1e-4)
        assert_near(case.on(weights=tuple(30 * w for w in case.weights[:1]) + case.weights[1:]))


@pytest.mark.parametrize(
    "flags", [["-U__AVX512F__"], ["-O1", "-fsanitize=undefined", "-fsanitize-undefined-trap-on-error"]]
)
def test_other_builds(flags, tmp_path, monkeypatch):
    """Vectors of eight, and a build that stops at what C leaves undefined."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(build, "FLAGS", [*build.FLAGS, *flags])
    monkeypatch.setattr(native, "library", build.library.__wrapped__)
    assert_near(small(T=3 * C, forget="start"))
    assert_errs_less_than_chunked(NETWORKS["default"], T=2 * C, D=48, C=C)
    assert [path.suffix for path in (tmp_path / "titans").iterdir()] == [".so"]


@pytest.mark.parametrize("carried", [0, 5], ids=["from M_0", "open chunk"])
@pytest.mark.parametrize("masked", [None, "right"])
def test_masks_and_open_chunks(carried, masked, runs):
    case = small(T=2 * C + 3 + carried, forget="start")
    state = case.tokens(0, carried).run()[1].detach() if carried else None
    assert_near(case.tokens(carried), state, masked and MASKS[masked](2, 2 * C + 3))
    assert runs == ([] if masked else ["forward", "backward"])


@pytest.mark.parametrize("threads", [1, 3])
def test_batch_heads_and_threads(threads):
    """Every memory gets its own numbers, whatever its row and head, however the inputs lie and who works at it."""
    case, before = small(T=3 * C), torch.get_num_threads()
    expected = gradients(case, "native", info=False)
    case = case.on(*(x.transpose(1, 2).contiguous().transpose(1, 2) for x in case.inputs))
    torch.set_num_threads(threads)
    try:
        found = gradients(case, "native", info=False)
    finally:
        torch.set_num_threads(before)
    for got, wanted in zip(found, expected, strict=True):
        assert all(torch.equal(got[name], x) for name, x in wanted.items())


def test_without_gradients_the_same_numbers(runs):
    case = small(T=5 * C)
    with torch.no_grad():
        fast = case.run("native", info=False)
    kept = case.leaves().run("native", info=False)
    assert_equal((fast[0], fast[1].maps), (kept[0].detach(), tuple(m.detach() for m in kept[1].maps)), 0.0)
    assert runs == ["forward", "forward"]


def test_pieces_of_a_long_call(monkeypatch, runs):
    """Every piece is worked out again for its backward, and only then keeps what that needs."""
    monkeypatch.setattr(pieces, "PIECE", C)
    kept, run = [], native.Job.run

    def spy(job, step, memories):
        kept.append(bool(job.tape))
        run(job, step, memories)

    monkeypatch.setattr(native.Job, "run", spy)
    assert_near(small(T=3 * C, forget="start"))
    assert runs == ["forward"] * 3 + ["forward", "backward"] * 3
    assert kept == [False] * 3 + [True] * 6


def test_two_backward_passes_agree():
    case = small().leaves()
    loss = case.run("native", info=False)[0].square().sum()
    leaves = [*case.inputs, *case.weights]
    first, second = (torch.autograd.grad(loss, leaves, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_no_rows():
    case = small().on(*(x[:0] for x in small().inputs))
    out, end, _ = case.run("native", info=False)
    assert out.shape == case.q.shape and end.maps[0].shape[0] == 0


def test_nan_stays_in_its_row():
    case = small(T=3 * C)
    case.q[0, C, 0, 0] = case.v[0, C, 1, 0] = torch.nan
    out, end, _ = case.run("native", info=False)
    assert out[0, C, 0].isnan().all() and out[0, 2 * C :, 1].isnan().all() and end.maps[0][0, 1].isnan().any()
    assert out[1].isfinite().all() and out[0, :C].isfinite().all() and end.maps[0][1].isfinite().all()


def assert_errs_less_than_chunked(network, forget="start", **sizes):
    """Root mean square over two draws of everything that comes out, float32 being exact; none errs twice as much."""
    errors = {"chunked": Counter(), "native": Counter()}
    for seed in range(2):
        case = make(network, dtype=torch.bfloat16, seed=seed, lr=0.01, **sizes)
        gates = {gate: getattr(case, gate).float() for gate in ("lr", "log_momentum", "log_retention")}
        case = case.on(forget=forget, **gates)
        exact = gradients(case.to(torch.float32), "chunked", info=False)
        for backend, total in errors.items():
            for got, expected in zip(gradients(case, backend, info=False), exact, strict=True):
                total.update({n: float((got[n].float() - x).square().mean()) for n, x in expected.items()})
    ratios = {n: (errors["native"][n] / e) ** 0.5 for n, e in errors["chunked"].items() if e}
    assert sum(ratios.values()) < len(ratios) and max(ratios.values()) < LOW_PRECISION, ratios


@pytest.mark.parametrize("forget", ["zero", "start"])
@pytest.mark.parametrize("name", ["default", "depth1", "depth3, narrow", "online"])
def test_bfloat16_errs_less_than_chunked(name, forget):
    assert_errs_less_than_chunked(NETWORKS[name], forget, T=2 * C, D=32, C=C)


@pytest.mark.parametrize("chunk, D, expansion", SIZES)
def test_bfloat16_sizes(chunk, D, expansion):
    assert_errs_less_than_chunked(MemoryMLP(expansion=expansion), B=1, T=2 * chunk, H=1, C=chunk, D=D)


BAD = {
    "float64": ({"dtype": torch.float64}, "q is torch.float64; use float32"),
    "head dim": ({"D": 8}, r"the maps have widths \[8, 32\]; use multiples of 16"),
    "expansion": ({"network": MemoryMLP(expansion=1.2)}, r"the maps have widths \[32, 38\]; use multiples of 16"),
    "chunk size": ({"C": 12}, "chunk_size=12; use a multiple of 16"),
}


@pytest.mark.parametrize("name", BAD)
def test_refusals_say_why(name, recwarn):
    """And "auto" goes another way without a word."""
    sizes, message = BAD[name]
    case = small(**{"T": 3, **sizes})
    with pytest.raises(ValueError, match=f"backend='native' cannot be taken: {message}, or take backend='chunked'"):
        case.run("native")
    assert dispatch._fast_path("auto", case.q, case.network, case.chunk_size) is dispatch.scan
    assert not recwarn


def test_auto_on_a_cpu_takes_it(runs, monkeypatch):
    small().run("auto", info=False)
    assert runs == ["forward"]
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    small().run("auto", info=False)
    assert runs == ["forward"]


BROKEN = {
    "no compiler": ("", "there is no C compiler; install gcc or clang"),
    "a broken compiler": ("echo no room here >&2; exit 1", "cannot compile scan.c; install gcc.*: no room here"),
    "no library": ('while [ "$1" != -o ]; do shift; done; echo junk > "$2"', "invalid ELF header|file too short|not a"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_without_what_it_takes_to_build(name, tmp_path, monkeypatch, unbuilt):
    """One warning, one try; "native" says the same; nothing half-made is left behind."""
    script, message = BROKEN[name]
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    if script:
        count = f"echo once >> {tmp_path}/tries"
        (tmp_path / "cc").write_text(f'#!/bin/sh\ncase "$*" in *dM*) exit 0;; esac\n{count}\n{script}\n')
        (tmp_path / "cc").chmod(0o755)
    with pytest.warns(UserWarning, match=f"takes 'chunked', not the faster 'native': .*({message})") as seen:
        for _ in range(2):
            assert_equal(small().run("auto", info=False)[0], small().run("chunked", info=False)[0], 0.0)
    assert len(seen) == 1 and (not script or (tmp_path / "tries").read_text() == "once\n")
    with pytest.raises(OSError, match=message):
        small().run("native", info=False)
    assert not list((tmp_path / "cache").rglob("tmp*"))


def test_without_a_home(monkeypatch, unbuilt):
    def nobody():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(build.Path, "home", nobody)
    with pytest.warns(UserWarning, match="takes 'chunked', not the faster 'native': Could not determine home"):
        small().run("auto", info=False)


def test_want_of_memory(monkeypatch):
    class Full:
        def forward(self, *_):
            return 1

    monkeypatch.setattr(native, "library", lambda _: Full())
    with pytest.raises(MemoryError, match="use a smaller chunk_size"), torch.no_grad():
        small().run("native", info=False)


def test_two_processes_build_at_once(tmp_path):
    code = "from titans.memory.native import SOURCE, build; build.library(SOURCE)"
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    both = [subprocess.Popen([sys.executable, "-c", code], env=environment) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    assert len(list((tmp_path / "titans").iterdir())) == 1
