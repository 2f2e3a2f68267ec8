"""What the commands share."""

import os
import warnings
from collections.abc import Sequence
from dataclasses import fields
from logging import WARNING, disable

from jsonargparse import ArgumentError, Namespace

from titans.training.config import ConfigParser
from titans.training.task import Task


def quiet_libraries() -> None:
    """Imports transformers without its notices and bars: the commands print their own.

    Of several processes the first warns for all.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if os.environ.get("RANK", "0") != "0":
        warnings.simplefilter("ignore")
        disable(WARNING)
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def parse(parser: ConfigParser, arguments: Sequence[str]) -> Namespace:
    """The parsed options; ValueError with the nearest valid key for a bad one."""
    try:
        return parser.parse_args(list(arguments))
    except ArgumentError as error:
        parser.error(str(error))


def take(arguments: list[str], name: str) -> str | None:
    """Removes `name VALUE` or `name=VALUE` from the arguments and returns VALUE."""
    for index, argument in enumerate(arguments):
        if argument.startswith(name + "="):
            return arguments.pop(index).partition("=")[2]
        if argument == name:
            if index + 1 == len(arguments):
                raise ValueError(f"{name} needs a value")
            arguments.pop(index)
            return arguments.pop(index)
    return None


def data_option(task: Task, text: str) -> str:
    """What `--data` stands for: the file of a task that has one for all splits, else the `text` of that name."""
    names = {f.name for f in fields(task.data_class)}
    return "--data.path" if "path" in names else f"--data.{text}"
