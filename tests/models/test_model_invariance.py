"""A changed token moves no earlier logit and no other row (issue 1, item 3)."""

import re

import pytest
import torch
from model_cases import MODELS, VARIANTS, assert_equal, build, ids, near

models = pytest.mark.parametrize(("variant", "size"), MODELS)
T = 21


@models
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 0.0), (torch.float32, 1e-6)])
def test_causality_and_rows(variant, size, dtype, bound):
    model, tokens = build(variant, size, dtype), ids(B=3, T=T)
    with torch.no_grad():
        logits = model(tokens).logits
        for where in (1, 5, 8, 13, T - 1):
            other = tokens.clone()
            other[1, where] = other[1, where] % 19 + 1
            moved = (model(other).logits - logits).abs().amax(-1)
            assert moved[1, :where].max() <= bound
            assert moved[[0, 2]].max() <= bound
            assert moved[1, where] > 1e-4


@models
def test_twice_is_the_same(variant, size):
    model, tokens = build(variant, size), ids()
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, model(tokens).logits)


@models
@pytest.mark.parametrize("side", ["left", "holes", "right"])
def test_padding_changes_nothing(variant, size, side):
    model, tokens = build(variant, size, torch.float64), ids(T=T)
    mask = torch.ones(2, T, dtype=torch.long)
    mask[1, {"left": slice(0, 5), "holes": slice(3, 17, 3), "right": slice(14, T)}[side]] = 0
    with torch.no_grad():
        logits = model(tokens, attention_mask=mask).logits
        assert_equal(logits[:1], model(tokens[:1]).logits)
        assert_equal(logits[1:, mask[1] > 0], model(tokens[1:, mask[1] > 0]).logits)


@models
def test_split_anywhere(variant, size):
    """In pieces through the cache, with a mask of all columns so far, as generation passes it."""
    model, tokens = build(variant, size), ids(T=T)
    mask = torch.ones(2, T, dtype=torch.long)
    mask[0, :4] = 0
    with torch.no_grad():
        full = model(tokens, attention_mask=mask).logits
        for cut in range(1, T, 3):
            first = model(tokens[:, :cut], attention_mask=mask[:, :cut])
            second = model(tokens[:, cut:], attention_mask=mask, cache=first.cache)
            logits = torch.cat([first.logits, second.logits], 1)
            near(logits[mask > 0], full[mask > 0])


@pytest.mark.parametrize("variant", VARIANTS)
def test_embeddings_instead_of_ids(variant):
    model, tokens = build(variant), ids()
    embedded = model.get_input_embeddings()(tokens)
    with torch.no_grad():
        assert torch.equal(model(inputs_embeds=embedded).logits, model(tokens).logits)
        for arguments in ({}, {"input_ids": tokens, "inputs_embeds": embedded}):
            with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
                model(**arguments)


@pytest.mark.parametrize("shape", [(5,), (2, 3, 5)])
def test_ids_of_another_shape(shape):
    model, wrong = build("mac"), torch.zeros(shape, dtype=torch.long)
    for call in (model, model.memorize):
        with pytest.raises(ValueError, match=rf"give input_ids \[B, T\].*not {re.escape(str(list(shape)))}"):
            call(wrong)
    with pytest.raises(ValueError, match=r"inputs_embeds \[B, T, hidden_size\], not \[1, 1, 5, 8\]"):
        model(inputs_embeds=torch.zeros(1, 1, 5, 8))


@pytest.mark.parametrize("variant", VARIANTS)
def test_outputs_on_request(variant):
    model, tokens = build(variant), ids()
    with torch.no_grad():
        out = model(tokens, output_hidden_states=True)
        assert len(out.hidden_states) == 3
        assert torch.equal(model.lm_head(out.hidden_states[-1]), out.logits)
        assert torch.equal(model(tokens, logits_to_keep=2).logits, out.logits[:, -2:])
        assert model(tokens, use_cache=False).cache is None
        expected = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        assert torch.allclose(model(tokens, labels=tokens).loss, expected)
