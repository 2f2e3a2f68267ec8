"""How near two results must be, per dtype, in one place; bounds are relative to the largest expected entry."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

EQUAL = {torch.float64: 1e-10, torch.float32: 1e-5}
"""Two ways to compute the same numbers: backends, a sequence in pieces, cached decoding."""

LOW_PRECISION = 2.0
"""Error against float32 of a bfloat16 result, in units of the error of plain PyTorch code in bfloat16."""

LOGITS = 1e-4
"""Absolute, float32 logits of cached decoding against the full forward (issue 1, item 3)."""


def error(got: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest entry of ``expected`` (infinite where ``got`` is not finite)."""
    assert got.shape == expected.shape, f"shape {list(got.shape)}, expected {list(expected.shape)}"
    if not expected.numel():
        return 0.0
    got, expected = got.detach().double(), expected.detach().double()
    difference, size = (got - expected).abs().max(), expected.abs().max()
    return float(torch.nan_to_num(difference / size if size else difference, nan=torch.inf))


def assert_equal(got, expected, tolerance: float | None = None, name: str = "result") -> None:
    """Tensors, or nested sequences and mappings of them, equal to the bound of their dtype; None equals None."""
    if isinstance(expected, Tensor):
        assert isinstance(got, Tensor), f"{name}: {got!r}, expected a tensor"
        bound = EQUAL.get(expected.dtype, 0.0) if tolerance is None else tolerance
        found = error(got, expected)
        assert found <= bound, f"{name}: relative error {found:.2e} > {bound:.0e}"
    elif isinstance(expected, Mapping):
        assert got.keys() == expected.keys(), f"{name}: {got.keys()}, expected {expected.keys()}"
        for key in expected:
            assert_equal(got[key], expected[key], tolerance, f"{name}[{key!r}]")
    elif isinstance(expected, Sequence) and not isinstance(expected, str):
        assert len(got) == len(expected), f"{name}: {len(got)} entries, expected {len(expected)}"
        for i, (g, e) in enumerate(zip(got, expected, strict=True)):
            assert_equal(g, e, tolerance, f"{name}[{i}]")
    else:
        assert got == expected, f"{name}: {got!r}, expected {expected!r}"
