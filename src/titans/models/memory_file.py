"""Memory files: the states of all layers, and the name of the model they belong to."""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from titans.memory import State
from titans.memory.state import load_tensors, save_tensors
from titans.models.configuration import TitansConfig

_ENTRY = "titans_memory"  # all metadata in one entry: safetensors writes several in any order
_PARTS = {"length": int, "single": bool, "notes": dict, "model": dict}  # of that entry
# fields of the configuration that no state depends on
_SILENT = {
    "initializer_range", "memory_write_price", "use_cache", "bos_token_id", "eos_token_id", "pad_token_id",
}  # fmt: skip


@dataclass(frozen=True)
class Identity:
    """What a memory depends on in its model.

    ``config``: the fields that shape the computation, and the dtype; ``weights``: sha256 of all parameters.
    """

    config: dict[str, Any]
    weights: str

    @classmethod
    def of(cls, model: PreTrainedModel) -> "Identity":
        """The identity of a Titans model; ValueError for any other."""
        if not isinstance(model.config, TitansConfig):
            raise ValueError(f"model_type={model.config.model_type!r} has no memory to keep; use a Titans model")
        fields = (name for name in TitansConfig.__annotations__ if name not in _SILENT)
        config = {name: getattr(model.config, name) for name in fields} | {"dtype": str(model.dtype)}
        digest = hashlib.sha256()
        for name, p in model.named_parameters():
            digest.update(f"{name} {p.dtype} {list(p.shape)}".encode())
            copy = p.detach().to("cpu", copy=True)  # numpy would hold on to a storage that FSDP2 has to free
            digest.update(copy.contiguous().flatten().view(torch.uint8).numpy().data)
        return cls(config, digest.hexdigest())

    def require(self, other: "Identity", path: str | os.PathLike) -> None:
        """ValueError where the memory in ``path``, of the model ``other``, is not this model's."""
        mend = "load it with the model that read it"
        for name, value in self.config.items():
            if other.config.get(name) != value:
                theirs = other.config.get(name)
                raise ValueError(f"{path} is the memory of another model, {name}={theirs!r}, not {value!r}; {mend}")
        if other.weights != self.weights:
            hashes = f"sha256 {other.weights[:12]}, not {self.weights[:12]}"
            raise ValueError(f"{path} is the memory of a model with other weights, {hashes}; {mend}")


def write_memory(
    path: str | os.PathLike, states: Sequence[State | None], model: Identity, about: dict[str, Any]
) -> None:
    """Writes the states of all layers and ``about``, which JSON can hold."""
    if Path(path).is_dir():
        raise ValueError(f"{path} is a folder; name a file, e.g. {Path(path) / 'book.memory.safetensors'}")
    tensors = {}
    for i, state in enumerate(states):
        if state is None:
            raise ValueError("the cache has read nothing; read something first, e.g. with model.memorize(ids)")
        tensors |= {f"{i}.{name}": t for name, t in state.tensors().items()}
    save_tensors(tensors, path, {_ENTRY: json.dumps({"model": asdict(model), **about})})


def read_memory(path: str | os.PathLike, model: PreTrainedModel) -> tuple[list[State], dict[str, Any]]:
    """The inverse of ``write_memory``, checked against the model; the states are on its device."""
    tensors, metadata = load_tensors(path, model.device)
    if _ENTRY not in metadata:
        raise ValueError(f"{path} is a safetensors file but no memory; give what save_pretrained of a cache wrote")
    with _damage(path):
        about = _about(metadata[_ENTRY])
    Identity.of(model).require(Identity(**about["model"]), path)
    with _damage(path):
        return [_state(block, i, tensors) for i, block in enumerate(model.base_model.layers)], about  # type: ignore[arg-type]


@contextmanager
def _damage(path: str | os.PathLike) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}; restore it from a copy or read the text again") from error


def _about(entry: str) -> dict[str, Any]:
    """What ``write_memory`` put into the entry; ValueError where a part is missing or of another type."""
    try:
        about = json.loads(entry)
        parts = [(about[name], kind) for name, kind in _PARTS.items()]
        parts += [(about["model"]["config"], dict), (about["model"]["weights"], str)]
        sound = all(isinstance(value, kind) for value, kind in parts) and len(about["model"]) == 2
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"its metadata cannot be read ({error!r})") from error
    if not sound:
        raise ValueError(f"its metadata must hold {', '.join(_PARTS)} and the model as save_pretrained writes them")
    return about


def _state(block: Any, index: int, tensors: dict[str, torch.Tensor]) -> State:
    """The state of one layer, of the kind and the shapes that the block makes itself."""
    prefix = f"{index}."
    own = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    with torch.no_grad():
        like: State = block.initial_state(min((len(t) for t in own.values() if t.dim()), default=1))
    for name, t in like.tensors().items():
        if name not in own or (own[name].shape, own[name].dtype) != (t.shape, t.dtype):
            found = f"{list(own[name].shape)} {own[name].dtype}" if name in own else "missing"
            raise ValueError(f"the tensor {prefix + name!r} should be {list(t.shape)} {t.dtype} and is {found}")
    return type(like).from_tensors(own)
