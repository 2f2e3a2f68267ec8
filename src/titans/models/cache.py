"""The cache of Titans models: one state a layer, constant in size."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from titans.layers.block import Block
from titans.layers.decode import Decoder, decoder
from titans.memory import State


class TitansCacheLayer(CacheLayerMixin):
    """Holds the state of one block; ``state`` is None before the first token."""

    supports_early_init = False

    def __init__(self):
        super().__init__()
        self.length = 0
        self._state: State | None = None
        self._decoder: Decoder | None = None  # while single tokens are read, the state is there
        self._single = False  # whether the last call read a single token, and nothing was done to the state since

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_state": self.state, "_decoder": None}  # a copy has no part in the model

    @property
    def state(self) -> State | None:
        """The block's state; while single tokens are read, a copy of it."""
        return self._state if self._decoder is None else self._decoder.state

    @state.setter
    def state(self, state: State | None) -> None:
        self._state, self._decoder, self._single = state, None, False

    def update(self, state: State, length: int) -> None:  # type: ignore[override]
        """Puts the state after ``length`` more tokens in place of the one before."""
        self.state, self.length, self._single = state, self.length + length, length == 1

    def step(self, block: Block, x: Tensor) -> Tensor | None:
        """One more token x [B, 1, dim] through the block, from the second in a row; None where ``forward`` has to."""
        if self._decoder is None:
            made = decoder(block, self._state) if self._single and self._state is not None else None
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

    Args:
        num_hidden_layers: blocks of the model.
    """

    def __init__(self, num_hidden_layers: int):
        super().__init__(layers=[TitansCacheLayer() for _ in range(num_hidden_layers)])

    @property
    def nbytes(self) -> int:
        """Size of all states in bytes."""
        states = (layer.state for layer in self.layers)  # type: ignore[union-attr]
        return sum(state.nbytes for state in states if state is not None)

    def detach_(self) -> "TitansCache":
        """Cuts the history of all states, in place: gradients of later calls stop here."""
        for layer in self.layers:
            layer.detach()  # type: ignore[union-attr]
        return self

    def restart(self, rows: Tensor, blocks: Iterable[Block]) -> None:
        """Puts the rows of the batch where ``rows`` [B] is true back to before the first token, in place.

        ``blocks``: the model's, ``model.model.layers``: where they start belongs to what is learned.
        """
        for layer, block in zip(self.layers, blocks, strict=True):
            layer._change(lambda state, block=block: state.where(~rows, block.initial_state(len(rows))))  # type: ignore
