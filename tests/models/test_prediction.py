"""The forecaster: shapes, both forms, reversible normalisation, independence, gradients, files, errors."""

import pytest
import torch
from tolerances import assert_equal
from transformers import AutoModelForTimeSeriesPrediction

from titans.models import TitansForPrediction, TitansPredictionConfig
from titans.models.configuration import VARIANTS
from titans.models.prediction import pinball

FORMS = [(variant, mixing) for variant in VARIANTS for mixing in (False, True)]
forms = pytest.mark.parametrize(("variant", "mixing"), FORMS)


def build(variant="lmm", mixing=False, **changes) -> TitansForPrediction:
    """In float64 and evaluation mode, with every parameter away from its start."""
    sizes = {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
        "memory_expansion": 2, "chunk_size": 3, "segment_length": 4, "sliding_window": 4, "num_persistent_tokens": 2,
        "context_length": 30, "prediction_length": 7, "num_input_channels": 3, "patch_length": 6, "patch_stride": 3,
    }  # fmt: skip
    torch.manual_seed(0)
    model = TitansForPrediction(TitansPredictionConfig(variant=variant, channel_mixing=mixing, **{**sizes, **changes}))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model.double().eval()


def series(batch=2, rows=30, channels=3) -> torch.Tensor:
    return torch.randn(batch, rows, channels, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@forms
@torch.no_grad()
def test_shapes_and_loss(variant, mixing):
    model, truth = build(variant, mixing), series(rows=7)
    assert model(series()).loss is None
    out = model(past_values=series(), future_values=truth)
    assert out.prediction_outputs.shape == (2, 7, 3)
    assert_equal(out.loss, ((out.prediction_outputs - truth) ** 2).mean())
    assert out["loss"] is out.loss  # as the Trainer asks for it


@forms
@torch.no_grad()
def test_a_shifted_and_scaled_series_has_its_forecast_shifted_and_scaled(variant, mixing):
    model, x = build(variant, mixing), series()
    shift, scale = torch.tensor([-40.0, 0.0, 7.0]), torch.tensor([0.01, 1.0, 300.0])
    plain, moved = model(x).prediction_outputs, model(x * scale + shift).prediction_outputs
    assert_equal(moved, plain * scale + shift)


@forms
def test_forecasts_start_as_small_as_the_series_whatever_the_look_back(variant, mixing):
    for rows in (30, 300):
        sizes = {"hidden_size": 16, "num_attention_heads": 2, "patch_length": 6, "patch_stride": 3}
        config = TitansPredictionConfig(
            variant=variant, channel_mixing=mixing, context_length=rows, prediction_length=50, num_input_channels=3,
            **sizes,
        )  # fmt: skip
        torch.manual_seed(0)
        with torch.no_grad():
            assert TitansForPrediction(config)(series(rows=rows).float()).prediction_outputs.std() < 1.5


@torch.no_grad()
def test_dropout_is_for_training_alone():
    plain, model = build(), build(dropout=0.5)
    assert_equal(model(series()).prediction_outputs, plain(series()).prediction_outputs)
    model.train()
    assert not torch.allclose(model(series()).prediction_outputs, model(series()).prediction_outputs)


@pytest.mark.parametrize("mixing", [False, True])
@torch.no_grad()
def test_a_channel_that_does_not_move_is_finite(mixing):
    x = series()
    x[..., 1] = 5.0
    assert build(mixing=mixing)(x).prediction_outputs.isfinite().all()


@forms
@torch.no_grad()
def test_channels_are_independent_or_mixed_and_windows_never(variant, mixing):
    model, x = build(variant, mixing), series()
    changed = x.clone()
    changed[0, :, 1] += torch.linspace(0, 3, 30) ** 2
    moved = (model(changed).prediction_outputs - model(x).prediction_outputs).abs().amax(1) > 1e-9
    assert moved.tolist() == [[mixing, True, mixing], [False, False, False]]


@torch.no_grad()
def test_independent_channels_are_as_if_alone():
    model, alone = build(), build(num_input_channels=1)
    for i in range(3):
        assert_equal(
            model(series()).prediction_outputs[..., i], alone(series()[..., i : i + 1]).prediction_outputs[..., 0]
        )


@pytest.mark.parametrize("mixing", [False, True])
@torch.no_grad()
def test_tokens_are_the_patches_that_end_with_the_newest_row(mixing):
    """With blocks that add nothing, the forecast is the head's map of the patches, written out here."""
    model = build(mixing=mixing, patch_stride=5)
    model.out_proj.weight.zero_()
    model.out_proj.bias.zero_()
    x = series()
    assert model.config.num_patches == 5
    for i in range(3):
        row = x[1, :, i]
        mean, scale = row.mean(), row.std(unbiased=False)
        patches = torch.cat([row[begin : begin + 6] for begin in (4, 9, 14, 19, 24)])
        expected = model.head((patches - mean) / scale) * scale + mean
        assert_equal(model(x).prediction_outputs[1, :, i], expected)


@pytest.mark.parametrize("mixing", [False, True])
@torch.no_grad()
def test_quantiles_ascend_and_the_median_is_the_forecast(mixing):
    """Against the pinball loss by its definition, and the head's outputs in the order of the steps."""
    model, x, truth = build(mixing=mixing, quantiles=[0.1, 0.5, 0.75]), series(), series(rows=7)
    out = model(x, truth)
    assert out.quantile_outputs.shape == (2, 7, 3, 3)
    assert (out.quantile_outputs.diff(dim=-1) >= 0).all()
    assert (model.outputs(x).diff(dim=-1) < 0).any(), "the head's own may cross"
    assert_equal(out.prediction_outputs, out.quantile_outputs[..., 1])
    losses = []
    for k, q in enumerate((0.1, 0.5, 0.75)):
        for forecast, value in zip(out.quantile_outputs[..., k].flatten(), truth.flatten(), strict=True):
            losses.append(q * (value - forecast) if value > forecast else (1 - q) * (forecast - value))
    assert_equal(out.loss, torch.stack(losses).mean())
    assert_equal(model(x * 10 + 3).quantile_outputs, out.quantile_outputs * 10 + 3)
    model.head.weight[3 * 2 + 1], model.head.bias[3 * 2 + 1] = 0, 0  # the second output of the third step
    assert_equal(model.outputs(x)[:, 2, :, 1], x.mean(1))


def test_the_pinball_loss_is_least_at_the_quantile():
    values = torch.arange(1, 101, dtype=torch.float64)
    for q in (0.1, 0.5, 0.9):
        tried = torch.arange(0.5, 101)
        losses = torch.stack([pinball(at.expand(100, 1), values, [q]).mean() for at in tried])
        assert tried[losses.argmin()] == pytest.approx(100 * q + 0.5)


@forms
@pytest.mark.parametrize("quantiles", [None, [0.2, 0.5]])
def test_every_parameter_gets_a_gradient(variant, mixing, quantiles):
    model = build(variant, mixing, quantiles=quantiles).train()
    model(series(), series(rows=7)).loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


@forms
@torch.no_grad()
def test_round_trip(variant, mixing, tmp_path):
    model = build(variant, mixing, quantiles=[0.5, 0.9]).float()
    model.save_pretrained(tmp_path)
    for kind in (TitansForPrediction, AutoModelForTimeSeriesPrediction):
        loaded = kind.from_pretrained(tmp_path)
        assert type(loaded) is TitansForPrediction
        assert loaded.state_dict().keys() == model.state_dict().keys()
        assert all(torch.equal(loaded.state_dict()[n], t) for n, t in model.state_dict().items())
        assert_equal(loaded(series().float()).prediction_outputs, model(series().float()).prediction_outputs)


@pytest.mark.parametrize("hole", [float("nan"), float("inf")])
def test_nan_is_named(hole):
    x = series()
    x[1, 4, 2] = hole
    with pytest.raises(ValueError, match=rf"past_values holds {hole}, first in window 1, row 4, channel 2; fill gaps"):
        build()(x)


def test_other_sizes_are_named():
    for x in (series(rows=29), series(channels=2), series()[0]):
        with pytest.raises(ValueError, match=r"shape .*\[batch, 30, 3\]"):
            build()(x)


def test_bad_configurations_name_the_mend():
    for changes, message in (
        ({"prediction_length": 0}, "prediction_length must be a positive integer, got 0"),
        ({"patch_length": 97}, "patch_length=97 is longer than context_length=96; shorten it"),
        ({"memory_gate": "write", "memory_write_price": 0.1}, r"memory_write_price=0\.1 is for language models"),
        ({"quantiles": [0.1, 0.9]}, r"quantiles=\[0\.1, 0\.9\] is not valid; use .* 0\.5 among them"),
        ({"quantiles": [0.5, 0.1]}, "ascending order"),
        ({"quantiles": [0.5, 0.5]}, "ascending order"),
        ({"quantiles": [0.5, 1.0]}, "between 0 and 1"),
        ({"quantiles": ["0.1", 0.5]}, "between 0 and 1"),
        ({"dropout": 1.0}, r"dropout=1\.0 is not valid; use a number from 0 to below 1"),
        ({"quantiles": []}, r"quantiles=\[\] is not valid"),
        ({"patch_lenght": 4}, "unknown key 'patch_lenght'.*did you mean 'patch_length'"),
        ({"hiden_size": 4}, "unknown key 'hiden_size'.*did you mean 'hidden_size'"),
        ({"variant": "mad"}, "variant must be one of"),
    ):
        with pytest.raises(ValueError, match=message):
            TitansPredictionConfig(**changes)
