"""Nucleotides as letters: what each is read as, what is refused, the other strand. No torch here."""

import re

NUCLEOTIDES = "ACGTN"  # N: any of the four
# The letters of IUPAC (Cornish-Bowden 1985): U is the T of RNA, the last row stands for two or three bases each.
READ_AS = {
    "A": "Aa",
    "C": "Cc",
    "G": "Gg",
    "T": "TtUu",
    "N": "Nn" + "RYSWKMBDHV" + "ryswkmbdhv",
}
_TABLE = str.maketrans({letter: base for base, letters in READ_AS.items() for letter in letters})
_OTHER = re.compile(f"[^{NUCLEOTIDES}]")
_COMPLEMENT = str.maketrans("ACGT", "TGCA")


def nucleotides(text: str, where: str = "the text") -> str:
    """`text` in the letters A, C, G, T and N: capitals, U as T, ambiguity codes as N.

    Raises:
        ValueError: any other letter, as proteins have; the message begins with `where`.
    """
    sequence = text.translate(_TABLE)
    if other := _OTHER.search(sequence):
        raise ValueError(
            f"{where} has {other.group()!r} at letter {other.start() + 1}, which is no nucleotide; give DNA or RNA: "
            "A, C, G, T, U, N and IUPAC's ambiguity codes"
        )
    return sequence


def reverse_complement(sequence: str) -> str:
    """The other strand, read in its own direction."""
    return sequence.translate(_COMPLEMENT)[::-1]
