"""The literature's forecasting experiments, by the name of the data set."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from titans.tasks.forecasting import task
from titans.training.config import nearest, require

# name -> (look-back, horizons), as in Informer, Autoformer and iTransformer (arXiv 2310.06625)
_USUAL = (96, [96, 192, 336, 720])
DATASETS: dict[str, tuple[int, list[int]]] = {
    **dict.fromkeys(("ETTh1", "ETTh2", "ETTm1", "ETTm2", "Weather", "Exchange", "ECL", "Traffic"), _USUAL),
    "ILI": (36, [24, 36, 48, 60]),
}
# Small ones; the size of a forecaster's map to the horizon is given by the horizon, so their sizes differ.
MODELS: dict[str, dict[str, Any]] = {
    "titans": task.preset()["model"],
    "patchtst": {"type": "patchtst", "d_model": 24, "ffn_dim": 71, "num_hidden_layers": 3, "num_attention_heads": 4},
    "itransformer": {"type": "itransformer"},
    "dlinear": {"type": "dlinear"},
    "nlinear": {"type": "nlinear"},
}
WINDOWS = 24_000  # that a training sees: three passes over ETTh1
RATES = [3e-4, 1e-3, 3e-3, 1e-2]


def dataset_experiment(
    dataset: str,
    path: str,
    output: str,
    *,
    models: Sequence[str] = ("titans",),
    horizons: Sequence[int] | None = None,
    seeds: int = 3,
    windows: float = WINDOWS,
) -> dict[str, Any]:
    """What ``Experiment.from_dict`` takes: each model trained and tested on each horizon, by the protocol.

    One budget for all data sets, horizons and models: as many training windows; four learning rates, each tried with
    all of them; the checkpoint is the best of four validations.

    Args:
        dataset: one of ``DATASETS``; its look-back is used, and its horizons unless others are given.
        path: its CSV file. A file's name says how it is split (`titans.training.series.borders`).
        output: folder of the results.
        models: of ``MODELS``.
        seeds: so many, from 0 on.
        windows: training windows.

    Raises:
        ValueError: an unknown name, a value that is out of range, a file that is split in another way.
    """
    require(dataset in DATASETS, "dataset", dataset, nearest(dataset, DATASETS))
    for name in models:
        require(name in MODELS, "models", name, nearest(name, MODELS))
    require(seeds > 0, "seeds", seeds, "a number above 0")
    require(windows > 0, "windows", windows, "a number above 0")
    look_back, usual = DATASETS[dataset]
    named = re.match(r"ETT[hm]\d", Path(path).name)
    other = named.group() if named else "a data set without 'ETT' at the start of its file's name"
    fits = (named is not None and other == dataset) or (named is None and not dataset.startswith("ETT"))
    require(fits, "data", path, f"a file of {dataset}; by its name this is {other}, and split as such")
    training = {"length": look_back, "batch_size": 32, "weight_decay": 0.0, "eval_every": 0.25}
    return {
        "task": task.name,
        "output": output,
        "models": {name: {"model": MODELS[name]} for name in models},
        "data": {"path": path},
        "training": {**training, "tokens": windows * look_back},
        "seeds": list(range(seeds)),
        "tuning": {"learning_rate": RATES, "tokens": 1},
        "parameter_tolerance": None,
        "vary": {"data.horizon": list(horizons or usual)},
    }
