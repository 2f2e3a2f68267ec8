"""One graph without breaks, forward and backward; the compiler's back end is not what is tested."""

import pytest
import torch
from model_cases import VARIANTS, assert_equal, build, ids


@pytest.mark.parametrize(
    ("variant", "length"), [("lmm", 10), *(pytest.param(v, 14, marks=pytest.mark.slow) for v in VARIANTS)]
)
def test_compiles_without_breaks(variant, length):
    """Whole and open chunks; at 14 tokens segments and windows, too."""
    model, x = build(variant, "4 in 8", torch.float64, use_cache=False), ids(2, length)
    results = [run(x).logits for run in (torch.compile(model, backend="aot_eager", fullgraph=True), model)]
    assert_equal(*results)
    grads = [torch.autograd.grad(y.square().sum(), list(model.parameters()), allow_unused=True) for y in results]
    assert_equal(*grads)
