"""Decoders give what ``forward`` gives, token by token, and leave the same state (test contract, item 3)."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from layer_cases import BLOCKS, CASES, SIZES, assert_equal, build, run, tokens

from titans.layers import native
from titans.layers.decode import Decoder, decoder
from titans.layers.native import operations
from titans.layers.native.operations import NativeOperations
from titans.layers.operations import Operations
from titans.memory import MemoryMLP
from titans.memory.native import build as build_c

T = 30
NETWORKS = {
    "depth 1": MemoryMLP(depth=1), "depth 3": MemoryMLP(depth=3), "silu": MemoryMLP(activation="silu"),
    "no norm": MemoryMLP(norm=False), "no residual": MemoryMLP(residual=False),
    "online": MemoryMLP(depth=1, norm=False, online=True),
}  # fmt: skip


# sizes in float64 that PyTorch's operations take, and in float32 for C
WAYS = {"PyTorch": (Operations, torch.float64, 16), "C": (NativeOperations, torch.float32, 32)}


@pytest.fixture(params=WAYS)
def way(request):
    """Operations, dtype and width."""
    if request.param == "C" and native.unbuilt(native.SOURCE):
        pytest.skip(native.unbuilt(native.SOURCE))
    return WAYS[request.param]


def assert_decodes(layer, x, start: int, way) -> None:
    with torch.no_grad():
        expected, end = run(layer, x)
        state = run(layer, x[:, :start])[1]
        made = Decoder(layer, state)
        assert type(made.operations) is way[0]
        before = {name: t.clone() for name, t in state.tensors().items()}
        got = torch.stack([made(token) for token in x[:, start:].unbind(1)], 1)
    assert_equal(got, expected[:, start:])
    assert_equal(made.state.tensors(), end.tensors())
    assert_equal(state.tensors(), before, tolerance=0.0)  # the state it was made from is nobody's but the caller's


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("start", [0, 1, 11])
@pytest.mark.parametrize(("name", "size"), [(name, size) for name, size in CASES if name in BLOCKS])
def test_single_tokens_are_the_whole(name, size, start, batch, way):
    _, dtype, dim = way
    assert_decodes(build(name, size, dtype, dim=dim), tokens(batch, T, dtype, dim=dim), start, way)


@pytest.mark.parametrize("gate", ["sigmoid", "write"])
@pytest.mark.parametrize("conv_size", [1, 4])
@pytest.mark.parametrize("network", NETWORKS)
def test_options(network, gate, conv_size, way):
    _, dtype, dim = way
    layer = build("mac", dtype=dtype, network=NETWORKS[network], gate=gate, conv_size=conv_size, dim=dim)
    assert_decodes(layer, tokens(2, T, dtype, dim=dim), 4, way)


def test_without_the_value_beside(way):
    _, dtype, dim = way
    layer = build("lmm", dtype=dtype, dim=dim)
    layer.memory.skip = None
    assert_decodes(layer, tokens(2, T, dtype, dim=dim), 4, way)


@pytest.mark.parametrize(("forget", "momentum"), [("zero", 1), ("none", 0.3), ("start", 0), ("none", 0)])
def test_forgetting_and_momentum(forget, momentum, way):
    _, dtype, dim = way
    layer = build("mac", dtype=dtype, dim=dim)
    layer.memory.forget, layer.memory.max_momentum = forget, momentum
    assert_decodes(layer, tokens(2, T, dtype, dim=dim), 4, way)


def wide(name: str, expansion: float = 4) -> torch.nn.Module:
    """A block of usual widths: heads of 64, chunk 16, segment or window 24."""
    return build(name, "16 in 24", torch.float32, network=MemoryMLP(expansion=expansion), dim=128)


@pytest.fixture
def in_c():
    if reason := native.unbuilt(native.SOURCE):
        pytest.skip(reason)
    return WAYS["C"]


def long_tokens():
    return tokens(2, 70, torch.float32, dim=128)


@pytest.mark.parametrize("expansion", [1, 4.5])
@pytest.mark.parametrize("name", BLOCKS)
def test_usual_widths(name, expansion, in_c):
    """Rows of several vectors, chunks and segments that end at different places."""
    assert_decodes(wide(name, expansion), long_tokens(), 5, in_c)


def assert_threads_agree(layer) -> None:
    """One and three of them, to the bit."""
    x, found, before = long_tokens(), [], torch.get_num_threads()
    with torch.no_grad():
        state = layer(x[:, :5])[1]
        for threads in (1, 3):
            made = Decoder(layer, state)
            torch.set_num_threads(threads)
            try:
                found.append([made(token) for token in x[:, 5:].unbind(1)] + list(made.state.tensors().values()))
            finally:
                torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("name", BLOCKS)
def test_threads_give_the_same_numbers(name, in_c, monkeypatch):
    monkeypatch.setattr(operations, "GRAIN", 1)
    assert_threads_agree(wide(name))


@pytest.mark.parametrize("limit", [1, 2])
def test_fewer_threads_than_were_asked_for(limit, in_c):
    """OpenMP may give less: no share of the work is lost."""
    code = "import sys; sys.path[:0] = sys.argv[1:]; import test_decode as t; t.operations.GRAIN = 1; "
    code += "t.assert_threads_agree(t.wide('mac'))"
    environment = os.environ | {"OMP_THREAD_LIMIT": str(limit)}
    folders = [str(folder) for folder in Path(__file__).parents[:2]]
    subprocess.run([sys.executable, "-c", code, *folders], env=environment, check=True)


@pytest.mark.parametrize(
    "flags", [["-U__AVX512F__"], ["-O1", "-fsanitize=undefined", "-fsanitize-undefined-trap-on-error"]]
)
@pytest.mark.parametrize("name", ["mac", "mag"])
def test_other_builds(name, flags, in_c, tmp_path, monkeypatch):
    """Vectors of eight, and a build that stops at what C leaves undefined."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(build_c, "FLAGS", [*build_c.FLAGS, *flags])
    monkeypatch.setattr(operations, "library", build_c.library.__wrapped__)
    assert_decodes(wide(name), long_tokens(), 5, in_c)
    assert [path.suffix for path in (tmp_path / "titans").iterdir()] == [".so"]


def test_where_pytorch_is_taken(in_c, monkeypatch):
    """Another dtype, a width that is no multiple of 16, a backend that was asked for, no compiler."""

    def taken(layer):
        x = torch.randn(1, 2, layer.memory.dim, dtype=layer.mix_norm.weight.dtype)
        with torch.no_grad():
            return type(Decoder(layer, layer(x)[1]).operations)

    assert taken(wide("mag")) is NativeOperations
    assert taken(wide("mag").double()) is taken(wide("mag", expansion=1.2)) is Operations
    layer = wide("mag")
    layer.memory.backend = "chunked"
    assert taken(layer) is Operations
    monkeypatch.setattr(native, "unbuilt", lambda _: "there is no C compiler")
    assert taken(wide("mag")) is Operations


def test_a_model_that_was_cast_since(in_c):
    layer, x = wide("lmm"), long_tokens()
    with torch.no_grad():
        made = Decoder(layer, layer(x)[1])
        with pytest.raises(ValueError, match=r"x is torch\.float64 on cpu, but its cache in float32"):
            made(x[:, 0].double())


@pytest.mark.parametrize("name", BLOCKS)
def test_bfloat16_is_as_near_as_forward(name):
    """The memory of a decoder works in float32: no further from float32 than ``forward`` in bfloat16, by half."""
    x = tokens(1, T, torch.float32)
    with torch.no_grad():
        exact = run(build(name, dtype=torch.float32), x)[0][:, 5:]
        layer, x = build(name, dtype=torch.bfloat16), x.bfloat16()
        plain = run(layer, x)[0][:, 5:]
        made = Decoder(layer, run(layer, x[:, :5])[1])
        got = torch.stack([made(token) for token in x[:, 5:].unbind(1)], 1)
    assert got.dtype == torch.bfloat16
    assert (got.float() - exact).norm() <= 1.5 * (plain.float() - exact).norm()


@pytest.mark.parametrize("name", BLOCKS)
def test_where_it_cannot_be_taken(name):
    """Rows at different places, gradients and autocast are ``forward``'s business."""
    layer, x = build(name), tokens(2, 9)
    with torch.no_grad():
        state = run(layer, x)[1]
        assert decoder(layer, state) is not None
        ragged = run(layer, x, mask=torch.arange(9) >= torch.tensor([[0], [4]]))[1]
        assert decoder(layer, ragged) is None
        with torch.autocast("cpu", torch.bfloat16):
            assert decoder(layer, state) is None
    assert decoder(layer, state) is None


def test_state_is_a_copy():
    layer, x = build("mac", "4 in 8"), tokens(2, T)
    with torch.no_grad():
        made = Decoder(layer, run(layer, x[:, :5])[1])
        kept = made.state
        saved = copy.deepcopy(kept.tensors())
        for token in x[:, 5 : 5 + 2 * SIZES["4 in 8"][1]].unbind(1):
            made(token)
    assert_equal(kept.tensors(), saved, tolerance=0.0)


@pytest.mark.parametrize("name", BLOCKS)
def test_what_it_gives_can_be_trained_on(name):
    """A decoder works in inference mode; neither what it returns nor its state is bound to that."""
    layer, x = build(name), tokens(1, 12)
    with torch.no_grad():
        made = Decoder(layer, run(layer, x[:, :2])[1])
        y = [made(token) for token in x[:, 2:].unbind(1)][-1]
    run(layer, y.unsqueeze(1), made.state)[0].sum().backward()
    assert layer.mix_norm.weight.grad is not None


def test_nan_is_named():
    layer, x = build("lmm"), tokens(1, 3)
    with torch.no_grad():
        made = Decoder(layer, run(layer, x)[1])
        with pytest.raises(ValueError, match="NaN"):
            made(torch.full((1, x.shape[-1]), torch.nan, dtype=x.dtype))
