"""How well a model predicts documents: nats a token, bits per byte, by window and by position."""

import math
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from titans.training.models import read_on
from titans.training.tokens import Corpus

_PIECE = 2048  # tokens read at once; longer windows go piece by piece with the model's cache
_FIRST_BUCKET = 128  # tokens in the first bucket of positions; each next one ends at twice the position


def measure(model: PreTrainedModel, corpus: Corpus, window: int | None) -> dict[str, Any]:
    """Bits per byte and word perplexity of a corpus read in windows (None: whole documents), and by position.

    Where white space cuts no words out of the text, as in DNA, the word perplexity is None.

    Every byte counts once: the first token of a window is predicted from the one before it (of a document: from the
    end-of-text token) and nothing else.
    """
    nats = token_nats(model, corpus, window)
    total = sum(float(n.sum()) for n in nats)
    bytes_per_token = corpus.num_bytes / corpus.num_tokens
    nats_a_word = total / max(1, corpus.num_words)
    edges = [0, _FIRST_BUCKET]
    while edges[-1] < max(map(len, nats)):
        edges.append(2 * edges[-1])
    positions = []
    for start, end in pairwise(edges):
        part = np.concatenate([n[start:end] for n in nats])
        bits = float(part.mean()) / math.log(2) / bytes_per_token
        positions.append({"from": start, "to": end, "tokens": len(part), "bits_per_byte": bits})
    return {
        "bits_per_byte": total / math.log(2) / corpus.num_bytes,
        "word_perplexity": math.exp(nats_a_word) if nats_a_word < 100 else None,
        "positions": positions,
    }


def token_nats(model: PreTrainedModel, corpus: Corpus, window: int | None) -> list[np.ndarray]:
    """The negative log-likelihood of every token, float64 [tokens] a document.

    The model starts anew every `window` tokens of a document (None: never). Windows are batched, longest first, and
    read piece by piece with the model's cache, so that memory does not grow with a document's length.
    """
    rows = [
        (document, start, min(start + (window or len(ids)), len(ids)))
        for document, ids in enumerate(corpus.ids)
        for start in range(0, len(ids), window or len(ids))
    ]
    rows.sort(key=lambda row: row[1] - row[2])
    nats = [np.zeros(len(ids)) for ids in corpus.ids]
    begin = 0
    while begin < len(rows):
        size = max(1, 4 * _PIECE // min(_PIECE, rows[begin][2] - rows[begin][1]))
        batch = rows[begin : begin + size]
        begin += size
        read = _batch_nats(model, [_window_ids(corpus, *row) for row in batch])
        for (document, start, end), values in zip(batch, read, strict=True):
            nats[document][start:end] = values[: end - start]
    return nats


def _window_ids(corpus: Corpus, document: int, start: int, end: int) -> np.ndarray:
    """The token before the window and those of the window: [end - start + 1]."""
    ids = corpus.ids[document]
    before = ids[start - 1] if start else corpus.eos_token_id
    return np.concatenate([[before], ids[start:end]]).astype(np.int64)


def _batch_nats(model: PreTrainedModel, windows: list[np.ndarray]) -> np.ndarray:
    """Negative log-likelihoods [B, T] of windows [T_i + 1], the longest first; past a window's end meaningless."""
    batch = np.zeros((len(windows), len(windows[0])), dtype=np.int64)
    for row, ids in zip(batch, windows, strict=True):
        row[: len(ids)] = ids  # what is past the end comes later, so no mask is needed
    ids = torch.from_numpy(batch).to(model.device)
    cache, nats = None, []
    with torch.inference_mode():
        for inputs, targets in zip(ids[:, :-1].split(_PIECE, 1), ids[:, 1:].split(_PIECE, 1), strict=True):
            logits, cache = read_on(model, inputs, cache)
            loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
            nats.append(loss.view_as(targets).cpu())
    return torch.cat(nats, 1).double().numpy()
