"""What stands before and behind a layer's memory: both ways of doing it against the definition, and which is taken."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from tolerances import EQUAL, LOW_PRECISION, assert_equal, error

from titans.layers import heads
from titans.layers.common import ShortConvolution
from titans.layers.native import heads as native
from titans.memory.native import build, unbuilt

needs_compiler = pytest.mark.skipif(unbuilt(native.SOURCE) is not None, reason=str(unbuilt(native.SOURCE)))
LOW = torch.bfloat16
EPS = 1e-6
OTHER_BUILDS = [["-U__AVX512F__"], ["-O1", "-fsanitize=undefined", "-fsanitize-undefined-trap-on-error"]]
# taps, heads of queries, keys and values, their width, tokens
CONVOLUTIONS = [(1, (1, 1, 1), 16, 5), (4, (2, 2, 2), 48, 33), (4, (1, 1, 4), 16, 1), (3, (1, 1, 2), 80, 2)]


@pytest.fixture
def runs(monkeypatch):
    """What ran of the C code."""
    seen, run = [], native._Job.run
    monkeypatch.setattr(native._Job, "run", lambda job, step: (seen.append(step), run(job, step)))
    return seen


def convolved(x, before, weight, heads):
    """``heads.convolve`` by its definition, a sum over taps, and a division by the length."""
    together, T = torch.cat([before, x], 1), x.shape[1]
    y = F.silu(sum(together[:, tap : tap + T] * w for tap, w in enumerate(weight)))
    q, k, v = y.unflatten(-1, (sum(heads), -1)).split(heads, -2)
    return *(t / t.square().sum(-1, keepdim=True).sqrt() for t in (q, k)), v, y


def read(reads, values, skip, weight, gate):
    """``heads.gate_reads`` by its definition."""
    x = reads if values is None else reads + skip * values
    x = x - x.mean(-1, keepdim=True)
    x = x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight
    return (x.flatten(-2) * gate * torch.sigmoid(gate),)


def convolution(taps, heads, width, T, B=2):
    channels = width * sum(heads)
    return torch.randn(B, T, channels), torch.randn(B, taps - 1, channels), torch.randn(taps, channels)


def reading(width=48, T=33, skip=True, B=2, H=3):
    reads, values = torch.randn(B, T, H, width), torch.randn(B, T, H, width)
    gate = torch.randn(B, T, H * width)
    return reads, values if skip else None, torch.randn(H, width) if skip else None, torch.randn(width), gate


def results(fn, inputs, dtype, learned=()):
    """Outputs and gradients of all inputs, in dtype; those at the places ``learned`` in float32 at least."""
    wide = torch.promote_types(dtype, torch.float32)
    given = [t if t is None else t.to(wide if i in learned else dtype).requires_grad_() for i, t in enumerate(inputs)]
    outs = fn(*given)
    torch.manual_seed(1)
    grads = [torch.randn(out.shape).to(out.dtype) for out in outs]
    wanted = [t for t in given if t is not None]
    return [t.double() for t in (*outs, *torch.autograd.grad(outs, wanted, grads))]


def assert_near(fn, definition, plain, inputs, dtype, learned):
    """Within the dtype's bound of the definition in float64, or twice the rounding of plain operations."""
    exact = results(definition, inputs, torch.float64)
    rounded, found = (results(f, inputs, dtype, learned) for f in (plain, fn))
    for x, theirs, ours in zip(exact, rounded, found, strict=True):
        assert error(ours, x) <= max(EQUAL[torch.float32], LOW_PRECISION * error(theirs, x))


def check_convolution(case, dtype, backend="auto"):
    inputs, of = convolution(*case), case[1]

    def by(backend):
        return lambda x, before, weight: heads.convolve(x, before, weight, of, True, backend)

    assert_near(by(backend), lambda *a: convolved(*a, of), by("chunked"), inputs, dtype, (2,))


def check_reading(dtype, backend="auto", **sizes):
    def by(backend):
        return lambda *inputs: (heads.gate_reads(*inputs, EPS, backend),)

    assert_near(by(backend), read, by("chunked"), reading(**sizes), dtype, (2, 3))


@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_convolve_in_pytorch(case):
    inputs, of = convolution(*case), case[1]
    found = results(lambda *a: heads.convolve(*a, of, True, "auto"), inputs, torch.float64)
    assert_equal(found, results(lambda *a: convolved(*a, of), inputs, torch.float64))
    alone = heads.convolve(*inputs, of, False, "chunked")
    assert_equal(alone, heads.convolve(*inputs, of, True, "chunked")[:3])


@pytest.mark.parametrize("skip", [True, False])
def test_gate_reads_in_pytorch(skip):
    inputs = reading(skip=skip)
    found = results(lambda *a: (heads.gate_reads(*a, EPS, "auto"),), inputs, torch.float64)
    assert_equal(found, results(read, inputs, torch.float64))


@needs_compiler
@pytest.mark.parametrize("dtype", native.DTYPES)
@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_convolve_in_c(case, dtype, runs):
    check_convolution(case, dtype)
    assert runs == ["convolve", "convolve_backward"]


@needs_compiler
@pytest.mark.parametrize("dtype", native.DTYPES)
@pytest.mark.parametrize("skip", [True, False])
def test_gate_reads_in_c(skip, dtype, runs):
    check_reading(dtype, skip=skip)
    assert runs == ["gate", "gate_backward"]


@needs_compiler
def test_what_gates_see_alone(runs):
    """Without ``whole`` the others are the same, and their gradients, too."""
    inputs, of = convolution(*CONVOLUTIONS[1]), CONVOLUTIONS[1][1]
    found = results(lambda *a: heads.convolve(*a, of, False, "auto"), inputs, torch.float32)
    for x, y in zip(results(lambda *a: convolved(*a, of)[:3], inputs, torch.float64), found, strict=True):
        assert error(y, x) <= EQUAL[torch.float32]
    assert runs == ["convolve", "convolve_backward"]


@needs_compiler
def test_rows_that_lie_apart_and_threads():
    """As a piece of a longer text lies, and shared out to more threads than there are heads."""
    (x, *rest), of = convolution(4, (1, 1, 1), 16, 21), (1, 1, 1)
    r = reading(width=16, T=21)
    long = torch.cat([x, torch.randn_like(x)], 1)
    expected, read_ = convolved(x, *rest, of)[:3], read(*r)
    before = torch.get_num_threads()
    torch.set_num_threads(5)
    try:
        found = heads.convolve(long[:, :21], *rest, of, False, "auto")
        assert_equal(found, expected, EQUAL[torch.float32])
        apart = (t if t is None or t.dim() < 3 else t.transpose(0, 1).contiguous().transpose(0, 1) for t in r)
        assert_equal(heads.gate_reads(*apart, EPS, "auto"), read_[0], EQUAL[torch.float32])
    finally:
        torch.set_num_threads(before)


@needs_compiler
@pytest.mark.parametrize("flags", OTHER_BUILDS)
def test_other_builds(flags, tmp_path, monkeypatch):
    """Vectors of eight, and a build that stops at what C leaves undefined."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(build, "FLAGS", [*build.FLAGS, *flags])
    monkeypatch.setattr(native, "library", build.library.__wrapped__)
    for dtype in native.DTYPES:
        check_convolution(CONVOLUTIONS[1], dtype)
        check_reading(dtype)
    assert [path.suffix for path in (tmp_path / "titans").iterdir()] == [".so"]


@needs_compiler
def test_bfloat16_is_rounded_to_the_nearest():
    """A convolution of one tap that changes nothing but for the silu: PyTorch's own rounding; NaN stays NaN."""
    x = torch.linspace(-5, 5, 1024).bfloat16().view(1, 64, 16)
    x[0, 3, 2], x[0, 4, 5] = torch.nan, torch.inf
    x = torch.cat([x, x, x], -1)
    *_, found = native.convolve(x, x[:, :0], torch.ones(1, 48), (1, 1, 1), True)
    assert_equal(found.float().nan_to_num(7), F.silu(x.float()).bfloat16().float().nan_to_num(7), 2**-8)
    assert found.isnan().sum() == 3


@pytest.mark.parametrize(
    "backend, width, dtypes",
    [("chunked", 16, [LOW]), ("auto", 24, [LOW]), ("auto", 16, [torch.float16]), ("auto", 16, [LOW, torch.float32])],
)
def test_left_to_pytorch(backend, width, dtypes):
    assert not native.supported(backend, width, None, *(torch.zeros(1, dtype=dtype) for dtype in dtypes))


@pytest.mark.parametrize(("size", "T", "ragged"), product([1, 2, 4], [0, 2, 9], [False, True]))
def test_short_convolution_keeps_its_last_inputs(size, T, ragged):
    layer = ShortConvolution(6, size)
    x, state = torch.randn(2, T, 6), torch.randn(2, size - 1, 6)
    lengths = [T, T // 2] if ragged else [T, T]
    end = layer.after(x, state, torch.tensor(lengths) if ragged else None)
    rows = zip(torch.cat([state, x], 1), lengths, strict=True)
    assert_equal(end, torch.stack([row[n : n + size - 1] for row, n in rows]))
