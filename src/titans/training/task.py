"""What a task is to training and comparing: a file in `titans.tasks` with an object of this shape."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from titans.training.config import TrainConfig

SPLITS = {"train": 0, "validation": 1, "test": 2}  # keeps the random numbers of the splits apart


@dataclass(frozen=True)
class TaskData:
    """What training needs.

    Attributes:
        train, validation: torch Datasets with a length; items are dicts of tensors that the model's forward takes.
        tokenizer: saved beside the model; None where a task has none.
        ordered: train on the items of `train` in their order, as they were made for it; otherwise they are shuffled.
        labels: the entry of an item that the model's loss is about.
        collate: makes a batch of items that are not of one size.
    """

    train: Any
    validation: Any
    tokenizer: Any
    ordered: bool = False
    labels: str = "labels"
    collate: Callable[[list[Any]], Any] | None = None


class Task(Protocol):
    """One task: its data, its metric, its presets. Importing it must not import torch.

    Attributes:
        name: as in `titans train --task NAME`.
        data_class: dataclass of the options under `data`; every field made by `option`.
        evaluation_class: the same for `evaluation`.
        picture: file name of its picture in a run's folder.
        higher_is_better: of the headline of `summary`.
        bimodal: whether a seed mostly finds all or nothing: tables then give median and best of the seeds.
    """

    name: str
    data_class: type
    evaluation_class: type
    picture: str
    higher_is_better: bool
    bimodal: bool

    def preset(self) -> dict[str, Any]:
        """The main experiment: nested values that replace the defaults of the options."""
        ...

    def load(self, config: "TrainConfig") -> TaskData:
        """Reads the data."""
        ...

    def build_model(self, config: "TrainConfig", data: TaskData) -> "PreTrainedModel":
        """A freshly initialised model of `config.model`, seeded with `config.training.seed`."""
        ...

    def evaluate(self, model: "PreTrainedModel", tokenizer: Any, data: Any, evaluation: Any) -> dict[str, Any]:
        """All held-out metrics, as values that JSON can hold. `data` and `evaluation` are the two dataclasses."""
        ...

    def summary(self, metrics: dict[str, Any]) -> dict[str, float]:
        """The numbers of a comparison's table, by column; the first one is the headline."""
        ...

    def report(self, metrics: dict[str, Any]) -> str:
        """What a person wants to read after a run, as markdown."""
        ...

    def plot(self, metrics: dict[str, dict[str, Any]], path: Path) -> None:
        """A picture of several runs' metrics, by name."""
        ...


def small_lmm(**changes: Any) -> dict[str, Any]:
    """The model of most presets, minutes on a CPU; ``changes``: settings of its own."""
    return {
        "type": "titans",
        "variant": "lmm",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_memory_heads": 2,
        "memory_expansion": 1,
        "chunk_size": 16,
        **changes,
    }
