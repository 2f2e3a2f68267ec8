"""Titans as a model of neuralforecast: fit, predict, cross-validate, save and load; the same core as ours."""

import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch

pytest.importorskip("neuralforecast")
from neuralforecast import NeuralForecast
from neuralforecast.losses.pytorch import MAE, DistributionLoss, MQLoss, QuantileLoss

from titans.forecasting import Titans
from titans.models import TitansForPrediction, TitansPredictionConfig
from titans.tasks.forecasting import small_model

QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
TINY = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_memory_heads": 1}
pytestmark = pytest.mark.filterwarnings("ignore")


def series(rows=120):
    time = np.arange(rows)
    noise = np.random.default_rng(0).standard_normal((2, rows))
    stamps = pd.date_range("2024-01-01", periods=rows, freq="h")
    waves = (np.sin(time * np.pi / 6) + 0.1 * noise[0], 100 + 50 * np.cos(time * np.pi / 6) + 5 * noise[1])
    return pd.concat([pd.DataFrame({"unique_id": i, "ds": stamps, "y": y}) for i, y in zip("ab", waves, strict=True)])


def titans(**choices):
    return Titans(**{"h": 6, "input_size": 24, "max_steps": 5, "model": TINY, **QUIET, **choices})


def test_fit_predict_cross_validate_save_and_load(tmp_path):
    models = [titans(), titans(loss=MQLoss(level=[80]), alias="Band"), titans(loss=QuantileLoss(0.9), alias="High")]
    forecaster = NeuralForecast(models=models, freq="h")
    forecaster.fit(series())
    made = forecaster.predict()
    assert {"Titans", "Band-median", "Band-lo-80", "Band-hi-80", "High_ql0.9"} <= set(made)
    assert list(made["unique_id"]) == ["a"] * 6 + ["b"] * 6
    assert made["ds"].iloc[0] == pd.Timestamp("2024-01-06 00:00")
    numbers = made.drop(columns=["unique_id", "ds"])
    assert np.isfinite(numbers).all(axis=None)
    forecaster.save(str(tmp_path), save_dataset=True)
    loaded = NeuralForecast.load(str(tmp_path))
    pd.testing.assert_frame_equal(loaded.predict()[made.columns], made)
    assert len(forecaster.cross_validation(series(), n_windows=2)) == 2 * 2 * 6


def test_it_learns_a_wave():
    """Less than half the error of the naive forecast that repeats the last value."""
    model = titans(max_steps=60, learning_rate=1e-2, windows_batch_size=64, random_seed=3)
    forecaster = NeuralForecast(models=[model], freq="h")
    made = forecaster.cross_validation(series(), n_windows=1)
    error = (made["Titans"] - made["y"]).abs().groupby(made["unique_id"]).mean()
    last = series().groupby("unique_id")["y"].nth(-7).to_numpy()
    naive = (made["y"] - np.repeat(last, 6)).abs().groupby(made["unique_id"]).mean()
    assert (error < 0.5 * naive).all()


def test_the_core_is_ours():
    """A window's forecast is that of ``TitansForPrediction`` with the same weights."""
    model = titans(h=5, input_size=20, loss=MAE()).eval()
    sizes = {"context_length": 20, "prediction_length": 5, "num_input_channels": 1}
    ours = TitansForPrediction(TitansPredictionConfig(**{**small_model(20), **TINY, **sizes})).eval()
    ours.load_state_dict(model.core.state_dict())
    x = torch.randn(3, 20, 1)
    with torch.no_grad():
        torch.testing.assert_close(model({"insample_y": x}), ours(x).prediction_outputs)
        assert titans(h=5, input_size=20, loss=MQLoss(level=[80, 90]))({"insample_y": x}).shape == (3, 5, 5)


def test_what_it_cannot_do_is_named():
    with pytest.raises(ValueError, match="loss=DistributionLoss wants a distribution; use a point or quantile loss"):
        titans(loss=DistributionLoss("Normal"))
    with pytest.raises(ValueError, match=r"unknown key 'hiden_size'.*did you mean 'hidden_size'"):
        titans(model={"hiden_size": 8})
    with pytest.raises(Exception, match="does not support future exogenous"):
        titans(futr_exog_list=["price"])


def test_it_is_imported_when_asked_for():
    code = (
        "import sys, titans.forecasting as f\n"
        "print('neuralforecast' in sys.modules)\n"
        "sys.modules['neuralforecast'] = None\n"
        "try: f.Titans\n"
        "except ImportError as error: print(error)\n"
        "try: f.Titan\n"
        "except AttributeError as error: print(error)\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    assert out[0] == "False"
    assert "pip install 'titans[forecast]'" in out[1]
    assert "no attribute 'Titan'" in out[2]
