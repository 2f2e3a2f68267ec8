"""The neural long-term memory as functions on tensors; needs torch alone. README.md here has the mathematics."""

from titans.memory.chunked import current_maps
from titans.memory.dispatch import MemoryInfo, neural_memory
from titans.memory.network import MemoryMLP
from titans.memory.state import MemoryState, State

__all__ = ["MemoryInfo", "MemoryMLP", "MemoryState", "State", "current_maps", "neural_memory"]
