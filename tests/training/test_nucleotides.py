"""Letters, the nucleotide tokenizer, FASTA files as text."""

import gzip
import lzma

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from titans.training.config import TextData
from titans.training.nucleotides import nucleotides, reverse_complement
from titans.training.text import read_documents, read_fasta, stream_documents
from titans.training.tokens import (
    byte_tokenizer,
    encode,
    load_tokenizer,
    nucleotide_tokenizer,
    prompt_ids,
    tokenizer_of,
)

TOKENIZER = nucleotide_tokenizer()
LETTERS = "ACGTUNRYSWKMBDHV"


def test_letters():
    assert nucleotides("acgtunACGTUN") == "ACGTTNACGTTN"
    assert nucleotides("RYSWKMBDHVryswkmbdhv") == "N" * 20
    assert nucleotides("") == ""
    assert reverse_complement("AACGTN") == "NACGTT"


@pytest.mark.parametrize("letter", ["E", "*", "-", "l", "\n", "é"])
def test_other_letters_are_named_with_their_place(letter):
    with pytest.raises(ValueError, match=r"^here has '.+' at letter 3, which is no nucleotide; give DNA or RNA"):
        nucleotides(f"AC{letter}EG", "here")


@given(st.text(LETTERS + LETTERS.lower()))
def test_tokenizer_reads_as_its_table_does(text):
    ids = TOKENIZER(text)["input_ids"]
    assert ids == encode(TOKENIZER, [text])[0].tolist()
    assert TOKENIZER.decode(ids) == nucleotides(text)


def test_tokenizer_on_disk(tmp_path):
    assert (len(TOKENIZER), TOKENIZER.bos_token_id, TOKENIZER.eos_token_id, TOKENIZER.pad_token_id) == (7, 5, 5, 6)
    TOKENIZER.save_pretrained(tmp_path)
    for loaded in (
        AutoTokenizer.from_pretrained(tmp_path),
        load_tokenizer(str(tmp_path)),
        load_tokenizer("nucleotide"),
    ):
        assert loaded("acgun")["input_ids"] == encode(loaded, ["ACGTN"])[0].tolist() == [0, 1, 2, 3, 4]
        padded = loaded.pad({"input_ids": [[0, 1], [2]]})
        assert padded["input_ids"] == [[0, 1], [2, 6]]
        assert padded["attention_mask"] == [[1, 1], [1, 0]]


def test_tokenizer_refuses_other_letters():
    with pytest.raises(ValueError, match="the text has 'E' at letter 2"):
        encode(TOKENIZER, ["AEG"])
    with pytest.raises(Exception, match="UNK"):  # the library's own; it drops nothing silently
        TOKENIZER("AEG")


def test_prompts():
    assert prompt_ids(TOKENIZER, "acg").tolist() == [[0, 1, 2]]
    assert prompt_ids(TOKENIZER, "").tolist() == [[5]]
    assert prompt_ids(byte_tokenizer(), "Hi").tolist() == [[72, 105]]


@pytest.mark.parametrize("suffix", [".fa", ".fasta.gz", ".fna.xz"])
def test_fasta_records_are_documents(tmp_path, suffix):
    opener = {"fa": open, "gz": gzip.open, "xz": lzma.open}[suffix.rpartition(".")[2]]
    path = tmp_path / f"genome{suffix}"
    with opener(path, "wt") as file:
        file.write("\n>chr1 the first\r\nacgt\r\nAC GU\r\n\r\n>\nNNRY\n")
    assert list(read_fasta(path)) == [("chr1", "ACGTACGT"), ("record 2", "NNNN")]
    assert list(read_documents(path)) == ["ACGTACGT", "NNNN"]
    assert ["".join(blocks) for blocks in stream_documents(path)] == ["ACGTACGT", "NNNN"]
    (tmp_path / "a.txt").write_text("text")
    assert list(read_documents(tmp_path)) == ["text", "ACGTACGT", "NNNN"]


def test_the_tokenizer_follows_the_file():
    for data, size in (
        (TextData(train="x/genome.fa.gz"), 7), (TextData(train="x/book.txt"), 258), (TextData(), 258),
        (TextData(train="genome.fa", tokenizer="bytes"), 258), (TextData(train="genomes", tokenizer="nucleotide"), 7),
    ):  # fmt: skip
        assert len(tokenizer_of(data)) == size


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"a\.fa does not begin with a FASTA record; give it a line of `>` and a name"),
        ("\nACGT\n>two\nACGT\n", "does not begin with a FASTA record"),
        (">one\nACGT\n>two\n>three\nA\n", r"a\.fa, record 'two' has no sequence; give it one or remove it"),
        (
            ">one\nACGT\n>two some words\nACGT\nMEEP\n",
            r"a\.fa, record 'two' has 'E' at letter 6, which is no nucleotide",
        ),
        (">one\n\0\n", r"record 'one' has '\\x00' at letter 1"),
    ],
)
def test_bad_fasta_names_file_record_and_letter(tmp_path, text, message):
    (tmp_path / "a.fa").write_text(text)
    with pytest.raises(ValueError, match=message):
        list(read_documents(tmp_path / "a.fa"))


def test_fasta_that_cannot_be_read(tmp_path, monkeypatch):
    (tmp_path / "a.fa.gz").write_bytes(b"no gzip")
    with pytest.raises(ValueError, match=r"a\.fa\.gz is not a readable \.gz file"):
        list(read_fasta(tmp_path / "a.fa.gz"))
    with pytest.raises(FileNotFoundError, match="does not exist"):
        list(read_documents("nowhere.fa"))
    (tmp_path / "b.fa").write_text(">a\nA\n")
    monkeypatch.setitem(__import__("sys").modules, "Bio.SeqIO.FastaIO", None)
    with pytest.raises(ImportError, match=r"biopython.*titans\[dna\]"):
        list(read_fasta(tmp_path / "b.fa"))
