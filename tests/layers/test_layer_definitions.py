"""Each block against its equations written out with loops and dense masks (arXiv 2501.00663, eqs. 21-31)."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from layer_cases import DIM, SIZES, assert_equal, build, run, tokens
from torch import Tensor

from titans.layers.attention import rotary_table, rotate

T = 21


def attend(attention, x: Tensor, rows: Tensor, persistent: Tensor | None, memory: Tensor | None = None) -> Tensor:
    """Softmax attention of x [T, dim] with a dense boolean mask ``rows`` [T, T], one head after the other.

    Keys: persistent tokens (seen by all, without position), ``memory`` tokens (at their token's position), tokens.
    """
    H, d = attention.heads, attention.head_dim
    wq, wk, wv = attention.qkv_proj.weight.chunk(3)
    places = torch.arange(len(x))
    outs = []
    for h in range(H):
        at = slice(h * d, (h + 1) * d)

        def turned(t):
            return rotate(t.unsqueeze(1), rotary_table(places, t)).squeeze(1)

        keys, values, seen = [turned(x @ wk[at].T)], [x @ wv[at].T], [rows]
        if memory is not None:
            keys, values, seen = [turned(memory @ wk[at].T), *keys], [memory @ wv[at].T, *values], [rows, rows]
        if persistent is not None:
            still = persistent @ wk[at].T
            still = torch.cat([torch.zeros_like(still[:, : d // 2]), still[:, d // 2 :]], 1)
            keys, values = [still, *keys], [persistent @ wv[at].T, *values]
            seen = [torch.ones(len(x), len(persistent), dtype=torch.bool), *seen]
        scores = turned(x @ wq[at].T) @ torch.cat(keys).T / d**0.5
        outs.append(scores.masked_fill(~torch.cat(seen, 1), -torch.inf).softmax(-1) @ torch.cat(values))
    return torch.cat(outs, -1) @ attention.out_proj.weight.T


def window(reach: int) -> Tensor:
    i, j = torch.arange(T).unsqueeze(1), torch.arange(T)
    return (j <= i) & (j > i - reach)


def mac(block, x: Tensor, reach: int) -> Tensor:
    outs, state = [], block.memory.initial_state(1)
    for start in range(0, T, reach):
        s = x[start : start + reach]
        queries, gate = block.memory.queries(s.unsqueeze(0)), block.memory.out_gate(s)
        recalled = block.memory.recall(queries, gate, tuple(block.memory.current_maps(state)))[0]
        h = block.memory.out_proj(recalled)  # eq. 21
        causal = torch.ones(len(s), len(s), dtype=torch.bool).tril()
        y = s + attend(block.attention, s, causal, block.persistent, h)  # eqs. 22, 23
        for t in range(len(s)):  # eq. 24, and the per-token read of eq. 25
            m, state = block.memory(y[t].view(1, 1, DIM), state)
            outs.append(block.gate(y[t], m[0, 0]))
    return torch.stack(outs)


def mag(block, x: Tensor, reach: int) -> Tensor:
    y = x + attend(block.attention, x, window(reach), block.persistent)
    return block.gate(y, remembered(block, x))


def mal(block, x: Tensor, reach: int) -> Tensor:
    y = remembered(block, x)
    return y + attend(block.attention, block.memory_norm(x + y), window(reach), None)


def remembered(block, x: Tensor) -> Tensor:
    """M([P | x]) without its prefix (eqs. 26, 28, 29, 30); the prefix is a chunk of its own."""
    memory, x = block.memory, x.unsqueeze(0)
    if block.persistent is None:
        return memory(x)[0][0]
    alone = copy.copy(memory)
    alone.chunk_size = len(block.persistent)
    end, start = alone(block.persistent.unsqueeze(0))[1], memory.initial_state(1)
    return memory(x, replace(start, maps=end.maps, conv=end.conv))[0][0]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("name", "mix"), [("mac", mac), ("mag", mag), ("mal", mal)])
def test_block_is_its_equations(name, mix, size):
    block, x = build(name, size), tokens(T=T)
    got = run(block, x)[0]
    for b in range(2):
        y = x[b] + mix(block, block.mix_norm(x[b]), SIZES[size][1])
        gate, up = block.feed_forward.up_proj(block.feed_forward_norm(y)).chunk(2, -1)
        assert_equal(got[b], y + block.feed_forward.down_proj(F.silu(gate) * up))


def test_rotary_positions_are_relative():
    """Scores depend on distances, in the rotary half; the other half does not turn."""
    q, k = torch.randn(2, 1, 1, 8, dtype=torch.float64)

    def at(t, place):
        return rotate(t, rotary_table(torch.tensor([place]), t))

    scores = [(at(q, a) * at(k, a - 3)).sum() for a in (3, 10, 5000)]
    assert_equal(scores[1:], [scores[0]] * 2)
    assert not torch.allclose((at(q, 4) * at(k, 0)).sum(), scores[0])
    assert torch.equal(at(q, 7)[..., 4:], q[..., 4:])


def test_attention_does_not_reach_past_its_window():
    """A change beyond the window moves MAG's attention by nothing."""
    block, x = build("mag", "4 in 8"), tokens(T=T)
    other = x.clone()
    other[:, 3] += 1
    y, z = (block.attention(t, block.attention.initial_state(2), None)[0] for t in (x, other))
    moved = (y != z).any(-1).any(0)
    assert moved.tolist() == [3 <= t < 3 + 8 for t in range(T)]


def test_shared_keys_are_equal_keys():
    """One head of queries and keys for two memories is two heads with the same projection and convolution."""
    shared, own = build("memory", "4 in 8"), build("memory", "1 in 4")
    own.chunk_size, inner = shared.chunk_size, 2 * shared.head_dim
    parts = shared.head_dim, shared.head_dim, inner
    with torch.no_grad():
        for mine, theirs, axis in ((own.qkv_proj, shared.qkv_proj, 0), (own.conv, shared.conv, 1)):
            q, k, v = theirs.weight.split(parts, axis)
            mine.weight.copy_(torch.cat([q, q, k, k, v], axis))
        same = {n: p for n, p in shared.named_parameters() if not n.startswith(("qkv_proj", "conv"))}
        own.load_state_dict(same, strict=False)
    assert_equal(own(tokens())[0], shared(tokens())[0])


def test_values_stand_beside_what_is_read():
    """What is normalised is the memory's answer and ``skip`` times the token's value."""
    layer, x = build("memory"), tokens()
    (reads, v), state = layer.write(x, layer.initial_state(2), None)
    assert_equal(v, layer.by_head(layer.qkv_proj(x), layer.gates_proj(x), layer.conv.initial_state(2), None)[2])
    y, end = layer(x)
    assert_equal(y, layer.out_proj(layer.out_norm(reads + layer.skip * v).flatten(-2) * F.silu(layer.out_gate(x))))
    assert_equal(end.tensors(), state.tensors())
    layer.skip = None
    y, end = layer(x)
    assert_equal(y, layer.out_proj(layer.out_norm(reads).flatten(-2) * F.silu(layer.out_gate(x))))
    assert_equal(end.tensors(), state.tensors())
