"""Segment sums and chunk masks, against loops and against exact arithmetic."""

import pytest
import torch
from tolerances import assert_equal

from titans.memory.gates import chunk_masks, segment_sum


@pytest.mark.parametrize("C", [1, 2, 7])
def test_segment_sum_is_what_it_says(C):
    x = torch.randn(2, 3, C, dtype=torch.float64)
    got = segment_sum(x)
    for t in range(C):
        for j in range(C):
            expected = x[..., j + 1 : t + 1].sum(-1) if t >= j else torch.full((2, 3), -torch.inf, dtype=torch.float64)
            assert torch.allclose(got[..., t, j], expected, atol=1e-14)


@pytest.mark.parametrize("C", [64, 2048])
def test_segment_sum_keeps_its_digits(C):
    """Differences of one cumulative sum err by 5e-6 at 64 and 1.5e-4 at 2,048 (equations.md, section 4)."""
    x = -torch.rand(C, generator=torch.Generator().manual_seed(0)) * 10
    exact = x.double().unsqueeze(0)
    t = torch.arange(C - 4, C)
    short = torch.stack([segment_sum(x)[t, t - 2], (exact[0, t] + exact[0, t - 1]).float()])
    assert_equal(short[0], short[1], 1e-6)
    whole, reference = segment_sum(x).exp(), segment_sum(x.double()).exp()
    assert_equal(whole, reference, 1e-6)


@pytest.mark.parametrize("where", [[0], [3], [5], [2, 3], list(range(6))])
def test_minus_infinity_is_a_wall(where):
    """exp(-inf) = 0 stands for "nothing is kept": no NaN in values or gradients, and nothing else is touched."""
    x = torch.randn(6, dtype=torch.float64)
    x[where] = -torch.inf
    x.requires_grad_()
    got = segment_sum(x).exp()
    for t in range(6):
        for j in range(6):
            inside = [r for r in where if j < r <= t]
            expected = 0.0 if t < j or inside else float(x.detach()[j + 1 : t + 1].sum().exp())
            assert abs(float(got[t, j].detach()) - expected) < 1e-12
    (gradient,) = torch.autograd.grad(got.sum(), x)
    assert gradient.isfinite().all()
    assert not gradient[where].any()


def test_masks_against_the_recurrence():
    """A scalar memory with gradient 1 at one token only: the masks are its response."""
    C = 7
    gates = torch.stack([torch.rand(C), torch.randn(C).sigmoid().log(), torch.randn(C).sigmoid().log()], -1).double()
    masks = chunk_masks(gates)
    lr, eta, retention = gates[:, 0], gates[:, 1].exp(), gates[:, 2].exp()

    def respond(memory, momentum, source):
        seen = []
        for t in range(C):
            momentum = eta[t] * momentum + lr[t] * (t == source)
            memory = retention[t] * memory + momentum
            seen.append(torch.as_tensor(memory))
        return torch.stack(seen), momentum

    for s in range(C):
        memory, momentum = respond(torch.tensor(0.0).double(), torch.tensor(0.0).double(), s)
        assert_equal(masks.write[:, s], memory)
        assert_equal(masks.to_state[s, 1], momentum)
    assert_equal(masks.read[:, 0], respond(torch.tensor(1.0).double(), torch.tensor(0.0).double(), -1)[0])
    carried = respond(torch.tensor(0.0).double(), torch.tensor(1.0).double(), -1)
    assert_equal(masks.read[:, 1], carried[0])
    assert_equal(masks.transition[1, 1], carried[1])
