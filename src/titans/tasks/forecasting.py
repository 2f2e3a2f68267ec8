"""Forecasting: time series from a CSV file, by the protocol of the literature (Informer, Autoformer, PatchTST).

The model reads `training.length` rows, the look-back, and forecasts the next `data.horizon` rows of all channels.
Splits, scaling and windows: `titans.training.series`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from titans.training.config import TrainConfig, option, require
from titans.training.series import SeriesWindows, load_windows
from titans.training.task import TaskData

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class ForecastingData:
    """What is forecast, and how far."""

    path: str | None = option(
        None, "CSV file (also .gz, .xz): a column 'date', then columns of numbers. Files named ETTh* and ETTm* are "
        "split into 12, 4 and 4 months for training, validation and test, others into 70, 10 and 20 %"
    )  # fmt: skip
    horizon: int = option(96, "rows to forecast; the look-back is training.length, and training.tokens counts its rows")

    def __post_init__(self):
        require(self.horizon > 0, "data.horizon", self.horizon, "a number above 0")


@dataclass
class ForecastingEvaluation:
    """How the test windows are read; all of them are."""

    batch_size: int = option(256, "test windows read at once; the numbers do not depend on it")

    def __post_init__(self):
        require(self.batch_size > 0, "evaluation.batch_size", self.batch_size, "a number above 0")


class Forecasting:
    """Forecasting; see `titans.training.task.Task` for the methods."""

    name = "forecasting"
    data_class = ForecastingData
    evaluation_class = ForecastingEvaluation
    picture = "horizon.png"
    higher_is_better = False

    def preset(self) -> dict[str, Any]:
        """A small LMM, every channel by itself; about ten passes over ETTh1."""
        return {
            "model": {
                "type": "titans",
                "variant": "lmm",
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_memory_heads": 2,
                "memory_expansion": 1,
                "chunk_size": 4,
            },
            "training": {"length": 96, "batch_size": 32, "tokens": 8e6, "learning_rate": 1e-3, "weight_decay": 0.0},
        }

    def load(self, config: TrainConfig) -> TaskData:
        windows = load_windows(config.data.path, config.training.length, config.data.horizon)
        return TaskData(windows["train"], windows["validation"], tokenizer=None, labels="future_values")

    def build_model(self, config: TrainConfig, data: TaskData) -> "PreTrainedModel":
        from titans.training.forecasters import build_forecaster

        return build_forecaster(
            config.model,
            context_length=config.training.length,
            prediction_length=config.data.horizon,
            num_input_channels=data.train.channels,
            seed=config.training.seed,
        )

    def evaluate(
        self, model: "PreTrainedModel", tokenizer: None, data: ForecastingData, evaluation: ForecastingEvaluation
    ) -> dict[str, Any]:
        known: Any = model.config
        require(hasattr(known, "prediction_length"), "model", type(model).__name__, "a model trained on this task")
        horizon, channels = known.prediction_length, known.num_input_channels
        require(data.horizon == horizon, "data.horizon", data.horizon, f"{horizon}, what the model was trained for")
        test = load_windows(data.path, known.context_length, horizon)["test"]
        same = test.channels == channels
        require(same, f"channels of {data.path}", test.channels, f"a file with the model's {channels}")
        squared, absolute = _errors(model, test, evaluation.batch_size)
        return {
            "look_back": known.context_length,
            "horizon": horizon,
            "channels": channels,
            "windows": len(test),
            "mse": float(squared.mean()),
            "mae": float(absolute.mean()),
            "mse_by_step": squared.mean(1).tolist(),
            "mae_by_step": absolute.mean(1).tolist(),
            "mse_by_channel": squared.mean(0).tolist(),
            "mae_by_channel": absolute.mean(0).tolist(),
        }

    def summary(self, metrics: dict[str, Any]) -> dict[str, float]:
        return {"MSE": metrics["mse"], "MAE": metrics["mae"]}

    def report(self, metrics: dict[str, Any]) -> str:
        m, last = metrics, metrics["horizon"]
        lines = [
            f"{m['windows']:,} test windows, look-back {m['look_back']}, horizon {last}, {m['channels']} channels",
            "",
            "| | MSE | MAE |",
            "|---|---:|---:|",
            f"| whole horizon | {m['mse']:.4f} | {m['mae']:.4f} |",
        ]
        for step in sorted({1, max(1, last // 4), max(1, last // 2), last}):
            lines.append(f"| step {step} | {m['mse_by_step'][step - 1]:.4f} | {m['mae_by_step'][step - 1]:.4f} |")
        return "\n".join(lines)

    def plot(self, metrics: dict[str, dict[str, Any]], path: Path) -> None:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.add_subplot(xlabel="rows ahead", ylabel="MSE of scaled values")
        for name, m in metrics.items():
            axes.plot(range(1, m["horizon"] + 1), m["mse_by_step"], label=f"{name}, {m['mse']:.3f}")
        axes.legend(fontsize="small")
        axes.grid(alpha=0.3)
        figure.savefig(path, dpi=120)


task = Forecasting()


def _errors(model: "PreTrainedModel", windows: SeriesWindows, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Squared and absolute errors, mean over all windows, float64 [horizon, channels] each."""
    import torch

    squared = absolute = np.zeros(1)
    for begin in range(0, len(windows), batch_size):
        batch = [windows[index] for index in range(begin, min(begin + batch_size, len(windows)))]
        past, truth = (np.stack([window[name] for window in batch]) for name in ("past_values", "future_values"))
        with torch.inference_mode():
            forecast = model(past_values=torch.from_numpy(past).to(model.device)).prediction_outputs.cpu().numpy()
        error = forecast.astype(np.float64) - truth
        squared, absolute = squared + (error**2).sum(0), absolute + np.abs(error).sum(0)
    return squared / len(windows), absolute / len(windows)
