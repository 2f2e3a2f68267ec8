"""Cached generation equals the full forward (test contract, item 6)."""

import copy

import pytest
import torch
from model_cases import MODELS, VARIANTS, VOCAB, assert_equal, build, ids, near

models = pytest.mark.parametrize(("variant", "size"), MODELS)
variants = pytest.mark.parametrize("variant", VARIANTS)
LENGTHS = [1, 2, 3, 5, 8, 9, 16, 21]  # below, at, above and at no multiple of chunks 3, 4, 8 and reaches 5, 8
NEW = 10


def greedy(model, prompt, **options):
    return model.generate(prompt, max_new_tokens=NEW, do_sample=False, **options)


def greedy_by_hand(model, prompt, steps=NEW):
    """No cache: the whole sequence again for every token."""
    for _ in range(steps):
        logits = model(prompt, use_cache=False).logits[:, -1]
        prompt = torch.cat([prompt, logits.argmax(-1, keepdim=True)], 1)
    return prompt


@models
@pytest.mark.parametrize("length", LENGTHS)
def test_cached_steps_are_the_full_forward(variant, size, length):
    """Trap 5: a prompt, then token by token; every logit of every position."""
    model, tokens = build(variant, size), ids(T=length + 12)
    with torch.no_grad():
        full = model(tokens).logits
        out = model(tokens[:, :length])
        logits = [out.logits]
        for t in range(length, tokens.shape[1]):
            out = model(tokens[:, t : t + 1], cache=out.cache)
            logits.append(out.logits)
    near(torch.cat(logits, 1), full)


@models
@pytest.mark.parametrize("length", [2, 8, 13])
def test_greedy_is_the_full_forward(variant, size, length):
    model, prompt = build(variant, size, torch.float64), ids(T=length)
    with torch.no_grad():
        assert torch.equal(greedy(model, prompt), greedy_by_hand(model, prompt))


@models
def test_generated_scores_are_the_full_logits(variant, size):
    model, prompt = build(variant, size), ids(T=11)
    out = greedy(model, prompt, output_logits=True, return_dict_in_generate=True)
    with torch.no_grad():
        full = model(out.sequences).logits
    near(torch.stack(out.logits, 1), full[:, 10:-1])


@models
def test_left_padding_changes_nothing(variant, size):
    """A batch of prompts of different lengths generates what each prompt generates alone."""
    model = build(variant, size, torch.float64)
    prompts = [ids(B=1, T=n, seed=n) for n in (3, 8, 13)]
    padded = torch.cat([torch.nn.functional.pad(p, (13 - p.shape[1], 0)) for p in prompts])
    out = greedy(model, padded, attention_mask=(padded != 0).long(), output_logits=True, return_dict_in_generate=True)
    logits = torch.stack(out.logits, 1)
    for b, prompt in enumerate(prompts):
        alone = greedy(model, prompt, output_logits=True, return_dict_in_generate=True)
        assert torch.equal(out.sequences[b, 13:], alone.sequences[0, prompt.shape[1] :])
        assert_equal(logits[b], torch.stack(alone.logits, 1)[0])


def beams_by_hand(model, prompt, beams, steps):
    """Exhaustive-width beam search without a cache: the score is the sum of log-probabilities."""
    found = [(0.0, prompt)]
    for _ in range(steps):
        longer = []
        for score, tokens in found:
            logp = model(tokens, use_cache=False).logits[0, -1].log_softmax(-1)
            longer += [(score + float(logp[i]), torch.cat([tokens, torch.tensor([[i]])], 1)) for i in range(VOCAB)]
        found = sorted(longer, key=lambda item: -item[0])[:beams]
    return found[0]


@variants
def test_beams(variant):
    """The cache follows its beams when they are reordered."""
    model, prompt = build(variant, dtype=torch.float64), ids(B=1, T=7)
    out = model.generate(
        prompt, max_new_tokens=6, num_beams=3, do_sample=False, length_penalty=0.0, return_dict_in_generate=True,
        output_scores=True,
    )  # fmt: skip
    with torch.no_grad():
        score, expected = beams_by_hand(model, prompt, 3, 6)
    assert torch.equal(out.sequences, expected)
    assert abs(float(out.sequences_scores[0]) - score) < 1e-5


@variants
def test_beams_in_a_left_padded_batch(variant):
    model = build(variant, dtype=torch.float64)
    prompts = [ids(B=1, T=n, seed=n) for n in (4, 9)]
    padded = torch.cat([torch.nn.functional.pad(p, (9 - p.shape[1], 0)) for p in prompts])
    beams = {"max_new_tokens": 6, "num_beams": 3, "do_sample": False}
    out = model.generate(padded, attention_mask=(padded != 0).long(), **beams)
    for b, prompt in enumerate(prompts):
        assert torch.equal(out[b, 9:], model.generate(prompt, **beams)[0, prompt.shape[1] :])


@variants
def test_sampling_with_and_without_cache(variant):
    """The same draws from the same seed; another seed draws something else."""
    model, prompt = build(variant, dtype=torch.float64), ids(T=9)

    def sample(seed, **options):
        torch.manual_seed(seed)
        return model.generate(prompt, max_new_tokens=NEW, do_sample=True, top_k=0, **options)

    assert torch.equal(sample(0), sample(0, use_cache=False))
    assert not torch.equal(sample(0), sample(1))
    several = sample(0, num_return_sequences=3)
    assert several.shape == (6, 9 + NEW)


@variants
def test_end_of_sequence_pads_the_finished_row(variant):
    """A row that ended does not disturb the one that goes on."""
    model, prompt = build(variant, dtype=torch.float64), ids(T=9)
    free = greedy(model, prompt)
    stop = int(free[0, 11])
    out = model.generate(prompt, max_new_tokens=NEW, do_sample=False, eos_token_id=stop)
    for row, whole in zip(out, free, strict=True):
        made = whole[9:].tolist()
        length = 9 + (made.index(stop) + 1 if stop in made else NEW)
        assert torch.equal(row[:length], whole[:length])
        assert not row[length:].any()


@variants
def test_cache_is_constant_in_size_and_reused(variant):
    """A conversation: generation goes on from a cache that was returned, as from the whole text."""
    model, prompt = build(variant, dtype=torch.float64), ids(B=1, T=40)
    with torch.no_grad():
        short, long = model(prompt[:, :3]).cache, model(prompt).cache
    assert short.nbytes == long.nbytes > 0
    assert long.get_seq_length() == 40
    whole = greedy(model, prompt)
    assert torch.equal(greedy(model, prompt, cache=model(prompt[:, :25]).cache), whole)
    with torch.no_grad(), pytest.warns(FutureWarning, match="Use `cache` instead"):  # the name it had before
        near(model(prompt[:, 25:], past_key_values=model(prompt[:, :25]).cache).logits, model(prompt).logits[:, 25:])


@variants
def test_prompt_longer_than_anything_seen(variant):
    """Issue 1, item 6: no position runs out."""
    model = build(variant)
    out = greedy(model, ids(B=1, T=700))
    assert out.shape == (1, 700 + NEW)


@variants
def test_a_zero_length_mask_row_is_an_empty_memory(variant):
    """A row of pads only, then its first token: as if the row began there."""
    model, tokens = build(variant, dtype=torch.float64), ids(B=1, T=5)
    with torch.no_grad():
        cache = model(torch.zeros_like(tokens), attention_mask=torch.zeros_like(tokens)).cache
        late = model(tokens, cache=cache, attention_mask=torch.ones_like(tokens)).logits
        assert_equal(late, model(tokens).logits)


@variants
def test_a_cache_in_the_middle_of_single_tokens(variant):
    """Copied without the model, rows chosen, read on in a piece: the same numbers as the full forward."""
    model, x = build(variant), ids(2, 25)
    with torch.no_grad():
        full, cache = model(x).logits, model(x[:, :5], use_cache=True).cache
        for t in range(5, 14):
            model(x[:, t : t + 1], cache=cache)
        assert cache.layers[0]._decoder is not None
        other = copy.deepcopy(cache)
        assert other.layers[0]._decoder is None
        near(model(x[:, 14:], cache=other).logits, full[:, 14:])
        cache.reorder_cache(torch.tensor([1, 1]))
        for t in range(14, 25):
            near(model(x[[1, 1], t : t + 1], cache=cache).logits[:, 0], full[[1, 1], t])
    assert cache.get_seq_length() == 25
