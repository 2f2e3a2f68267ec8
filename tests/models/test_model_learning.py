"""A tiny model learns to recall what its attention cannot reach (test contract, item 7)."""

import pytest
import torch
from model_cases import VARIANTS

from titans.models import TitansConfig, TitansForCausalLM

KEYS, VALUES, WINDOW = 4, 4, 4
VOCAB = KEYS + VALUES + 1  # and noise
NOISE = VOCAB - 1


def recall(batch: int, pairs: int, gap: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """[key value ...] [noise ...] [key value ...]: pairs, a gap longer than the window, the pairs in another order.

    Labels are the second half's values, and nothing else.
    """
    keys = torch.stack([torch.randperm(KEYS, generator=generator)[:pairs] for _ in range(batch)])
    values = KEYS + torch.randint(0, VALUES, (batch, pairs), generator=generator)
    order = torch.stack([torch.randperm(pairs, generator=generator) for _ in range(batch)])
    told = torch.stack([keys, values], -1).flatten(1)
    asked = torch.stack([keys.gather(1, order), values.gather(1, order)], -1).flatten(1)
    tokens = torch.cat([told, torch.full((batch, gap), NOISE), asked], 1)
    labels = torch.full_like(tokens, -100)
    labels[:, told.shape[1] + gap + 1 :: 2] = values.gather(1, order)
    return tokens, labels


def model(variant: str, **changes) -> TitansForCausalLM:
    torch.manual_seed(0)
    return TitansForCausalLM(TitansConfig(**{
        "variant": variant, "vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "memory_expansion": 2, "chunk_size": 8, "segment_length": WINDOW, "sliding_window": WINDOW,
        "num_persistent_tokens": 1, **changes,
    }))  # fmt: skip


def accuracy(trained, generator, gap) -> float:
    tokens, labels = recall(256, 2, gap, generator)
    with torch.no_grad():
        guesses = trained(tokens, use_cache=False).logits[:, :-1].argmax(-1)
    asked = labels[:, 1:] != -100
    return float((guesses == labels[:, 1:])[asked].float().mean())


def learn(variant: str, steps: int, gap: int = 8, lr: float = 4e-3, **changes) -> float:
    """Accuracy on fresh sequences after training; chance is 1/4."""
    trained, generator = model(variant, **changes).train(), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(trained.parameters(), lr)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (step + 1) / 20) * min(1.0, 4 * (1 - step / steps))
        tokens, labels = recall(64, 2, gap, generator)
        optimizer.zero_grad()
        trained(tokens, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        optimizer.step()
    return accuracy(trained.eval(), generator, gap)


def test_the_task_is_out_of_reach_of_the_window():
    """Between a pair and its question lie more tokens than all layers' windows together see at once."""
    tokens, labels = recall(4, 2, 8, torch.Generator().manual_seed(0))
    for row, label in zip(tokens, labels, strict=True):
        for t in (label != -100).nonzero().flatten().tolist():
            first = (row == row[t - 1]).nonzero().flatten()[0]
            assert t - 1 - first > WINDOW
            assert row[first + 1] == label[t]


@pytest.mark.parametrize("variant", ["lmm"])
def test_recall_smoke(variant):
    assert learn(variant, 150) > 0.3


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_recall(variant):
    assert learn(variant, 800) > 0.9
