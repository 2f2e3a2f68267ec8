"""The cache of Titans models: one state a layer, constant in size; its file is a memory to keep."""

import os
from collections.abc import Callable, Sequence
from copy import copy
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from titans.layers.block import Block
from titans.layers.decode import Decoder, decoder
from titans.memory import State
from titans.models.memory_file import Identity, read_memory, write_memory


def _own(t: Tensor) -> Tensor:
    """A tensor as a file would give it back: views keep more than they show, and layout decides the last bits."""
    return t if t.is_contiguous() and t.storage_offset() == 0 else t.clone(memory_format=torch.contiguous_format)


class TitansCacheLayer(CacheLayerMixin):
    """Holds the state of one block; ``state`` is None before the first token."""

    supports_early_init = False

    def __init__(self):
        super().__init__()
        self.length = 0
        self._state: State | None = None
        self._decoder: Decoder | None = None  # while single tokens are read, the state is there
        self.single = False  # whether the last call read a single token, and nothing was done to the state since

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_state": self.state, "_decoder": None}  # a copy has no part in the model

    @property
    def state(self) -> State | None:
        """The block's state; while single tokens are read, a copy of it."""
        return self._state if self._decoder is None else self._decoder.state

    @state.setter
    def state(self, state: State | None) -> None:
        self._state, self._decoder, self.single = state, None, False

    def update(self, state: State, length: int) -> None:  # type: ignore[override]
        """Puts the state after ``length`` more tokens in place of the one before."""
        self.state, self.length, self.single = state.map(_own), self.length + length, length == 1

    def step(self, block: Block, x: Tensor) -> Tensor | None:
        """One more token x [B, 1, dim] through the block, from the second in a row; None where ``forward`` has to."""
        if self._decoder is None:
            made = decoder(block, self._state) if self.single and self._state is not None else None
            if made is None:
                return None
            self._decoder, self._state = made, None
        self.length += 1
        return self._decoder(x.squeeze(1)).unsqueeze(1)

    def get_seq_length(self) -> int:
        """Columns read so far, padding included, as generation counts them."""
        return self.length

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Mask length and offset for ``query_length`` new tokens."""
        return self.length + query_length, 0

    def lazy_initialization(self, *_: Any) -> None:
        """Nothing to prepare: a block makes its first state itself."""

    def reset(self) -> None:
        """Back to before the first token."""
        self.state, self.length = None, 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows in another order, some more than once, some not at all (beam search)."""
        self._change(lambda state: state.select(beam_idx))

    batch_select_indices = reorder_cache

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row ``repeats`` times."""
        self._change(lambda state: state.repeat(repeats))

    def offload(self) -> None:
        """Moves the state to the CPU."""
        self._change(lambda state: state.to("cpu"))

    def prefetch(self) -> None:
        """Moves the state to the accelerator, if there is one."""
        self._change(lambda state: state.to(torch.accelerator.current_accelerator() or "cpu"))

    def detach(self) -> None:
        """Cuts the history of the state: gradients of later calls stop here."""
        self._change(lambda state: state.detach())

    def _change(self, change: Callable[[State], State]) -> None:
        if (state := self.state) is not None:
            self.state = change(state)


class TitansCache(Cache):
    """The ``cache`` of a Titans model: its size does not depend on what was read.

    ``notes`` (what JSON can hold, by name) are kept in its file beside it.

    Args:
        num_hidden_layers: blocks of the model.
    """

    layers: list[TitansCacheLayer]

    def __init__(self, num_hidden_layers: int):
        super().__init__(layers=[TitansCacheLayer() for _ in range(num_hidden_layers)])
        self.notes: dict[str, Any] = {}

    @property
    def nbytes(self) -> int:
        """Size of all states in bytes."""
        states = (layer.state for layer in self.layers)
        return sum(state.nbytes for state in states if state is not None)

    @property
    def rows(self) -> int:
        """Rows of the batch; 0 before the first token."""
        state = self.layers[0].state
        return 0 if state is None else len(next(iter(state.tensors().values())))

    @classmethod
    def cat(cls, caches: "Sequence[TitansCache]") -> "TitansCache":
        """The rows of several caches, one after the other; all have read as many columns."""
        joined = cls(len(caches[0].layers))
        for layer, parts in zip(joined.layers, zip(*(cache.layers for cache in caches), strict=True), strict=True):
            states = [part.state for part in parts]
            layer.update(type(states[0]).cat(states), parts[0].length)
        return joined

    def copy(self) -> "TitansCache":
        """Another cache of the same states: what one reads, the other does not know."""
        other = copy(self)
        other.layers = [copy(layer) for layer in self.layers]
        return other

    def detach_(self) -> "TitansCache":
        """Cuts the history of all states, in place: gradients of later calls stop here."""
        for layer in self.layers:
            layer.detach()
        return self

    def rebase(self) -> "TitansCache":
        """Counts columns anew, in place: what was read is memory, which the ids given to ``generate`` do not hold."""
        for layer in self.layers:
            layer.length = 0
        return self

    def save_pretrained(self, path: str | os.PathLike, model: PreTrainedModel | Identity) -> None:
        """Writes a memory file (safetensors), whole or not at all: equal caches of a model are equal files.

        Args:
            path: the file, e.g. ``book.memory.safetensors``.
            model: the model that read, or its ``Identity``, which costs a reading of all weights.

        Raises:
            ValueError: nothing was read yet, or ``path`` is a folder.
        """
        model = model if isinstance(model, Identity) else Identity.of(model)
        about = {"length": self.get_seq_length(), "single": self.layers[0].single, "notes": self.notes}
        write_memory(path, [layer.state for layer in self.layers], model, about)

    @classmethod
    def load(cls, path: str | os.PathLike, model: PreTrainedModel) -> "TitansCache":
        """The cache that ``save_pretrained`` wrote, on the model's device; reading goes on bit for bit.

        Raises:
            FileNotFoundError: no such file.
            ValueError: the file is broken or no memory, or belongs to another model: other weights, or another
                configuration, whose first differing field is named.
        """
        states, about = read_memory(path, model)
        cache = cls(len(states))
        for layer, state in zip(cache.layers, states, strict=True):
            layer.state, layer.length, layer.single = state, about["length"], about["single"]
        cache.notes = about["notes"]
        return cache
