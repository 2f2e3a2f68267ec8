"""What is timed: a case names a task, a subject and the sizes; a subject is built from it in a process of its own."""

import importlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

# task -> (what it times, subject -> "module:function" that builds it from a case)
TASKS: dict[str, tuple[str, dict[str, str]]] = {
    "op": (
        "the memory's rule alone, [batch, length, heads, head_dim]",
        {name: f"titans.bench.ops:{name}" for name in ("titans", "gated_delta_rule", "sdpa")}
        | {"titans-triton": "titans.bench.ops:titans_triton"},
    ),
    "memory": (
        "one sequence mixer, [batch, length, dim]",
        {
            "titans": "titans.bench.layers:titans",
            "titans-pytorch": "titans.bench.layers:titans_pytorch",
            "sdpa": "titans.bench.layers:sdpa",
            "matmul": "titans.bench.layers:matmul",
        },
    ),
    "train": (
        "a training step of a language model: forward, backward, AdamW",
        dict.fromkeys(("mac", "mag", "mal", "lmm", "llama", "mamba2", "gated_delta_net"), "titans.bench.models:train"),
    ),
    "decode": (
        "tokens written one by one after reading `length` tokens",
        dict.fromkeys(("mac", "mag", "mal", "lmm", "llama", "mamba2"), "titans.bench.models:decode")
        | {"titans-pytorch": "titans.bench.models:decode_titans_pytorch"},
    ),
    "stream": (
        "a long sequence read on after `length` tokens, 65,536 a round",
        dict.fromkeys(("mac", "mag", "mal", "lmm", "mamba2"), "titans.bench.models:stream"),
    ),
}
DTYPES, DEVICES = ("float32", "bfloat16"), ("cpu", "cuda")
PASSES = {
    "op": ("forward", "backward"),
    "memory": ("forward", "backward"),
    "train": ("step",),
    "decode": ("step",),
    "stream": ("step",),
}

DEFAULT_SIZES: dict[str, dict[str, Any]] = {
    "op": {"heads": 4, "head_dim": 64, "depth": 2, "expansion": 4, "chunk_size": 64, "batch": 2},
    "memory": {"dim": 384, "heads": 4, "head_dim": 64, "depth": 2, "expansion": 4, "chunk_size": 64, "batch": 2},
    "train": {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "chunk_size": 64, "reach": 64,
              "batch": 1},
    "decode": {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "chunk_size": 64, "reach": 64,
               "batch": 1},
    "stream": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "chunk_size": 64, "reach": 64,
               "batch": 1},
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One thing to time.

    Attributes:
        task, subject: keys of TASKS; or "train" and the name of an experiment's model.
        measure: one of PASSES; "backward" is forward and backward.
        length: tokens.
        dtype: of the operands: "float32" or "bfloat16" (the memory's state is float32 in both).
        sizes: the task's own, as in DEFAULT_SIZES; of an experiment's model its `model` and the `batch`, and of a
            forecaster the `horizon` and the `channels`.
        revision: commit whose code is timed; None for this one.
    """

    task: str
    subject: str
    measure: str
    length: int
    threads: int = 1
    dtype: str = "float32"
    device: str = "cpu"
    sizes: dict[str, Any] = field(default_factory=dict)
    revision: str | None = None

    @property
    def name(self) -> str:
        return self.subject + (f"@{self.revision}" if self.revision else "")


@dataclass
class Subject:
    """A built case.

    Attributes:
        run: one repetition.
        tokens: read or written by it.
        check: raises AssertionError if what is timed is not right; None where there is nothing of ours to check.
    """

    run: Callable[[], Any]
    tokens: int
    check: Callable[[], None] | None = None


def builder(case: Case) -> Callable[[Case], Subject]:
    """What builds the case; raises ImportError with the mend if a peer is not installed."""
    place = TASKS[case.task][1].get(case.subject, "")
    if "model" in case.sizes:
        place = f"titans.bench.models:{'forecast' if 'horizon' in case.sizes else 'train'}"
    module, _, function = place.partition(":")
    return getattr(importlib.import_module(module), function)


def groups(
    task: str, subjects: list[str] | None, lengths: list[int], threads: list[int], dtypes: list[str],
    passes: list[str] | None, device: str, sizes: dict[str, Any], against: str | None,
) -> list[list[Case]]:  # fmt: skip
    """Every combination, the subjects of each together; lengths, too, where speed should not depend on them.

    Raises:
        ValueError: a task, subject, pass, dtype or size that is unknown.
    """
    _known("task", [task], TASKS)
    subjects = subjects or list(TASKS[task][1])
    passes = passes or list(PASSES[task])
    _known("subjects", subjects, TASKS[task][1])
    _known("passes", passes, PASSES[task])
    _known("dtypes", dtypes, DTYPES)
    _known("device", [device], DEVICES)
    _known("sizes", sizes, DEFAULT_SIZES[task])
    sizes = DEFAULT_SIZES[task] | sizes
    revisions = [None] if against is None else [None, against]
    together = [lengths] if task in ("decode", "stream") else [[length] for length in lengths]
    return [
        [Case(task, s, p, n, t, d, device, sizes, r) for n in some for s in subjects for r in revisions]
        for some, t, d, p in itertools.product(together, threads, dtypes, passes)
    ]


_WIDE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}  # the 170M preset
SUITES: dict[str, list[dict[str, Any]]] = {
    "gpu": [
        {"task": "op", "subjects": ["titans", "titans-triton", "gated_delta_rule", "sdpa"],
         "lengths": [4096, 16384], "sizes": {"heads": 16}},
        {"task": "memory", "subjects": ["titans-pytorch", "titans", "sdpa", "matmul"], "lengths": [4096]},
        {"task": "train", "subjects": ["llama", "mag", "mac"], "lengths": [4096], "sizes": {**_WIDE, "reach": 512}},
        {"task": "train", "subjects": ["llama", "mag"], "lengths": [32768], "sizes": {**_WIDE, "reach": 512}},
        {"task": "decode", "subjects": ["mac", "mag", "llama"], "lengths": [4096], "sizes": {**_WIDE, "reach": 512}},
    ],
}  # fmt: skip


def suite(name: str) -> list[list[Case]]:
    """The groups of a whole suite of cases: everything one machine is to be asked, bfloat16 on a GPU.

    Raises:
        ValueError: an unknown name.
    """
    _known("suite", [name], SUITES)
    common: dict[str, Any] = {
        "threads": [1], "dtypes": ["bfloat16"], "passes": None, "device": "cuda", "sizes": {}, "against": None,
    }  # fmt: skip
    return [group for entry in SUITES[name] for group in groups(**(common | entry))]


def training_steps(
    path: str, subjects: list[str] | None, threads: list[int], dtypes: list[str], device: str
) -> list[list[Case]]:
    """A training step of each model of an experiment, at the lengths and batch sizes that it varies.

    Args:
        path: its YAML file; of the task language, and of bytes, or of the task forecasting, whose data are read.
        subjects: names of its models; None for all.

    Raises:
        ValueError: another task or tokenizer, an unknown model, dtype or device.
    """
    from titans.tasks import get_task
    from titans.training.compare import Experiment
    from titans.training.config import load_yaml, require

    experiment = Experiment.from_dict(load_yaml(path))
    task = get_task(experiment.task)
    known = task.name in ("language", "forecasting")
    require(known, "task", task.name, f"in {path} the task language or forecasting")
    tokenizer = experiment.data.get("tokenizer", "bytes")
    require(tokenizer == "bytes", "data.tokenizer", tokenizer, f"in {path} 'bytes', or leave it out")
    subjects = subjects or list(experiment.models)
    _known("subjects", subjects, experiment.models)
    _known("dtypes", dtypes, DTYPES)
    _known("device", [device], DEVICES)
    planned = []
    for variant in experiment.variants().values():
        runs = {name: variant.config(task, name, "step") for name in subjects}
        first = runs[subjects[0]]
        sizes: dict[str, Any] = {"batch": first.training.batch_size}
        if task.name == "forecasting":
            sizes |= {"horizon": first.data.horizon, "channels": task.load(first).train.channels}
        planned += [
            [
                Case("train", name, "step", run.training.length, t, d, device, {"model": run.model, **sizes})
                for name, run in runs.items()
            ]
            for t, d in itertools.product(threads, dtypes)
        ]
    return planned


def _known(name: str, given, valid) -> None:
    for value in given:
        if value not in valid:
            raise ValueError(f"{name}={value!r} is unknown; use one of {', '.join(valid)}")


def load_peer() -> Any:
    """The package titans-pytorch; ImportError with the mend if it is not there."""
    try:
        return importlib.import_module("titans_pytorch")
    except ImportError as error:
        raise ImportError("titans-pytorch is not installed; pip install titans-pytorch==0.5.5") from error
