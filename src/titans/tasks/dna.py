"""DNA: classes of nucleotide sequences, from a folder of CSV files, as in GUE (Zhou et al., arXiv 2306.15006)."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from titans.training.config import TrainConfig, option, require
from titans.training.sequences import FILES, LabelledSequences, Record, classes_of, read_split
from titans.training.task import TaskData, small_lmm

if TYPE_CHECKING:
    from transformers import PreTrainedModel

GUE = {  # tasks of two classes, and the bases of their sequences
    "prom_300_tata": 300, "prom_core_all": 70, "prom_core_notata": 70, "prom_core_tata": 70,
    "tf_0": 101, "tf_1": 101, "tf_2": 101,
}  # fmt: skip


@dataclass
class DnaData:
    """Where the sequences come from."""

    path: str | None = option(
        None, "folder with the files train, dev and test (.csv, also .gz, .xz) of columns 'sequence' and 'label', as "
        f"those of GUE; its tasks, with their training.length: {', '.join(f'{k} ({n})' for k, n in GUE.items())}"
    )  # fmt: skip
    reverse_complement: bool = option(
        False, "train on the reverse complements, too; test and `titans classify` then take the mean over both strands"
    )


@dataclass
class DnaEvaluation:
    """How the test sequences are read; all of them are."""

    batch_tokens: int = option(32_768, "bases read at once, padding included; the numbers do not depend on it")

    def __post_init__(self):
        require(self.batch_tokens > 0, "evaluation.batch_tokens", self.batch_tokens, "a number above 0")


class Dna:
    """Classes of DNA; see `titans.training.task.Task` for the methods."""

    name = "dna"
    data_class = DnaData
    evaluation_class = DnaEvaluation
    picture = "confusion.png"
    higher_is_better = True
    bimodal = False

    def preset(self) -> dict[str, Any]:
        """A small LMM; about ten passes over the training sequences of GUE's prom_core_tata."""
        return {
            "model": small_lmm(),
            "training": {"length": 70, "batch_size": 32, "tokens": 3.4e6, "learning_rate": 2e-3},
        }

    def load(self, config: TrainConfig) -> TaskData:
        from transformers import DataCollatorWithPadding

        from titans.training.tokens import nucleotide_tokenizer

        splits = {split: read_split(config.data.path, split) for split in FILES}
        for split in ("train", "dev"):
            _check_lengths(splits[split], config.training.length, split)
        classes, tokenizer = classes_of(splits), nucleotide_tokenizer()
        return TaskData(
            train=LabelledSequences(splits["train"], classes, tokenizer, config.data.reverse_complement),
            validation=LabelledSequences(splits["dev"], classes, tokenizer, both_strands=False),
            tokenizer=tokenizer,
            collate=DataCollatorWithPadding(tokenizer),
        )

    def build_model(self, config: TrainConfig, data: TaskData) -> "PreTrainedModel":
        from titans.training.classifiers import build_classifier
        from titans.training.tokens import special_ids

        ids = special_ids(data.tokenizer)
        return build_classifier(config.model, classes=data.train.classes, **ids, seed=config.training.seed)

    def evaluate(
        self, model: "PreTrainedModel", tokenizer: Any, data: DnaData, evaluation: DnaEvaluation
    ) -> dict[str, Any]:
        from titans.training.classify import batches, probabilities
        from titans.training.models import is_classifier

        kind = type(model).__name__
        require(is_classifier(kind), "model", kind, "a model trained on this task")
        known: Any = model.config
        records, number = read_split(data.path, "test"), known.label2id
        unknown = sorted({record.label for record in records} - set(number))
        require(not unknown, "labels of test", unknown, f"the model's: {', '.join(number)}")
        confusion = np.zeros((len(number), len(number)), dtype=int)
        for batch in batches(records, evaluation.batch_tokens):
            sequences = [record.sequence for record in batch]
            found = probabilities(model, tokenizer, sequences, data.reverse_complement).argmax(1)
            np.add.at(confusion, ([number[record.label] for record in batch], found), 1)
        return {
            "sequences": len(records),
            "classes": list(number),
            **scores(confusion),
            "confusion": confusion.tolist(),  # [class, predicted class]
        }

    def summary(self, metrics: dict[str, Any]) -> dict[str, float]:
        return {"MCC": metrics["mcc"], "accuracy": metrics["accuracy"], "macro F1": metrics["macro_f1"]}

    def report(self, metrics: dict[str, Any]) -> str:
        m = metrics
        lines = [
            f"{m['sequences']:,} test sequences of {len(m['classes'])} classes",
            "",
            f"MCC {m['mcc']:.3f}, accuracy {m['accuracy']:.3f}, macro F1 {m['macro_f1']:.3f}",
            "",
            "| class | " + " | ".join(f"taken for {name}" for name in m["classes"]) + " |",
            "|---|" + "---:|" * len(m["classes"]),
        ]
        for name, row in zip(m["classes"], m["confusion"], strict=True):
            lines.append(f"| {name} | " + " | ".join(f"{count:,}" for count in row) + " |")
        return "\n".join(lines)

    def plot(self, metrics: dict[str, dict[str, Any]], path: Path) -> None:
        """What each class is taken for, a panel for every run."""
        from matplotlib.figure import Figure

        if not metrics:
            return
        figure = Figure(figsize=(3.2 * len(metrics) + 0.6, 3.2), layout="constrained")
        panels = figure.subplots(1, len(metrics), squeeze=False)[0]
        for axes, (name, m) in zip(panels, metrics.items(), strict=True):
            confusion = np.array(m["confusion"])
            share = confusion / np.maximum(1, confusion.sum(1, keepdims=True))
            axes.imshow(share, vmin=0, vmax=1, cmap="Blues")
            for (row, column), value in np.ndenumerate(share):
                axes.text(column, row, f"{value:.2f}", ha="center", va="center", color="k" if value < 0.6 else "w")
            axes.set_xticks(range(len(share)), m["classes"])
            axes.set_yticks(range(len(share)), m["classes"])
            axes.set(title=f"{name}, MCC {m['mcc']:.3f}", xlabel="taken for", ylabel="class")
        figure.savefig(path, dpi=120)


task = Dna()


def scores(confusion: np.ndarray) -> dict[str, float]:
    """Accuracy, Matthews correlation and macro F1 of counts [class, taken for].

    The correlation is that of any number of classes (Gorodkin 2004); 0 where all sequences are, or are taken for, one.
    """
    total, right = confusion.sum(), np.trace(confusion)
    true, taken = confusion.sum(1), confusion.sum(0)
    spread = np.sqrt(float(total**2 - taken @ taken)) * np.sqrt(float(total**2 - true @ true))
    f1 = 2 * np.diag(confusion) / np.maximum(1, true + taken)
    return {
        "accuracy": float(right / total),
        "mcc": float(total * right - taken @ true) / spread if spread else 0.0,
        "macro_f1": float(f1.mean()),
    }


def _check_lengths(records: list[Record], length: int, split: str) -> None:
    """Raises ValueError for a sequence that is longer than a window."""
    longest = max(records, key=lambda record: len(record.sequence))
    require(
        len(longest.sequence) <= length,
        "training.length",
        length,
        f"at least {len(longest.sequence)}, the bases of {split} record {longest.id!r}",
    )
