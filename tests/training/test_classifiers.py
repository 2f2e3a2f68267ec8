"""Classifiers behind one interface: padding, independence, gradients, files, starts, errors."""

import pytest
import torch
from tolerances import assert_equal
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification

from titans.training.classifiers import CLASSIFIER_TYPES, build_classifier
from titans.training.models import build_model

IDS = {"vocab_size": 7, "eos_token_id": 5, "pad_token_id": 6}
SMALL = {
    "titans": {"variant": "lmm", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1},
    "llama": {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1},
    "sliding_llama": {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "sliding_window": 4},
    "mamba2": {"hidden_size": 16, "num_hidden_layers": 1, "head_dim": 8, "state_size": 8, "chunk_size": 8},
    "gated_delta_net": {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
                        "linear_key_head_dim": 8, "linear_value_head_dim": 8},
    "olmo_hybrid": {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
                    "linear_key_head_dim": 8, "linear_value_head_dim": 8},
    "lstm": {"hidden_size": 16, "num_hidden_layers": 1},
    "transformer": {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2},
    "cnn": {"hidden_size": 16},
}  # fmt: skip
T = 21
kinds = pytest.mark.parametrize("kind", CLASSIFIER_TYPES)


def build(kind, **fields):
    """In evaluation mode, with every parameter away from its start."""
    model = build_classifier({"type": kind, **SMALL[kind], **fields}, classes=["a", "b", "c"], **IDS)
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model.eval()


def ids(batch=3):
    return torch.randint(0, 5, (batch, T), generator=torch.Generator().manual_seed(1))


@kinds
@torch.no_grad()
def test_padding_on_either_side_changes_nothing(kind):
    model, mask = build(kind), torch.ones(3, T, dtype=torch.long)
    mask[1, :6], mask[2, 13:] = 0, 0
    logits = model(ids(), attention_mask=mask).logits
    for row, real in enumerate((slice(None), slice(6, None), slice(0, 13))):
        assert_equal(logits[row], model(ids()[row : row + 1, real]).logits[0], 1e-4)
    assert (logits[1] - model(ids()).logits[1]).abs().max() > 1e-3


@kinds
@torch.no_grad()
def test_rows_are_independent_and_every_token_counts(kind):
    model = build(kind)
    logits = model(ids()).logits
    for where in (0, 10, T - 1):
        other = ids()
        other[1, where] = (other[1, where] + 1) % 5
        moved = (model(other).logits - logits).abs().amax(-1)
        assert moved[[0, 2]].max() < 1e-6
        assert moved[1] > 1e-5


@kinds
def test_every_parameter_gets_a_gradient_and_a_step_lowers_the_loss(kind):
    model, labels = build(kind).train(), torch.tensor([0, 1, 2])
    mask = torch.ones(3, T, dtype=torch.long)
    mask[1, 9:] = 0
    loss = model(ids(), attention_mask=mask, labels=labels).loss
    loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []
    torch.optim.SGD(model.parameters(), 0.01).step()
    assert model(ids(), attention_mask=mask, labels=labels).loss < loss


@kinds
@torch.no_grad()
def test_round_trip(kind, tmp_path):
    model = build(kind)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert loaded.config.id2label == {0: "a", 1: "b", 2: "c"}
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert_equal(loaded.eval()(ids()).logits, model(ids()).logits)


@pytest.mark.parametrize("kind", ["llama", "mamba2", "gated_delta_net", "lstm"])
def test_backbones_start_as_in_the_language_model(kind):
    """The wrapper draws nothing before them, and what a library sets by hand stays."""
    spec = {"type": kind, **SMALL[kind]}
    body, other = build_classifier(spec, classes=["a", "b"], **IDS).backbone, build_model(spec, **IDS).base_model
    assert all(torch.equal(p, other.state_dict()[name]) for name, p in body.state_dict().items())


@torch.no_grad()
def test_the_transformer_sees_both_directions_and_the_others_one():
    changed = ids(1)
    changed[0, -1] = (changed[0, -1] + 1) % 5
    for kind, moves in (("transformer", True), ("llama", False), ("mamba2", False), ("gated_delta_net", False)):
        body = build(kind).backbone
        first = [body(input_ids=x, use_cache=False).last_hidden_state[0, 0] for x in (ids(1), changed)]
        assert ((first[0] - first[1]).abs().max() > 1e-6) == moves


def test_the_cnn_against_its_definition():
    """Two rows without padding; the norm takes the mean over all their tokens."""
    model = build("cnn", num_hidden_layers=2).train()
    body, x = model.backbone, model.backbone.embed_tokens(ids(2)).mT
    for convolution, norm in zip(body.convolutions, body.norms, strict=True):
        y = F.conv1d(F.pad(x, (3, 4)), convolution.weight, convolution.bias)
        mean, variance = y.mean((0, 2), keepdim=True), y.var((0, 2), keepdim=True, unbiased=False)
        y = (y - mean) / (variance + 1e-5).sqrt() * norm.weight[:, None] + norm.bias[:, None]
        x = F.max_pool1d(F.pad(F.relu(y), (0, y.shape[2] % 2)), 2)
    assert x.shape == (2, 16, 6)
    assert_equal(model(ids(2)).logits, model.score(x.mean(2)), 1e-4)


def test_the_norm_of_the_cnn_counts_real_tokens_alone():
    model, mask = build("cnn", num_hidden_layers=1).train(), torch.ones(2, T, dtype=torch.long)
    mask[:, 10:] = 0
    assert_equal(model(ids(2), attention_mask=mask).logits, model(ids(2)[:, :10]).logits, 1e-4)


def test_bad_specs_name_the_mend():
    for spec, message in (
        ({"type": "bert"}, r"model\.type='bert' is not valid; use"),
        ({"type": "cnn", "hiden_size": 8}, r"model\.hiden_size is no setting of 'cnn'; use 'hidden_size'"),
        ({"type": "mamba2", "hiden_size": 8}, r"model\.hiden_size is no setting of 'mamba2'; use 'hidden_size'"),
        ({"hiden_size": 8}, r"unknown key 'hiden_size'.*did you mean 'hidden_size'"),
        ({"type": "llama", "hidden_size": 30}, r"model=.* is refused by LlamaConfig: .*not a multiple"),
        ({"type": "transformer", "hidden_size": "x"}, r"model=.* is refused by ModernBertConfig: .*expected int"),
    ):
        with pytest.raises(ValueError, match=f"(?s){message}"):
            build_classifier(spec, classes=["a", "b"], **IDS)
