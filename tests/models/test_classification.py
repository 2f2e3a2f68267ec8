"""The classifier: pooling, padding on either side, independence, gradients, loss, files, errors."""

import pytest
import torch
from model_cases import VARIANTS, assert_equal, config, ids
from transformers import AutoModelForSequenceClassification

from titans.models import TitansForCausalLM, TitansForSequenceClassification

variants = pytest.mark.parametrize("variant", VARIANTS)
T = 21


def build(variant="lmm", **changes) -> TitansForSequenceClassification:
    """In float64 and evaluation mode, with every parameter away from its start."""
    torch.manual_seed(0)
    model = TitansForSequenceClassification(config(variant, **{"num_labels": 3, **changes}))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model.double().eval()


@variants
@torch.no_grad()
def test_logits_are_a_map_of_the_mean_over_tokens(variant):
    model, tokens = build(variant), ids()
    out = model(tokens, output_hidden_states=True)
    assert out.loss is None
    assert_equal(out.logits, model.score(out.hidden_states[-1].mean(1)))
    assert_equal(out.hidden_states[-1], model.model(tokens).last_hidden_state)
    assert_equal(model(inputs_embeds=model.get_input_embeddings()(tokens)).logits, out.logits)


@variants
@pytest.mark.parametrize("side", ["left", "right", "both"])
@torch.no_grad()
def test_padding_changes_nothing(variant, side):
    model, tokens = build(variant), ids(T=T)
    real = {"left": slice(6, T), "right": slice(0, 15), "both": slice(4, 17)}[side]
    mask = torch.zeros(2, T, dtype=torch.long)
    mask[0], mask[1, real] = 1, 1
    logits = model(tokens, attention_mask=mask).logits
    assert_equal(logits[:1], model(tokens[:1]).logits)
    assert_equal(logits[1:], model(tokens[1:, real]).logits)
    assert (logits[1:] - model(tokens[1:]).logits).abs().max() > 1e-4


@variants
@torch.no_grad()
def test_rows_are_independent_and_every_token_counts(variant):
    model, tokens = build(variant), ids(B=3)
    logits = model(tokens).logits
    for where in (0, 10, T - 1):
        other = tokens.clone()
        other[1, where] = other[1, where] % 19 + 1
        moved = (model(other).logits - logits).abs().amax(-1)
        assert moved[[0, 2]].max() == 0
        assert moved[1] > 1e-5


@variants
def test_every_parameter_gets_a_gradient(variant):
    model = build(variant).train()
    mask = torch.ones(2, T, dtype=torch.long)
    mask[1, :5] = 0
    model(ids(T=T), attention_mask=mask, labels=torch.tensor([0, 2])).loss.backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []


def test_loss_is_cross_entropy_or_the_squared_error_of_a_single_label():
    model, labels = build(), torch.tensor([2, 0])
    out = model(ids(), labels=labels)
    assert_equal(out.loss, torch.nn.functional.cross_entropy(out.logits, labels))
    assert out["loss"] is out.loss  # as the Trainer asks for it
    model, numbers = build(num_labels=1), torch.tensor([0.5, -1.0], dtype=torch.float64)
    out = model(ids(), labels=numbers)
    assert_equal(out.loss, ((out.logits[:, 0] - numbers) ** 2).mean())


@variants
@torch.no_grad()
def test_round_trip(variant, tmp_path):
    model = build(variant, id2label={0: "none", 1: "enhancer", 2: "promoter"}).float()
    model.save_pretrained(tmp_path)
    for kind in (TitansForSequenceClassification, AutoModelForSequenceClassification):
        loaded = kind.from_pretrained(tmp_path)
        assert type(loaded) is TitansForSequenceClassification
        assert loaded.config.id2label == {0: "none", 1: "enhancer", 2: "promoter"}
        assert loaded.state_dict().keys() == model.state_dict().keys()
        assert all(torch.equal(loaded.state_dict()[n], t) for n, t in model.state_dict().items())
        assert_equal(loaded(ids()).logits, model(ids()).logits)


@torch.no_grad()
def test_takes_the_body_of_a_language_model(tmp_path):
    model = TitansForCausalLM(config("mag"))
    model.save_pretrained(tmp_path)
    loaded = TitansForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
    assert all(torch.equal(p, loaded.model.state_dict()[n]) for n, p in model.model.state_dict().items())


def test_learns_what_only_the_first_token_tells():
    """Two classes, 16 tokens of noise behind the one that decides; padded on the left to lengths of their own."""
    torch.manual_seed(0)
    model = TitansForSequenceClassification(config("lmm", num_labels=2, num_hidden_layers=1))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)

    def batch():
        tokens, labels = torch.randint(3, 20, (32, T)), torch.randint(0, 2, (32,))
        begin = torch.randint(0, 5, (32,))
        tokens[torch.arange(32), begin] = 1 + labels
        return tokens, (torch.arange(T) >= begin.unsqueeze(1)).long(), labels

    for _ in range(40):
        tokens, mask, labels = batch()
        optimizer.zero_grad()
        model(tokens, attention_mask=mask, labels=labels).loss.backward()
        optimizer.step()
    tokens, mask, labels = batch()
    assert (model.eval()(tokens, attention_mask=mask).logits.argmax(1) == labels).float().mean() > 0.95


def test_bad_input_names_the_mend():
    mask = torch.ones(2, T, dtype=torch.long)
    mask[1] = 0
    with pytest.raises(ValueError, match=r"row 1 of attention_mask has no token; leave empty sequences out"):
        build()(ids(T=T), attention_mask=mask)
    with pytest.raises(ValueError, match=r"mask must be \[batch, length\] = \[2, 21\], got \[2, 20\]"):
        build()(ids(T=T), attention_mask=mask[:, 1:])
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        build()()
    with pytest.raises(ValueError, match=r"memory_write_price=0\.1 is for language models; leave it at 0"):
        build(memory_gate="write", memory_write_price=0.1)
