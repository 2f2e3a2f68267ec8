"""Gradients of whole models, checkpointing, stable starts, falling loss (issue 1, items 3 and 4)."""

import copy

import pytest
import torch
from model_cases import MODELS, VARIANTS, assert_equal, build, config, ids

from titans.models import TitansForCausalLM, titans_tiny

variants = pytest.mark.parametrize("variant", VARIANTS)


def gradients(model, tokens, **arguments) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(tokens, labels=tokens, **arguments).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("variant", "size"), MODELS)
@pytest.mark.parametrize("gate", ["sigmoid", "write"])
@pytest.mark.parametrize("fresh", [False, True], ids=["anywhere", "fresh"])
def test_every_parameter_gets_a_gradient(variant, size, gate, fresh):
    """Traps 4 and 10: also at the start, where distributed training would fail first."""
    model = (
        TitansForCausalLM(config(variant, size, memory_gate=gate)) if fresh else build(variant, size, memory_gate=gate)
    )
    found = gradients(model.train(), ids(T=40))
    missing = [n for n, _ in model.named_parameters() if n not in found or not found[n].any()]
    assert not missing
    assert all(g.isfinite().all() for g in found.values())


@variants
def test_activation_checkpointing_gives_the_same_gradients(variant):
    model = build(variant, dtype=torch.float64).train()
    expected = gradients(model, ids())
    again = copy.deepcopy(model)
    again.gradient_checkpointing_enable()
    assert again.is_gradient_checkpointing
    assert_equal(gradients(again, ids()), expected)
    mask = torch.ones(2, 21, dtype=torch.long)
    mask[0, :6] = 0
    assert_equal(gradients(again, ids(), attention_mask=mask), gradients(model, ids(), attention_mask=mask))


@variants
def test_checkpointing_recomputes(variant):
    """It is not just a flag: every block runs twice."""
    model, calls = build(variant).train(), []
    model.gradient_checkpointing_enable()
    model.model.layers[0].mix_norm.register_forward_hook(lambda *_: calls.append(1))
    gradients(model, ids())
    assert len(calls) == 2


def test_price_of_writing_in_accumulated_batches():
    """The losses of a batch's rows, as the Trainer accumulates them, add up to the batch's."""
    model = TitansForCausalLM(config("lmm", memory_gate="write", memory_write_price=0.1)).train()
    x = ids()
    labels = x.clone()
    labels[0, : x.shape[1] // 2] = -100
    items = (labels[:, 1:] != -100).sum()
    rows = [model(x[i : i + 1], labels=labels[i : i + 1], num_items_in_batch=items).loss for i in range(len(x))]
    assert len(rows) > 1
    assert_equal(sum(rows), model(x, labels=labels, num_items_in_batch=items).loss)


@variants
@pytest.mark.parametrize("checkpointing", [False, True])
def test_price_of_writing(variant, checkpointing):
    """Fresh gates are all 3/4: the price is known, it is not part of the validation loss, and it closes gates."""
    model = TitansForCausalLM(config(variant, memory_gate="write", memory_write_price=0.1))
    free = copy.deepcopy(model)
    free.config.memory_write_price = 0.0
    if checkpointing:
        model.gradient_checkpointing_enable()
    loss = [
        m.train(training)(ids(), labels=ids()).loss.item()
        for m, training in ((model, True), (free, True), (model, False))
    ]
    assert loss[0] == pytest.approx(loss[1] + 0.1 * 0.75, abs=1e-5)
    assert loss[2] == pytest.approx(loss[1], abs=1e-5)
    bias = [
        gradients(m.train(), ids())[f"model.layers.{i}.memory.gates_proj.bias"]
        for i in range(model.config.num_hidden_layers)
        for m in (model, free)
    ]
    heads = model.config.num_memory_heads
    for priced, unpriced in zip(bias[::2], bias[1::2], strict=True):
        # d hardsigmoid = 1/6, shared evenly by all heads and layers
        expected = torch.full((heads,), 0.1 / 6 / heads / model.config.num_hidden_layers)
        assert_equal((priced - unpriced)[:heads], expected)
        assert_equal(priced[heads:], unpriced[heads:])


@variants
def test_carried_memory_trains_over_segments(variant):
    """Truncated backpropagation: the cache carries numbers, ``detach_`` stops the history."""
    model, tokens = build(variant).train(), ids(T=30)
    first = model(tokens[:, :15], use_cache=True)
    cache = first.cache.detach_()
    assert not any(t.requires_grad for layer in cache.layers for t in layer.state.tensors().values())
    second = model(tokens[:, 15:], cache=cache, labels=tokens[:, 15:])
    second.loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert model.model.layers[0].memory.qkv_proj.weight.grad.any()


@pytest.mark.parametrize("depth", [1, 2, 4])
@pytest.mark.parametrize("chunk", [1, 16, 64])
@variants
def test_the_start_is_not_chaotic(variant, chunk, depth):
    """A relative change of 1e-9 in the embeddings moves the logits of a fresh model by little more than itself.

    Where small differences grow along the sequence, float32 and cached decoding cannot agree with anything.
    """
    sizes = {"memory_depth": depth, "chunk_size": chunk, "num_hidden_layers": 2, "hidden_size": 64}
    model = TitansForCausalLM(titans_tiny(variant, **sizes)).double().eval()
    tokens = torch.randint(0, 258, (1, 256 if chunk > 1 else 96))
    with torch.no_grad():
        logits = model(tokens).logits
        embedding = model.model.embed_tokens.weight
        embedding.mul_(1 + 1e-9 * torch.randn_like(embedding))
        growth = (model(tokens).logits - logits).abs().max() / (1e-9 * logits.abs().max())
    assert growth < 300


@variants
def test_cached_decoding_of_a_fresh_model(variant):
    """Issue 1, item 3, at the sizes of the tiny preset, in float32."""
    model = TitansForCausalLM(titans_tiny(variant)).eval()
    tokens = torch.randint(0, 258, (1, 150))
    with torch.no_grad():
        full, out = model(tokens).logits, model(tokens[:, :77])
        logits = [out.logits]
        for t in range(77, 150):
            out = model(tokens[:, t : t + 1], cache=out.cache)
            logits.append(out.logits)
    assert (torch.cat(logits, 1) - full).abs().max() <= 1e-4


def falling(variant, dtype, T, steps, **sizes):
    """A few steps on one text that repeats itself: no NaN in losses, gradients and parameters, and the loss falls."""
    torch.manual_seed(0)
    model = TitansForCausalLM(titans_tiny(variant, memory_depth=4, vocab_size=64, **sizes)).to(dtype).train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    tokens, losses = torch.randint(0, 64, (1, 32)).repeat(1, T // 32), []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        assert loss.isfinite()
        assert norm.isfinite()
        optimizer.step()
        losses.append(loss.item())
    assert all(p.isfinite().all() for p in model.parameters())
    assert losses[-1] < losses[0] - 0.05
    assert max(losses) < losses[0] + 0.2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@variants
def test_depth_4_is_stable(variant, dtype):
    falling(variant, dtype, 512, 6, num_hidden_layers=1, hidden_size=32, chunk_size=64)


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [16, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@variants
def test_depth_4_is_stable_at_8192_tokens(variant, dtype, chunk):
    falling(variant, dtype, 8192, 10, num_hidden_layers=2, hidden_size=64, chunk_size=chunk)
