"""Questions in long prompts: the search for a length, training windows, answering, measuring."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from titans.training import answers
from titans.training.models import MODEL_TYPES, build_model, read_on
from titans.training.questions import Question, QuestionWindows, listing, longest
from titans.training.tokens import byte_tokenizer

BYTES = byte_tokenizer()
IDS = {"vocab_size": 258, "eos_token_id": 256, "pad_token_id": 257}
SMALL = {
    "titans": {"variant": "mac", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
               "num_attention_heads": 1, "num_memory_heads": 1, "chunk_size": 8, "segment_length": 16},
    "llama": {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
    "sliding_llama": {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
                      "sliding_window": 16},
    "mamba2": {"hidden_size": 16, "num_hidden_layers": 1, "head_dim": 16, "state_size": 8, "chunk_size": 16},
    "gated_delta_net": {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
                        "linear_key_head_dim": 16, "linear_value_head_dim": 16},
    "olmo_hybrid": {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
                    "linear_key_head_dim": 16, "linear_value_head_dim": 16},
    "lstm": {"hidden_size": 16, "num_hidden_layers": 1},
}  # fmt: skip


def small(kind):
    return build_model({"type": kind, **SMALL[kind]}, **IDS).eval()


@given(st.lists(st.integers(1, 30), min_size=2, max_size=200), st.integers(0, 100), st.integers(0, 5), st.data())
def test_the_longest_is_maximal_and_fits_and_is_found_in_few_steps(steps, base, least, data):
    least = min(least, len(steps))
    sizes = np.cumsum([base, *steps])
    measured = []

    def size(n):
        measured.append(n)
        return int(sizes[n]) if n <= len(steps) else int(sizes[-1]) + 7 * (n - len(steps))

    limit = data.draw(st.integers(size(least), size(least) + 5000))
    measured.clear()
    n = longest(size, limit, least)
    assert len(measured) <= 30
    assert n >= least
    assert size(n) <= limit < size(n + 1)


def test_a_limit_below_the_shortest_names_it():
    with pytest.raises(ValueError, match=r"length=9 is not valid; use at least 10"):
        longest(lambda n: 7 + 3 * n, 9, 1)


def test_lists_are_written_as_ruler_does():
    assert [listing(w) for w in (["a"], ["a", "b"], ["a", "b", "c"])] == ["a", "a, and b", "a, b, and c"]


@pytest.mark.parametrize(
    ("output", "found"),
    [
        (" 1234567, and ABC.", [True, True]),
        ("x1234567x", [True, False]),
        ("", [False, False]),
        ("123 4567 abc", [False, True]),
    ],
)
def test_answers_are_looked_for_anywhere_whatever_their_case(output, found):
    assert Question("", "", ("1234567", "aBc"), (0.0, 0.5)).found(output) == found


def _make(rng, length, reserve):
    """A prompt of letters and a target of one digit; the whole of `length` bytes with the end."""
    digit = str(rng.integers(10))
    return Question("".join(rng.choice(list("abcd"), length - 2)), digit, (digit,), (0.0,))


def windows(**options):
    defaults = {"split": "train", "seed": 3, "window": 20, "lengths": [10], "count": 60}
    return QuestionWindows([_make], BYTES, **{**defaults, **options})


def test_windows_are_full_of_questions_and_only_answers_are_learned():
    item = windows(lengths=[9])[0]
    text = item["input_ids"].tolist()
    assert [text[8], text[17], text[18:]] == [256, 256, [257, 257]]
    learned = item["labels"] != -100
    assert np.flatnonzero(learned).tolist() == [7, 8, 16, 17]
    assert (item["labels"][learned] == item["input_ids"][learned]).all()


def test_a_part_of_the_text_is_learned_too():
    items = [windows(text_loss=0.25, window=200, lengths=[200])[i] for i in range(20)]
    assert np.mean([(item["labels"][:198] != -100).mean() for item in items]) == pytest.approx(0.25, abs=0.03)
    assert all((item["labels"][198:] == item["input_ids"][198:]).all() for item in items)


def test_an_item_depends_on_seed_split_and_index_alone():
    data = windows()
    again = windows()
    again[7]
    for i in (5, 0, 59):
        assert (data[i]["input_ids"] == again[i]["input_ids"]).all()
    for other in (windows(seed=4), windows(split="validation")):
        assert (data[5]["input_ids"] != other[5]["input_ids"]).any()
    assert (data[5]["input_ids"] != data[6]["input_ids"]).any()
    with pytest.raises(IndexError):
        data[60]


def test_a_curriculum_admits_the_longer_later():
    data = windows(lengths=[20, 5, 10], curriculum=True)
    ends = [int((data[i]["input_ids"] == 256).sum()) for i in range(60)]
    assert set(ends[:20]) == {4}
    assert set(ends[20:40]) == {2, 4}
    assert set(ends[40:]) == {1, 2, 4}
    with pytest.raises(ValueError, match=r"data\.lengths=\[30\].*training\.length=20"):
        windows(lengths=[30])


@pytest.mark.parametrize("kind", MODEL_TYPES)
def test_answers_of_a_batch_are_those_of_each_prompt_alone(kind, monkeypatch):
    monkeypatch.setattr(answers, "_PIECE", 16)
    model = small(kind)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 256, n).astype(np.uint16) for n in (40, 43, 57)]
    written, _ = answers.answer(model, prompts, 6, end=256)
    for prompt, expected in zip(prompts, written, strict=True):
        ids = torch.from_numpy(prompt.astype(np.int64))[None]
        for token in expected:
            with torch.no_grad():
                assert read_on(model, ids)[0][0, -1].argmax() == token
            ids = torch.cat([ids, torch.tensor([[token]])], 1)


class Script:
    """A model that writes, after a prompt that ends in token p, p + 1, p + 2, ... up to the end-of-text token 9."""

    device = torch.device("cpu")

    class config:
        model_type = "scripted"

    def __call__(self, input_ids, cache=None, use_cache=None, logits_to_keep=0):
        logits = torch.nn.functional.one_hot((input_ids[:, -1:] + 1).clamp(max=9), 10).float()
        return type("Output", (), {"logits": logits, "cache": None})


def test_decoding_stops_at_the_end_of_text_and_at_the_limit():
    prompts = [np.array(p, dtype=np.uint16) for p in ([1, 1, 6], [1, 3], [8])]
    assert answers.answer(Script(), prompts, 4, end=9)[0] == [[7, 8], [4, 5, 6, 7], []]


def test_examine_counts_by_answer_and_depth(monkeypatch):
    def scripted(model, prompts, max_new_tokens, end):
        return [[ord("7")] if len(p) < 40 else [] for p in prompts], 2.0

    monkeypatch.setattr(answers, "answer", scripted)
    questions = [Question("x" * n, "", ("7", "8"), (0.05, 1.0)) for n in (30, 31, 300, 32)]
    result = answers.examine(small("llama"), BYTES, iter(questions), 64, 5)
    assert result["samples"] == 4
    assert result["accuracy"] == pytest.approx(37.5)
    assert result["depths"] == [
        {"from": 0.0, "to": 0.1, "answers": 4, "accuracy": 75.0},
        {"from": 0.9, "to": 1.0, "answers": 4, "accuracy": 0.0},
    ]
    assert result["prompt_tokens"] == pytest.approx(393 / 4)
    assert result["tokens_per_second"] == pytest.approx(393 / 4)  # two batches: the long one goes alone
    assert len(result["examples"]) == 3
