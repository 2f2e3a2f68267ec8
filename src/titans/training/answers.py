"""How a model answers questions at the end of long prompts: read piece by piece, then greedy decoding."""

import itertools
import time
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from titans.training.models import has_constant_state, read_on
from titans.training.peak import PeakMemory
from titans.training.questions import DEPTHS, Question
from titans.training.tokens import encoder

_PIECE = 2048  # tokens of a row read at once
_TOKENS = 8192  # tokens of all rows read at once
_CACHED = 65536  # tokens of all rows that a growing cache may hold, unless a single row has more
_SPREAD = 128  # rows of a batch differ by at most so many tokens: they are read token by token
_WAITING = 2**22  # tokens of questions that wait to be put into batches
_EXAMPLES = 3


def examine(
    model: PreTrainedModel, tokenizer: Any, questions: Iterable[Question], length: int, max_new_tokens: int
) -> dict[str, Any]:
    """Asks all `questions`, whose prompts have about `length` tokens; memory does not grow with their number.

    Returns:
        accuracy (percent, mean over the questions of the fraction of answers found), the same by depth of the answers,
        speed of reading, the process's highest memory while it read and wrote, some examples.
    """
    memory = PeakMemory(model.device.type)
    encode = encoder(tokenizer)
    start, reading, read = time.perf_counter(), 0.0, 0
    scores, marks, examples = [], [], []
    waiting = max(1, min(64, _WAITING // max(1, length)))
    for batch in _batches(((question, encode(question.prompt)) for question in questions), model, waiting):
        prompts = [ids for _, ids in batch]
        written, seconds = answer(model, prompts, max_new_tokens, tokenizer.eos_token_id)
        reading, read = reading + seconds, read + sum(map(len, prompts))
        for (question, _), ids in zip(batch, written, strict=True):
            output = tokenizer.decode(ids, skip_special_tokens=True)
            found = question.found(output)
            scores.append(100 * float(np.mean(found)))
            marks += zip(question.depths, found, strict=True)
            examples.append({"answers": list(question.answers), "output": output})
    return {
        "samples": len(scores),
        "accuracy": float(np.mean(scores)),
        "depths": _by_depth(marks),
        "prompt_tokens": read / len(scores),
        "tokens_per_second": read / max(reading, 1e-9),
        "seconds": time.perf_counter() - start,
        "peak_bytes": memory.highest(),
        "examples": examples[:_EXAMPLES],
    }


def answer(
    model: PreTrainedModel, prompts: list[np.ndarray], max_new_tokens: int, end: int
) -> tuple[list[list[int]], float]:
    """What the model writes after each prompt, token ids without the end-of-text token `end`; greedy.

    Rows go together without padding or masks: what all have is read in pieces, the rest token by token, each row
    reading its prompt on while others write already.

    Args:
        prompts: token ids, [T_i] each, at least one token.

    Returns:
        the written ids, at most `max_new_tokens` a row; the seconds that reading the pieces took.
    """
    start = time.perf_counter()
    shared = min(map(len, prompts))
    ids = torch.from_numpy(np.stack([prompt[:shared] for prompt in prompts]).astype(np.int64)).to(model.device)
    cache, likeliest = None, []
    with torch.inference_mode():
        for piece in ids.split(_PIECE, 1):
            logits, cache = read_on(model, piece, cache, last=True)
            likeliest = logits[:, -1].argmax(-1).tolist()
        seconds = time.perf_counter() - start
        written: list[list[int]] = [[] for _ in prompts]
        open_rows = set(range(len(prompts)))
        for position in itertools.count(shared):
            for row, token in enumerate(likeliest):
                if position < len(prompts[row]):
                    likeliest[row] = int(prompts[row][position])
                elif row in open_rows:
                    written[row] += [token] if token != end else []
                    if token == end or len(written[row]) == max_new_tokens:
                        open_rows.remove(row)
            if not open_rows:
                break
            logits, cache = read_on(model, torch.tensor(likeliest, device=model.device)[:, None], cache, last=True)
            likeliest = logits[:, -1].argmax(-1).tolist()
    return written, seconds


def _batches(
    questions: Iterator[tuple[Question, np.ndarray]], model: PreTrainedModel, waiting: int
) -> Iterator[list[tuple[Question, np.ndarray]]]:
    """Batches of prompts of about one length, from `waiting` questions at a time."""
    while block := sorted(itertools.islice(questions, waiting), key=lambda pair: len(pair[1])):
        while block:
            shortest = len(block[0][1])
            rows = max(1, _TOKENS // min(_PIECE, shortest))
            if not has_constant_state(model):
                rows = max(1, min(rows, _CACHED // shortest))
            batch = [pair for pair in block[:rows] if len(pair[1]) - shortest <= _SPREAD]
            del block[: len(batch)]
            yield batch


def _by_depth(marks: list[tuple[float, bool]]) -> list[dict[str, Any]]:
    tenths: dict[int, list[bool]] = {}
    for depth, found in marks:
        tenths.setdefault(min(int(depth * DEPTHS), DEPTHS - 1), []).append(found)
    return [
        {"from": t / DEPTHS, "to": (t + 1) / DEPTHS, "answers": len(found), "accuracy": 100 * float(np.mean(found))}
        for t, found in sorted(tenths.items())
    ]
