"""Language modelling: bits per byte of held-out text, by window length and by position in the document."""

import gzip
import lzma
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from titans.training.config import TextData, TrainConfig, option, require
from titans.training.task import TaskData

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WHOLE = "whole"  # the window that holds a document from its first byte to its last


@dataclass
class LanguageData(TextData):
    """Where the text comes from, and how much of it is validated on."""

    validation_bytes: float = option(250_000, "validate on at most so many bytes, the beginnings of all documents")
    carry: bool = option(
        False, "train on the windows of a document in their order, the memory carried from one to the next; gradients "
        "stop at a window's start (Titans only)"
    )  # fmt: skip
    streaming: bool = option(
        False, "read and tokenize the training text as training goes, at constant memory, over and over; windows are "
        "shuffled a million tokens at a time"
    )  # fmt: skip

    def __post_init__(self):
        require(self.validation_bytes > 0, "data.validation_bytes", self.validation_bytes, "a number above 0")
        if self.streaming:
            require(self.train is not None, "data.train", None, "the text that data.streaming is to read")
            mend = "false with data.streaming, or `titans prepare`: documents are drawn from all of the text"
            require(not self.carry, "data.carry", True, mend)
            self.require_held_out("is streamed")

    def require_held_out(self, why: str) -> None:
        """Raises ValueError where validation and test text are not given."""
        for split in ("validation", "test"):
            mend = f"a text of its own: data.train={self.train!r} {why}, and no text of it can be held out"
            require(getattr(self, split) is not None, f"data.{split}", None, mend)


@dataclass
class LanguageEvaluation:
    """What is measured on the test text."""

    lengths: list[int] = option([512, 8192], "windows, in tokens: the model starts anew at each")
    whole: bool = option(True, "also read each document from first to last byte, the memory carried all the way")
    max_bytes: float = option(1e6, "measure on at most so many bytes, the beginnings of all documents")
    sample: int = option(200, "tokens of a sample to generate after the beginning of the first document")

    def __post_init__(self):
        require(bool(self.lengths) and min(self.lengths) > 0, "evaluation.lengths", self.lengths, "lengths above 0")
        require(self.max_bytes > 0, "evaluation.max_bytes", self.max_bytes, "a number above 0")
        require(self.sample >= 0, "evaluation.sample", self.sample, "0 (no sample) or a number of tokens")


class Language:
    """Language modelling; see `titans.training.task.Task` for the methods."""

    name = "language"
    data_class = LanguageData
    evaluation_class = LanguageEvaluation
    picture = "position.png"
    higher_is_better = False
    bimodal = False

    def preset(self) -> dict[str, Any]:
        """A small byte-level MAC on the standard library's source: about three minutes on two cores."""
        return {
            "model": {
                "type": "titans",
                "variant": "mac",
                "hidden_size": 128,
                "intermediate_size": 256,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_memory_heads": 2,
                "memory_depth": 2,
                "memory_expansion": 2,
                "chunk_size": 64,
                "memory_max_lr": 0.1,
                "segment_length": 64,
                "num_persistent_tokens": 4,
            },
            "training": {"length": 512, "batch_size": 8, "tokens": 8e5, "learning_rate": 4e-3, "eval_every": 0.25},
            "data": {"validation_bytes": 50_000},
            "evaluation": {"lengths": [512], "max_bytes": 200_000},
        }

    def load(self, config: TrainConfig) -> TaskData:
        from titans.training.text import split_documents, truncate
        from titans.training.tokens import Corpus, WindowDataset, tokenizer_of

        data: LanguageData = config.data
        tokenizer = tokenizer_of(data)
        train = self._train(config, tokenizer)
        validation = truncate(split_documents(data, "validation"), int(data.validation_bytes))
        return TaskData(
            train=train,
            validation=WindowDataset(Corpus.build(validation, tokenizer).packed(), config.training.length),
            tokenizer=tokenizer,
            ordered=data.carry or data.streaming,
        )

    def _train(self, config: TrainConfig, tokenizer: Any) -> Any:
        from titans.training.streamed import StreamedWindows
        from titans.training.text import expand
        from titans.training.tokens import WindowDataset

        data, training = config.data, config.training
        if data.streaming:
            source = expand(data.train)
            return StreamedWindows(source, data.text_field, tokenizer, training.length, training.windows, training.seed)
        corpus = self._corpus(data, tokenizer)
        return self._streams(corpus, config) if data.carry else WindowDataset(corpus.packed(), training.length)

    def _corpus(self, data: LanguageData, tokenizer: Any) -> Any:
        """What is trained on: the tokens of `titans prepare` where they lie, or the text in memory."""
        from titans.training.prepared import PreparedCorpus, is_prepared
        from titans.training.text import expand, split_documents
        from titans.training.tokens import Corpus

        if data.train is None or not is_prepared(expand(data.train)):
            return Corpus.build(split_documents(data, "train"), tokenizer)
        data.require_held_out("holds tokens")
        return PreparedCorpus(expand(data.train), tokenizer)

    def _streams(self, corpus: Any, config: TrainConfig) -> Any:
        from titans.training.carried import DocumentStreams

        kind, training = config.model.get("type", "titans"), config.training
        require(kind == "titans", "data.carry", True, f"false: a {kind!r} cannot be trained with what it carries")
        return DocumentStreams(corpus, training.length, training.batch_size, training.windows, training.seed)

    def build_model(self, config: TrainConfig, data: TaskData) -> "PreTrainedModel":
        from titans.training.models import build_model
        from titans.training.tokens import special_ids

        return build_model(config.model, **special_ids(data.tokenizer), seed=config.training.seed)

    def evaluate(
        self, model: "PreTrainedModel", tokenizer: Any, data: LanguageData, evaluation: LanguageEvaluation
    ) -> dict[str, Any]:
        from titans.training.likelihood import measure
        from titans.training.models import has_constant_state
        from titans.training.text import split_documents, truncate
        from titans.training.tokens import Corpus

        documents = truncate(split_documents(data, "test"), int(evaluation.max_bytes))
        corpus = Corpus.build(documents, tokenizer)
        text = "".join(documents).encode()
        windows: dict[str, int | None] = {str(length): length for length in evaluation.lengths}
        if evaluation.whole and has_constant_state(model):
            windows[WHOLE] = None
        return {
            "documents": len(documents),
            "bytes": corpus.num_bytes,
            "words": corpus.num_words,
            "tokens": corpus.num_tokens,
            "gzip_bits_per_byte": 8 * len(gzip.compress(text, 9)) / len(text),
            "xz_bits_per_byte": 8 * len(lzma.compress(text, preset=9)) / len(text),
            "windows": {name: measure(model, corpus, length) for name, length in windows.items()},
            "sample": _sample(model, tokenizer, documents[0], evaluation.sample) if evaluation.sample else None,
        }

    def summary(self, metrics: dict[str, Any]) -> dict[str, float]:
        windows = metrics["windows"].items()
        bits = {f"bits per byte @ {name}": window["bits_per_byte"] for name, window in windows}
        words = {f"word perplexity @ {name}": window["word_perplexity"] for name, window in windows}
        return bits | {column: value for column, value in words.items() if value is not None}

    def report(self, metrics: dict[str, Any]) -> str:
        windows = metrics["windows"]
        names = {name: "memory carried" if name == WHOLE else f"anew every {name}" for name in windows}
        lines = [
            f"{metrics['bytes']:,} bytes of {metrics['documents']} held-out documents",
            "",
            "| | bits per byte | word perplexity |",
            "|---|---:|---:|",
        ]
        for name, window in windows.items():
            words = "" if window["word_perplexity"] is None else f"{window['word_perplexity']:,.1f}"
            lines.append(f"| {names[name]} | {window['bits_per_byte']:.3f} | {words} |")
        lines += [f"| {packer} | {metrics[packer + '_bits_per_byte']:.3f} | |" for packer in ("gzip", "xz")]
        lines += ["", "Bits per byte by position in the document:", ""]
        lines += ["| tokens | " + " | ".join(names.values()) + " |", "|---:|" + "---:|" * len(names)]
        for rows in zip(*(window["positions"] for window in windows.values()), strict=True):
            values = " | ".join(f"{row['bits_per_byte']:.3f}" for row in rows)
            lines.append(f"| {rows[0]['from']:,} to {rows[0]['to']:,} | {values} |")
        if metrics["sample"]:
            lines += ["", "A sample, after the beginning of a held-out document:", "", "```"]
            lines += [metrics["sample"]["prompt"] + metrics["sample"]["text"], "```"]
        return "\n".join(lines)

    def plot(self, metrics: dict[str, dict[str, Any]], path: Path) -> None:
        from matplotlib.figure import Figure

        longest = {name: list(m["windows"])[-1] for name, m in metrics.items()}
        names = list(next(iter(metrics.values()))["windows"]) if len(metrics) == 1 else None
        figure = Figure(figsize=(7, 4.5), layout="constrained")
        axes = figure.add_subplot(xlabel="position in the document (tokens)", ylabel="bits per byte", xscale="log")
        for name, m in metrics.items():
            for window in names or [longest[name]]:
                rows = m["windows"][window]["positions"]
                label = f"{name}, {'memory carried' if window == WHOLE else f'anew every {window}'}"
                axes.plot([row["to"] for row in rows], [row["bits_per_byte"] for row in rows], marker="o", label=label)
        axes.legend(fontsize="small")
        axes.grid(alpha=0.3)
        figure.savefig(path, dpi=120)


task = Language()


def _sample(model: Any, tokenizer: Any, document: str, tokens: int) -> dict[str, str]:
    """What the model writes after the first lines of a document; the same every time."""
    import torch
    from transformers import set_seed

    prompt = document[:200].rsplit("\n", 1)[0] or document[:200]
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).to(model.device)
    set_seed(0)
    with torch.inference_mode():
        output = model.generate(**ids, max_new_tokens=tokens, do_sample=True, temperature=0.7, top_p=0.95)
    written = output[0, ids["input_ids"].shape[1] :]
    return {"prompt": prompt, "text": tokenizer.decode(written, skip_special_tokens=True)}
