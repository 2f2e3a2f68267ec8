"""TitansConfig refuses what cannot work, and says what would."""

import pytest
import torch
from model_cases import VARIANTS, config
from transformers import AutoConfig

from titans.models import (
    TitansConfig,
    TitansForCausalLM,
    titans_170m,
    titans_340m,
    titans_400m,
    titans_760m,
    titans_tiny,
)

BAD = [
    ({"chunksize": 4}, "unknown key 'chunksize'.*did you mean 'chunk_size'"),
    ({"num_memory_head": 4}, "did you mean 'num_memory_heads'"),
    ({"sliding_windows": 4}, "did you mean 'sliding_window'"),
    ({"zzz": 1}, "unknown key 'zzz' for a Titans model$"),
    ({"variant": "max"}, "variant must be one of .*'max'"),
    ({"memory_gate": "relu"}, "memory_gate must be one of .*'relu'"),
    ({"memory_write_price": -1, "memory_gate": "write"}, "memory_write_price=-1 must be 0 or more"),
    ({"memory_write_price": 0.1}, "memory_write_price=0.1 .*memory_gate='write'.*'sigmoid'"),
    ({"memory_online": True}, "memory_online=True needs a memory that is linear"),
    ({"memory_online": 1, "memory_norm": False}, "memory_online must be True or False, got 1"),
    ({"memory_activation": "tanh"}, "memory_activation must be one of .*'tanh'"),
    ({"memory_depth": 5}, "memory_depth must be 1, 2, 3 or 4, got 5"),
    ({"memory_expansion": 0}, "memory_expansion must be positive"),
    ({"memory_max_lr": 0.0}, "memory_max_lr must be positive, got 0.0"),
    ({"memory_max_momentum": 1.5}, "memory_max_momentum must be from 0 to 1, got 1.5"),
    ({"memory_max_momentum": "all"}, "memory_max_momentum must be from 0 to 1, got 'all'"),
    ({"initializer_range": -0.02}, "initializer_range must be positive, got -0.02"),
    ({"num_persistent_tokens": -1}, "num_persistent_tokens must be 0 or more, got -1"),
    ({"hidden_size": 18}, "hidden_size=18 must be num_attention_heads=2 times a multiple of 4"),
    ({"num_memory_heads": 3}, "hidden_size=16 is no multiple of num_memory_heads=3.*memory_head_dim"),
    ({"num_memory_key_heads": 3}, "num_memory_heads=2 must be a multiple of num_memory_key_heads=3"),
    ({"num_memory_key_heads": 0}, "num_memory_key_heads must be a positive integer, got 0"),
    ({"num_hidden_layers": 0}, "num_hidden_layers must be a positive integer, got 0"),
    ({"chunk_size": 2.5}, "chunk_size must be a positive integer, got 2.5"),
    ({"segment_length": "8"}, "segment_length must be a positive integer, got '8'"),
    ({"sliding_window": True}, "sliding_window must be a positive integer, got True"),
    ({"vocab_size": None}, "vocab_size must be a positive integer, got None"),
    ({"memory_head_dim": 0}, "memory_head_dim must be"),
    ({"memory_head_dim": -4}, "memory_head_dim must be"),
    ({"memory_head_dim": 2.5}, "memory_head_dim must be a positive integer, got 2.5"),
    ({"memory_norm": 2.5}, "memory_norm must be True or False, got 2.5"),
    ({"memory_max_lr": {"a": 1}}, "memory_max_lr must be positive, got {'a': 1}"),
    ({"initializer_range": float("inf")}, "initializer_range must be positive, got inf"),
    ({"memory_write_price": "1", "memory_gate": "write"}, "memory_write_price='1' must be 0 or more"),
    ({"num_persistent_tokens": 1.5}, "num_persistent_tokens must be"),
    ({"num_persistent_tokens": True}, "num_persistent_tokens must be 0 or more, got True"),
]


@pytest.mark.parametrize(("changes", "message"), BAD, ids=[str(c) for c, _ in BAD])
def test_bad_value(changes, message):
    with pytest.raises(ValueError, match=message):
        config(**{"variant": "mac", **changes})


def test_defaults_follow_other_values():
    made = config("mac", num_memory_heads=None, intermediate_size=None)
    assert (made.num_memory_heads, made.num_memory_key_heads) == (2, 2)
    assert made.memory_head_dim == 8
    assert made.intermediate_size == 32
    assert config("mac", num_memory_heads=3, memory_head_dim=5).memory_head_dim == 5
    assert made.initializer_range == pytest.approx(48**-0.5)  # the start of PyTorch's own maps of 16 inputs
    assert config("mac", initializer_range=0.5).initializer_range == 0.5


def test_the_trained_theta_stays_where_the_chunk_changes(tmp_path):
    made = config("mac", chunk_size=64, memory_depth=2)
    assert made.memory_max_lr == 1 / 64
    made.save_pretrained(tmp_path)
    assert TitansConfig.from_pretrained(tmp_path, chunk_size=16).memory_max_lr == 1 / 64


@pytest.mark.parametrize("variant", VARIANTS)
def test_round_trip_through_json(variant, tmp_path):
    made = config(variant, memory_depth=3, memory_gate="write")
    made.save_pretrained(tmp_path)
    for loaded in (TitansConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert isinstance(loaded, TitansConfig)
        assert loaded.to_diff_dict() | {"_name_or_path": ""} == made.to_diff_dict() | {"_name_or_path": ""}


# published parameter counts; the feed-forward width is not published and makes them come out
SIZES = {titans_170m: 170e6, titans_340m: 340e6, titans_400m: 400e6, titans_760m: 760e6}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("preset", SIZES, ids=lambda p: p.__name__)
def test_presets_build(preset, variant):
    """On the meta device: no memory is taken, and the size is what the name says."""
    with torch.device("meta"):
        model = TitansForCausalLM(preset(variant))
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert 0.99 < model.num_parameters() / SIZES[preset] < 1.01


@pytest.mark.parametrize("variant", VARIANTS)
def test_tiny_preset(variant):
    model = TitansForCausalLM(titans_tiny(variant, num_hidden_layers=2))
    assert model.config.num_hidden_layers == 2
    assert model(torch.randint(0, 258, (1, 9))).logits.shape == (1, 9, 258)
