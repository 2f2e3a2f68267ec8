"""A tiny model learns to recall what its attention cannot reach (test contract, item 7)."""

import pytest
import torch

from titans.models import TitansConfig, TitansForCausalLM

KEYS, VALUES, WINDOW, PAIRS, GAP = 4, 4, 4, 2, 8
VOCAB = KEYS + VALUES + 1  # and noise
NOISE = VOCAB - 1


def recall(batch: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """[key value ...] [noise ...] [key value ...]: pairs, a gap longer than the window, the pairs in another order.

    Labels are the second half's values, and nothing else.
    """
    keys = torch.stack([torch.randperm(KEYS, generator=generator)[:PAIRS] for _ in range(batch)])
    values = KEYS + torch.randint(0, VALUES, (batch, PAIRS), generator=generator)
    order = torch.stack([torch.randperm(PAIRS, generator=generator) for _ in range(batch)])
    told = torch.stack([keys, values], -1).flatten(1)
    asked = torch.stack([keys.gather(1, order), values.gather(1, order)], -1).flatten(1)
    tokens = torch.cat([told, torch.full((batch, GAP), NOISE), asked], 1)
    labels = torch.full_like(tokens, -100)
    labels[:, told.shape[1] + GAP + 1 :: 2] = values.gather(1, order)
    return tokens, labels


def model(variant: str) -> TitansForCausalLM:
    torch.manual_seed(0)
    return TitansForCausalLM(TitansConfig(
        variant=variant, vocab_size=VOCAB, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, memory_depth=1,
        memory_max_lr=0.5, chunk_size=8, segment_length=WINDOW, sliding_window=WINDOW, num_persistent_tokens=1,
    ))  # fmt: skip


def learn(variant: str, steps: int, lr: float = 4e-3) -> TitansForCausalLM:
    trained, generator = model(variant).train(), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(trained.parameters(), lr)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (step + 1) / 20) * min(1.0, 4 * (1 - step / steps))
        tokens, labels = recall(64, generator)
        optimizer.zero_grad()
        trained(tokens, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        optimizer.step()
    return trained.eval()


def accuracy(trained: TitansForCausalLM, start: int = 0) -> float:
    """Share of right values on fresh sequences, read from token ``start`` on; chance is 1/4."""
    tokens, labels = recall(512, torch.Generator().manual_seed(1))
    with torch.no_grad():
        guesses = trained(tokens[:, start:], use_cache=False).logits[:, :-1].argmax(-1)
    asked = labels[:, start + 1 :] != -100
    return float((guesses == labels[:, start + 1 :])[asked].float().mean())


def test_the_task_is_out_of_reach_of_the_window():
    """Between a pair and its question lie more tokens than the window or segment holds."""
    tokens, labels = recall(4, torch.Generator().manual_seed(0))
    for row, label in zip(tokens, labels, strict=True):
        for t in (label != -100).nonzero().flatten().tolist():
            first = (row == row[t - 1]).nonzero().flatten()[0]
            assert t - 1 - first > WINDOW
            assert row[first + 1] == label[t]


def recalls(variant: str, steps: int, least: float) -> None:
    """Right by what the memory holds: a reader who missed the pairs can only guess."""
    trained = learn(variant, steps)
    assert accuracy(trained) > least
    assert accuracy(trained, start=2 * PAIRS) < 0.35


def test_recall():
    recalls("mag", 300, 0.9)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "steps", "least"), [("lmm", 400, 0.9), ("mag", 600, 0.9), ("mac", 2000, 0.9), ("mal", 2000, 0.75)]
)
def test_recall_of_every_variant(variant, steps, least):
    recalls(variant, steps, least)
