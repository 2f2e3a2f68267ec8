"""The largest steps and momentum that a memory takes by default, and what they keep from growing."""

import math

import pytest
import torch
from torch import Tensor

from titans.layers import NeuralMemory
from titans.layers.neural_memory import stable_momentum
from titans.memory import MemoryMLP, neural_memory

ONLINE = MemoryMLP(1, residual=False, norm=False, online=True)


@pytest.mark.parametrize(
    ("network", "chunk_size", "largest"),
    [
        (MemoryMLP(), 4, 0.1),
        (MemoryMLP(1), 64, 1 / 64),
        (MemoryMLP(2), 64, 1 / 64),
        (MemoryMLP(3), 64, 1 / 256),
        (MemoryMLP(4), 16, 1 / 128),
        (MemoryMLP(norm=False), 4, 0.025),
        (MemoryMLP(1, norm=False), 64, 1 / 64),
        (ONLINE, 64, 0.25),
    ],
)
def test_the_default_of_the_largest_theta(network, chunk_size, largest):
    assert NeuralMemory(16, heads=1, chunk_size=chunk_size, network=network).max_lr == pytest.approx(largest)


@pytest.mark.parametrize(
    ("network", "max_lr", "largest"),
    [(MemoryMLP(), None, 1), (ONLINE, None, 0.375), (ONLINE, 0.04, 0.75), (ONLINE, 0.75, 0)],
)
def test_the_default_of_the_largest_eta(network, max_lr, largest):
    memory = NeuralMemory(16, heads=1, network=network, max_lr=max_lr)
    assert memory.max_momentum == pytest.approx(largest, abs=0.001)
    with torch.no_grad():
        memory.gates_proj.bias.fill_(20)  # every gate open
    _, _, info = memory(torch.randn(2, 3, 16), return_info=True)
    torch.testing.assert_close(info["momentum"], torch.full((2, 3, 1), memory.max_momentum))


@pytest.mark.parametrize("value", [-0.1, 1.5, float("nan")])
def test_eta_is_a_share(value):
    with pytest.raises(ValueError, match=f"max_momentum must be from 0 to 1, got {value}"):
        NeuralMemory(16, max_momentum=value)


def growth(theta: float, eta: float) -> float:
    """Growth a token, as a logarithm, under the gates up to theta and eta and the keys that lead to the longest.

    An error m and its momentum s over two features: s <- eta s - 2 theta (m.k) k, m <- m + s. Linear, and the same when
    both are turned, so that only the share of s and its angle to m count: value iteration on a grid of them.
    """
    points, steps = 24, 120
    angles = torch.linspace(0, math.pi / 2, points), torch.linspace(0, math.pi, points)
    share, apart = (t.double().flatten() for t in torch.meshgrid(*angles, indexing="ij"))
    m = torch.stack([share.cos(), 0 * share], -1)
    s = share.sin().unsqueeze(-1) * torch.stack([apart.cos(), apart.sin()], -1)
    turn = torch.arange(36).double() * math.pi / 36
    keys = torch.stack([turn.cos(), turn.sin()], -1)
    moves = [(lr, momentum, k) for lr in (theta / 2, theta) for momentum in (0, eta) for k in keys]
    moves += [(0, momentum, keys[0]) for momentum in (0, eta / 2, eta)]
    gain, corners, weights = zip(*(_moved(m, s, *move, points) for move in moves), strict=True)
    gain, corners, weights = torch.stack(gain), torch.stack(corners), torch.stack(weights)
    value, halfway = torch.zeros_like(share), 0.0
    for step in range(steps):
        value = (gain + (value[corners] * weights).sum(1)).amax(0)
        if step == steps // 2 - 1:
            halfway = value.max().item()
    return (value.max().item() - halfway) / (steps - steps // 2)


def _moved(m: Tensor, s: Tensor, lr: float, momentum: float, k: Tensor, points: int) -> tuple[Tensor, Tensor, Tensor]:
    """By how much one token makes (m, s) longer; the four points of the grid where that leads, and their weights."""
    s = momentum * s - 2 * lr * (m @ k).unsqueeze(-1) * k
    m = m + s
    long = m.norm(dim=1).clamp_min(1e-12), s.norm(dim=1).clamp_min(1e-12)
    apart = torch.acos(((m * s).sum(1) / (long[0] * long[1])).clamp(-1, 1))
    place = [torch.atan2(long[1], long[0]) / (math.pi / 2) * (points - 1), apart / math.pi * (points - 1)]
    low = [p.long().clamp(max=points - 2) for p in place]
    (a, b), (u, v) = low, (p - i for p, i in zip(place, low, strict=True))
    corners = torch.stack([a * points + b, a * points + b + 1, (a + 1) * points + b, (a + 1) * points + b + 1])
    weights = torch.stack([(1 - u) * (1 - v), (1 - u) * v, u * (1 - v), u * v])
    return torch.hypot(*long).log(), corners, weights


@pytest.mark.parametrize("theta", [1 / 64, 0.05, 0.1, 0.25, 0.5])
def test_no_gates_and_no_keys_make_an_online_map_grow(theta):
    """With the default; and it is not far below what would."""
    eta = stable_momentum(ONLINE, theta)
    assert growth(theta, eta) < 4e-3  # what the grid rounds: with 48 points a side half of it is left
    assert growth(theta, eta + 0.15) > 5e-3


def held(theta: float, eta: float) -> Tensor:
    """What an online map answers for one key while gates come and go: two writes with eta, three times eta alone."""
    T = 200
    k = torch.zeros(1, T, 1, 4, dtype=torch.float64)
    k[..., 0] = 1
    writes = (torch.arange(T) % 5 < 2).double().view(1, T, 1)
    momentum = torch.full_like(writes, eta).log()
    maps = ONLINE.init(1, 4)[0].double()
    out, _ = neural_memory(k, k, k, theta * writes, momentum, 0 * writes, (maps,), network=ONLINE, chunk_size=16)
    return out[0, :, 0, 0]


def test_momentum_that_outlives_its_write_swings_up():
    """docs/decisions.md: theta = 1/2 twice, eta = 0.9 throughout; not with the default of eta."""
    assert held(0.5, 0.9).abs().max() > 1e6
    assert held(0.5, stable_momentum(ONLINE, 0.5)).abs().max() < 3
