"""Neural memory that learns while it reads: Titans (arXiv 2501.00663) in PyTorch."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from titans.layers import LMM, MAC, MAG, MAL, NeuralMemory
    from titans.memory import MemoryMLP, MemoryState, neural_memory
    from titans.models import (
        TitansCache,
        TitansConfig,
        TitansForCausalLM,
        TitansForPrediction,
        TitansForSequenceClassification,
        TitansModel,
        TitansPredictionConfig,
    )

__version__ = "0.1.0"

_HOMES = {
    "titans.memory": ("MemoryMLP", "MemoryState", "neural_memory"),
    "titans.layers": ("LMM", "MAC", "MAG", "MAL", "NeuralMemory"),
    "titans.models": (
        "TitansCache", "TitansConfig", "TitansForCausalLM", "TitansForPrediction",
        "TitansForSequenceClassification", "TitansModel", "TitansPredictionConfig",
    ),
}  # fmt: skip
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}
__all__ = [
    "LMM", "MAC", "MAG", "MAL", "MemoryMLP", "MemoryState", "NeuralMemory", "TitansCache", "TitansConfig",
    "TitansForCausalLM", "TitansForPrediction", "TitansForSequenceClassification", "TitansModel",
    "TitansPredictionConfig", "neural_memory",
]  # fmt: skip


def __getattr__(name: str):
    """Loads a public name's module at first use, so that ``import titans`` costs nothing."""
    if name not in _HOME_OF:
        raise AttributeError(f"module 'titans' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME_OF[name]), name)
