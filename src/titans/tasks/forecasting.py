"""Forecasting: time series from a CSV file, by the protocol of the literature (Informer, Autoformer, PatchTST).

The model reads `training.length` rows, the look-back, and forecasts the next `data.horizon` rows of all channels.
Splits, scaling and windows: `titans.training.series`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from titans.training.config import TrainConfig, option, require
from titans.training.series import SeriesWindows, load_windows
from titans.training.task import TaskData

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


def small_model(look_back: int = 96) -> dict[str, Any]:
    """A small LMM, every channel by itself: fields of `TitansPredictionConfig`, with patches that fit the look-back."""
    patch = min(16, max(1, look_back // 2))
    return {
        "variant": "lmm",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_memory_heads": 2,
        "memory_expansion": 1,
        "chunk_size": 16,
        "memory_max_lr": 0.1,
        "dropout": 0.2,
        "patch_length": patch,
        "patch_stride": max(1, patch // 2),
    }


@dataclass
class ForecastingData:
    """What is forecast, and how far."""

    path: str | None = option(
        None, "CSV file (also .gz, .xz): a column 'date', then columns of numbers. Files named ETTh* and ETTm* are "
        "split into 12, 4 and 4 months for training, validation and test, others into 70, 10 and 20 %"
    )  # fmt: skip
    horizon: int = option(96, "rows to forecast; the look-back is training.length, and training.tokens counts its rows")
    carry: bool = option(
        False, "read windows in their order, a look-back apart, the memory carried from one to the next, in training "
        "(gradients stop at a window's start), validation and test (Titans only)"
    )  # fmt: skip

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
    bimodal = False

    def preset(self) -> dict[str, Any]:
        """About ten passes over ETTh1."""
        return {
            "model": {"type": "titans", **small_model()},
            "training": {"length": 96, "batch_size": 32, "tokens": 8e6, "learning_rate": 1e-3, "weight_decay": 0.0},
        }

    def load(self, config: TrainConfig) -> TaskData:
        windows = load_windows(config.data.path, config.training.length, config.data.horizon)
        train, validation = windows["train"], windows["validation"]
        if config.data.carry:
            train, validation = _in_order(train, validation, config)
        return TaskData(train, validation, tokenizer=None, ordered=config.data.carry, labels="future_values")

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
        mend = f"false: a {type(model).__name__} has no memory to carry"
        require(not data.carry or hasattr(model, "update"), "data.carry", True, mend)
        means = _means(model, test, evaluation.batch_size, data.carry)
        squared, absolute = means["squared"], means["absolute"]
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
            **(_of_quantiles(known.quantiles, means) if "pinball" in means else {}),
        }

    def summary(self, metrics: dict[str, Any]) -> dict[str, float]:
        columns = {"MSE": metrics["mse"], "MAE": metrics["mae"]}
        if "pinball" in metrics:
            columns |= {"pinball loss": metrics["pinball"], _interval(metrics): metrics["interval_coverage"]}
        return columns

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
        if "pinball" in m:
            lines += [
                "",
                f"Quantiles: mean pinball loss {m['pinball']:.4f}; {_interval(m)}: {m['interval_coverage']:.3f} of the "
                "values; at or below",
                *(f"- {q:g}: {share:.3f}" for q, share in zip(m["quantiles"], m["coverage"], strict=True)),
            ]
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


def _in_order(train: SeriesWindows, validation: SeriesWindows, config: TrainConfig) -> "tuple[Any, Any]":
    from titans.training.carried import SeriesStreams

    kind, training = config.model.get("type", "titans"), config.training
    require(kind == "titans", "data.carry", True, f"false: a {kind!r} has no memory to carry")
    return (
        SeriesStreams.to_train(train, training.batch_size, training.windows, training.seed),
        SeriesStreams.to_validate(validation, training.batch_size),
    )


def _means(model: "PreTrainedModel", windows: SeriesWindows, batch_size: int, carry: bool) -> "dict[str, Tensor]":
    """Means over all windows, float64: `squared` and `absolute` errors [horizon, channels].

    Of a model that forecasts quantiles also [horizon, channels, Q]: `below`, the share of truths at or below each, and
    `pinball`, their loss.
    """
    from titans.models.prediction import pinball

    totals: dict[str, Tensor] = {}
    for forecast, quantiles, truth in _forecasts(model, windows, batch_size, carry):
        error = forecast - truth
        measured = {"squared": error**2, "absolute": error.abs()}
        if quantiles is not None:
            measured["below"] = (truth.unsqueeze(-1) <= quantiles).double()
            measured["pinball"] = pinball(quantiles, truth, model.config.quantiles)
        for name, values in measured.items():
            totals[name] = totals.get(name, 0) + values.sum(0)
    return {name: total / len(windows) for name, total in totals.items()}


def _forecasts(
    model: "PreTrainedModel", windows: SeriesWindows, batch_size: int, carry: bool
) -> "Iterator[tuple[Tensor, Tensor | None, Tensor]]":
    """Batches of forecasts, of quantiles where the model has them, and of the truth; float64, on the CPU."""
    import torch

    for indices, memory in _batches(model, windows, batch_size, carry):
        batch = [windows[index] for index in indices]
        past, truth = (
            torch.from_numpy(np.stack([window[name] for window in batch])) for name in ("past_values", "future_values")
        )
        with torch.inference_mode():
            output = model(past_values=past.to(model.device), **memory)
        quantiles = getattr(output, "quantile_outputs", None)
        yield output.prediction_outputs.cpu().double(), None if quantiles is None else quantiles.cpu().double(), truth


def _batches(model: Any, windows: SeriesWindows, batch_size: int, carry: bool) -> Iterator[tuple[range, dict]]:
    """Windows, and the memory they are read with: with `carry`, of a stream that begins with the first window."""
    import torch

    stream, step = None, windows.look_back if carry else len(windows)
    for first in range(0, len(windows), step):
        if carry:  # after these rows it is the memory of the next `look_back` windows
            rows = torch.from_numpy(windows.values[first : first + step])
            stream = model.update(rows.unsqueeze(0), stream)
        end = min(first + step, len(windows))
        for begin in range(first, end, batch_size):
            batch = range(begin, min(begin + batch_size, end))
            yield batch, {} if stream is None else {"cache": stream.memory(len(batch))}


def _of_quantiles(quantiles: list[float], means: "dict[str, Tensor]") -> dict[str, Any]:
    coverage = means["below"].mean((0, 1)).tolist()
    return {
        "quantiles": quantiles,
        "coverage": coverage,
        "interval_coverage": coverage[-1] - coverage[0],
        "pinball": float(means["pinball"].mean()),
    }


def _interval(metrics: dict[str, Any]) -> str:
    return f"between {metrics['quantiles'][0]:g} and {metrics['quantiles'][-1]:g}"
