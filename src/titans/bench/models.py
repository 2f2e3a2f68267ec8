"""Subjects of `bench train`, `decode` and `stream`: whole language models; of an experiment, forecasters as well."""

import bisect
from collections.abc import Callable
from typing import Any

import torch

from titans.bench.case import Case, Subject, load_peer
from titans.layers import NeuralMemory

VARIANTS = ("mac", "mag", "mal", "lmm")
STREAM_TOKENS, STREAM_PIECE, DECODE_TOKENS = 65_536, 4_096, 64


def model(case: Case) -> Any:
    """A byte-level model, an experiment's or of the subject's kind at the case's sizes.

    Ours take the kernels on a GPU; a baseline at the case's sizes gets as many parameters as a MAC.
    """
    from titans.training.models import build_model

    ids = {"vocab_size": 258, "eos_token_id": 256, "pad_token_id": 257}
    sizes = {name: value for name, value in case.sizes.items() if name not in ("batch", "reach", "chunk_size")}

    def ours(variant: str) -> dict[str, Any]:
        reach = {"segment_length": case.sizes["reach"]} if variant == "mac" else {"sliding_window": case.sizes["reach"]}
        return {"variant": variant, "chunk_size": case.sizes["chunk_size"], **sizes, **reach}

    net: Any
    if "model" in case.sizes:
        net = build_model(case.sizes["model"], **ids)
    elif case.subject in VARIANTS:
        net = build_model(ours(case.subject), **ids)
        for memory in _memories(net):
            memory.backend = "triton" if case.device == "cuda" else "auto"
    else:
        wanted = build_model(ours("mac"), **ids).num_parameters()
        spec, grown, steps = {"type": case.subject, **sizes}, "intermediate_size", range(16, 8192, 16)
        if case.subject == "mamba2":
            spec.pop("num_attention_heads")
            grown, steps = "num_hidden_layers", range(1, 65)
        elif case.subject == "gated_delta_net":
            heads = spec.pop("num_attention_heads")
            spec |= {"linear_num_key_heads": heads, "linear_num_value_heads": heads}
        net = _nearest(lambda size: build_model(spec | {grown: size}, **ids), wanted, steps)
    return net.to(case.device)


def _memories(net: Any) -> list[NeuralMemory]:
    return [module for module in net.modules() if isinstance(module, NeuralMemory)]


def _nearest(make: Callable[[int], Any], wanted: int, sizes: range) -> Any:
    """The smallest model of at least the wanted number of parameters."""
    return make(sizes[bisect.bisect_left(sizes, wanted, key=lambda size: make(size).num_parameters())])


def _check(case: Case, net: Any):
    """For our models: reading in pieces gives what reading at once gives."""
    config = net.config
    if config.model_type != "titans":
        return None
    reach = max(config.chunk_size, config.segment_length, config.sliding_window)

    def check() -> None:
        from titans.training.models import read_on

        ids = torch.randint(0, 256, (1, 3 * reach + 1), device=case.device)
        with torch.no_grad():
            whole = net(ids).logits
            first, cache = read_on(net, ids[:, : reach + 1])
            rest, _ = read_on(net, ids[:, reach + 1 :], cache)
        error = (torch.cat([first, rest], 1) - whole).abs().max().item()
        if not error < 1e-3:
            raise AssertionError(f"{case.subject} read in pieces differs by {error:.1e}; no speed is reported for it")

    return check


def _autocast(case: Case):
    return torch.autocast(case.device, torch.bfloat16, enabled=case.dtype == "bfloat16")


def train(case: Case) -> Subject:
    net = model(case)
    check = _check(case, net.eval())
    net.train().config.use_cache = False
    ids = torch.randint(0, 256, (case.sizes["batch"], case.length), device=case.device)
    return Subject(_step(case, net, input_ids=ids, labels=ids), ids.numel(), check)


def forecast(case: Case) -> Subject:
    """A training step of an experiment's forecaster, on rows of random numbers; tokens are the look-back's rows."""
    from titans.training.forecasters import build_forecaster

    sizes = case.sizes
    lengths = {"context_length": case.length, "prediction_length": sizes["horizon"]}
    net: Any = build_forecaster(sizes["model"], **lengths, num_input_channels=sizes["channels"])
    net.to(case.device)
    past, future = (
        torch.randn(sizes["batch"], rows, sizes["channels"], device=case.device) for rows in lengths.values()
    )
    memories = _memories(net)

    @torch.no_grad()
    def check() -> None:
        found = []
        for backend in ("reference", "auto"):
            for memory in memories:
                memory.backend = backend
            found.append(net.eval()(past_values=past[:1]).prediction_outputs)
        net.train()
        error = (found[0] - found[1]).abs().max().item()
        if not error < 1e-3:
            raise AssertionError(f"{case.subject} differs from the reference by {error:.1e}; no speed is reported")

    step = _step(case, net.train(), past_values=past, future_values=future)
    return Subject(step, sizes["batch"] * case.length, check if memories else None)


def _step(case: Case, net: Any, **batch: torch.Tensor) -> Callable[[], None]:
    """A training step on a batch."""
    optimizer = torch.optim.AdamW(net.parameters(), fused=True)

    def run() -> None:
        with _autocast(case):
            net(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def decode(case: Case) -> Subject:
    """Greedy, the state carried from repetition to repetition."""
    from titans.training.models import read_on

    net = model(case).eval()
    prompt = torch.randint(0, 256, (case.sizes["batch"], case.length), device=case.device)
    with torch.inference_mode():
        cache = None
        for piece in prompt.split(STREAM_PIECE, 1):
            logits, cache = read_on(net, piece, cache)

    def run() -> None:
        nonlocal cache, logits
        with torch.inference_mode(), _autocast(case):
            for _ in range(DECODE_TOKENS):
                logits, cache = read_on(net, logits[:, -1:].argmax(-1), cache)

    return Subject(run, DECODE_TOKENS * case.sizes["batch"], _check(case, net))


def decode_titans_pytorch(case: Case) -> Subject:
    """titans-pytorch's MAC with its own cached sampling, which reads the prompt anew in every repetition."""
    s = case.sizes
    net = load_peer().MemoryAsContextTransformer(
        num_tokens=258, dim=s["hidden_size"], depth=s["num_hidden_layers"], segment_len=s["reach"],
        heads=s["num_attention_heads"], dim_head=s["hidden_size"] // s["num_attention_heads"],
    ).eval()  # fmt: skip
    prompt = torch.randint(0, 256, (1, case.length))

    def run() -> None:
        net.sample(prompt, case.length + DECODE_TOKENS, use_cache=True, show_progress=False)

    return Subject(run, DECODE_TOKENS)


def stream(case: Case) -> Subject:
    """Reads 65,536 tokens a repetition, going on where the one before stopped."""
    from titans.training.models import read_on

    net, cache = model(case).eval(), None
    check = _check(case, net)

    def read(tokens: int) -> None:
        nonlocal cache
        for start in range(0, tokens, STREAM_PIECE):
            shape = case.sizes["batch"], min(STREAM_PIECE, tokens - start)
            with torch.inference_mode(), _autocast(case):
                logits, cache = read_on(net, torch.randint(0, 256, shape, device=case.device), cache)
            if not torch.isfinite(logits).all():
                raise AssertionError(f"{case.subject} gave NaN or infinity")

    read(case.length)
    return Subject(lambda: read(STREAM_TOKENS), STREAM_TOKENS * case.sizes["batch"], check)
