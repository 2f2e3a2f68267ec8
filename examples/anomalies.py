"""Surprise along a series as an anomaly score, beside the error of a trained forecaster. Cells, as of a notebook.

    python examples/anomalies.py --picture anomalies.png
    python examples/anomalies.py ETTh1.csv.gz --column OT --picture ett.png

Without a file, on a series of its own: hourly, with a day and a week in it, drifting, with anomalies of six kinds in
its second half. Patches of eight rows are ranked by what is known once they have been read.
"""

# %%
import argparse
import sys

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

from titans import MemoryMLP, TitansForPrediction, TitansPredictionConfig, neural_memory
from titans.training.series import read_cells, read_series

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("csv", nargs="?", help="CSV file (also .gz, .xz): a column 'date', then columns of numbers")
parser.add_argument("--column", help="of the file; by default its last")
parser.add_argument("--picture", help="file for a picture: .png, .pdf or .svg")
options = parser.parse_args([] if "ipykernel" in sys.modules else None)

PATCH, LOOK_BACK = 8, 96  # rows


# %% The series: the first half is learned from, and has no anomalies
def made_series(rows: int = 9600) -> tuple[np.ndarray, list[tuple[str, int, int]]]:
    """Values [rows], and the kind, first row and number of rows of each anomaly."""
    rng, t = np.random.default_rng(0), np.arange(rows)
    day = np.sin(2 * np.pi * t / 24) + 0.4 * np.sin(4 * np.pi * t / 24 + 1)
    x = (1 + t / rows) * (1 + 0.3 * np.sin(2 * np.pi * t / 168)) * day
    x += 3 * t / rows + np.cumsum(rng.normal(0, 0.01, rows)) + rng.normal(0, 0.1, rows)
    anomalies = []
    kinds = [("spike", 1), ("shift", 24), ("stuck", 12), ("backwards", 24), ("noise", 12), ("faint", 24)] * 2
    for place, (kind, length) in enumerate(kinds):
        first = rows // 2 + (2 * place + 1) * rows // 52 + int(rng.integers(48))
        part = x[first : first + length]  # changed in place
        if kind == "spike":
            part += 2.5 * rng.choice([-1, 1])
        elif kind == "shift":
            part += 1.2
        elif kind == "stuck":
            part[:] = part[0]
        elif kind == "backwards":
            part[:] = part[::-1].copy()
        elif kind == "noise":
            part += rng.normal(0, 0.6, length)
        else:
            part[:] = part.mean() + 0.4 * (part - part.mean())
        anomalies.append((kind, first, length))
    return x, anomalies


if options.csv:
    names, cells, _ = read_cells(options.csv)
    column = options.column or names[-1]
    if column not in names[1:]:
        parser.error(f"--column {column!r} is none of {', '.join(names[1:])}")
    series, anomalies = read_series(options.csv)[:, names.index(column) - 1], []
    rows = [row[0] for row in cells]  # their dates
else:
    series, anomalies = made_series()
    rows = [f"row {row}" for row in range(len(series))]
half = len(series) // 2
if half < 2 * (LOOK_BACK + PATCH):
    parser.error(f"{options.csv} has {len(series)} rows; give at least {4 * (LOOK_BACK + PATCH)}")
series = (series - series[:half].mean()) / series[:half].std()
# window i: the look-back of a patch, then the patch; one after the other, and each scaled as its look-back is
windows = torch.from_numpy(series).float().unfold(0, LOOK_BACK + PATCH, 1)
patches = windows[half % PATCH :: PATCH]
begins = np.arange(len(patches)) * PATCH + half % PATCH + LOOK_BACK  # the first row of each patch
mean, scale = patches[:, :LOOK_BACK].mean(1, keepdim=True), patches[:, :LOOK_BACK].std(1, keepdim=True).clamp_min(1e-3)
scores = {}

# %% A forecaster of the next patch, trained on the first half: its error, and the surprise of the memory inside
torch.manual_seed(0)
config = TitansPredictionConfig(
    variant="lmm", hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_memory_heads=2, memory_expansion=1,
    chunk_size=4, context_length=LOOK_BACK, prediction_length=PATCH, patch_length=PATCH, patch_stride=PATCH,
)  # fmt: skip
model = TitansForPrediction(config)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=300)
for _ in range(300):
    batch = windows[torch.randint(half - LOOK_BACK - PATCH, (32,))].unsqueeze(-1)
    model(batch[:, :LOOK_BACK], batch[:, LOOK_BACK:]).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    schedule.step()

with torch.no_grad():
    forecast = model(patches[:, :LOOK_BACK, None]).prediction_outputs[..., 0]
    scores["forecaster's error"] = (forecast - patches[:, LOOK_BACK:]).abs().mean(1)
    read, layer = patches[:, PATCH:], model.model.layers[0]  # the newest patch is the last token
    tokens = (read - read.mean(1, keepdim=True)) / read.std(1, keepdim=True).clamp_min(1e-3)
    x = layer.mix_norm(model.in_proj(tokens.unfold(1, PATCH, PATCH)))
    scores["surprise inside it"] = layer.memory(x, return_info=True)[2]["surprise"][:, -1].mean(-1)

# %% A memory that nobody trained: its keys are the look-backs, its values the patches that followed
# One pass over the series, in order: its surprise is what it did not foresee, and it learns as it goes on.
keys = F.normalize((patches[:, :LOOK_BACK] - mean) / scale, dim=1)[None, :, None]  # [1, patches, 1 head, LOOK_BACK]
values = F.pad((patches[:, LOOK_BACK:] - mean) / scale, (0, LOOK_BACK - PATCH))[None, :, None]
linear, nothing = MemoryMLP(depth=1, residual=False, norm=False), [torch.zeros(1, LOOK_BACK, LOOK_BACK)]
each = torch.ones(keys.shape[:3])
gates = 0.1 * each, -1e3 * each, 0 * each  # theta; log eta, no momentum; log(1 - alpha), nothing is forgotten
_, _, info = neural_memory(keys, keys, values, *gates, nothing, network=linear, chunk_size=1, return_info=True)
scores["memory's surprise"] = info.surprise[0, :, 0]

# %% What they find in the second half
later = begins >= half
begins, scores = begins[later], {name: score.numpy()[later] for name, score in scores.items()}
ranks = {name: 1 + np.argsort(np.argsort(-score)) for name, score in scores.items()}


def touching(first: int, length: int) -> np.ndarray:
    """Which patches hold some of these rows."""
    return (begins + PATCH > first) & (begins < first + length)


def average_precision(score: np.ndarray, labels: np.ndarray) -> float:
    found = labels[np.argsort(-score)]
    return float((np.cumsum(found) / np.arange(1, len(found) + 1))[found].mean())


if anomalies:
    print(f"best rank of each anomaly's patches among {len(begins)} patches")
    print(f"{'':12}", *(f"{name:>20}" for name in scores))
    for kind, first, length in anomalies:
        print(f"{kind:12}", *(f"{rank[touching(first, length)].min():20}" for rank in ranks.values()))
    labels = np.any([touching(first, length) for _, first, length in anomalies], axis=0)
    print(f"{'all of them':12}", *(f"{average_precision(score, labels):20.3f}" for score in scores.values()))
    print(f"all of them: average precision over their patches; a guess has {labels.mean():.3f}")
else:
    for name in ("forecaster's error", "memory's surprise"):
        top = np.argsort(ranks[name])[:10]
        print(f"{name}, the ten highest from:", *(f"  {rows[begins[patch]]}" for patch in top), sep="\n")

# %% The picture
figure = Figure(figsize=(12, 8), layout="constrained")
upper, *lower = figure.subplots(1 + len(scores), sharex=True)
upper.plot(np.arange(half, len(series)), series[half:], linewidth=0.5)
upper.set_ylabel("series")
for axes, (name, score) in zip(lower, scores.items(), strict=True):
    axes.plot(begins, score, linewidth=0.7)
    axes.set_ylabel(name)
for kind, first, length in anomalies:
    for axes in (upper, *lower):
        axes.axvspan(first, first + length, color="tab:red", alpha=0.4)
    upper.annotate(kind, (first, series[half:].max()), fontsize=7)
lower[-1].set_xlabel("row")
if options.picture:
    figure.savefig(options.picture, dpi=100)
