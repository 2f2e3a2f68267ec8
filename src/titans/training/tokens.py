"""Tokens and windows: tokenizers of bytes and nucleotides, tokenized documents, packed training windows."""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers
from torch.utils.data import Dataset
from transformers import AutoTokenizer, GPT2Tokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from titans.training.config import TextData
from titans.training.nucleotides import NUCLEOTIDES, READ_AS, nucleotides
from titans.training.text import blocks_of, expand, is_fasta

Tokenizer = Any  # a PreTrainedTokenizerBase: the library's own types promise less than it returns

END_OF_TEXT, PAD = "<|endoftext|>", "<|pad|>"


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token a byte: ids 0 to 255 are the bytes, 256 ends (and begins) a text, 257 pads. Round-trips any str."""
    vocabulary = {letter: byte for byte, letter in bytes_to_unicode().items()}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _with_special_tokens(tokenizer)


def nucleotide_tokenizer() -> PreTrainedTokenizerFast:
    """A token a base: ids 0 to 4 are A, C, G, T, N, 5 ends (and begins) a sequence, 6 pads.

    Letters are read as `nucleotides` reads them; `encoder` says which one it refuses, the tokenizer by itself only that
    it has no token for it.
    """
    tokenizer = tokenizers.Tokenizer(models.WordLevel({base: i for i, base in enumerate(NUCLEOTIDES)}))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Replace(Regex(f"[{letters}]"), base) for base, letters in READ_AS.items()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return _with_special_tokens(tokenizer)


def _with_special_tokens(tokenizer: tokenizers.Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=PAD,
        split_special_tokens=True,  # "<|endoftext|>" inside a text is thirteen bytes like any other
        clean_up_tokenization_spaces=False,
    )


_OWN = {"bytes": byte_tokenizer, "nucleotide": nucleotide_tokenizer}


def tokenizer_of(data: TextData) -> Tokenizer:
    """What `data.tokenizer` names; by default nucleotides where the training text is a FASTA file, else bytes."""
    if data.tokenizer is not None:
        return load_tokenizer(expand(data.tokenizer))
    return load_tokenizer("nucleotide" if data.train is not None and is_fasta(data.train) else "bytes")


def load_tokenizer(name_or_path: str = "bytes") -> Tokenizer:
    """Our own ("bytes", "nucleotide"), or that of a folder (tokenizer.json, or GPT-2's vocab.json and merges.txt).

    Raises:
        ValueError: no tokenizer there, or one without an end-of-text token.
    """
    if name_or_path in _OWN:
        return _OWN[name_or_path]()
    try:
        if (Path(name_or_path) / "vocab.json").exists() and not (Path(name_or_path) / "tokenizer.json").exists():
            tokenizer: Tokenizer = GPT2Tokenizer.from_pretrained(name_or_path)
        else:
            tokenizer = AutoTokenizer.from_pretrained(name_or_path)
    except Exception as error:  # the library raises many types for "no tokenizer there"
        raise ValueError(
            f"tokenizer={name_or_path!r} cannot be loaded ({error}); give 'bytes', 'nucleotide' or a folder "
            "with tokenizer.json, or with vocab.json and merges.txt"
        ) from error
    if tokenizer.eos_token_id is None:
        raise ValueError(f"tokenizer={name_or_path!r} has no end-of-text token; set its eos_token")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def special_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """What a model must know of its tokenizer, as `build_model` takes it."""
    return {
        "vocab_size": len(tokenizer),
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def digest(tokenizer: Tokenizer) -> str:
    """sha256 of all that decides which ids a text becomes, the end-of-text token included."""
    return hashlib.sha256(f"{tokenizer.eos_token_id} {tokenizer.backend_tokenizer.to_str()}".encode()).hexdigest()


def encode(tokenizer: Tokenizer, documents: list[str]) -> list[np.ndarray]:
    """Token ids of each document [tokens], of the type of `encoder`, without special tokens.

    A document is tokenized in `blocks_of` it, as where it is streamed: its ids are the same everywhere.
    """
    of_block = encoder(tokenizer)
    return [np.concatenate([*map(of_block, blocks_of(document)), of_block("")]) for document in documents]


def encoder(tokenizer: Tokenizer) -> Callable[[str], np.ndarray]:
    """A function from a text to its token ids [tokens], without special tokens: uint8, uint16 or uint32, as fits.

    That of nucleotides raises ValueError at a letter that is none.
    """
    dtype = np.min_scalar_type(len(tokenizer) - 1)
    if is_bytes(tokenizer):
        # A table look-up: the tokenizer itself would take minutes for a shelf of books.
        vocabulary, letters = tokenizer.get_vocab(), bytes_to_unicode()
        table = np.array([vocabulary[letters[byte]] for byte in range(256)], dtype=dtype)
        return lambda text: table[np.frombuffer(text.encode(), np.uint8)]
    if is_nucleotide(tokenizer):
        vocabulary, bases = tokenizer.get_vocab(), np.zeros(128, dtype=dtype)
        bases[list(NUCLEOTIDES.encode())] = [vocabulary[base] for base in NUCLEOTIDES]
        return lambda text: bases[np.frombuffer(nucleotides(text).encode(), np.uint8)]
    plain = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
    return lambda text: np.asarray(tokenizer(text, **plain)["input_ids"], dtype=dtype)


def is_bytes(tokenizer: Tokenizer) -> bool:
    """Whether every token of a text is one of its utf-8 bytes."""
    vocabulary = tokenizer.get_vocab()
    letters = bytes_to_unicode().values()
    return len(vocabulary) - len(tokenizer.get_added_vocab()) == 256 and all(c in vocabulary for c in letters)


def is_nucleotide(tokenizer: Tokenizer) -> bool:
    """Whether the tokens of a text are A, C, G, T and N."""
    return set(tokenizer.get_vocab()) - set(tokenizer.get_added_vocab()) == set(NUCLEOTIDES)


def prompt_ids(tokenizer: Tokenizer, prompt: str) -> torch.Tensor:
    """The ids [1, tokens] of a prompt; of an empty one, the token that begins a text."""
    ids = encoder(tokenizer)(prompt).astype(np.int64)
    return torch.from_numpy(ids).unsqueeze(0) if len(ids) else torch.tensor([[tokenizer.bos_token_id]])


def stream(tokenizer: Tokenizer, documents: Iterable[Iterable[str]], size: int) -> Iterator[np.ndarray]:
    """Documents end to end, the end-of-text token before each, `size` tokens at a time and the one after them.

    Yields arrays of `size` + 1 ids, each beginning with the last id of the one before; the last is shorter. A document
    is given in blocks of text, each tokenized by itself: memory does not grow with its length.
    """
    encode = encoder(tokenizer)
    held = np.empty(0, dtype=encode("").dtype)
    end = np.array([tokenizer.eos_token_id], dtype=held.dtype)
    for ids in chain.from_iterable(chain([end], map(encode, blocks)) for blocks in documents):
        held = np.concatenate([held, ids])
        while len(held) > size:
            yield held[: size + 1]
            held = held[size:]
    if len(held):
        yield held


@dataclass(frozen=True)
class Corpus:
    """Tokenized documents. `ids` is one array of `encode` a document; the sizes are those of the text itself."""

    ids: list[np.ndarray]
    eos_token_id: int
    num_bytes: int
    num_words: int

    @classmethod
    def build(cls, documents: Iterable[str], tokenizer: Tokenizer) -> "Corpus":
        """Tokenizes `documents`; bytes are utf-8 bytes, words are split at white space."""
        documents = list(documents)
        return cls(
            ids=encode(tokenizer, documents),
            eos_token_id=int(tokenizer.eos_token_id),
            num_bytes=sum(len(d.encode()) for d in documents),
            num_words=sum(len(d.split()) for d in documents),
        )

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.ids))

    def packed(self) -> np.ndarray:
        """All documents end to end, each ended by the end-of-text token: [tokens + documents]."""
        end = np.array([self.eos_token_id], dtype=self.ids[0].dtype)
        return np.concatenate([part for ids in self.ids for part in (ids, end)])


class WindowDataset(Dataset):
    """Windows of `length` tokens cut from packed ids, without overlap; a last, shorter one is dropped.

    Items are `{"input_ids": LongTensor [length], "labels": the same}`: the model shifts the labels itself.

    Raises:
        ValueError: the text is shorter than one window.
    """

    def __init__(self, ids: np.ndarray, length: int):
        if len(ids) < length:
            raise ValueError(
                f"training.length={length} is longer than the whole text of {len(ids)} tokens; "
                "use a shorter length or more text"
            )
        self.ids, self.length = ids, length

    def __len__(self) -> int:
        return len(self.ids) // self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        window = self.ids[index * self.length : (index + 1) * self.length]
        ids = torch.from_numpy(window.astype(np.int64))
        return {"input_ids": ids, "labels": ids}
