"""Models on disk: round trips, Auto classes, broken files, low precision."""

import json

import pytest
import torch
from model_cases import VARIANTS, assert_equal, build, config, ids
from transformers import AutoModel, AutoModelForCausalLM

from titans.models import TitansForCausalLM, TitansModel

variants = pytest.mark.parametrize("variant", VARIANTS)


@variants
@pytest.mark.parametrize("tied", [True, False])
def test_round_trip(variant, tied, tmp_path):
    """Every parameter bit for bit, gates included, which have a start of their own."""
    model = build(variant, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    for kind in (TitansForCausalLM, AutoModelForCausalLM):
        loaded = kind.from_pretrained(tmp_path)
        assert type(loaded) is TitansForCausalLM
        assert loaded.state_dict().keys() == model.state_dict().keys()
        assert all(torch.equal(loaded.state_dict()[n], t) for n, t in model.state_dict().items())
        assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
        with torch.no_grad():
            assert_equal(loaded(ids()).logits, model(ids()).logits)


@variants
def test_body_alone(variant, tmp_path):
    model = build(variant).double()  # in float32 the alignment of a file's tensors shows: 1e-5 of rounding
    model.save_pretrained(tmp_path)
    body = AutoModel.from_pretrained(tmp_path)
    assert type(body) is TitansModel
    with torch.no_grad():
        assert_equal(body(ids()).last_hidden_state, model.model(ids()).last_hidden_state)


@variants
def test_from_config_is_a_fresh_start(variant):
    """Auto classes build the model with the gates where they should start: none forgets more than 10 % a token."""
    model = AutoModelForCausalLM.from_config(config(variant))
    for layer in model.model.layers:
        info = layer.memory(torch.randn(1, 5, 16), return_info=True)[2]
        assert torch.allclose(info["lr"], torch.tensor(0.05), atol=1e-6)
        assert torch.allclose(info["momentum"], torch.tensor(0.5), atol=1e-6)
        assert info["forget"].max() < 0.1


@pytest.mark.parametrize("how", ["truncated", "empty", "text"])
def test_broken_checkpoint(how, tmp_path):
    """Issue 1, item 6: an error, never a model with weights made up."""
    build("mac").save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes({"truncated": whole[: len(whole) // 2], "empty": b"", "text": b"no tensors here"}[how])
    with pytest.raises(Exception, match=r"(?i)safetensor|header|incomplete|file|deserializ") as raised:
        TitansForCausalLM.from_pretrained(tmp_path)
    assert not isinstance(raised.value, (AssertionError, KeyError, AttributeError))


def test_unknown_key_in_a_saved_config(tmp_path):
    build("mac").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "segment_lenght": 4}))
    with pytest.raises(ValueError, match=r"unknown key 'segment_lenght'.*did you mean 'segment_length'"):
        TitansForCausalLM.from_pretrained(tmp_path)


def memories(cache):
    """Memory states of all layers."""
    return [getattr(layer.state, "memory", layer.state) for layer in cache.layers]


@variants
def test_bfloat16_model_keeps_float32_memory(variant, tmp_path):
    """Weights and momentum, from the first token on, and through decoding."""
    build(variant).save_pretrained(tmp_path)
    model = TitansForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        out = model(ids())
        out = model(ids(T=1), cache=out.cache)
    assert out.logits.dtype == torch.bfloat16
    for state in memories(out.cache):
        assert {t.dtype for t in (*state.maps, state.pending, state.transition)} == {torch.float32}


@variants
def test_bfloat16_is_near_float32(variant):
    model = build(variant)
    with torch.no_grad():
        expected = model(ids()).logits
        got = model.to(torch.bfloat16)(ids()).logits
    assert (got - expected).abs().mean() < 0.05 * expected.abs().mean()


@variants
def test_autocast(variant):
    """Mixed precision training: the memory's state stays float32, gradients are finite and near the float32 ones."""
    model = build(variant).train()

    def train():
        model.zero_grad()
        out = model(ids(), labels=ids(), use_cache=True)
        out.loss.backward()
        return out, torch.cat([p.grad.flatten() for p in model.parameters()])

    exact, expected = train()
    with torch.autocast("cpu", torch.bfloat16):
        out, got = train()
    for state in memories(out.cache):
        assert {t.dtype for t in (*state.maps, state.pending, state.transition)} == {torch.float32}
    assert abs((out.loss - exact.loss).item()) < 0.05 * exact.loss.item()
    assert torch.cosine_similarity(got, expected, 0) > (0.94 if variant == "mac" else 0.95)


@variants
def test_cache_moves_and_resets(variant):
    model = build(variant)
    with torch.no_grad():
        cache = model(ids()).cache
        before = {n: t.clone() for n, t in cache.layers[0].state.tensors().items()}
        cache.layers[0].offload()
        assert_equal(cache.layers[0].state.tensors(), before, 0.0)
        assert cache.layers[0].get_mask_sizes(3) == (24, 0)
        cache.reset()
        assert cache.get_seq_length() == 0
        assert cache.nbytes == 0
        assert torch.equal(model(ids(), cache=cache).logits, model(ids()).logits)
