"""What tests of whole runs share: a text to train on, and what a run logged."""

import json
from pathlib import Path


def write_text(path: Path, rows: int) -> Path:
    """JSON lines of different lengths."""
    texts = (f"{i} and {i * i}, " * (5 + i % 40) for i in range(rows))
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def losses(folder) -> list[tuple[tuple[str, int], float]]:
    """All losses of a run in order, each with its kind and step."""
    entries = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").open()]
    return [((key, e["step"]), e[key]) for e in entries for key in ("loss", "eval_loss") if key in e]
