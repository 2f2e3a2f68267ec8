"""What defines a run, and the parser that checks it: YAML, dotted options and Python values go one way.

No torch here: the command line builds its help from these classes.
"""

import difflib
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_origin

from jsonargparse import ArgumentError, ArgumentParser, DefaultHelpFormatter, get_loader

if TYPE_CHECKING:
    from titans.training.task import Task


def option(default: Any, text: str) -> Any:
    """A dataclass field with its default (a list or dict is copied) and its help text."""
    if isinstance(default, (list, dict)):
        return field(default_factory=default.copy, metadata={"help": text})
    return field(default=default, metadata={"help": text})


def require(valid: bool, name: str, value: Any, mend: str) -> None:
    """Raises ValueError naming the argument, its value and the mend."""
    if not valid:
        raise ValueError(f"{name}={value!r} is not valid; use {mend}")


def nearest(word: str, valid: Iterable[str]) -> str:
    """The valid words like `word`, or all of them where none is like it: the mend of a message."""
    close = difflib.get_close_matches(str(word), sorted(valid), n=3, cutoff=0.6)
    return " or ".join(map(repr, close)) if close else "one of " + ", ".join(sorted(valid))


def check_settings(kind: str, keys: Iterable[str], valid: Iterable[str]) -> None:
    """Raises ValueError for a key that is no setting of a type of model."""
    for key in keys:
        if key not in valid:
            raise ValueError(f"model.{key} is no setting of {kind!r}; use {nearest(key, valid)}")


@contextmanager
def refusals(spec: dict[str, Any], name: str) -> Iterator[None]:
    """What a library raises at settings that it cannot use, of which it has a family of types, as ValueError."""
    try:
        yield
    except ImportError:  # a library that is not installed
        raise
    except Exception as error:
        raise ValueError(f"model={spec} is refused by {name}: {error}") from error


@dataclass
class TextData:
    """Where text comes from. Environment variables in paths are expanded."""

    train: str | None = option(
        None, "text file, folder, .jsonl, FASTA (also .gz, .xz) or data set, in the task language also a folder of "
        "`titans prepare`; by default Python's own standard library"
    )  # fmt: skip
    validation: str | None = option(None, "the same; by default the last 5 % of the training text")
    test: str | None = option(None, "the same; by default 5 % of the training text, before the validation text")
    tokenizer: str | None = option(
        None, "'bytes', 'nucleotide', or a folder with a tokenizer; by default nucleotide for a FASTA file, else bytes"
    )
    text_field: str = option("text", "field of .jsonl lines and data set rows that holds the text")


@dataclass
class TrainingConfig:
    """How long, how fast and with what care a model is trained."""

    length: int = option(
        512, "tokens of a training window; in forecasting the look-back, in rows, in dna the longest sequence, in bases"
    )
    batch_size: int = option(16, "windows of a step, all processes together; a multiple of their number")
    gradient_accumulation: int = option(1, "steps whose gradients are added up before the weights move")
    tokens: float = option(
        1e6, "budget: tokens seen in training, in forecasting look-back rows of all windows; may be written 2e6"
    )
    learning_rate: float = option(2e-3, "peak step size of AdamW, reached after warm-up, then falling along a cosine")
    warmup: float = option(0.05, "fraction of the run in which the step size rises from zero")
    weight_decay: float = option(0.1, "of matrices; norms, biases, gates and other vectors have none")
    max_grad_norm: float = option(1.0, "longer gradients are scaled down to this norm")
    bf16: bool = option(False, "bfloat16 autocast; weights, optimizer and memory state stay float32")
    write_price_after: float = option(
        0.0, "fraction of the run before model.memory_write_price is asked: beside attention, a memory that must pay "
        "before it is of use shuts its gates for good"
    )  # fmt: skip
    checkpoint_activations: bool = option(
        False, "keep what enters a block alone and work the rest out again in the backward pass: less memory, more time"
    )
    skip_nonfinite: bool = option(
        False, "skip and count steps whose loss or gradient is not finite; otherwise the first one ends the run"
    )
    eval_every: float = option(0.1, "validate and save a checkpoint every so many steps; up to 1: fraction of the run")
    seed: int = option(0, "of initialisation and of the order of the windows")
    start_from: str | None = option(None, "folder of a run whose weights training starts from; by default random ones")

    def __post_init__(self):
        for name in ("length", "batch_size", "gradient_accumulation", "tokens", "learning_rate", "eval_every"):
            require(getattr(self, name) > 0, f"training.{name}", getattr(self, name), "a number above 0")
        for name in ("weight_decay", "max_grad_norm", "seed"):
            require(getattr(self, name) >= 0, f"training.{name}", getattr(self, name), "a number of at least 0")
        require(self.length > 1, "training.length", self.length, "at least 2: a token and the next")
        for name in ("warmup", "write_price_after"):
            value = getattr(self, name)
            require(0 <= value < 1, f"training.{name}", value, "a fraction of the run, at least 0 and below 1")

    @property
    def steps(self) -> int:
        """Optimizer steps that see `tokens` tokens (at least one)."""
        return max(1, round(self.tokens / self.tokens_per_step))

    @property
    def windows(self) -> int:
        """Windows that all steps see together."""
        return self.steps * self.batch_size * self.gradient_accumulation

    @property
    def tokens_per_step(self) -> int:
        """Tokens between two moves of the weights."""
        return self.length * self.batch_size * self.gradient_accumulation


@dataclass
class TrainConfig:
    """One run. `data` and `evaluation` are dataclasses of the task."""

    task: str
    output: str | None
    model: dict[str, Any]
    data: Any
    evaluation: Any
    training: TrainingConfig

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as written to a run's config.yaml."""
        return asdict(self)


class _HelpFormatter(DefaultHelpFormatter):
    """Examples keep their lines."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if text.startswith("examples:") else super()._fill_text(text, width, indent)


class ConfigParser(ArgumentParser):
    """Raises ValueError for a bad key, naming the nearest valid one. Lists may be written `--lengths 512 1024`."""

    def __init__(self, **kwargs: Any):
        super().__init__(formatter_class=_HelpFormatter, **kwargs)

    def parse_args(self, args: Sequence[str], *rest: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        return super().parse_args(self._with_lists(args), *rest, **kwargs)

    def _with_lists(self, arguments: Sequence[str]) -> list[str]:
        """The words after an option that takes a list, put in brackets unless they are."""
        gathered: list[str] = []
        words: list[str] = []
        for argument in [*arguments, "--"]:
            if words and argument.startswith("-"):
                gathered += [words[0], words[1] if words[1:2] and words[1][0] == "[" else f"[{', '.join(words[1:])}]"]
                words = []
            if words:
                words.append(argument)
            elif self._takes_list(argument):
                words = [argument]
            else:
                gathered.append(argument)
        return gathered[:-1]

    def _takes_list(self, argument: str) -> bool:
        typehint = getattr(self._option_string_actions.get(argument), "_typehint", None)
        return get_origin(typehint) is list or list in {get_origin(part) for part in getattr(typehint, "__args__", ())}

    def error(self, message: str, ex: Exception | None = None):
        unknown = re.search(r"(?:unrecognized arguments: --|Option '|does not accept option ')([\w.+-]+)", message)
        if unknown:
            key = unknown.group(1).partition("=")[0]
            valid = [name.removeprefix("--") for name in self._option_string_actions if name.startswith("--")]
            close = difflib.get_close_matches(key, valid, n=1, cutoff=0.5)
            mend = f"did you mean {close[0]!r}?" if close else "see --help for the valid keys"
            raise ValueError(f"{key!r} is no option; {mend}")
        raise ValueError(re.sub(r"\s*\n\s*", " ", message))


def config_parser(task: "Task", preset: dict[str, Any] | None = None, **kwargs: Any) -> ConfigParser:
    """The parser of a task's runs: `--config FILE.yaml`, then every key as a dotted option.

    Defaults are those of `preset`, by default the task's own, its main experiment; elsewhere each option's.
    """
    preset = task.preset() if preset is None else preset
    parser = ConfigParser(**kwargs)
    parser.add_argument("--config", action="config", help="YAML file with any of the keys below")
    parser.add_argument("--task", type=str, default=task.name, help="what is learned")
    parser.add_argument("--output", type=str | None, default=None, help="folder of the run; by default runs/TASK-DATE")
    parser.add_argument(
        "--model",
        type=dict[str, Any],
        default=preset.get("model", {}),
        help="type (titans, llama, sliding_llama, mamba2, gated_delta_net, olmo_hybrid, lstm, in dna also transformer, "
        "cnn; in forecasting titans, patchtst, itransformer, dlinear, nlinear) and the fields of its configuration, as "
        "in --model.variant mag",
    )
    parts = {"data": task.data_class, "evaluation": task.evaluation_class, "training": TrainingConfig}
    for part, cls in parts.items():
        defaults = cls()
        for f in fields(cls):
            default = preset.get(part, {}).get(f.name, getattr(defaults, f.name))
            parser.add_argument(f"--{part}.{f.name}", type=f.type, default=default, help=f.metadata["help"])
    return parser


def parse_config(
    task: "Task",
    values: dict[str, Any] | None = None,
    arguments: Sequence[str] | None = None,
    parser: ConfigParser | None = None,
) -> TrainConfig:
    """Checks `values` (nested plain values) or `arguments` (options) against the task's keys.

    Raises:
        ValueError: an unknown key (the message names the nearest valid one) or a value of the wrong type or range.
    """
    parser = parser or config_parser(task)
    try:
        checked = parser.parse_object(values or {}) if arguments is None else parser.parse_args(list(arguments))
    except ArgumentError as error:
        parser.error(str(error))
    plain = checked.as_dict()
    for part in ("data", "evaluation", "training"):
        require(isinstance(plain[part], dict), part, plain[part], f"a mapping, `{part}:` and its keys below it")
    return TrainConfig(
        task=task.name,
        output=plain["output"],
        model=plain["model"],
        data=task.data_class(**plain["data"]),
        evaluation=task.evaluation_class(**plain["evaluation"]),
        training=TrainingConfig(**plain["training"]),
    )


def load_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML file's mapping, with numbers such as 2e6 read as numbers.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not YAML, or not a mapping.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} does not exist; give a YAML file")
    try:
        values = get_loader("yaml")(Path(path).read_text(encoding="utf-8"))
    except Exception as error:  # yaml has a family of types
        raise ValueError(f"{path} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds no mapping; write `key: value` lines")
    return values
