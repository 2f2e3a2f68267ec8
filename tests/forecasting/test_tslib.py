"""Titans as a model of Time-Series-Library: its interface, the common fields, what is refused."""

from types import SimpleNamespace

import pytest
import torch

from titans.forecasting.tslib import Model

FIELDS = {"seq_len": 36, "pred_len": 10, "enc_in": 3}


def build(**fields):
    torch.manual_seed(0)
    return Model(SimpleNamespace(**{**FIELDS, **fields}))


@pytest.mark.parametrize("task", ["long_term_forecast", "short_term_forecast"])
def test_forecasts_from_the_past_alone(task):
    """Called as its experiments call a model: by position, marks that may be None, the decoder's input not read."""
    model = build(task_name=task, label_len=18, dropout=0.1).eval()
    x, marks, truth = torch.randn(2, 36, 3), torch.randn(2, 36, 4), torch.randn(2, 28, 3)
    with torch.no_grad():
        made = model(x, marks, truth, torch.randn(2, 28, 4))
        assert made.shape == (2, 10, 3)
        torch.testing.assert_close(model(x, None, torch.zeros(2, 28, 3), None), made)
        assert (model(x + 1, None, None, None) - made - 1).abs().max() < 1e-4


def test_it_trains():
    model = build()
    model(torch.randn(2, 36, 3), None, None, None).square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_the_common_fields():
    config = build(d_model=24, e_layers=1, d_ff=40, n_heads=3).core.config
    sizes = (config.hidden_size, config.num_hidden_layers, config.intermediate_size, config.num_memory_heads)
    assert sizes == (24, 1, 40, 3)
    assert (build().core.config.hidden_size, build().core.config.patch_length) == (32, 16)
    assert build(seq_len=5).core.config.patch_length == 2


def test_what_is_refused_is_named():
    with pytest.raises(ValueError, match="task_name='imputation' is not valid; use long_term_forecast or short_term"):
        build(task_name="imputation")
    with pytest.raises(ValueError, match=r"shape \[2, 36, 4\].*\[batch, 36, 3\]"):
        build()(torch.randn(2, 36, 4), None, None, None)
    with pytest.raises(AttributeError, match="pred_len"):
        Model(SimpleNamespace(seq_len=36, enc_in=3))
    with pytest.raises(ValueError, match="no multiple of num_memory_heads=5"):
        build(n_heads=5)
