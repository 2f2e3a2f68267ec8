"""The command line: one file a command, no logic of its own. Nothing heavy is imported before a command runs."""

import importlib
import sys

import titans

COMMANDS = {
    "prepare": "tokenize texts of any size once, for training that never loads them whole",
    "train": "train a model; without arguments, a small one on text this machine already has",
    "generate": "let a trained model go on from a prompt",
    "memorize": "read documents of any size into a model's memory, and keep it in a file",
    "eval": "measure a trained model on a task",
    "classify": "say which class each DNA sequence of a file belongs to",
    "forecast": "train a forecaster on a CSV file, and write the rows after its last one",
    "compare": "train several models under one budget, over seeds, and tabulate",
    "bench": "time and memory of layers and models, side by side",
}

USAGE = f"""usage: titans COMMAND [options]

Titans: language models with a neural memory that learns while it reads (arXiv 2501.00663).

commands:
{chr(10).join(f"  {name:<10}{text}" for name, text in COMMANDS.items())}

examples:
  titans train                                  about three minutes on two cores
  titans train --data my_texts/ --output runs/mine
  titans prepare huge.jsonl.xz -o huge.tokens
  titans generate runs/mine --prompt "def main("
  titans memorize runs/mine book.txt -o book.memory.safetensors
  titans eval language runs/mine --data other.txt
  titans classify runs/tata genes.fa -o calls.csv
  titans forecast data.csv --horizon 96 -o forecast.csv
  titans COMMAND --help                         all options of a command
  titans --version
"""


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns the exit code: 0, or 2 after a message on a mistake of the user's."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    if arguments[0] == "--version":
        print(f"titans {titans.__version__}")
        return 0
    command = arguments.pop(0)
    try:
        if command not in COMMANDS:
            import difflib

            close = difflib.get_close_matches(command, COMMANDS, n=1)
            mend = f"did you mean {close[0]!r}?" if close else "see titans --help"
            raise ValueError(f"{command!r} is no command; {mend}")
        return importlib.import_module(f"titans.cli.{command}").main(arguments) or 0
    except (ValueError, OSError, ImportError, FloatingPointError, MemoryError) as error:
        print(f"titans {command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"titans {command}: interrupted", file=sys.stderr)
        return 130
