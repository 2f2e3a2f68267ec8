"""titans eval harness"""

import json
from pathlib import Path

from titans.cli.common import parse, quiet_libraries
from titans.training.config import ConfigParser

EXAMPLES = """examples:
  titans eval harness runs/mine --tasks niah_single_1 niah_single_2 --lengths 2048 4096 --data books.jsonl.xz
  titans eval harness runs/mine --tasks qa1 qa2 --lengths 0 1000 --babi babi_en10k --data books.jsonl.xz
  titans eval harness runs/mine --tasks lambada_openai              lm-eval's own; its data come from the network
"""


def main(arguments: list[str]) -> None:
    parser = ConfigParser(
        prog="titans eval harness",
        description="Measures a trained model with EleutherAI's lm-evaluation-harness: its own tasks, and what needle "
        "and babilong ask as tasks of its. Needs pip install 'titans[harness]'.",
        epilog=EXAMPLES,
        exit_on_error=False,
    )
    parser.add_argument("run", type=str, help="folder of a run, as `titans train` leaves it")
    parser.add_argument("--tasks", type=list[str], required=True, help="names of ours or of lm-eval's")
    parser.add_argument("--lengths", type=list[int], default=[2048], help="prompts of our tasks, in tokens")
    parser.add_argument("--samples", type=int | None, default=None, help="of each; by default 100 of ours, all others")
    parser.add_argument("--seed", type=int, default=42, help="of our questions")
    parser.add_argument(
        "--data", type=str | None, default=None, help="books for our tasks; by default Python's library"
    )
    parser.add_argument("--words", type=str | None, default=None, help="data.words of the task needle")
    parser.add_argument("--babi", type=str | None, default=None, help="data.babi of the task babilong")
    parser.add_argument("--json", type=str | None, default=None, help="file for the metrics")
    options = parse(parser, arguments)

    quiet_libraries()
    try:
        from titans.training.harness import harness_task, run_harness
    except ImportError as error:
        raise ImportError(f"titans eval harness needs `lm-eval` ({error}): pip install 'titans[harness]'") from error
    from titans.tasks import babilong, needle
    from titans.training.files import write_atomically
    from titans.training.models import load_text_run

    model, tokenizer = load_text_run(options.run)
    tasks: list = list(options.tasks)
    for task, data in ((needle.task, {"words": options.words}), (babilong.task, {"babi": options.babi})):
        names = [name for name in options.tasks if name in task.data_class.known]
        if names:
            tasks = [name for name in tasks if name not in names]
            asked = {"lengths": options.lengths, "samples": options.samples or 100, "seed": options.seed}
            evaluation = task.evaluation_class(task=names, **asked)
            for name, length, made in task.questions(tokenizer, task.data_class(test=options.data, **data), evaluation):
                tasks.append(harness_task(f"{name} @ {length}", list(made), evaluation.max_new_tokens))
    results = run_harness(model, tokenizer, tasks, options.samples)
    print("| task | metric | value |\n|---|---|---:|")
    for name, metrics in results.items():
        for metric, value in metrics.items():
            if isinstance(value, float):
                print(f"| {name} | {metric.partition(',')[0]} | {value:.3f} |")
    if options.json:
        write_atomically(Path(options.json), json.dumps(results, indent=1, default=str))
