"""The layer and the four blocks at sizes where chunk, segment and window meet in every way."""

import torch
from tolerances import assert_equal
from torch import Tensor, nn

from titans.layers import LMM, MAC, MAG, MAL, NeuralMemory
from titans.memory import MemoryMLP

DIM = 16
LAYERS = ("memory", "lmm", "mac", "mag", "mal")
BLOCKS = LAYERS[1:]
# (chunk, segment or window, persistent tokens, heads of queries and keys for the two memories)
SIZES = {
    "3 in 8": (3, 8, 2, 2),
    "4 in 8": (4, 8, 0, 1),
    "8 over 5": (8, 5, 3, 1),
    "1 in 4": (1, 4, 1, 2),
    "window 1": (4, 1, 1, 2),
    "16 in 24": (16, 24, 3, 1),
}
CASES = [
    ("memory", "3 in 8"),
    ("memory", "4 in 8"),
    ("lmm", "3 in 8"),
    *((b, s) for b in ("mac", "mag", "mal") for s in SIZES),
]


def build(
    name: str,
    size: str = "3 in 8",
    dtype=torch.float64,
    network=None,
    gate="sigmoid",
    conv_size=4,
    seed=0,
    backend="auto",
    dim=DIM,
) -> nn.Module:
    """A layer with every parameter away from its start, so that nothing is zero or one by chance."""
    torch.manual_seed(seed)
    chunk, reach, persistent, key_heads = SIZES[size]
    memory = NeuralMemory(
        dim, heads=2, key_heads=key_heads, chunk_size=chunk, network=network or MemoryMLP(expansion=2), gate=gate,
        conv_size=conv_size, max_lr=0.05, backend=backend,
    )  # fmt: skip
    common = {"num_attention_heads": 2, "num_persistent_tokens": persistent, "intermediate_size": 3 * dim // 2}
    layer: nn.Module = memory
    if name == "lmm":
        layer = LMM(memory, intermediate_size=3 * dim // 2)
    elif name == "mac":
        layer = MAC(memory, segment_length=reach, **common)
    elif name in ("mag", "mal"):
        layer = {"mag": MAG, "mal": MAL}[name](memory, sliding_window=reach, **common)
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return layer.to(dtype)


def tokens(B=2, T=21, dtype=torch.float64, seed=1, dim=DIM) -> Tensor:
    return torch.randn(B, T, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def run(layer: nn.Module, x: Tensor, state=None, mask=None):
    """(y, state)"""
    return layer(x, state, mask)


def in_pieces(layer: nn.Module, x: Tensor, cuts: list[int], mask=None, between=lambda s: s):
    """The sequence cut at the given places; ``between`` sees every state that is carried."""
    state, outs = None, []
    for start, stop in zip([0, *cuts], [*cuts, x.shape[1]], strict=True):
        y, state = layer(x[:, start:stop], state, None if mask is None else mask[:, start:stop])
        state = between(state)
        outs.append(y)
    return torch.cat(outs, 1), state


MASKS = {
    "left": lambda B, T: torch.arange(T) >= (torch.arange(B) * 5 + 2).unsqueeze(1),
    "right": lambda B, T: torch.arange(T) < (T - 4 * torch.arange(B) - 1).unsqueeze(1),
    "holes": lambda B, T: torch.rand(B, T, generator=torch.Generator().manual_seed(3)) < 0.6,
    "a padded row": lambda B, T: (torch.arange(B) > 0).unsqueeze(1).expand(B, T),
}

__all__ = ["BLOCKS", "CASES", "DIM", "LAYERS", "MASKS", "SIZES", "assert_equal", "build", "in_pieces", "run", "tokens"]
