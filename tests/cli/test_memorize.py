"""titans memorize: files of any size into a memory, whatever interrupts it; titans generate goes on from it."""

import gzip
import json
import lzma
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from titans.cli import main
from titans.memory.state import load_tensors
from titans.models import TitansCache, TitansForCausalLM
from titans.models.configuration import VARIANTS
from titans.training import memorize as memorizing
from titans.training.likelihood import measure
from titans.training.models import build_model, load_run
from titans.training.tokens import Corpus, byte_tokenizer, special_ids

LMM = {
    "variant": "lmm", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1,
    "memory_depth": 1, "chunk_size": 64,
}  # fmt: skip
MAC = LMM | {"variant": "mac", "chunk_size": 16, "segment_length": 40, "sliding_window": 50}


def make_run(folder, spec, seed=0):
    """A run of bytes, not trained."""
    tokenizer = byte_tokenizer()
    build_model(spec, **special_ids(tokenizer), seed=seed).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("run"), MAC)


def write_text(path, size):
    with open(path, "w") as file:
        line = 0
        while file.tell() < size:
            file.writelines(f"{i} times {i} is {i * i}.\n" for i in range(line, line + 20))
            line += 20
    return str(path)


def start(*arguments):
    code = "import sys; from titans.cli import main; sys.exit(main(sys.argv[1:]))"
    return subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], stderr=subprocess.PIPE, text=True)


def resident(process):
    """MiB."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) / 1024


def notes(path):
    return json.loads(load_tensors(path)[1]["titans_memory"])["notes"]


def wait_for(path, process, tokens=1):
    """Until so many tokens are saved; the resident memory of the process by the tokens saved."""
    sizes = {}
    while not path.exists() or notes(path)["tokens"] < tokens:
        assert process.poll() is None, process.stderr.read()
        if path.exists():
            sizes[notes(path)["tokens"]] = resident(process)
        time.sleep(0.02)
    return sizes


def kill_and_resume(folder, run, text, save_every, tokens):
    """Reads ``text`` twice, once killed when ``tokens`` were saved: both files, resident sizes, tokens/s resumed."""
    whole, cut = folder / "whole", folder / "cut"
    command = ["memorize", run, text, "--save-every", save_every, "-o"]
    reference, process = start(*command, whole), start(*command, cut)
    sizes = wait_for(folder / "cut.unfinished", process, tokens)
    process.kill()
    process.wait()
    assert not cut.exists(), "it was done before it was killed"
    began, before = time.perf_counter(), notes(folder / "cut.unfinished")["tokens"]
    again = start(*command, cut)
    assert again.wait() == 0, again.stderr.read()
    speed = (notes(cut)["tokens"] - before) / (time.perf_counter() - began)
    assert reference.wait() == 0, reference.stderr.read()
    assert not (folder / "cut.unfinished").exists()
    return whole, cut, sizes, speed


def test_killed_and_resumed_is_the_same_file(tmp_path):
    text, run = write_text(tmp_path / "text.txt", 100_000), make_run(tmp_path / "run", LMM)
    whole, cut, _, _ = kill_and_resume(tmp_path, run, text, save_every=4096, tokens=20_000)
    assert cut.read_bytes() == whole.read_bytes()
    assert notes(cut)["tokens"] == os.path.getsize(text) + 1


@pytest.mark.slow
def test_fifty_megabytes_killed_half_way(tmp_path):
    """The same memory bit for bit, and the process no larger at the end than at the beginning."""
    run = make_run(tmp_path / "run", LMM)
    text = write_text(tmp_path / "text.txt", 50_000_000)
    whole, cut, sizes, speed = kill_and_resume(tmp_path, run, text, save_every=1_000_000, tokens=25_000_000)
    assert cut.read_bytes() == whole.read_bytes()
    assert notes(cut)["tokens"] == os.path.getsize(text) + 1
    first, *_, last = sizes.values()
    print(f"{speed:,.0f} tokens/s after the resume; {first:.0f} MiB resident at {min(sizes):,} tokens, "
          f"{last:.0f} MiB at {max(sizes):,}")  # fmt: skip
    assert last < first + 20


def memorize(run, *arguments):
    return main(["memorize", run, *map(str, arguments)])


def stop_after(monkeypatch, pieces):
    """Ctrl-C, so many pieces later."""
    read, left = memorizing._read, iter(range(pieces))

    def stop(*arguments):
        if next(left, None) is None:
            raise KeyboardInterrupt
        read(*arguments)

    monkeypatch.setattr(memorizing, "_read", stop)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """Of this process: chunks, segments and windows are open where they end."""
    monkeypatch.setattr(memorizing, "PIECE", 250)


@pytest.fixture
def half_read(run, tmp_path, monkeypatch):
    """The unfinished memory of 4 pieces of a text of 6."""
    text = write_text(tmp_path / "text.txt", 1400)
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        assert memorize(run, text, "-o", tmp_path / "m", "--save-every", 500) == 130
    assert notes(tmp_path / "m.unfinished")["tokens"] == 1000
    return text


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_resume_reads_on_from_what_was_saved(variant, tmp_path, monkeypatch):
    """Twice interrupted, saved at other places: the same file."""
    text, run = write_text(tmp_path / "text.txt", 1400), make_run(tmp_path / "run", MAC | {"variant": variant})
    for pieces, every, saved in ((3, 500, 500), (1, 1, 750)):
        with monkeypatch.context() as patch:
            stop_after(patch, pieces)
            assert memorize(run, text, "-o", tmp_path / "m", "--save-every", every) == 130
        assert notes(tmp_path / "m.unfinished")["tokens"] == saved
    assert memorize(run, text, "-o", tmp_path / "m") == 0
    assert memorize(run, text, "-o", tmp_path / "n") == 0
    assert (tmp_path / "m").read_bytes() == (tmp_path / "n").read_bytes()


def test_a_kill_between_the_last_saving_and_the_name(run, tmp_path, monkeypatch, capsys):
    text = write_text(tmp_path / "text.txt", 600)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda a, b: Path(a).rename(b) if str(a).endswith(".part") else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            memorize(run, text, "-o", tmp_path / "m")
    assert memorize(run, text, "-o", tmp_path / "m") == 0
    assert memorize(run, text, "-o", tmp_path / "n") == 0
    assert (tmp_path / "m").read_bytes() == (tmp_path / "n").read_bytes()
    assert memorize(run, text, "-o", tmp_path / "m") == 2
    assert "exists already; delete it or use another name" in capsys.readouterr().err


@pytest.mark.parametrize("other", ["another text", "shorter", "longer before", "only its end"])
def test_a_resume_with_other_text_is_refused(other, half_read, run, tmp_path, capsys):
    text, path = Path(half_read).read_text(), tmp_path / "other.txt"
    path.write_text({"another text": text.replace("7", "8"), "shorter": text[:700], "longer before": "x" + text,
                     "only its end": text[-700:]}[other])  # fmt: skip
    before = (tmp_path / "m.unfinished").read_bytes()
    assert memorize(run, path, "-o", tmp_path / "m") == 2
    assert "m.unfinished has read 1,000 tokens of other text" in capsys.readouterr().err
    assert memorize(run, path, half_read, "-o", tmp_path / "m") == 2
    assert (tmp_path / "m.unfinished").read_bytes() == before
    assert not (tmp_path / "m").exists()


def test_a_resume_by_another_run_is_refused(half_read, tmp_path, capsys):
    assert memorize(make_run(tmp_path / "run", MAC, seed=1), half_read, "-o", tmp_path / "m") == 2
    assert "other weights" in capsys.readouterr().err
    assert memorize(make_run(tmp_path / "lmm", LMM), half_read, "-o", tmp_path / "m") == 2
    assert "variant='mac', not 'lmm'" in capsys.readouterr().err


@pytest.mark.parametrize("remarks", [{}, {"title": "a book"}])
def test_a_memory_of_somebody_else_is_not_read_on(remarks, half_read, run, tmp_path, capsys):
    model, path = TitansForCausalLM.from_pretrained(run), tmp_path / "m.unfinished"
    cache = TitansCache.load(path, model)
    cache.notes = remarks
    cache.save_pretrained(path, model)
    assert memorize(run, half_read, "-o", tmp_path / "m") == 2
    assert "m.unfinished is a memory that `memorize` did not write" in capsys.readouterr().err


def test_files_are_documents_however_they_are_packed(run, tmp_path, monkeypatch):
    """The end-of-text token before each; the same memory, to the bit, from plain, packed and JSON-lines files."""
    texts = ["Grüße \U0001f600\r\n" * 30, "the other\n" * 20]
    (tmp_path / "a.txt").write_text(texts[0], newline="")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(texts[1].encode()))
    (tmp_path / "ab.jsonl.xz").write_bytes(lzma.compress("\n".join(json.dumps({"t": t}) for t in texts).encode()))
    assert memorize(run, tmp_path / "a.txt", tmp_path / "b.txt.gz", "-o", tmp_path / "new" / "m") == 0
    assert memorize(run, tmp_path / "ab.jsonl.xz", "--text-field", "t", "-o", tmp_path / "n") == 0
    assert (tmp_path / "new" / "m").read_bytes() == (tmp_path / "n").read_bytes()
    monkeypatch.setattr("titans.models.causal_lm.PIECE", 250)
    model, tokenizer = load_run(run)
    ids = [i for text in texts for i in (tokenizer.eos_token_id, *text.encode())]
    expected, got = model.memorize(torch.tensor([ids])), TitansCache.load(tmp_path / "n", model)
    assert got.notes["tokens"] == len(ids)
    for a, b in zip(got.layers, expected.layers, strict=True):
        assert all(torch.equal(t, b.state.tensors()[name]) for name, t in a.state.tensors().items())


def test_surprise_is_what_evaluation_measures(run, tmp_path, capsys):
    text = write_text(tmp_path / "text.txt", 1000)
    assert memorize(run, text, "-o", tmp_path / "m") == 0
    model, tokenizer = load_run(run)
    expected = measure(model, Corpus.build([Path(text).read_text()], tokenizer), None)["bits_per_byte"]
    assert memorizing.Reading(**notes(tmp_path / "m")).surprise == pytest.approx(expected, rel=1e-6)
    assert f"{expected:.3f} bits a token" in capsys.readouterr().out


def test_generate_goes_on_from_a_memory(run, tmp_path, capsys):
    text = write_text(tmp_path / "text.txt", 1000)
    assert memorize(run, text, "-o", tmp_path / "m") == 0
    capsys.readouterr()
    options = ["--prompt", "7 times", "--max-new-tokens", "20"]
    assert main(["generate", run, "--memory", str(tmp_path / "m"), *options]) == 0
    model, tokenizer = load_run(run)
    prompt = torch.tensor([list(b"7 times")])
    ids = model.generate(prompt, cache=TitansCache.load(tmp_path / "m", model), max_new_tokens=20, do_sample=False)
    printed = capsys.readouterr().out
    assert printed.rstrip("\n") == tokenizer.decode(ids[0], skip_special_tokens=True).rstrip("\n")
    assert main(["generate", run, *options]) == 0
    assert capsys.readouterr().out != printed, "the memory says nothing"
    other = make_run(tmp_path / "other", MAC, seed=1)
    assert main(["generate", other, "--memory", str(tmp_path / "m"), *options]) == 2
    assert "other weights" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.txt", None, "missing.txt is no file; give text files"),
        (".", None, "is no file; give text files"),
        ("empty.txt", b"", "empty.txt is empty"),
        ("binary.txt", b"a\0b", "binary.txt is not utf-8 text"),
        ("latin.txt", "é".encode("latin-1"), "latin.txt is not utf-8 text"),
        ("cut.txt.gz", gzip.compress(os.urandom(9999).hex().encode())[:5000], "cut.txt.gz is not a readable .gz file"),
    ],
)
def test_files_that_cannot_be_read(name, content, message, run, tmp_path, capsys):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert memorize(run, tmp_path / name, "-o", tmp_path / "m") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "m").exists()


def test_mistakes(run, tmp_path, capsys):
    text = write_text(tmp_path / "text.txt", 100)
    assert memorize(run, text, "-o", tmp_path / "m", "--save-every", 0) == 2
    assert "save_every=0" in capsys.readouterr().err
    llama = {"type": "llama", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    assert memorize(make_run(tmp_path / "llama", llama), text, "-o", tmp_path / "m") == 2
    assert "model_type='llama' has no memory" in capsys.readouterr().err
    (tmp_path / "m.unfinished").write_bytes(b"broken")
    assert memorize(run, text, "-o", tmp_path / "m") == 2
    assert "m.unfinished is truncated or no safetensors file" in capsys.readouterr().err
