"""Every parameter learns, at a cost that does not grow with the sequence."""

from itertools import product

import pytest
import torch
from layer_cases import CASES, DIM, LAYERS, SIZES, build, run, tokens
from torch.utils.flop_counter import FlopCounterMode

from titans.layers import MAC, MAG, MAL, NeuralMemory
from titans.memory import MemoryMLP, pieces

NETWORKS = {
    "default": MemoryMLP(),
    "depth 1": MemoryMLP(depth=1),
    "depth 4": MemoryMLP(depth=4, expansion=2),
    "plain": MemoryMLP(residual=False, norm=False),
    "online": MemoryMLP(1, 1, norm=False, online=True),
}
REPEATED = {f"depth {d}, chunk {C}": (MemoryMLP(d, 1), C) for d, C in product((1, 2, 3, 4), (16, 64))}


@pytest.mark.parametrize(("name", "size"), CASES)
@pytest.mark.parametrize("gate", ["sigmoid", "write"])
def test_every_parameter_gets_a_gradient(name, size, gate):
    """Traps 4 and 10: projections, convolutions, gates, M_0, norms, persistent tokens."""
    layer = build(name, size, gate=gate)
    run(layer, tokens(T=30))[0].square().sum().backward()
    missing = [n for n, p in layer.named_parameters() if p.grad is None or not p.grad.any()]
    assert not missing
    assert all(p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("network", NETWORKS)
def test_every_parameter_of_every_memory_network(network):
    layer = build("memory", network=NETWORKS[network])
    run(layer, tokens(T=30))[0].square().sum().backward()
    assert not [n for n, p in layer.named_parameters() if p.grad is None or not p.grad.any()]


@pytest.mark.parametrize("case", [*REPEATED, "online"])
def test_gradients_stay_small_where_a_long_text_repeats(case):
    """Every chunk writes the same keys again: with a largest theta of 0.1 depth 3 and 4 get norms above 1e4 here."""
    torch.manual_seed(1)
    network, chunk_size = REPEATED.get(case, (NETWORKS["online"], 64))
    memory = NeuralMemory(16, heads=1, chunk_size=chunk_size, network=network)
    y, _ = memory(torch.randn(1, 32, 16).repeat(1, 64, 1))
    y.square().mean().backward()
    assert torch.nn.utils.get_total_norm([p.grad for p in memory.parameters() if p.grad is not None]) < 1


@pytest.mark.parametrize("name", LAYERS)
def test_fresh_layer_gradients_come_through_the_writes(name):
    """At the start, keys and values learn only because later reads depend on what was written (trap 4)."""
    torch.manual_seed(0)
    memory = NeuralMemory(DIM, heads=2, chunk_size=3, max_lr=0.05).double()
    y, _ = memory(tokens(T=30))
    y.square().sum().backward()
    grad = memory.qkv_proj.weight.grad
    q, k, v = grad.chunk(3)
    assert k.abs().max() > 1e-6 * q.abs().max()
    assert v.abs().max() > 1e-6 * q.abs().max()
    assert memory.gates_proj.bias.grad.abs().min() > 0


@pytest.mark.parametrize("gate", ["sigmoid", "write"])
@pytest.mark.parametrize("name", LAYERS)
def test_gradients_are_right(name, gate):
    """Finite differences along a random direction of all parameters and the input at once."""
    layer, x = build(name, gate=gate), tokens(B=1, T=11)
    leaves = [x.requires_grad_(), *layer.parameters()]
    grads = torch.autograd.grad(run(layer, x)[0].square().sum(), leaves)
    directions = [torch.randn_like(p) for p in leaves]

    def loss(step):
        with torch.no_grad():
            for p, d in zip(leaves, directions, strict=True):
                p.add_(step * d)
            value = run(layer, x)[0].square().sum()
            for p, d in zip(leaves, directions, strict=True):
                p.sub_(step * d)
        return value

    expected = (loss(1e-6) - loss(-1e-6)) / 2e-6
    got = sum((g * d).sum() for g, d in zip(grads, directions, strict=True))
    assert abs(float(got - expected)) <= 1e-5 * abs(float(expected)) + 1e-6


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "with backward"])
def test_work_per_token_does_not_grow(name, backward, monkeypatch):
    """FLOPs of four times the tokens are four times as many (both lengths long enough for recomputation)."""
    monkeypatch.setattr(pieces, "PIECE", 16)
    layer, counts = build(name, "4 in 8", torch.float32), []
    for T in (64, 256):
        with FlopCounterMode(display=False) as counter:
            y, _ = run(layer, tokens(B=1, T=T, dtype=torch.float32))
            if backward:
                y.sum().backward()
        counts.append(counter.get_total_flops())
    assert 3.6 < counts[1] / counts[0] < 4.2


@pytest.mark.parametrize("name", LAYERS)
def test_a_long_call_keeps_little(name, monkeypatch):
    """The backward works pieces out again; of all that is mixed between projections only their inputs are kept."""
    layer, kept = build(name, "4 in 8", torch.float32), []
    for piece in (256, 16):
        monkeypatch.setattr(pieces, "PIECE", piece)
        held = {}

        def keep(t, held=held):
            held[t.untyped_storage().data_ptr()] = t.untyped_storage()
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            run(layer, tokens(B=1, T=256, dtype=torch.float32))
        kept.append(sum(s.nbytes() for s in held.values()))
    assert kept[1] < kept[0] / 2


@pytest.mark.parametrize("name", LAYERS)
def test_a_step_costs_the_same_after_any_length(name):
    layer, counts = build(name, "4 in 8", torch.float32), []
    with torch.no_grad():
        for T in (16, 1024):
            state = run(layer, tokens(B=1, T=T, dtype=torch.float32))[1]
            with FlopCounterMode(display=False) as counter:
                run(layer, tokens(B=1, T=1, dtype=torch.float32), state)
            counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_write_gate_can_be_exactly_closed():
    """Where it is shut nothing is written and nothing forgotten, in float32, for ever."""
    layer = build("memory", dtype=torch.float32, gate="write")
    with torch.no_grad():
        layer.gates_proj.weight.zero_()
        layer.gates_proj.bias.view(3, 2)[0] = -10
    x = tokens(T=300, dtype=torch.float32)
    _, state, info = layer(x, return_info=True)
    assert not info["lr"].any()
    assert not info["forget"].any()
    start = layer.initial_state(len(x)).weights
    assert all(torch.equal(w, m) for w, m in zip(state.weights, start, strict=True))


@pytest.mark.parametrize(("gate", "reach"), [("sigmoid", 0), ("write", 3)])
def test_how_far_back_a_gate_sees(gate, reach):
    """A sigmoid sees its token, the write gate as far as the convolution (of 4) reaches; none sees what comes."""
    layer = build("memory", gate=gate)
    torch.nn.init.normal_(layer.gates_proj.weight, std=0.1)
    x, at = tokens(T=20), 9
    other = x.clone()
    other[:, at] += 1
    for name in ("lr", "momentum", "forget"):
        seen = (layer(x, return_info=True)[2][name] != layer(other, return_info=True)[2][name]).flatten(2).any(2)[0]
        assert seen.nonzero().flatten().tolist() == list(range(at, at + reach + 1))


@pytest.mark.parametrize("gate", ["sigmoid", "write"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_momentum_and_forgetting_it_is_gradient_descent(gate, dtype):
    """One linear map, chunks of one token: W grows by lr k 2 (v - W k)^T a token, and by nothing else."""
    layer = NeuralMemory(8, heads=1, chunk_size=1, network=MemoryMLP(1, residual=False, norm=False), gate=gate,
                         forget="none", max_momentum=0, conv_size=1, max_lr=0.3).to(dtype)  # fmt: skip
    x = torch.randn(1, 40, 8, dtype=dtype)
    _, state, info = layer(x, return_info=True)
    assert not info["momentum"].any()
    assert not info["forget"].any()
    gates = None if gate == "write" else layer.gates_proj(x)
    k, v = (t[0, :, 0] for t in layer.by_head(layer.qkv_proj(x), gates, layer.conv.initial_state(1), None)[1:3])
    w = layer.start()[0][0]
    for t in range(40):
        w = w + info["lr"][0, t, 0] * torch.outer(k[t], 2 * (v[t] - k[t] @ w))
    assert torch.allclose(layer.current_maps(state)[0][0, 0], w, atol=1e-5 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("gate", ["sigmoid", "write"])
def test_info_is_what_the_layer_did(gate):
    """Per token and head, zero or finite at padding, and the output does not depend on asking."""
    layer, x = build("memory", gate=gate), tokens()
    mask = torch.ones(2, 21, dtype=torch.bool)
    mask[0, :5] = False
    y, state, info = layer(x, None, mask, return_info=True)
    assert set(info) == {"surprise", "loss", "lr", "momentum", "forget"}
    assert all(t.shape == (2, 21, 2) for t in info.values())
    for name, top in (("lr", 0.05), ("momentum", 1.0), ("forget", 1.0)):
        assert info[name].min() >= 0
        assert info[name].max() <= top
    assert (info["loss"][mask] > 0).all()
    assert (info["surprise"][mask] > 0).all()
    silent, other = layer(x, None, mask)
    assert torch.allclose(y, silent, atol=1e-12)
    assert torch.allclose(state.weights[0], other.weights[0], atol=1e-12)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NeuralMemory(16, heads=3), "dim=16 is no multiple of heads=3"),
        (lambda: NeuralMemory(16, heads=4, key_heads=3), "key_heads=3 must divide heads=4"),
        (lambda: NeuralMemory(16, heads=4, key_heads=0), "key_heads=0 must divide heads=4"),
        (lambda: NeuralMemory(16, gate="none"), "gate must be one of .*'none'"),
        (lambda: NeuralMemory(16, conv_size=0), "conv_size must be at least 1, got 0"),
        (lambda: NeuralMemory(16)(torch.zeros(1, 3, 8)), r"x must be \[batch, length, dim=16\], got \[1, 3, 8\]"),
        (lambda: NeuralMemory(16)(torch.zeros(3, 16)), r"x must be .*got \[3, 16\]"),
        (lambda: NeuralMemory(16)(torch.zeros(1, 3, 16), None, torch.ones(1, 4)), r"mask must be .*\[1, 3\].*\[1, 4\]"),
        (lambda: block(MAC, segment_length=0), "segment_length must be at least 1, got 0"),
        (lambda: block(MAG, sliding_window=0), "sliding_window must be at least 1, got 0"),
        (lambda: block(MAL, sliding_window=4, num_attention_heads=3), "dim=16 must be heads=3 times a multiple of 4"),
        (lambda: block(MAL, sliding_window=4, num_persistent_tokens=-1), "num_persistent_tokens must be 0 or more"),
    ],
)
def test_bad_argument(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def block(kind, **changes):
    sizes = {"num_attention_heads": 2, "num_persistent_tokens": 1, "intermediate_size": 8}
    return kind(NeuralMemory(DIM), **{**sizes, **changes})


def test_sizes_cover_what_they_claim():
    """The template's sizes: a chunk that divides the reach, ones that do not, a longer one, no persistent tokens."""
    chunks = {(reach % chunk == 0, chunk > reach) for chunk, reach, *_ in SIZES.values()}
    assert chunks == {(True, False), (False, False), (False, True)}
    assert {persistent == 0 for _, _, persistent, _ in SIZES.values()} == {True, False}


def test_a_gate_that_forgets_all_it_can_has_finite_gradients():
    """Write gate and forgetting both at 1 in float32: log(1 - alpha) was -inf there, and its gradient NaN."""
    torch.manual_seed(0)
    layer = NeuralMemory(16, heads=2, chunk_size=4, gate="write")
    with torch.no_grad():
        write, _, forget = layer.gates_proj.bias.view(3, 2)
        write.fill_(10)
        forget.fill_(40)
    y, _ = layer(torch.randn(2, 9, 16))
    y.square().sum().backward()
    for name, p in layer.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), name
