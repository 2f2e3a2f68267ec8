"""Sequences of nucleotides and their classes: records of files, a folder's splits, training items. No torch here."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from titans.training.config import require
from titans.training.nucleotides import nucleotides, reverse_complement
from titans.training.text import expand, is_fasta, read_csv, read_fasta

if TYPE_CHECKING:
    from titans.training.tokens import Tokenizer

FILES = ("train", "dev", "test")  # of a folder, a split each, as in GUE


@dataclass(frozen=True)
class Record:
    """One sequence (A, C, G, T, N) and its class; `label` is empty where the file tells none."""

    id: str
    sequence: str
    label: str = ""


def read_records(path: str | Path) -> Iterator[Record]:
    """The records of a FASTA file or, by any other name, a CSV file (each also .gz, .xz), one at a time.

    A CSV file has a column `sequence`, and may have `label` and `id` (by default the record's number).

    Raises:
        FileNotFoundError: no such file.
        ValueError: no record or no such column, a record without a sequence, a letter that is no nucleotide.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} does not exist; give a FASTA file or a CSV file with a column 'sequence'")
    if is_fasta(path):
        yield from (Record(name, sequence) for name, sequence in read_fasta(path))
        return
    lines = read_csv(path)
    _, header = next(lines)
    if "sequence" not in header:
        raise ValueError(f"{path} has the columns {', '.join(header)}; name that of the sequences 'sequence'")
    for number, (_, cells) in enumerate(lines, start=1):
        row = dict(zip(header, cells, strict=True))
        name = row.get("id") or str(number)
        if not row["sequence"]:
            raise ValueError(f"{path}, record {name!r} has no sequence; give it one or remove it")
        yield Record(name, nucleotides(row["sequence"], f"{path}, record {name!r}"), row.get("label", ""))


def read_split(folder: str | None, split: str) -> list[Record]:
    """All records of a split's file in `folder`, each with its label.

    Raises:
        FileNotFoundError: no such folder, or no such file in it.
        ValueError: no folder given, two files of that split, a record without a label, or as `read_records`.
    """
    require(folder is not None, "data.path", folder, f"a folder with the files {', '.join(FILES)} (.csv, .gz, .xz)")
    path = Path(expand(str(folder)))
    if not path.is_dir():
        raise FileNotFoundError(f"data.path={str(folder)!r} is no folder; give one with {', '.join(FILES)} files")
    found = sorted(file for file in path.iterdir() if file.name.partition(".")[0] == split)
    if len(found) != 1:
        names = ", ".join(file.name for file in found) or f"no {split} file"
        raise FileNotFoundError(f"{path} holds {names}; put one {split}.csv there (or .csv.gz, .csv.xz)")
    records = list(read_records(found[0]))
    for record in records:
        if not record.label:
            mend = "give a CSV file with the columns 'sequence' and 'label'"
            raise ValueError(f"{found[0]}, record {record.id!r} has no label; {mend}")
    return records


def classes_of(splits: dict[str, list[Record]]) -> list[str]:
    """The labels that occur, in order: the same in every split.

    Raises:
        ValueError: other labels in one split than in another, or one label alone.
    """
    found = {split: sorted({record.label for record in records}) for split, records in splits.items()}
    first, classes = next(iter(found.items()))
    require(len(classes) > 1, f"classes of {first}", classes, "records of at least two classes")
    for split, others in found.items():
        require(others == classes, f"classes of {split}", others, f"those of {first}, {classes}")
    return classes


class LabelledSequences:
    """Items `{"input_ids": token ids of one sequence, "labels": its class's number}`; they are to be padded.

    Args:
        both_strands: after all sequences come their reverse complements, of the same classes.
    """

    def __init__(self, records: Sequence[Record], classes: list[str], tokenizer: "Tokenizer", both_strands: bool):
        from titans.training.tokens import encode

        sequences, labels = [record.sequence for record in records], [classes.index(r.label) for r in records]
        if both_strands:
            sequences, labels = sequences + list(map(reverse_complement, sequences)), labels * 2
        self.classes, self.ids, self.labels = classes, encode(tokenizer, sequences), labels

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_ids": self.ids[index].tolist(), "labels": self.labels[index]}
