"""Inputs for ``neural_memory`` and the comparisons that several test files make."""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from tolerances import assert_equal
from torch import Tensor

from titans.memory import MemoryInfo, MemoryMLP, MemoryState, neural_memory

OPTIONS = {
    "default": MemoryMLP(),
    "depth1": MemoryMLP(depth=1),
    "depth3": MemoryMLP(depth=3, expansion=2),
    "depth4": MemoryMLP(depth=4, expansion=1.5),
    "narrow": MemoryMLP(expansion=0.5),
    "silu": MemoryMLP(activation="silu"),
    "relu": MemoryMLP(activation="relu"),
    "no residual": MemoryMLP(residual=False),
    "no norm": MemoryMLP(norm=False),
    "plain": MemoryMLP(residual=False, norm=False),
    "plain depth1": MemoryMLP(depth=1, residual=False, norm=False),
    "plain depth4": MemoryMLP(depth=4, residual=False, norm=False, expansion=2),
    "online": MemoryMLP(depth=1, norm=False, online=True),
    "plain online": MemoryMLP(depth=1, residual=False, norm=False, online=True),
    "large eps": MemoryMLP(norm_eps=0.1),
}


@dataclass(frozen=True)
class Case:
    """Arguments of ``neural_memory``, a sequence of T tokens in each of B rows."""

    q: Tensor
    k: Tensor
    v: Tensor
    lr: Tensor
    log_momentum: Tensor
    log_retention: Tensor
    weights: tuple[Tensor, ...]
    network: MemoryMLP
    chunk_size: int
    forget: str = "zero"

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """Everything with a token axis."""
        return self.q, self.k, self.v, self.lr, self.log_momentum, self.log_retention

    def on(self, *inputs: Tensor, **changes) -> "Case":
        """With other inputs (in the order of ``inputs``)."""
        names = ("q", "k", "v", "lr", "log_momentum", "log_retention")
        return replace(self, **dict(zip(names, inputs, strict=True)) if inputs else {}, **changes)

    def tokens(self, start: int, stop: int | None = None) -> "Case":
        return self.on(*(x[:, start:stop] for x in self.inputs))

    def to(self, where: torch.dtype | str) -> "Case":
        """In another dtype, or on another device."""
        return self.on(*(x.to(where) for x in self.inputs), weights=tuple(w.to(where) for w in self.weights))

    def leaves(self) -> "Case":
        """Copies that gather gradients."""

        def leaf(x):
            return x.detach().clone().requires_grad_()

        return self.on(*map(leaf, self.inputs), weights=tuple(map(leaf, self.weights)))

    def run(self, backend="chunked", state: MemoryState | None = None, mask: Tensor | None = None, info=True):
        """(out, state, info); without ``info``, chunked takes whole chunks through ``scan``, and info is None."""
        out, end, *seen = neural_memory(
            *self.inputs, self.weights, network=self.network, chunk_size=self.chunk_size,
            state=state, mask=mask, forget=self.forget, backend=backend, return_info=info,
        )  # type: ignore[misc]  # fmt: skip
        return out, end, seen[0] if seen else None


def make(network=OPTIONS["default"], B=2, T=13, H=2, D=4, C=4, dtype=torch.float64, seed=0, lr=0.02) -> Case:
    """Unit keys and queries, lively gates, some of them exactly at their limits, gain and bias that matter.

    ``lr`` is the largest step; where depth, chunk and length make the recurrence itself chaotic, take a smaller one.
    """
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    q, k = (F.normalize(normal(B, T, H, D), dim=-1) for _ in range(2))
    step = lr * torch.sigmoid(normal(B, T, H))
    log_momentum, log_retention = F.logsigmoid(normal(B, T, H)), F.logsigmoid(6 + normal(B, T, H))
    where = torch.rand(B, T, H, generator=g)
    step[where < 0.1] = 0
    log_retention[where > 0.9] = 0
    log_momentum[(where > 0.4) & (where < 0.5)] = 0
    weights = [normal(H, i, o) * i**-0.5 for i, o in network.shapes(D)]
    if network.norm:
        weights += [1 + 0.2 * normal(H, D), 0.2 * normal(H, D)]
    case = Case(q, k, normal(B, T, H, D), step, log_momentum, log_retention, tuple(weights), network, C)
    return case.to(dtype)


def results(out, state, info) -> dict[str, Tensor]:
    """Everything a call returns, by name."""
    return {"out": out, **state.tensors(), **(info._asdict() if info else {})}


def gradients(
    case: Case, backend="chunked", state: MemoryState | None = None, mask=None, info=True
) -> tuple[dict, dict]:
    """Results, and gradients of a fixed random functional of all of them for every input, weight and state tensor."""
    case = case.leaves()
    leaves = {f"d {i}": x for i, x in enumerate((*case.inputs, *case.weights))}
    if state is not None:
        state = state.map(lambda x: x.detach().clone().requires_grad_(x.is_floating_point()))
        leaves |= {f"d state.{n}": x for n, x in state.tensors().items() if x.requires_grad}
    found = results(*case.run(backend, state, mask, info))
    g = torch.Generator().manual_seed(1)
    total = sum(
        (x * torch.randn(x.shape, generator=g, dtype=torch.float64).to(x)).sum()
        for x in found.values() if x.is_floating_point()
    )  # fmt: skip
    grads = torch.autograd.grad(total, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return {n: x.detach() for n, x in found.items()}, dict(zip(leaves, grads, strict=True))


def assert_same(case: Case, state=None, mask=None, info=True) -> None:
    """Chunked equals the reference: results and all gradients."""
    expected = gradients(case, "reference", state, mask, info)
    for got, want in zip(gradients(case, "chunked", state, mask, info), expected, strict=True):
        assert_equal(got, want)


def in_pieces(case: Case, cuts: list[int], backend="chunked", state=None, mask=None, info=True, between=lambda s: s):
    """The sequence cut at the given places, one call a piece; ``between`` sees every state that is carried."""
    T = case.q.shape[1]
    outs, infos = [], []
    for start, stop in zip([0, *cuts], [*cuts, T], strict=True):
        here = None if mask is None else mask[:, start:stop]
        out, state, seen = case.tokens(start, stop).run(backend, state, here, info)
        state = between(state)
        outs.append(out)
        infos.append(seen)
    joined = MemoryInfo(*(torch.cat(x, 1) for x in zip(*infos, strict=True))) if info else None
    return torch.cat(outs, 1), state, joined


MASKS = {
    "left": lambda B, T: torch.arange(T) >= (torch.arange(B) * 3 + 1).clamp(max=T).unsqueeze(1),
    "right": lambda B, T: torch.arange(T) < (T - 2 * torch.arange(B) - 1).clamp(min=0).unsqueeze(1),
    "holes": lambda B, T: torch.rand(B, T, generator=torch.Generator().manual_seed(3)) < 0.6,
    "a padded row": lambda B, T: (torch.arange(B) > 0).unsqueeze(1).expand(B, T),
    "nothing": lambda B, T: torch.zeros(B, T, dtype=torch.bool),
}
PATHS = {"info": True, "scan": False}
"""Whether info is asked for: the two paths of the chunked backend."""

__all__ = [
    "MASKS",
    "OPTIONS",
    "PATHS",
    "Case",
    "assert_equal",
    "assert_same",
    "gradients",
    "in_pieces",
    "make",
    "results",
]
