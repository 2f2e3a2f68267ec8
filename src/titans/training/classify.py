"""Sequences in, probabilities of classes out: batch by batch, from a file of any size at constant memory."""

import csv
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from titans.training.config import load_yaml, require
from titans.training.files import replace_durably
from titans.training.models import load_run
from titans.training.nucleotides import reverse_complement
from titans.training.sequences import Record, read_records
from titans.training.tokens import Tokenizer, encode

BATCH_TOKENS = 32_768  # read at once, padding included


def classify_run(run: str, path: str, output: str) -> int:
    """`classify` by the model of a run's folder, as it was trained: on one strand or on both.

    Raises:
        ValueError: also where the run is of another task.
    """
    model, tokenizer = load_run(run)
    config = load_yaml(Path(run) / "config.yaml")
    require(config["task"] == "dna", f"task of {run}", config["task"], "a run of the task 'dna'")
    return classify(model, tokenizer, path, output, both_strands=config["data"]["reverse_complement"])


def classify(
    model: PreTrainedModel, tokenizer: Tokenizer, path: str, output: str, *, both_strands: bool = False
) -> int:
    """Writes a CSV file with a line for every record of a FASTA or CSV file; returns how many.

    Its columns: id, the likeliest label, and for every class the probability `p_LABEL`. The file may be of any size;
    each record is read whole.

    Args:
        both_strands: as in `probabilities`.

    Raises:
        FileNotFoundError, ValueError: as `read_records`; also where `output` exists. Nothing is written then.
    """
    target = Path(output)
    if target.exists():
        raise ValueError(f"output={output!r} exists already; delete it or use another name")
    known: Any = model.config
    labels = [known.id2label[i] for i in range(known.num_labels)]
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary, count = target.with_name(f".{target.name}.part"), 0
    try:
        with temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["id", "label", *(f"p_{label}" for label in labels)])
            for batch in batches(read_records(path), BATCH_TOKENS):
                rows = probabilities(model, tokenizer, [record.sequence for record in batch], both_strands)
                for record, row in zip(batch, rows, strict=True):
                    writer.writerow([record.id, labels[row.argmax()], *(f"{p:.6f}" for p in row)])
                count += len(batch)
        replace_durably(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    return count


def batches(records: Iterable[Record], tokens: int) -> Iterator[list[Record]]:
    """Records in their order, as many at once as make up `tokens` when padded, at least one."""
    batch, longest = [], 0
    for record in records:
        longest = max(longest, len(record.sequence))
        if batch and longest * (len(batch) + 1) > tokens:
            yield batch
            batch, longest = [], len(record.sequence)
        batch.append(record)
    if batch:
        yield batch


def probabilities(
    model: PreTrainedModel, tokenizer: Tokenizer, sequences: list[str], both_strands: bool = False
) -> np.ndarray:
    """The probability of every class, float64 [sequences, classes], all sequences read at once.

    Args:
        both_strands: the mean over each sequence and its reverse complement.
    """
    ids = [row.tolist() for row in encode(tokenizer, sequences)]
    inputs = tokenizer.pad({"input_ids": ids}, return_tensors="pt").to(model.device)
    with torch.inference_mode():
        found = model(**inputs).logits.double().softmax(-1).cpu().numpy()
    if both_strands:
        other = probabilities(model, tokenizer, list(map(reverse_complement, sequences)))
        found = (found + other) / 2
    return found
