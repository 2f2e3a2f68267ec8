"""Subjects of `bench op`: the rule alone, on queries, keys, values and gates, beside what it competes with."""

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from titans.bench.case import Case, Subject
from titans.bench.layers import check_memory


def subject(case: Case, extra: list[Tensor], call: Callable[..., Tensor], check=None) -> Subject:
    """Times ``call(q, k, v, *extra)``, q and k of unit length, [batch, length, heads, head_dim]."""
    s, dtype = case.sizes, getattr(torch, case.dtype)
    shape = (s["batch"], case.length, s["heads"], s["head_dim"])
    q, k, v = (torch.randn(shape, device=case.device) for _ in range(3))
    inputs = [t.to(dtype) for t in (F.normalize(q, dim=-1), F.normalize(k, dim=-1), v)] + extra
    backward = case.measure == "backward"
    leaves = [t.requires_grad_() for t in inputs] if backward else inputs

    def run() -> None:
        with torch.set_grad_enabled(backward):
            out = call(*leaves)
        if backward:
            torch.autograd.grad(out.sum(), leaves)

    return Subject(run, shape[0] * shape[1], check)


def _gates(case: Case, number: int) -> list[Tensor]:
    shape = (case.sizes["batch"], case.length, case.sizes["heads"])
    return [torch.rand(shape, device=case.device) for _ in range(number)]


def titans(case: Case, backend: str = "chunked") -> Subject:
    """titans.neural_memory in plain PyTorch."""
    from titans.memory import MemoryMLP, neural_memory

    s, device = case.sizes, case.device
    network = MemoryMLP(depth=s["depth"], expansion=s["expansion"])
    weights = [w.to(device) for w in network.init(s["heads"], s["head_dim"])]
    lr, momentum, forget = _gates(case, 3)
    gates = [0.1 * lr, momentum.log(), torch.log1p(-0.01 * forget)]

    def call(q: Tensor, k: Tensor, v: Tensor, lr: Tensor, momentum: Tensor, retention: Tensor, *maps: Tensor) -> Tensor:
        arguments: Any = {"network": network, "chunk_size": s["chunk_size"], "backend": backend}
        return neural_memory(q, k, v, lr, momentum, retention, maps, **arguments)[0]

    return subject(case, gates + weights, call, partial(check_memory, case, network, backend))


def titans_triton(case: Case) -> Subject:
    """titans.neural_memory by its kernels."""
    return titans(case, "triton")


def gated_delta_rule(case: Case) -> Subject:
    """The kernel of flash-linear-attention; needs a GPU."""
    try:
        rule = importlib.import_module("fla.ops.gated_delta_rule").chunk_gated_delta_rule
    except ImportError as error:
        raise ImportError(f"flash-linear-attention: {error}; pip install flash-linear-attention") from error
    if case.device == "cpu":
        raise ValueError("subject='gated_delta_rule' needs a GPU; use --device cuda")
    decay, beta = _gates(case, 2)
    dtype = getattr(torch, case.dtype)
    return subject(case, [(-decay).to(dtype), beta.to(dtype)], lambda q, k, v, g, b: rule(q, k, v, g=g, beta=b)[0])


def sdpa(case: Case) -> Subject:
    """Causal softmax attention."""

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    return subject(case, [], call)
