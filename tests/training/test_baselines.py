"""The library baselines behind one interface."""

import pytest
import torch
from torch.nn import functional as F
from transformers import TrainingArguments

from titans.training.models import MODEL_TYPES, build_model, has_constant_state, read_on
from titans.training.trainer import RunTrainer

BASELINES = [kind for kind in MODEL_TYPES if kind != "titans"]
IDS = {"vocab_size": 258, "eos_token_id": 256, "pad_token_id": 257}
SMALL = {
    "llama": {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2},
    "sliding_llama": {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "sliding_window": 16},
    "mamba2": {"hidden_size": 32, "num_hidden_layers": 2, "head_dim": 16, "state_size": 8, "chunk_size": 16},
    "gated_delta_net": {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2,
                        "linear_key_head_dim": 16, "linear_value_head_dim": 16},
    "olmo_hybrid": {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2,
                    "linear_key_head_dim": 16, "linear_value_head_dim": 16},
    "lstm": {"hidden_size": 32, "num_hidden_layers": 2},
}  # fmt: skip


def small(kind, **fields):
    return build_model({"type": kind, **SMALL[kind], **fields}, **IDS)


@pytest.fixture(params=BASELINES)
def kind(request):
    return request.param


def test_defaults_make_a_million_parameters(kind):
    assert build_model({"type": kind}, **IDS).num_parameters() == pytest.approx(1.05e6, rel=0.01)


def test_causal_and_streamed_equals_whole(kind):
    model = small(kind).eval()
    ids = torch.randint(0, 256, (2, 90), generator=torch.Generator().manual_seed(0))
    changed = ids.clone()
    changed[:, 60] = (changed[:, 60] + 1) % 256
    with torch.no_grad():
        whole = model(input_ids=ids).logits
        assert torch.equal(whole[:, :60], model(input_ids=changed).logits[:, :60])
        assert not torch.equal(whole[:, 60:], model(input_ids=changed).logits[:, 60:])
        cache, pieces = None, []
        for piece in ids.split(40, 1):
            logits, cache = read_on(model, piece, cache)
            pieces.append(logits)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, atol=1e-4, rtol=1e-4)


def test_logits_of_labelled_tokens_alone_give_the_same_gradients(kind, tmp_path):
    assert_logits_of_labelled_tokens_alone(small(kind), tmp_path)


def test_titans_logits_of_labelled_tokens_alone_give_the_same_gradients(tmp_path):
    spec = {"variant": "mag", "hidden_size": 32, "num_hidden_layers": 1, "num_memory_heads": 1,
            "num_attention_heads": 2, "memory_gate": "write", "memory_write_price": 0.1}  # fmt: skip
    assert_logits_of_labelled_tokens_alone(build_model(spec, **IDS), tmp_path)


def assert_logits_of_labelled_tokens_alone(model, folder):
    """The Trainer's loss and gradients are the model's own; its output map sees nothing that is not labelled."""
    rows, draw = [], torch.Generator().manual_seed(0)
    ids = torch.randint(0, 256, (3, 40), generator=draw)
    labels = ids.where(torch.rand(ids.shape, generator=draw) < 0.2, -100)
    wanted = model.train()(input_ids=ids, labels=labels).loss
    wanted.backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    trainer = RunTrainer(model=model, args=TrainingArguments(output_dir=str(folder), use_cpu=True, report_to="none"))
    watch = model.get_output_embeddings().register_forward_hook(lambda _, args, out: rows.append(out.shape[:2]))
    loss = trainer.compute_loss(model, {"input_ids": ids, "labels": labels})
    watch.remove()
    loss.backward()
    assert rows == [(1, (labels[:, 1:] != -100).sum())]
    torch.testing.assert_close(loss, wanted)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-6, rtol=1e-4)


def test_one_step_lowers_the_loss_and_every_parameter_has_a_gradient(kind):
    model = small(kind).train()
    ids = torch.randint(0, 256, (4, 64), generator=torch.Generator().manual_seed(0))
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    torch.optim.SGD(model.parameters(), 0.02).step()
    assert model(input_ids=ids, labels=ids).loss < loss


def test_a_sliding_window_forgets_and_full_attention_does_not():
    ids = torch.randint(0, 256, (1, 64), generator=torch.Generator().manual_seed(0))
    changed = ids.clone()
    changed[:, 0] = (changed[:, 0] + 1) % 256
    with torch.no_grad():
        for kind, forgets in (("sliding_llama", True), ("llama", False), ("olmo_hybrid", False)):
            model = small(kind, num_hidden_layers=2 if kind == "olmo_hybrid" else 1).eval()
            same = torch.equal(model(input_ids=ids).logits[:, -1], model(input_ids=changed).logits[:, -1])
            assert same is forgets
            assert has_constant_state(model) is forgets


def test_baselines_start_as_ours(kind):
    """Mamba2 apart, whose authors' start is of that size at any width."""
    start = small(kind).get_input_embeddings().weight.std().item()
    assert start == pytest.approx(0.1 if kind == "mamba2" else 96**-0.5, rel=0.05)
    assert small(kind, initializer_range=0.5).get_input_embeddings().weight.std().item() == pytest.approx(0.5, rel=0.05)


def test_a_gated_delta_net_remembers_at_the_start():
    """Steps of forgetting between 0.001 and 0.1; with transformers' start, 1.3, a state would be gone in a token."""
    model = small("gated_delta_net", linear_num_value_heads=4, linear_num_key_heads=2)
    for layer in model.base_model.layers:
        steps = F.softplus(layer.linear_attn.dt_bias)
        assert steps.tolist() == pytest.approx([10**-2.75, 10**-2.25, 10**-1.75, 10**-1.25], rel=1e-5)


def test_seed_decides_the_weights(kind):
    spec = {"type": kind, **SMALL[kind]}
    one, same, other = (build_model(spec, **IDS, seed=seed) for seed in (1, 1, 2))
    pairs = zip(one.parameters(), same.parameters(), other.parameters(), strict=True)
    different = False
    for a, b, c in pairs:
        assert torch.equal(a, b)
        different |= not torch.equal(a, c)
    assert different


def test_bad_keys_and_types_name_the_nearest(kind):
    with pytest.raises(ValueError, match="hidden_size"):
        build_model({"type": kind, "hiden_size": 32}, **IDS)
    with pytest.raises(ValueError, match=r"model\.type='lama' is unknown; use 'llama'"):
        build_model({"type": "lama"}, **IDS)
