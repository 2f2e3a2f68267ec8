"""Decoders give what ``forward`` gives, token by token, and leave the same state (test contract, item 3)."""

import copy

import pytest
import torch
from layer_cases import BLOCKS, CASES, SIZES, assert_equal, build, run, tokens

from titans.layers.decode import Decoder, MemoryDecoder, decoder
from titans.memory import MemoryMLP

T = 30
NETWORKS = {
    "depth 1": MemoryMLP(depth=1), "depth 3": MemoryMLP(depth=3), "silu": MemoryMLP(activation="silu"),
    "no norm": MemoryMLP(norm=False), "no residual": MemoryMLP(residual=False),
    "online": MemoryMLP(depth=1, norm=False, online=True),
}  # fmt: skip


def assert_decodes(layer, x, start: int) -> None:
    with torch.no_grad():
        expected, end = run(layer, x)
        state = run(layer, x[:, :start])[1]
        made = (MemoryDecoder if layer.__class__.__name__ == "NeuralMemory" else Decoder)(layer, state)
        before = {name: t.clone() for name, t in state.tensors().items()}
        got = torch.stack([made(token) for token in x[:, start:].unbind(1)], 1)
    assert_equal(got, expected[:, start:])
    assert_equal(made.state.tensors(), end.tensors())
    assert_equal(state.tensors(), before, tolerance=0.0)  # the state it was made from is nobody's but the caller's


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("start", [0, 1, 11])
@pytest.mark.parametrize(("name", "size"), CASES)
def test_single_tokens_are_the_whole(name, size, start, batch):
    assert_decodes(build(name, size), tokens(batch, T), start)


@pytest.mark.parametrize("gate", ["sigmoid", "write"])
@pytest.mark.parametrize("conv_size", [1, 4])
@pytest.mark.parametrize("network", NETWORKS)
def test_options(network, gate, conv_size):
    assert_decodes(build("memory", network=NETWORKS[network], gate=gate, conv_size=conv_size), tokens(2, T), 4)


def test_without_the_value_beside():
    layer = build("memory")
    layer.skip = None
    assert_decodes(layer, tokens(2, T), 4)


@pytest.mark.parametrize(("forget", "momentum"), [("zero", True), ("none", True), ("start", False), ("none", False)])
def test_forgetting_and_momentum(forget, momentum):
    layer = build("mac")
    layer.memory.forget, layer.memory.momentum = forget, momentum
    assert_decodes(layer, tokens(2, T), 4)


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
