"""DNA: files that are right and wrong, both strands, scores, runs from end to end, bodies of language models."""

import gzip
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from titans.cli import main
from titans.tasks import get_task
from titans.tasks.dna import GUE, DnaEvaluation, scores
from titans.training.classifiers import build_classifier
from titans.training.classify import batches, probabilities
from titans.training.compare import Experiment, compare
from titans.training.config import parse_config
from titans.training.models import build_model, load_run
from titans.training.nucleotides import reverse_complement
from titans.training.run import _load_weights, train
from titans.training.sequences import FILES, Record, classes_of, read_records, read_split
from titans.training.tokens import nucleotide_tokenizer, special_ids

TASK, TOKENIZER = get_task("dna"), nucleotide_tokenizer()
SMALL = {
    "titans": {"variant": "lmm", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
               "num_memory_heads": 1, "memory_expansion": 1, "chunk_size": 4},
    "cnn": {"hidden_size": 16, "num_hidden_layers": 1},
}  # fmt: skip
MARKS = {"start": "TATAAA", "none": ""}


def sequences(count, seed):
    """Random ones of 12 to 20 bases without T; the class `start` has TATAAA within."""
    rng = np.random.default_rng(seed)
    for i in range(count):
        label = ("none", "start")[i % 2]
        bases = "".join(rng.choice(list("ACG"), rng.integers(12, 15)))
        where = rng.integers(len(bases))
        yield bases[:where] + MARKS[label] + bases[where:], label


def write(path, rows, names="sequence,label"):
    path.parent.mkdir(exist_ok=True)
    with (gzip.open if path.suffix == ".gz" else open)(path, "wt") as file:
        file.write("\n".join([names, *(",".join(row) for row in rows)]) + "\n")
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three splits, one of them packed."""
    path = tmp_path_factory.mktemp("dna") / "marks"
    write(path / "train.csv", sequences(128, 0))
    write(path / "dev.csv.gz", sequences(32, 1))
    write(path / "test.csv", sequences(33, 2))
    return path


def values(folder, output, kind="titans", **training):
    training = {"length": 20, "batch_size": 16, "tokens": 20 * 16 * 60, "eval_every": 0.25, "learning_rate": 1e-2,
                **training}  # fmt: skip
    model = {"type": kind, **SMALL[kind]}
    return {"output": str(output), "model": model, "training": training, "data": {"path": str(folder)}}


def small(kind="titans", classes=("none", "start")):
    return build_classifier({"type": kind, **SMALL[kind]}, classes=list(classes), **special_ids(TOKENIZER)).eval()


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "marks"
    config = parse_config(TASK, values(folder, output))
    return output, train(config, TASK, progress=False)


def test_gue():
    """The seven tasks have the files of the protocol, two classes and the lengths that the options name."""
    if "TITANS_DATA" not in os.environ:
        pytest.skip("TITANS_DATA names no folder of data sets")
    for name, length in GUE.items():
        folder = str(Path(os.environ["TITANS_DATA"]) / "gue" / name)
        splits = {split: read_split(folder, split) for split in FILES[1:]}  # the train files are long
        assert classes_of(splits) == ["0", "1"]
        assert {len(record.sequence) for records in splits.values() for record in records} == {length}
    assert len(read_split("$TITANS_DATA/gue/prom_core_tata", "train")) == 4904


def test_records_of_csv_files(tmp_path):
    rows = [("acgu", "x", "7"), ("RT", "", ""), ("N" * 200_000, '"a, b"', "long")]
    path = write(tmp_path / "a.csv.gz", rows, "sequence,label,id")
    records = list(read_records(path))
    assert records[:2] == [Record("7", "ACGT", "x"), Record("2", "NT", "")]
    assert (records[2].id, len(records[2].sequence), records[2].label) == ("long", 200_000, "a, b")
    assert list(read_records(write(tmp_path / "b.csv", [("1", "A")], "other,sequence"))) == [Record("1", "A")]
    (tmp_path / "c.fa").write_text(">one\nac\n")
    assert list(read_records(tmp_path / "c.fa")) == [Record("one", "AC")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"train\.csv is empty; give a CSV file with a line of names"),
        ("sequence,label\n", "nothing below it"),
        ("seq,label\nA,0\n", r"has the columns seq, label; name that of the sequences 'sequence'"),
        ("sequence,class\nA,0\n", r"record '1' has no label; give a CSV file with the columns 'sequence' and 'label'"),
        ("sequence,label\nA,0\nC,\n", r"train\.csv, record '2' has no label"),
        ("sequence,label\nA,0\n,1\n", r"train\.csv, record '2' has no sequence; give it one"),
        ("sequence,label\nA,0\nC\n", r"line 3 has 1 cells, its first line 2"),
        ("sequence,label\nACGT,0\nMEEP,1\n", r"train\.csv, record '2' has 'E' at letter 2, which is no nucleotide"),
        ("sequence,label\nA,0\n\0,1\n", "is not utf-8 text"),
    ],
)
def test_bad_files_name_the_mend(tmp_path, text, message):
    (tmp_path / "train.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_split(str(tmp_path), "train")


def test_bad_folders_name_the_mend(tmp_path):
    with pytest.raises(ValueError, match=r"data\.path=None is not valid; use a folder with the files train, dev, test"):
        read_split(None, "train")
    with pytest.raises(FileNotFoundError, match=r"data\.path='nowhere' is no folder; give one with train, dev, test"):
        read_split("nowhere", "train")
    with pytest.raises(FileNotFoundError, match=r"holds no dev file; put one dev\.csv there"):
        read_split(str(tmp_path), "dev")
    write(tmp_path / "dev.csv", [("A", "0")])
    write(tmp_path / "dev.csv.gz", [("A", "0")])
    with pytest.raises(FileNotFoundError, match=r"holds dev\.csv, dev\.csv\.gz; put one dev\.csv there"):
        read_split(str(tmp_path), "dev")
    (tmp_path / "train.fa").write_text(">one\nACGT\n")
    with pytest.raises(ValueError, match=r"train\.fa, record 'one' has no label; give a CSV file"):
        read_split(str(tmp_path), "train")
    with pytest.raises(FileNotFoundError, match=r"nowhere\.fa does not exist; give a FASTA file or a CSV file"):
        list(read_records("nowhere.fa"))


def test_splits_of_other_classes_are_refused():
    a, b, c = (Record("", "A", label) for label in "abc")
    assert classes_of({"train": [b, a, a], "dev": [a, b]}) == ["a", "b"]
    with pytest.raises(
        ValueError, match=r"classes of dev=\['a', 'b', 'c'\] is not valid; use those of train, \['a', 'b'"
    ):
        classes_of({"train": [a, b], "dev": [a, b, c]})
    with pytest.raises(ValueError, match=r"classes of test=\['a'\] is not valid"):
        classes_of({"train": [a, b], "dev": [b, a], "test": [a]})
    with pytest.raises(ValueError, match=r"classes of train=\['a'\] is not valid; use records of at least two classes"):
        classes_of({"train": [a]})


def test_a_sequence_longer_than_a_window_is_named(folder, tmp_path):
    with pytest.raises(
        ValueError, match=r"training\.length=19 is not valid; use at least 20, the bases of train record"
    ):
        TASK.load(parse_config(TASK, values(folder, tmp_path, length=19)))


@pytest.mark.parametrize("both", [False, True])
def test_items_and_batches(folder, tmp_path, both):
    config = parse_config(TASK, values(folder, tmp_path))
    config.data.reverse_complement = both
    data, rows = TASK.load(config), list(sequences(128, 0))
    assert (len(data.train), len(data.validation)) == (256 if both else 128, 32)
    for index, (sequence, label) in list(enumerate(rows))[:4]:
        assert data.train[index] == {"input_ids": TOKENIZER(sequence)["input_ids"], "labels": int(label == "start")}
        if both:
            other = TOKENIZER(reverse_complement(sequence))["input_ids"]
            assert data.train[128 + index] == {**data.train[index], "input_ids": other}
    lengths = [len(sequence) for sequence, _ in rows[:4]]
    batch = data.collate([data.train[i] for i in range(4)])
    assert batch["input_ids"].shape == (4, max(lengths))
    assert batch["attention_mask"].sum(1).tolist() == lengths
    assert batch["labels"].tolist() == [0, 1, 0, 1]


def test_scores():
    """Two classes by the textbook's formula, three by hand; a class that is never taken; one taken always."""
    got = scores(np.array([[50, 10], [5, 35]]))
    assert got["accuracy"] == pytest.approx(0.85)
    assert got["mcc"] == pytest.approx((35 * 50 - 10 * 5) / np.sqrt(45 * 40 * 60 * 55))
    assert got["macro_f1"] == pytest.approx((100 / 115 + 70 / 85) / 2)
    three = scores(np.array([[2, 1, 0], [0, 2, 0], [1, 0, 0]]))
    assert three["mcc"] == pytest.approx((6 * 4 - (3 * 3 + 3 * 2 + 0)) / np.sqrt((36 - 18) * (36 - 14)))
    assert three["macro_f1"] == pytest.approx((4 / 6 + 4 / 5 + 0) / 3)
    assert scores(np.array([[3, 0], [2, 0]])) == {"accuracy": 0.6, "mcc": 0.0, "macro_f1": pytest.approx(0.375)}
    assert scores(np.diag([3, 4, 5]))["mcc"] == pytest.approx(1)


@pytest.mark.parametrize("kind", SMALL)
def test_probabilities_are_of_each_sequence_alone_and_of_both_strands_if_asked(kind):
    model, texts = small(kind), ["ACGTNNACA", "GG", "TTTTTTTTTTTTTCA"]
    got = probabilities(model, TOKENIZER, texts)
    assert got.sum(1) == pytest.approx(1)
    for text, row in zip(texts, got, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([TOKENIZER(text)["input_ids"]])).logits
        assert row == pytest.approx(logits[0].softmax(0).numpy(), abs=1e-6)
    both = probabilities(model, TOKENIZER, texts, both_strands=True)
    assert both == pytest.approx((got + probabilities(model, TOKENIZER, list(map(reverse_complement, texts)))) / 2)
    assert both == pytest.approx(
        probabilities(model, TOKENIZER, list(map(reverse_complement, texts)), both_strands=True)
    )


def test_batches_hold_so_many_tokens_and_lose_nothing():
    records = [Record(str(i), "A" * n) for i, n in enumerate([3, 3, 3, 9, 1, 1, 30, 2])]
    got = [[record.id for record in batch] for batch in batches(iter(records), 9)]
    assert got == [["0", "1", "2"], ["3"], ["4", "5"], ["6"], ["7"]]


def test_train_and_eval(run, folder, tmp_path, capsys):
    output, result = run
    metrics = result["metrics"]
    assert metrics["accuracy"] > 0.9
    assert metrics["sequences"] == np.sum(metrics["confusion"]) == 33
    assert metrics["classes"] == ["none", "start"]
    assert list(TASK.summary(metrics)) == ["MCC", "accuracy", "macro F1"]
    lines = [json.loads(line) for line in (output / "metrics.jsonl").open()]
    assert result["validation_loss"] == min(line["eval_loss"] for line in lines if "eval_loss" in line)
    assert (output / "confusion.png").exists()
    model, tokenizer = load_run(str(output))
    assert model.config.id2label == {0: "none", 1: "start"}
    assert tokenizer("acg")["input_ids"] == [0, 1, 2]
    out = tmp_path / "out.json"
    assert main(["eval", "dna", str(output), "--json", str(out), "--batch-tokens", "50"]) == 0
    assert "33 test sequences of 2 classes" in capsys.readouterr().out
    written = json.loads(out.read_text())
    assert {name: written[name] for name in metrics} == {**metrics, "mcc": pytest.approx(metrics["mcc"])}
    other = write(tmp_path / "other" / "test.csv", [("ACGT", "start"), ("ACGT", "end")])
    assert main(["eval", "dna", str(output), "--data", str(other.parent)]) == 2
    assert "labels of test=['end'] is not valid; use the model's: none, start" in capsys.readouterr().err
    for command in (["eval", "language", str(output)], ["generate", str(output)]):
        assert main(command) == 2
        assert "TitansForSequenceClassification, which writes no text; give a language model" in capsys.readouterr().err


def test_the_checkpoint_is_chosen_on_dev_alone(folder, tmp_path):
    """Another test file changes neither the weights nor the validation loss."""
    results = []
    for name, seed in (("one", 2), ("two", 3)):
        for split in ("train.csv", "dev.csv.gz"):
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / split).write_bytes((folder / split).read_bytes())
        write(tmp_path / name / "test.csv", sequences(33, seed))
        config = parse_config(TASK, values(tmp_path / name, tmp_path / f"run_{name}", tokens=20 * 16 * 8))
        results.append(train(config, TASK, progress=False))
    assert results[0]["validation_loss"] == results[1]["validation_loss"]
    models = [load_run(str(tmp_path / f"run_{name}"))[0] for name in ("one", "two")]
    assert all(torch.equal(p, models[1].state_dict()[n]) for n, p in models[0].state_dict().items())


def test_compare(folder, tmp_path):
    experiment = Experiment(
        task="dna", output=str(tmp_path / "out"), parameter_tolerance=9.0, data={"path": str(folder)},
        models={kind: {"model": {"type": kind, **SMALL[kind]}} for kind in SMALL},
        training={"length": 20, "batch_size": 16, "tokens": 20 * 16 * 4, "eval_every": 1},
    )  # fmt: skip
    results = compare(experiment, TASK, say=lambda text: None)
    assert [len(entry["runs"]) for entry in results["models"].values()] == [1, 1]
    assert "| MCC | accuracy | macro F1 |" in (tmp_path / "out" / "table.md").read_text()
    assert (tmp_path / "out" / "confusion.png").exists()


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A language model of nucleotides, by the command, on a FASTA file."""
    path = tmp_path_factory.mktemp("genome")
    rng = np.random.default_rng(0)
    with gzip.open(path / "genome.fa.gz", "wt") as file:
        for i in range(3):
            file.write(f">chr{i}\n" + "\n".join("".join(rng.choice(list("ACGTn"), 60)) for _ in range(20)) + "\n")
    model = ["--model", json.dumps({"type": "titans", **SMALL["titans"]})]
    sizes = ["--training.length", "20", "--training.batch_size", "4", "--training.tokens", "400"]
    options = ["--evaluation.lengths", "[16]", "--evaluation.sample", "4", *model, *sizes]
    assert main(["train", "--data", str(path / "genome.fa.gz"), "--output", str(path / "run"), *options]) == 0
    return path / "run"


def test_the_next_nucleotide(pretrained, capsys):
    metrics = json.loads((pretrained / "result.json").read_text())["metrics"]
    assert metrics["tokens"] == metrics["bytes"] == 171  # 5 % of 3,420 bases
    assert metrics["windows"]["16"]["word_perplexity"] is None
    assert set(metrics["sample"]["text"]) <= set("ACGTN")
    assert list(get_task("language").summary(metrics)) == ["bits per byte @ 16", "bits per byte @ whole"]
    assert main(["generate", str(pretrained), "--prompt", "acgtu", "--max-new-tokens", "5"]) == 0
    assert capsys.readouterr().out.startswith("ACGTT")
    genome, memory = pretrained.parent / "genome.fa.gz", pretrained.parent / "memory.safetensors"
    assert main(["memorize", str(pretrained), str(genome), "-o", str(memory)]) == 0
    assert "3603 tokens read" in capsys.readouterr().out.replace(",", "")  # three records of 1,200
    assert main(["generate", str(pretrained), "--prompt", "MEEP"]) == 2
    assert "the text has 'E' at letter 2, which is no nucleotide" in capsys.readouterr().err
    assert main(["eval", "dna", str(pretrained)]) == 2
    assert "model='TitansForCausalLM' is not valid; use a model trained on this task" in capsys.readouterr().err


def test_starts_from_a_language_model(pretrained, folder, tmp_path):
    """A learning rate too small to move anything leaves its body; another size is refused by name."""
    tiny = {"tokens": 20 * 16, "learning_rate": 1e-12, "start_from": str(pretrained)}
    config = parse_config(TASK, values(folder, tmp_path / "run", **tiny))
    train(config, TASK, evaluate=False, progress=False)
    bodies = [load_run(str(path))[0].base_model.state_dict() for path in (pretrained, tmp_path / "run")]
    assert all(torch.allclose(p, bodies[1][name], atol=1e-6) for name, p in bodies[0].items())
    config = parse_config(TASK, values(folder, tmp_path / "other", **tiny))
    config.model["hidden_size"] = 32
    with pytest.raises(ValueError, match=r"(?s)training\.start_from=.*run' does not fit this model: .*embed_tokens"):
        train(config, TASK, progress=False)


@pytest.mark.parametrize(
    "spec",
    [
        {"type": "mamba2", "hidden_size": 16, "num_hidden_layers": 1, "head_dim": 8, "state_size": 8},
        {"type": "gated_delta_net", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1},
    ],
    ids=lambda spec: spec["type"],
)
def test_baselines_start_from_language_models_too(spec, tmp_path):
    body = build_model(spec, **special_ids(TOKENIZER), seed=1)
    body.save_pretrained(tmp_path)
    model = build_classifier(spec, classes=["a", "b"], **special_ids(TOKENIZER))
    _load_weights(model, str(tmp_path))
    assert all(torch.equal(p, model.backbone.state_dict()[n]) for n, p in body.base_model.state_dict().items())


def test_a_run_with_both_strands_says_so_to_its_evaluation(folder, tmp_path):
    config = parse_config(TASK, values(folder, tmp_path / "run", tokens=20 * 16 * 4))
    config.data.reverse_complement = True
    result = train(config, TASK, progress=False)
    model, tokenizer = load_run(str(tmp_path / "run"))
    records = read_split(str(folder), "test")
    both = probabilities(model, tokenizer, [record.sequence for record in records], both_strands=True).argmax(1)
    right = [model.config.id2label[i] == record.label for i, record in zip(both, records, strict=True)]
    assert result["metrics"]["accuracy"] == pytest.approx(np.mean(right))


def test_bad_options_name_the_mend(tmp_path, capsys):
    with pytest.raises(ValueError, match=r"evaluation\.batch_tokens=0 is not valid"):
        DnaEvaluation(batch_tokens=0)
    with pytest.raises(ValueError, match=r"'data\.reverse_complment' is no option; did you mean"):
        parse_config(TASK, {"data": {"reverse_complment": True}})
    assert main(["train", "--task", "dna", "--data", "nowhere", "--output", str(tmp_path / "none")]) == 2
    assert "data.path='nowhere' is no folder" in capsys.readouterr().err
