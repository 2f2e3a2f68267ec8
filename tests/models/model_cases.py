"""Tiny models of all variants at sizes where chunk, segment and window meet in every way."""

import torch
from tolerances import LOGITS, assert_equal
from torch import Tensor

from titans.models import TitansConfig, TitansForCausalLM
from titans.models.configuration import VARIANTS

VOCAB = 20
# (chunk, segment and window, persistent tokens, heads of queries and keys: as memories if None)
SIZES = {"3 in 8": (3, 8, 2, None), "4 in 8": (4, 8, 0, None), "8 over 5": (8, 5, 1, 1)}
MODELS = [(variant, size) for variant in VARIANTS for size in SIZES if variant != "lmm" or size == "3 in 8"]


def config(variant: str, size: str = "3 in 8", **changes) -> TitansConfig:
    chunk, reach, persistent, key_heads = SIZES[size]
    sizes = {
        "vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_memory_key_heads": key_heads, "memory_expansion": 2, "chunk_size": chunk,
        "segment_length": reach, "sliding_window": reach, "num_persistent_tokens": persistent, "pad_token_id": 0,
    }  # fmt: skip
    return TitansConfig(variant=variant, **{**sizes, **changes})


def build(variant: str, size: str = "3 in 8", dtype=torch.float32, seed=0, **changes) -> TitansForCausalLM:
    """In evaluation mode, with every parameter away from its start, so that logits differ and gates speak."""
    torch.manual_seed(seed)
    model = TitansForCausalLM(config(variant, size, **changes))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model.to(dtype).eval()


def ids(B=2, T=21, seed=1) -> Tensor:
    """Token ids without the padding id."""
    return torch.randint(1, VOCAB, (B, T), generator=torch.Generator().manual_seed(seed))


def near(got: Tensor, expected: Tensor, bound: float = LOGITS) -> None:
    """Absolute bound for float32 logits (1e-10 relative for float64)."""
    if expected.dtype == torch.float64:
        assert_equal(got, expected)
    else:
        assert got.shape == expected.shape
        assert float((got - expected).abs().max()) <= bound


__all__ = ["MODELS", "SIZES", "VARIANTS", "VOCAB", "assert_equal", "build", "config", "ids", "near"]
