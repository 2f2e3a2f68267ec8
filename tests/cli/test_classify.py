"""titans classify: a line a record, whatever the batches; nothing half-written; refusals."""

import csv
import gzip
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml

from titans.cli import main
from titans.training import classify
from titans.training.classifiers import build_classifier
from titans.training.classify import probabilities
from titans.training.models import load_run
from titans.training.tokens import nucleotide_tokenizer, special_ids


@pytest.fixture(scope="module", params=[False, True], ids=["one strand", "both strands"])
def run(request, tmp_path_factory):
    """A run's folder with random weights, trained on one strand or on both."""
    folder, tokenizer = tmp_path_factory.mktemp("run"), nucleotide_tokenizer()
    spec = {"variant": "lmm", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "chunk_size": 4}
    model = build_classifier(spec, classes=["cold, wet", "hot"], **special_ids(tokenizer))
    torch.nn.init.normal_(model.score.weight)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    config = {"task": "dna", "data": {"path": None, "reverse_complement": request.param}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return SimpleNamespace(path=str(folder), both=request.param)


@pytest.fixture
def genes():
    rng = np.random.default_rng(0)
    return {f"gene{i}": "".join(rng.choice(list("ACGTN"), n)) for i, n in enumerate([5, 30, 1, 70, 70, 12])}


@pytest.mark.parametrize("form", ["fa", "csv.gz"])
@pytest.mark.parametrize("tokens", [1, 150, 10_000])
def test_a_line_for_every_record(run, genes, form, tokens, tmp_path, monkeypatch, capsys):
    path, out = tmp_path / f"genes.{form}", tmp_path / "new" / "calls.csv"
    if form == "fa":
        path.write_text("".join(f">{name} some words\n{sequence.lower()}\n" for name, sequence in genes.items()))
    else:
        lines = "".join(f"{sequence},x,{name}\n" for name, sequence in genes.items())
        path.write_bytes(gzip.compress(("sequence,what,id\n" + lines).encode()))
    monkeypatch.setattr(classify, "BATCH_TOKENS", tokens)
    assert main(["classify", run.path, str(path), "-o", str(out)]) == 0
    assert f"{out}: the classes of 6 sequences" in capsys.readouterr().out
    with out.open(newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["id", "label", "p_cold, wet", "p_hot"]
    assert [row[0] for row in rows] == list(genes)
    expected = probabilities(*load_run(run.path), list(genes.values()), run.both)
    assert np.array([row[2:] for row in rows], float) == pytest.approx(expected, abs=2e-6)
    assert [row[1] for row in rows] == [["cold, wet", "hot"][i] for i in expected.argmax(1)]
    assert list(out.parent.iterdir()) == [out]


def test_nothing_is_left_of_a_file_that_turns_out_wrong(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(classify, "BATCH_TOKENS", 1)
    (tmp_path / "genes.fa").write_text(">one\nACGT\n>two\nACGT\n>three\nMEEP\n")
    assert main(["classify", run.path, str(tmp_path / "genes.fa"), "-o", str(tmp_path / "calls.csv")]) == 2
    assert "genes.fa, record 'three' has 'E' at letter 2, which is no nucleotide" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["genes.fa"]


def test_records_are_read_as_they_are_needed(run, tmp_path, monkeypatch):
    """Of a file of many records, no more than a batch and one are held."""
    taken, seen, read = 0, [], classify.read_records

    def counted(path):
        nonlocal taken
        for record in read(path):
            taken += 1
            yield record

    def measured(model, tokenizer, sequences, both):
        assert taken - sum(map(len, seen)) <= len(sequences) + 1
        seen.append(sequences)
        return np.full((len(sequences), 2), 0.5)

    monkeypatch.setattr(classify, "read_records", counted)
    monkeypatch.setattr(classify, "probabilities", measured)
    monkeypatch.setattr(classify, "BATCH_TOKENS", 40)
    (tmp_path / "many.fa").write_text("".join(f">{i}\nACGT\n" for i in range(100)))
    assert main(["classify", run.path, str(tmp_path / "many.fa"), "-o", str(tmp_path / "calls.csv")]) == 0
    assert [len(batch) for batch in seen] == [10] * 10


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.fa", "", "a.fa does not begin with a FASTA record"),
        ("a.csv", "", "a.csv is empty"),
        ("a.csv", "seq\nA\n", "a.csv has the columns seq; name that of the sequences 'sequence'"),
        ("a.fa", None, "a.fa does not exist; give a FASTA file or a CSV file"),
        ("out.csv", "sequence\nA\n", "out.csv' exists already; delete it or use another name"),
    ],
)
def test_refusals(run, name, text, message, tmp_path, capsys):
    if text is not None:
        (tmp_path / name).write_text(text)
    assert main(["classify", run.path, str(tmp_path / name), "-o", str(tmp_path / "out.csv")]) == 2
    assert message in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} <= {name}


def test_runs_that_cannot_classify(run, tmp_path, capsys):
    assert main(["classify", "nowhere", "a.fa", "-o", str(tmp_path / "out.csv")]) == 2
    assert "no model.safetensors" in capsys.readouterr().err
    folder = shutil.copytree(run.path, tmp_path / "run")
    (folder / "config.yaml").write_text("task: language")
    assert main(["classify", str(folder), "a.fa", "-o", str(tmp_path / "out.csv")]) == 2
    assert "task of" in (error := capsys.readouterr().err)
    assert "='language' is not valid; use a run of the task 'dna'" in error
    (folder / "config.yaml").write_text((Path(run.path) / "config.yaml").read_text())
    for file in folder.glob("tokenizer*"):
        file.unlink()
    (tmp_path / "a.fa").write_text(">one\nACGT\n")
    (tmp_path / "test.csv").write_text("sequence,label\nACGT,hot\n")
    for command in (
        ["classify", str(folder), str(tmp_path / "a.fa"), "-o", str(tmp_path / "out.csv")],
        ["eval", "dna", str(folder), "--data", str(tmp_path)],
    ):
        assert main(command) == 2
        assert "tokenizer=None is not valid; use the whole folder of the run" in capsys.readouterr().err
    assert not (tmp_path / "out.csv").exists()
