"""Configuration of Titans models, and presets from a tiny one to the paper's sizes."""

import difflib
import math
from typing import Any

from transformers import PreTrainedConfig

from titans.layers.neural_memory import FORGET, GATES, stable_lr, stable_momentum
from titans.memory import MemoryMLP

VARIANTS = ("mac", "mag", "mal", "lmm")
_BASE_KEYS = {"dtype", "torch_dtype", "attn_implementation", "model_type", "transformers_version"}


def linear_start(width: int) -> float:
    """The standard deviation PyTorch starts a linear map of so many inputs with: 0.021 at 768, 0.072 at 64."""
    return (3 * width) ** -0.5


class TitansConfig(PreTrainedConfig):
    """A Titans model (arXiv 2501.00663).

    Args:
        variant: ``"mac"`` (memory as context), ``"mag"`` (as gate), ``"mal"`` (as layer) or ``"lmm"`` (memory alone).
        vocab_size: number of token ids; 258 fits the byte tokenizer.
        hidden_size: width of the residual stream.
        intermediate_size: hidden width of the SwiGLU feed-forward part; default 8/3 of ``hidden_size``, in steps of 32.
        num_hidden_layers: blocks.
        num_attention_heads: heads of the attention (unused by ``lmm``).
        num_memory_heads: memories a layer; default ``num_attention_heads``.
        num_memory_key_heads: heads of queries and keys that the memories share; default ``num_memory_heads``.
        memory_head_dim: width of a memory's keys and values; default ``hidden_size // num_memory_heads``.
        memory_depth: linear maps of the memory network, 1 to 4.
        memory_expansion: hidden width of the memory network over its head width.
        memory_activation, memory_residual, memory_norm, memory_online: see ``titans.memory.MemoryMLP``.
        memory_gate: ``"sigmoid"`` or ``"write"``, see ``titans.NeuralMemory``.
        memory_write_price: in training this much times the mean write gate of all tokens, heads and layers is added to
            the loss, so that what need not be written is not. 0.03 is a start; needs ``memory_gate="write"``. Beside
            attention it must not begin with the training: ``training.write_price_after``.
        memory_max_lr: largest inner step size theta; default as in ``titans.NeuralMemory``. Loaded with another
            ``chunk_size``, a model keeps the theta it was trained with.
        memory_forget: ``"start"``, ``"zero"`` or ``"none"``, see ``titans.NeuralMemory``.
        memory_max_momentum: largest share eta of past surprise that a token carries on; 0 for none; default as in
            ``titans.NeuralMemory``.
        memory_skip: whether a token's own value stands beside what it reads, see ``titans.NeuralMemory``.
        memory_conv_size: length of the causal convolution over queries, keys and values; 1 for none.
        chunk_size: tokens whose inner gradients are taken at the same memory.
        segment_length: tokens a segment (``mac``).
        sliding_window: tokens a query sees, itself included (``mag``, ``mal``).
        num_persistent_tokens: learned tokens before every sequence (``mac``, ``mag``, ``mal``).
        initializer_range: standard deviation of linear maps and embeddings at the start; default ``linear_start``.
        tie_word_embeddings: use the embedding as the output map, too.

    Raises:
        ValueError: an unknown key (the message names the nearest one) or a value that cannot work.
    """

    model_type = "titans"
    keys_to_ignore_at_inference = ["cache"]  # noqa: RUF012

    variant: str = "mac"
    vocab_size: int = 258
    hidden_size: int = 256
    intermediate_size: int | None = None
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_memory_heads: int | None = None
    num_memory_key_heads: int | None = None
    memory_head_dim: int | None = None
    memory_depth: int = 2
    memory_expansion: float | int = 4
    memory_activation: str = "gelu"
    memory_residual: bool = True
    memory_norm: bool = True
    memory_online: bool = False
    memory_gate: str = "sigmoid"
    memory_write_price: float | int = 0.0
    memory_max_lr: float | None = None
    memory_forget: str = "start"
    memory_max_momentum: float | int | None = None
    memory_skip: bool = True
    memory_conv_size: int = 4
    chunk_size: int = 16
    segment_length: int = 64
    sliding_window: int = 64
    num_persistent_tokens: int = 4
    initializer_range: float | None = None
    tie_word_embeddings: bool = True
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any):
        for key in kwargs:
            if not (key.startswith("_") or key in _BASE_KEYS or hasattr(PreTrainedConfig, key)):
                near = difflib.get_close_matches(key, self.__dataclass_fields__, 1)
                raise ValueError(
                    f"unknown key {key!r} for a Titans model" + (f"; did you mean {near[0]!r}?" if near else "")
                )
        if self.num_memory_heads is None:
            self.num_memory_heads = self.num_attention_heads
        if self.num_memory_key_heads is None:
            self.num_memory_key_heads = self.num_memory_heads
        if self.intermediate_size is None:
            self.intermediate_size = max(32, round(self.hidden_size * 8 / 3 / 32) * 32)
        self._check()
        if self.initializer_range is None:
            self.initializer_range = linear_start(self.hidden_size)
        if self.memory_head_dim is None:
            self.memory_head_dim = self.hidden_size // self.num_memory_heads
        if self.memory_max_lr is None:
            self.memory_max_lr = stable_lr(self.memory_network, self.chunk_size)
        if self.memory_max_momentum is None:
            self.memory_max_momentum = stable_momentum(self.memory_network, self.memory_max_lr)
        super().__post_init__(**kwargs)

    @property
    def memory_network(self) -> MemoryMLP:
        """The memory network's shape."""
        return MemoryMLP(
            self.memory_depth,
            self.memory_expansion,
            self.memory_activation,
            self.memory_residual,
            self.memory_norm,
            online=self.memory_online,
        )

    def _check(self) -> None:
        if self.variant not in VARIANTS:
            raise ValueError(f"variant must be one of {VARIANTS}, got {self.variant!r}")
        if self.memory_gate not in GATES:
            raise ValueError(f"memory_gate must be one of {GATES}, got {self.memory_gate!r}")
        price = self.memory_write_price
        if not isinstance(price, (int, float)) or not 0 <= price < math.inf or (price and self.memory_gate != "write"):
            raise ValueError(
                f"memory_write_price={price!r} must be 0 or more, and 0 unless memory_gate='write' "
                f"(it is {self.memory_gate!r})"
            )
        if self.memory_forget not in FORGET:
            raise ValueError(f"memory_forget must be one of {FORGET}, got {self.memory_forget!r}")
        positive = (
            "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_memory_heads", "num_memory_key_heads", "memory_conv_size", "chunk_size", "segment_length",
            "sliding_window",
        )  # fmt: skip
        for name in positive if self.memory_head_dim is None else (*positive, "memory_head_dim"):
            self._check_positive(name)
        if self.num_memory_heads % self.num_memory_key_heads:  # type: ignore[operator]
            raise ValueError(
                f"num_memory_heads={self.num_memory_heads} must be a multiple of "
                f"num_memory_key_heads={self.num_memory_key_heads}"
            )
        if not _is_integer(self.num_persistent_tokens) or self.num_persistent_tokens < 0:
            raise ValueError(
                f"num_persistent_tokens must be 0 or more, got {self.num_persistent_tokens!r}; use an integer"
            )
        for name in ("memory_max_lr", "initializer_range"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, (int, float)) and 0 < value < math.inf):
                raise ValueError(f"{name} must be positive, got {value!r}; leave it out for the default")
        momentum = self.memory_max_momentum
        if momentum is not None and not (isinstance(momentum, (int, float)) and 0 <= momentum <= 1):
            raise ValueError(f"memory_max_momentum must be from 0 to 1, got {momentum!r}; leave it out for the default")
        if self.memory_head_dim is None and self.hidden_size % self.num_memory_heads:  # type: ignore[operator]
            raise ValueError(
                f"hidden_size={self.hidden_size} is no multiple of num_memory_heads={self.num_memory_heads}; "
                "choose another or give memory_head_dim"
            )
        if self.variant != "lmm" and self.hidden_size % (4 * self.num_attention_heads):
            raise ValueError(
                f"hidden_size={self.hidden_size} must be num_attention_heads={self.num_attention_heads} "
                "times a multiple of 4"
            )
        try:
            _ = self.memory_network
        except ValueError as error:  # its messages begin with the field, there without memory_
            raise ValueError(f"memory_{error}") from error

    def _check_positive(self, name: str) -> None:
        value = getattr(self, name)
        if not _is_integer(value) or value < 1:
            raise ValueError(f"{name} must be a positive integer, got {value!r}")


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def titans_tiny(variant: str = "mac", **overrides: Any) -> TitansConfig:
    """About a million parameters, byte-level: trains on a CPU."""
    return TitansConfig(**{"variant": variant, "hidden_size": 128, "num_attention_heads": 2, **overrides})


def _paper(variant: str, overrides: dict[str, Any], **sizes: int) -> TitansConfig:
    # the paper names layers and widths; the feed-forward width, here an LMM's, makes the count come out (32,000 tokens)
    common = {
        "vocab_size": 32_000,
        "chunk_size": 64,
        "segment_length": 512,
        "sliding_window": 512,
        "num_persistent_tokens": 16,
    }
    # what the others spend on attention and on the product with the memory
    matrices = {"mal": 4, "mac": 5, "mag": 5}.get(variant, 0)
    sizes["intermediate_size"] -= sizes["hidden_size"] * matrices // 3 // 32 * 32
    return TitansConfig(**{"variant": variant, **common, **sizes, **overrides})


def titans_170m(variant: str = "mac", **overrides: Any) -> TitansConfig:
    """The paper's smallest size: 12 layers, 768 wide."""
    return _paper(
        variant, overrides, hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3808
    )


def titans_340m(variant: str = "mac", **overrides: Any) -> TitansConfig:
    """The paper's 340M: 24 layers, 1,024 wide."""
    return _paper(
        variant, overrides, hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=2240
    )


def titans_400m(variant: str = "mac", **overrides: Any) -> TitansConfig:
    """The paper's 400M: 24 layers, 1,024 wide."""
    return _paper(
        variant, overrides, hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=3072
    )


def titans_760m(variant: str = "mac", **overrides: Any) -> TitansConfig:
    """The paper's largest size: 24 layers, 1,536 wide."""
    return _paper(
        variant, overrides, hidden_size=1536, num_hidden_layers=24, num_attention_heads=16, intermediate_size=3616
    )
