"""Memory files: a document read once, kept, and gone on from, by the model that read it and no other."""

import json

import pytest
import torch
from model_cases import MODELS, VARIANTS, assert_equal, build, ids
from safetensors.torch import save_file

from titans.memory.state import load_tensors, save_tensors
from titans.models import TitansCache, TitansForCausalLM
from titans.models.memory_file import Identity
from titans.training.models import build_model

models = pytest.mark.parametrize(("variant", "size"), MODELS)
variants = pytest.mark.parametrize("variant", VARIANTS)


def tensors(cache):
    return [layer.state.tensors() for layer in cache.layers]


def same(a, b):
    assert all(x.keys() == y.keys() for x, y in zip(tensors(a), tensors(b), strict=True))
    assert all(torch.equal(x[n], y[n]) for x, y in zip(tensors(a), tensors(b), strict=True) for n in x)
    assert a.get_seq_length() == b.get_seq_length()
    assert a.notes == b.notes


def round_trip(cache, model, path):
    cache.save_pretrained(path, model)
    return TitansCache.load(path, model)


def write_on(model, cache, prompt):
    with torch.no_grad():
        return model.generate(
            prompt, cache=cache, max_new_tokens=12, do_sample=False, output_logits=True, return_dict_in_generate=True
        )


@models
@pytest.mark.parametrize("length", [1, 24, 37])
def test_round_trip_is_exact_and_generation_goes_on_bit_for_bit(variant, size, length, tmp_path):
    model = build(variant, size)
    cache = model.memorize(ids(T=length))
    cache.notes = {"title": "Grüße", "tokens": length}
    loaded = round_trip(cache, model, tmp_path / "a.memory.safetensors")
    same(loaded, cache)
    a, b = (write_on(model, c, ids(T=5, seed=3)) for c in (cache, loaded))
    assert torch.equal(a.sequences, b.sequences)
    assert all(torch.equal(x, y) for x, y in zip(a.logits, b.logits, strict=True))
    same(loaded, cache)
    assert [p.name for p in tmp_path.iterdir()] == ["a.memory.safetensors"], "nothing but the file is left behind"


@variants
def test_equal_caches_are_equal_files(variant, tmp_path):
    model = build(variant)
    for name in "ab":
        model.memorize(ids()).save_pretrained(tmp_path / name, model)
    round_trip(TitansCache.load(tmp_path / "a", model), model, tmp_path / "c")
    assert len({(tmp_path / name).read_bytes() for name in "abc"}) == 1


@models
@pytest.mark.parametrize("singles", [1, 2, 8])
def test_in_the_middle_of_single_tokens(variant, size, singles, tmp_path):
    """Saving does not disturb the cache, and what follows, single tokens or a piece, is the same bit for bit."""
    model, x = build(variant, size), ids(T=40)
    with torch.no_grad():
        cache = model(x[:, :10]).cache
        for t in range(10, 10 + singles):
            model(x[:, t : t + 1], cache=cache)
        assert (cache.layers[0]._decoder is not None) == (singles > 1)
        loaded = round_trip(cache, model, tmp_path / "m")
        assert loaded.get_seq_length() == 10 + singles
        for t in range(10 + singles, 30):
            step = x[:, t : t + 1]
            assert torch.equal(model(step, cache=loaded).logits, model(step, cache=cache).logits)
        assert torch.equal(model(x[:, 30:], cache=loaded).logits, model(x[:, 30:], cache=cache).logits)


@variants
def test_rows_that_stand_at_different_places(variant, tmp_path):
    """Left padding: every row has read another number of tokens."""
    model, x = build(variant), ids(B=3, T=20)
    mask = torch.arange(20) >= torch.tensor([[0], [3], [11]])
    with torch.no_grad():
        cache = model(x, attention_mask=mask).cache
        loaded = round_trip(cache, model, tmp_path / "m")
        same(loaded, cache)
        assert torch.equal(model(x, cache=loaded).logits, model(x, cache=cache).logits)


@variants
@pytest.mark.parametrize(("length", "piece"), [(1, 7), (7, 7), (8, 7), (50, 7), (61, 13)])
def test_memorize_in_pieces_is_one_forward(variant, length, piece, monkeypatch):
    monkeypatch.setattr("titans.models.causal_lm.PIECE", piece)
    model, x, rest = build(variant, dtype=torch.float64), ids(T=length), ids(T=9, seed=2)
    cache = model.memorize(x)
    with torch.no_grad():
        whole = model(torch.cat([x, rest], 1)).logits[:, length:]
        assert_equal(model(rest, cache=cache).logits, whole)


@variants
def test_memorize_at_its_real_pieces(variant):
    model, x = build(variant, num_hidden_layers=1), ids(B=1, T=4300)
    with torch.no_grad():
        assert_equal(tensors(model.memorize(x)), tensors(model(x, logits_to_keep=1).cache))


@variants
def test_memorize_goes_on_and_generate_takes_what_is_new(variant):
    """In two calls as in one; a prompt after it is not mistaken for what was read, be it longer or shorter."""
    model, x = build(variant, dtype=torch.float64), ids(B=1, T=30)
    cache = model.memorize(x[:, :11])
    assert model.memorize(x[:, 11:20], cache) is cache
    assert cache.get_seq_length() == 0
    written = model.generate(x[:, 20:], cache=cache, max_new_tokens=8, do_sample=False)
    assert torch.equal(written, model.generate(x, max_new_tokens=8, do_sample=False)[:, 20:])


def test_memorize_leaves_a_cache_for_anything():
    """No inference tensors: gradients may flow through what follows."""
    model = build("mac")
    model(ids(), cache=model.memorize(ids()), labels=ids()).loss.backward()
    assert all(p.grad is not None for p in model.model.layers[0].feed_forward.parameters())


@variants
def test_the_model_may_be_saved_and_loaded(variant, tmp_path):
    model = build(variant)
    model.memorize(ids()).save_pretrained(tmp_path / "m", model)
    model.save_pretrained(tmp_path / "model")
    again = TitansForCausalLM.from_pretrained(tmp_path / "model")
    same(TitansCache.load(tmp_path / "m", again), model.memorize(ids()))
    half = TitansForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"another model, dtype='torch.float32', not 'torch.bfloat16'"):
        TitansCache.load(tmp_path / "m", half)
    same(round_trip(half.memorize(ids()), half, tmp_path / "half"), half.memorize(ids()))


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"num_hidden_layers": 1}, "num_hidden_layers=2, not 1"),
        ({"chunk_size": 4}, "chunk_size=3, not 4"),
        ({"sliding_window": 9, "memory_max_lr": 0.02}, "memory_max_lr=0.1, not 0.02"),
    ],
)
def test_another_configuration_is_refused(change, field, tmp_path):
    model = build("mag")
    model.memorize(ids()).save_pretrained(tmp_path / "m", model)
    with pytest.raises(ValueError, match=rf"m is the memory of another model, {field}; load it with"):
        TitansCache.load(tmp_path / "m", build("mag", **change))
    with pytest.raises(ValueError, match="variant='mag', not 'mal'"):
        TitansCache.load(tmp_path / "m", build("mal"))
    other = build_model({"type": "llama", "hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 16},
                        vocab_size=20, eos_token_id=0, pad_token_id=1)  # fmt: skip
    with pytest.raises(ValueError, match="model_type='llama' has no memory"):
        TitansCache.load(tmp_path / "m", other)


def test_any_other_weight_is_refused(tmp_path):
    """The last bit of any parameter, and two that changed places; what no state depends on may differ."""
    model = build("mac", tie_word_embeddings=False)
    model.memorize(ids()).save_pretrained(tmp_path / "m", model)
    model.config.use_cache, model.config.eos_token_id = False, 3
    TitansCache.load(tmp_path / "m", model)
    for parameter in model.parameters():
        kept = parameter.detach().clone()
        parameter.data.view(-1)[-1:].view(torch.int32).bitwise_xor_(1)
        with pytest.raises(ValueError, match="other weights, sha256"):
            TitansCache.load(tmp_path / "m", model)
        parameter.data.copy_(kept)
    first, second = (layer.mix_norm.weight for layer in model.model.layers)
    first.data, second.data = second.data, first.data
    with pytest.raises(ValueError, match="other weights"):
        TitansCache.load(tmp_path / "m", model)


def test_identity_takes_nothing_but_the_model():
    assert Identity.of(build("lmm")) == Identity.of(build("lmm"))
    assert Identity.of(build("lmm")) != Identity.of(build("lmm", seed=1))


@pytest.mark.parametrize("how", ["truncated", "empty", "text", "no memory", "missing tensor", "wrong shape"])
def test_broken_files(how, tmp_path):
    model, path = build("mac"), tmp_path / "book.memory.safetensors"
    model.memorize(ids()).save_pretrained(path, model)
    whole, (held, metadata) = path.read_bytes(), load_tensors(path)
    message = "truncated or no safetensors file"
    if how in ("truncated", "empty", "text"):
        path.write_bytes({"truncated": whole[: len(whole) // 2], "empty": b"", "text": b"no tensors here"}[how])
    elif how == "no memory":
        save_file(held, path)
        message = "no memory; give what save_pretrained"
    else:
        name = "1.memory.maps.0"
        held[name] = held[name][:, :, :, :-1]
        if how == "missing tensor":
            del held[name]
        save_tensors(held, path, metadata)
        message = f"damaged: the tensor '{name}'.*restore it"
    with pytest.raises(ValueError, match=rf"book.memory.safetensors.*{message}"):
        TitansCache.load(path, model)


ENTRIES = {
    "no JSON": (lambda about: "{", "metadata cannot be read"),
    "a list": (lambda about: "[]", "metadata cannot be read"),
    "nested without end": (lambda about: "[" * 10_000, "metadata cannot be read"),
    "no length": (lambda about: json.dumps({n: v for n, v in about.items() if n != "length"}), "'length'"),
    "length": (lambda about: json.dumps(about | {"length": "5"}), "must hold length"),
    "no model": (lambda about: json.dumps(about | {"model": None}), "metadata cannot be read"),
    "weights": (
        lambda about: json.dumps(about | {"model": about["model"] | {"weights": True}}),
        "must hold .* the model",
    ),
    "more": (lambda about: json.dumps(about | {"model": about["model"] | {"x": 1}}), "must hold .* the model"),
}


@pytest.mark.parametrize("name", ENTRIES)
def test_damaged_metadata(name, tmp_path):
    entry, message = ENTRIES[name]
    model, path = build("lmm"), tmp_path / "book.memory"
    model.memorize(ids()).save_pretrained(path, model)
    held, metadata = load_tensors(path)
    save_tensors(held, path, {"titans_memory": entry(json.loads(metadata["titans_memory"]))})
    with pytest.raises(ValueError, match=rf"book.memory is damaged: its .*{message}.*restore it"):
        TitansCache.load(path, model)


@pytest.mark.parametrize("name", ["0.position", "0.pending"])
@pytest.mark.parametrize("change", [torch.Tensor.half, lambda t: t.flatten()[0].clone()], ids=["dtype", "a number"])
def test_a_tensor_of_another_kind(name, change, tmp_path):
    model, path = build("lmm"), tmp_path / "book.memory"
    model.memorize(ids()).save_pretrained(path, model)
    held, metadata = load_tensors(path)
    save_tensors(held | {name: change(held[name])}, path, metadata)
    with pytest.raises(ValueError, match=f"book.memory is damaged: the tensor '{name}' should be .* and is "):
        TitansCache.load(path, model)


def test_mistakes(tmp_path):
    model = build("lmm")
    with pytest.raises(FileNotFoundError, match="no file"):
        TitansCache.load(tmp_path / "nowhere", model)
    with pytest.raises(ValueError, match="has read nothing"):
        TitansCache(2).save_pretrained(tmp_path / "m", model)
    with pytest.raises(ValueError, match="is a folder; name a file"):
        model.memorize(ids()).save_pretrained(tmp_path, model)
    assert not list(tmp_path.iterdir())


def test_the_metadata_is_plain(tmp_path):
    """Anything may look up whose memory it is, without torch."""
    model = build("mac")
    model.memorize(ids()).save_pretrained(tmp_path / "m", model)
    raw = (tmp_path / "m").read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    about = json.loads(header["__metadata__"]["titans_memory"])
    assert about["model"]["config"]["variant"] == "mac"
    assert len(about["model"]["weights"]) == 64
