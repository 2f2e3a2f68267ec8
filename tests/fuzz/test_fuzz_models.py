"""All variants at drawn configurations, valid and not; sequences cut anywhere, with padding anywhere."""

import math

import torch
from fuzzing import fuzz, refused
from hypothesis import strategies as st
from tolerances import EQUAL
from torch import Tensor

from titans.models import TitansConfig, TitansForCausalLM
from titans.models.configuration import VARIANTS

VOCAB = 11
SIZES = {
    "vocab_size": st.just(VOCAB),
    "hidden_size": st.sampled_from([8, 16]),
    "intermediate_size": st.integers(1, 12),
    "num_hidden_layers": st.integers(1, 2),
    "num_attention_heads": st.integers(1, 2),
    "num_memory_heads": st.none() | st.integers(1, 2),
    "memory_head_dim": st.none() | st.integers(3, 6),
    "memory_depth": st.integers(1, 4),
    "memory_expansion": st.sampled_from([0.5, 1, 2]),
    "memory_activation": st.sampled_from(["gelu", "silu", "relu"]),
    "memory_residual": st.booleans(),
    "memory_norm": st.booleans(),
    "memory_online": st.booleans(),
    "memory_gate": st.sampled_from(["sigmoid", "write"]),
    "memory_max_lr": st.none() | st.just(1e-3),
    "memory_forget": st.sampled_from(["start", "zero", "none"]),
    "memory_max_momentum": st.none() | st.sampled_from([0, 0.3, 1]),
    "memory_skip": st.booleans(),
    "memory_conv_size": st.integers(1, 5),
    "chunk_size": st.integers(1, 9),
    "segment_length": st.integers(1, 9),
    "sliding_window": st.integers(1, 9),
    "num_persistent_tokens": st.integers(0, 3),
    "initializer_range": st.none() | st.just(0.1),
    "tie_word_embeddings": st.booleans(),
}
CONFIGURED = ["variant", *SIZES, "memory_write_price", "use_cache"]
CONFIGS = st.fixed_dictionaries({"variant": st.sampled_from(VARIANTS)}, optional=SIZES)
SMALL = {name: SIZES[name] for name in ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads")}
GARBAGE = st.sampled_from(
    [-1, 0, 3, 7, 2.5, -0.5, math.nan, math.inf, -math.inf, None, True, "", "4", "mac", "none", [2], {"a": 1}, (1, 2)]
)


def build(config: dict, seed: int) -> TitansForCausalLM:
    """In evaluation mode, with every parameter away from its start, so that gates speak."""
    torch.manual_seed(seed)
    model = TitansForCausalLM(TitansConfig(**config)).eval()
    for p in model.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    return model


def draw_config(data) -> dict:
    small = data.draw(st.fixed_dictionaries(SMALL), "sizes")
    config = {**small, "num_hidden_layers": 1, **data.draw(CONFIGS, "config")}
    return config | ({"memory_depth": 1, "memory_norm": False} if config.get("memory_online") else {})


def draw_mask(data, B: int, T: int) -> Tensor | None:
    """None, left padding of any length, or padding anywhere."""
    kind = data.draw(st.sampled_from(["none", "left", "anywhere"]), "padding")
    if kind == "none":
        return None
    if kind == "left":
        padding = data.draw(st.lists(st.integers(0, T), min_size=B, max_size=B), "left")
        return torch.arange(T) >= torch.tensor(padding).unsqueeze(1)
    return torch.tensor(data.draw(st.lists(st.lists(st.booleans(), min_size=T, max_size=T), min_size=B, max_size=B)))


def read(model: TitansForCausalLM, ids: Tensor, mask: Tensor | None, cuts: list[int]) -> tuple[Tensor, dict]:
    """Logits and states after reading piece by piece; the mask grows with the columns as it does in generation."""
    logits, cache = [], None
    for start, stop in zip([0, *cuts], [*cuts, ids.shape[1]], strict=True):
        here = None if mask is None else mask[:, :stop]
        out = model(ids[:, start:stop], attention_mask=here, cache=cache, use_cache=True)
        logits.append(out.logits)
        cache = out.cache
    states = {f"{i}.{n}": t for i, layer in enumerate(cache.layers) for n, t in layer.state.tensors().items()}
    return torch.cat(logits, 1), states


@fuzz(few=40, many=4000)
def test_a_sequence_cut_anywhere_is_the_whole(data):
    B, T = data.draw(st.integers(1, 3), "batch"), data.draw(st.integers(1, 20), "length")
    model = build(draw_config(data), data.draw(st.integers(0, 99), "seed")).double()
    ids = torch.randint(VOCAB, (B, T), generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99), "ids")))
    mask = draw_mask(data, B, T)
    cuts = sorted(data.draw(st.lists(st.integers(1, T - 1), max_size=4, unique=True), "cuts")) if T > 1 else []
    singles = data.draw(st.integers(0, 3), "single tokens at the end")
    cuts = sorted({*cuts, *range(max(1, T - singles), T)})
    with torch.no_grad():
        (whole, states), (got, ends) = (read(model, ids, mask, c) for c in ([], cuts))
    for name, want, found in [("logits", whole, got), *((n, t, ends[n]) for n, t in states.items())]:
        assert want.isfinite().all(), f"{name} is not finite"
        if name == "logits" and mask is not None:
            want, found = want[mask], found[mask]
        difference, size = (max(x.abs().flatten().tolist(), default=0) for x in (found - want, want))
        assert difference <= EQUAL[torch.float64] * max(1, size), f"{name} differs by {difference:.1e}"


@fuzz(few=30, many=1000)
def test_finite_in_low_precision_and_in_training(data):
    """Logits, loss and every gradient."""
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]), "dtype")
    model = build(draw_config(data), data.draw(st.integers(0, 99), "seed")).to(dtype).train()
    B, T = data.draw(st.integers(1, 2), "batch"), data.draw(st.integers(2, 12), "length")
    ids = torch.randint(VOCAB, (B, T), generator=torch.Generator().manual_seed(0))
    out = model(ids, attention_mask=draw_mask(data, B, T), labels=ids)
    out.loss.backward()
    assert out.logits.isfinite().all()
    assert out.loss.isfinite()
    for name, p in model.named_parameters():
        assert p.grad is None or p.grad.isfinite().all(), f"the gradient of {name} is not finite"


@fuzz(few=150, many=5000)
def test_any_configuration_works_or_is_refused_by_name(data):
    names = [*CONFIGURED, "memory_dpeth"]
    changes = data.draw(st.dictionaries(st.sampled_from(names), GARBAGE, max_size=3), "changes")
    config = {**draw_config(data), **changes}

    def use():
        model = TitansForCausalLM(TitansConfig(**config)).eval()
        with torch.no_grad():
            assert model(torch.zeros(1, 3, dtype=torch.long)).logits.isfinite().all()

    refused(use, *changes, "hidden_size")
