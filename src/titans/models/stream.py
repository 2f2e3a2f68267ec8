"""Where a forecaster stands in a series that goes on; its file is a memory file."""

import os
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from titans.models.cache import TitansCache


@dataclass(frozen=True)
class TitansStream:
    """What ``TitansForPrediction.update`` keeps of a series: its size does not grow with the rows that were read.

    Attributes:
        cache: memory of all blocks of ``context_length`` rows that ended where the look-back begins, or before.
        rows: [B, n, channels], n below two blocks: those since; the last of them are the look-back.
    """

    cache: TitansCache
    rows: Tensor

    @property
    def nbytes(self) -> int:
        """Size of memory and rows in bytes."""
        return self.cache.nbytes + self.rows.nbytes

    def memory(self, times: int) -> TitansCache:
        """A copy of the memory to read so many windows of each series with: ``past_values`` [times * B, ...]."""
        cache = self.cache.copy()
        cache.batch_select_indices(torch.arange(cache.rows).repeat(times))
        return cache

    def save_pretrained(self, path: str | os.PathLike, model: PreTrainedModel) -> None:
        """Writes a memory file with the rows among its notes, as ``TitansCache.save_pretrained``."""
        cache = self.cache.copy()
        cache.notes = {"rows": self.rows.tolist()}
        cache.save_pretrained(path, model)

    @classmethod
    def load(cls, path: str | os.PathLike, model: PreTrainedModel) -> "TitansStream":
        """The stream that ``save_pretrained`` wrote, on the model's device; it goes on bit for bit.

        Raises:
            FileNotFoundError, ValueError: as ``TitansCache.load``; a memory that belongs to no stream.
        """
        cache = TitansCache.load(path, model)
        if "rows" not in cache.notes:
            raise ValueError(f"{path} holds a memory without rows; give what save_pretrained of a stream wrote")
        rows = torch.tensor(cache.notes.pop("rows"), dtype=model.dtype, device=model.device)
        return cls(cache, rows.view(*rows.shape[:2], model.config.num_input_channels))
