"""The memory as a layer, and the four architectures around it; needs torch alone."""

from titans.layers.lmm import LMM
from titans.layers.mac import MAC
from titans.layers.mag import MAG
from titans.layers.mal import MAL
from titans.layers.neural_memory import NeuralMemory

__all__ = ["LMM", "MAC", "MAG", "MAL", "NeuralMemory"]
