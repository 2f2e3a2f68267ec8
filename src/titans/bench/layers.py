"""Subjects of `bench memory`: our layer, its peer, attention, and the bare matrix products of our layer."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titans.bench.case import Case, Subject, load_peer


def subject(case: Case, layer: nn.Module, call: Callable[[Tensor], Tensor], check=None) -> Subject:
    """Times ``call`` on random input [batch, length, dim], with the gradients of input and parameters if asked for."""
    dtype = getattr(torch, case.dtype)
    layer.to(case.device)
    shape = (case.sizes["batch"], case.length, case.sizes["dim"])
    x = torch.randn(shape, device=case.device, requires_grad=case.measure == "backward")

    def run() -> None:
        with torch.autocast(case.device, dtype, enabled=dtype != torch.float32):
            if case.measure == "forward":
                with torch.no_grad():
                    call(x)
            else:
                call(x).sum().backward()
                layer.zero_grad(set_to_none=True)
                x.grad = None

    return Subject(run, shape[0] * shape[1], check)


def titans(case: Case) -> Subject:
    """titans.NeuralMemory, per-token gates and reads, as it runs; on a GPU by the kernels."""
    from titans import NeuralMemory
    from titans.memory import MemoryMLP

    s = case.sizes
    network = MemoryMLP(depth=s["depth"], expansion=s["expansion"])
    backend = "triton" if case.device == "cuda" else "auto"
    layer = NeuralMemory(
        s["dim"], heads=s["heads"], head_dim=s["head_dim"], chunk_size=s["chunk_size"], network=network, backend=backend
    )
    check = partial(check_memory, case, network, backend, layer.forget)
    return subject(case, layer, lambda x: layer(x)[0], check)


def check_memory(case: Case, network: Any, backend: str, forget: str = "zero") -> None:
    """The backend that is timed against the reference, outputs and gradients, two chunks and a token.

    "chunked" in float64 and small; what is fused as it is timed, with at most twice the error of what is not.
    """
    from titans.memory import neural_memory

    generator, fused = torch.Generator().manual_seed(0), backend != "chunked"
    C, d = case.sizes["chunk_size"], case.sizes["head_dim"] if fused else min(case.sizes["head_dim"], 8)
    B, T, H = 2, 2 * C + 1, 1
    q, k, v = (F.normalize(torch.randn(B, T, H, d, generator=generator).double(), dim=-1) for _ in range(3))
    lr = 0.01 * torch.rand(B, T, H, generator=generator).double()
    log_gates = [F.logsigmoid(2 + torch.randn(B, T, H, generator=generator).double()) for _ in range(2)]
    inputs = (q, k, v, lr, *log_gates, *(w.double() for w in network.init(H, d)))

    def results(backend: str, dtype: torch.dtype = torch.float64) -> list[Tensor]:
        others = torch.float64 if dtype == torch.float64 else torch.float32
        leaves = [t.to(case.device, dtype if i < 3 else others, copy=True) for i, t in enumerate(inputs)]
        leaves = [t.requires_grad_() for t in leaves]
        memory: Any = partial(neural_memory, network=network, chunk_size=C, forget=forget, backend=backend)
        out, state = memory(*leaves[:6], tuple(leaves[6:]))
        loss = out.square().sum() + sum(w.square().sum() for w in state.weights)
        return [out, *torch.autograd.grad(loss, leaves)]

    def errors(got: list[Tensor]) -> list[float]:
        return [((g - e).norm() / e.norm().clamp_min(1e-12)).item() for g, e in zip(got, exact, strict=True)]

    exact, dtype = results("reference"), getattr(torch, case.dtype) if fused else torch.float64
    bounds = [1e-5 + 2 * e for e in errors(results("chunked", dtype))] if fused else [1e-9] * len(exact)
    for error, bound in zip(errors(results(backend, dtype)), bounds, strict=True):
        if not error < bound:
            raise AssertionError(f"the memory differs from its reference by {error:.1e}; no speed is reported for it")


def titans_pytorch(case: Case) -> Subject:
    """titans-pytorch 0.5.5 at its own true per-chunk updates (`batch_size=chunk_size`)."""
    s = case.sizes
    layer = load_peer().NeuralMemory(
        dim=s["dim"], chunk_size=s["chunk_size"], batch_size=s["chunk_size"], dim_head=s["head_dim"], heads=s["heads"],
        default_model_kwargs={"depth": s["depth"], "expansion_factor": float(s["expansion"])},
    )  # fmt: skip
    return subject(case, layer, lambda x: layer(x)[0])


def sdpa(case: Case) -> Subject:
    """Causal softmax attention of the same width."""
    s, inner = case.sizes, case.sizes["heads"] * case.sizes["head_dim"]
    layer = nn.ModuleList([nn.Linear(s["dim"], 3 * inner, bias=False), nn.Linear(inner, s["dim"], bias=False)])

    def call(x: Tensor) -> Tensor:
        q, k, v = layer[0](x).unflatten(-1, (3, s["heads"], -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return layer[1](F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(-2))

    return subject(case, layer, call)


def matmul(case: Case) -> Subject:
    """The floor: every matrix product of our layer's forward at its own shapes, nothing else; thrice for backward."""
    s, dtype = case.sizes, getattr(torch, case.dtype)
    from titans.memory import MemoryMLP

    G, C, tokens = s["batch"] * s["heads"], s["chunk_size"], s["batch"] * case.length
    inner, chunks = s["heads"] * s["head_dim"], -(-case.length // s["chunk_size"])

    def pair(batch: int, m: int, k: int, n: int) -> tuple[Tensor, Tensor]:
        left, right = (torch.randn(batch, *shape, device=case.device) for shape in ((m, k), (k, n)))
        return left.to(dtype), right.to(dtype)

    products = []  # (a, b, times)
    for index, (d, h) in enumerate(MemoryMLP(depth=s["depth"], expansion=s["expansion"]).shapes(s["head_dim"])):
        products.append((*pair(G, C, d, h), chunks))  # keys forward
        if index:
            products.append((*pair(G, C, h, d), chunks))  # keys backward
        products.append((*pair(G, C, 2 * d, h), chunks))  # queries through W and S
        products.append((*pair(G, C, d, h), chunks))  # queries through M_0, where forgetting leads there
        products.append((*pair(G, C, d, C), chunks))  # queries on keys
        products.append((*pair(G, C, C, h), chunks))
        products.append((*pair(G, 2 * d, C, h), chunks))  # update of W and S
    projections = [(*pair(1, tokens, s["dim"], 4 * inner), 1), (*pair(1, tokens, inner, s["dim"]), 1)]
    passes = 1 if case.measure == "forward" else 3

    def run() -> None:
        with torch.no_grad():
            for _ in range(passes):
                for a, b, times in (*products, *projections):
                    for _ in range(times):
                        torch.bmm(a, b)

    return Subject(run, tokens)
