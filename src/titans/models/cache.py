"""The cache of Titans models: one state a layer, constant in size."""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from titans.memory import State


class TitansCacheLayer(CacheLayerMixin):
    """Holds the state of one block; ``state`` is None before the first token."""

    supports_early_init = False

    def __init__(self):
        super().__init__()
        self.state: State | None = None
        self.length = 0

    def update(self, state: State, length: int) -> None:  # type: ignore[override]
        """Puts the state after ``length`` more tokens in place of the one before."""
        self.state, self.length = state, self.length + length

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
        self.state = self.state and self.state.select(beam_idx)

    batch_select_indices = reorder_cache

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row ``repeats`` times."""
        self.state = self.state and self.state.repeat(repeats)

    def offload(self) -> None:
        """Moves the state to the CPU."""
        self.state = self.state and self.state.to("cpu")

    def prefetch(self) -> None:
        """Moves the state to the accelerator, if there is one."""
        self.state = self.state and self.state.to(torch.accelerator.current_accelerator() or "cpu")


class TitansCache(Cache):
    """``past_key_values`` of a Titans model: its size does not depend on what was read.

    Args:
        num_hidden_layers: blocks of the model.
    """

    def __init__(self, num_hidden_layers: int):
        super().__init__(layers=[TitansCacheLayer() for _ in range(num_hidden_layers)])

    @property
    def nbytes(self) -> int:
        """Size of all states in bytes."""
        return sum(layer.state.nbytes for layer in self.layers if layer.state is not None)  # type: ignore[union-attr]

    def detach_(self) -> "TitansCache":
        """Cuts the history of all states, in place: gradients of later calls stop here."""
        for layer in self.layers:
            layer.state = layer.state and layer.state.detach()  # type: ignore[union-attr]
        return self
