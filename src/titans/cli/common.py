"""What the commands share."""

import os
from collections.abc import Sequence

from jsonargparse import ArgumentError, Namespace

from titans.training.config import ConfigParser


def quiet_libraries() -> None:
    """Imports transformers without its notices and bars: the commands print their own."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def parse(parser: ConfigParser, arguments: Sequence[str]) -> Namespace:
    """The parsed options; ValueError with the nearest valid key for a bad one."""
    try:
        return parser.parse_args(list(arguments))
    except ArgumentError as error:
        parser.error(str(error))
