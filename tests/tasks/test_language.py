"""Bits per byte: the arithmetic, windows, positions."""

import math

import numpy as np
import pytest
import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from titans.tasks import get_task
from titans.training import likelihood
from titans.training.config import parse_config
from titans.training.models import build_model
from titans.training.text import split_documents
from titans.training.tokens import Corpus, byte_tokenizer

TASK = get_task("language")
BYTES = byte_tokenizer()


class Uniform(PreTrainedModel):
    """Gives every token the same probability."""

    config_class = PretrainedConfig

    def __init__(self):
        super().__init__(PretrainedConfig())
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def forward(self, input_ids, cache=None, use_cache=None):
        return CausalLMOutputWithPast(logits=self.weight + torch.zeros(*input_ids.shape, 256))


@pytest.mark.parametrize("window", [3, 100, None])
def test_a_uniform_model_needs_eight_bits_a_byte(window):
    corpus = Corpus.build(["two words", "another three words"], BYTES)
    measured = likelihood.measure(Uniform(), corpus, window)
    assert measured["bits_per_byte"] == pytest.approx(8)
    assert measured["word_perplexity"] == pytest.approx(math.exp(28 * math.log(256) / 5))
    assert measured["positions"] == [{"from": 0, "to": 128, "tokens": 28, "bits_per_byte": pytest.approx(8)}]


def test_position_buckets_double_and_cover_all_tokens():
    corpus = Corpus.build(["a" * 300, "b" * 100], BYTES)
    positions = likelihood.measure(Uniform(), corpus, None)["positions"]
    assert [(p["from"], p["to"], p["tokens"]) for p in positions] == [(0, 128, 228), (128, 256, 128), (256, 512, 44)]


@pytest.mark.parametrize("window", [16, 40, None])
def test_nats_equal_a_forward_pass_a_window(window, monkeypatch):
    monkeypatch.setattr(likelihood, "_PIECE", 24)  # windows longer than a piece are streamed
    spec = {"type": "sliding_llama", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    model = build_model(spec, vocab_size=258, eos_token_id=256, pad_token_id=257).eval()
    corpus = Corpus.build(["The quick brown fox jumps over the lazy dog, again and again.", "Short.", "x" * 33], BYTES)
    nats = likelihood.token_nats(model, corpus, window)
    for ids, values in zip(corpus.ids, nats, strict=True):
        with_end = np.concatenate([[256], ids]).astype(np.int64)
        for start in range(0, len(ids), window or len(ids)):
            part = torch.from_numpy(with_end[start : start + (window or len(ids)) + 1])
            with torch.no_grad():
                log_p = model(input_ids=part[None, :-1]).logits[0].log_softmax(-1)
            expected = -log_p.gather(1, part[1:, None])[:, 0]
            np.testing.assert_allclose(values[start : start + len(expected)], expected, atol=1e-4)


def test_metrics_report_and_summary(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("some words, and some more words\n" * 200)
    config = parse_config(
        TASK,
        {
            "model": {"type": "sliding_llama", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1},
            "data": {"train": str(text)},
            "evaluation": {"lengths": [32, 64], "sample": 5},
            "training": {"length": 32},
        },
    )
    data = TASK.load(config)
    model = TASK.build_model(config, data).eval()
    metrics = TASK.evaluate(model, data.tokenizer, config.data, config.evaluation)
    assert metrics == TASK.evaluate(model, data.tokenizer, config.data, config.evaluation)
    assert list(metrics["windows"]) == ["32", "64", "whole"]
    assert metrics["gzip_bits_per_byte"] < 2
    assert next(iter(TASK.summary(metrics))) == "bits per byte @ 32"
    report = TASK.report(metrics)
    assert all(word in report for word in ("gzip", "xz", "memory carried", "anew every 32", "A sample"))
    TASK.plot({"a": metrics, "b": metrics}, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").exists()


def test_full_attention_is_not_read_whole():
    model = build_model(
        {"type": "llama", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1},
        vocab_size=258, eos_token_id=256, pad_token_id=257,
    )  # fmt: skip
    evaluation = TASK.evaluation_class(lengths=[64], max_bytes=2000, sample=0)
    metrics = TASK.evaluate(model.eval(), BYTES, TASK.data_class(), evaluation)
    assert list(metrics["windows"]) == ["64"]


def test_held_out_text_is_never_trained_on(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{i:07d}\n" for i in range(1000)))
    config = parse_config(TASK, {"data": {"train": str(text)}, "training": {"length": 8}})
    data = TASK.load(config)
    test = "".join(split_documents(config.data, "test"))
    train, validation = (bytes(d.ids[d.ids < 256].astype(np.uint8)).decode() for d in (data.train, data.validation))
    assert train + test + validation == text.read_text()
    assert len(test) > 0
    assert len(validation) > 0


def test_bad_options():
    with pytest.raises(ValueError, match=r"evaluation\.lengths=\[\]"):
        parse_config(TASK, {"evaluation": {"lengths": []}})
    with pytest.raises(ValueError, match="environment variable that is not set"):
        TASK.load(parse_config(TASK, {"data": {"train": "${SURELY_NOT_SET}/x.txt"}}))
    with pytest.raises(ValueError, match="task='langage' is unknown; use 'language'"):
        get_task("langage")
