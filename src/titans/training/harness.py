"""EleutherAI's lm-evaluation-harness over our runs: its tasks by name, and our questions as tasks of its."""

from collections.abc import Sequence
from typing import Any

import datasets
from lm_eval import evaluator  # pyright: ignore[reportMissingImports]
from lm_eval.api.task import ConfigurableTask  # pyright: ignore[reportMissingImports]
from lm_eval.models import huggingface  # pyright: ignore[reportMissingImports]
from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

from titans.training.answers import answer
from titans.training.questions import Question
from titans.training.tokens import encoder

# The library's decorators hide what these take.
_HFLM: Any = huggingface.HFLM
_simple_evaluate: Any = evaluator.simple_evaluate


class Harness(_HFLM):
    """A model of ours or a baseline as lm-eval's: prompts of any length are read piece by piece, decoding is greedy."""

    def __init__(self, model: Any, tokenizer: Any):
        super().__init__(pretrained=model, tokenizer=tokenizer, max_length=2**31, batch_size=1)

    def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
        """The texts that follow the requests' prompts, each up to the first of its stop words."""
        encode, texts = encoder(self.tokenizer), []
        for context, options in (request.args for request in requests):
            limit = int(options.get("max_gen_toks", self.max_gen_toks))
            written, _ = answer(self.model, [encode(context)], limit, int(self.tokenizer.eos_token_id))
            text = self.tokenizer.decode(written[0], skip_special_tokens=True)
            for stop in options.get("until", ()):
                text = text.partition(stop)[0] if stop else text
            texts.append(text)
        return texts


def harness_task(name: str, questions: Sequence[Question], max_new_tokens: int) -> ConfigurableTask:
    """A task of lm-eval's that asks questions of ours; its metric is the percentage of answers found."""
    rows = [{"number": i, "prompt": q.prompt, "target": q.target} for i, q in enumerate(questions)]

    def score(row: dict[str, Any], outputs: list[str]) -> dict[str, float]:
        found = questions[row["number"]].found(outputs[0])
        return {"accuracy": 100 * sum(found) / len(found)}

    return ConfigurableTask(
        config={
            "task": name,
            "custom_dataset": lambda **_: {"test": datasets.Dataset.from_list(rows)},
            "test_split": "test",
            "doc_to_text": lambda row: row["prompt"],
            "doc_to_target": lambda row: row["target"],
            "target_delimiter": "",
            "output_type": "generate_until",
            "generation_kwargs": {"until": [], "do_sample": False, "max_gen_toks": max_new_tokens},
            "process_results": score,
            "metric_list": [{"metric": "accuracy", "aggregation": "mean", "higher_is_better": True}],
        }
    )


def run_harness(
    model: Any, tokenizer: Any, tasks: Sequence[str | ConfigurableTask], samples: int | None
) -> dict[str, dict[str, Any]]:
    """lm-eval's metrics by task.

    Args:
        tasks: names that lm-eval knows (most load their data from the network), or tasks of `harness_task`.
        samples: at most so many of each task; None: all.

    Raises:
        ValueError: a name that lm-eval does not know.
    """
    named = [task for task in tasks if isinstance(task, str)]
    manager = TaskManager(include_defaults=bool(named))
    unknown = sorted(set(named) - set(manager.all_tasks))
    if unknown:
        raise ValueError(f"tasks={unknown} are unknown; use names of `lm-eval ls tasks`, or of our tasks' questions")
    results = _simple_evaluate(
        Harness(model, tokenizer), tasks=list(tasks), limit=samples, task_manager=manager, bootstrap_iters=0
    )
    return results["results"]
