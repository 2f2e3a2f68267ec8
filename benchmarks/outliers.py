"""A million tokens with outliers through every variant, the memory carried: everything has to stay finite.

    python benchmarks/outliers.py            # a quarter of an hour of one core; writes benchmarks/results/reliability/
    python benchmarks/outliers.py 100000     # so many tokens

docs/reliability.md has the table.
"""

import json
import sys
import time
from collections.abc import Iterator
from itertools import chain, cycle, islice, product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from titans.memory import MemoryState
from titans.models import TitansCache, TitansConfig, TitansModel
from titans.models.configuration import VARIANTS
from titans.training.files import write_atomically
from titans.training.provenance import provenance
from titans.training.text import stdlib_documents

RESULTS = Path(__file__).parent / "results" / "reliability" / "outliers.json"
LONGEST = 1024  # tokens of a stretch
SIZES = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "memory_expansion": 2, "chunk_size": 64,
}  # fmt: skip
ONLINE = {"memory_depth": 1, "memory_norm": False, "memory_residual": False, "memory_online": True}
MEMORIES = {"two maps": {}, "one online map": ONLINE}


def build(variant: str, memory: str) -> TitansModel:
    """Every parameter away from its start, so that gates differ from token to token and reach their limits."""
    torch.manual_seed(0)
    model = TitansModel(TitansConfig(variant=variant, **SIZES, **MEMORIES[memory])).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model


def stretches(embedding: Tensor, tokens: int) -> Iterator[tuple[str, Tensor]]:
    """Inputs [1, n, dim], n from 1 to ``LONGEST``, ``tokens`` in all, of one kind after the other."""
    generator, dim = torch.Generator().manual_seed(0), embedding.shape[1]
    text = (byte for document in cycle(stdlib_documents("train")) for byte in document.encode())

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    kinds = {
        "text": lambda x: x,
        "scaled by 1e4": lambda x: 1e4 * x,
        "zeros": torch.zeros_like,
        "one token repeated": lambda x: x[:1].expand_as(x),
        "noise": lambda x: normal(*x.shape),
        "scaled by 1e-4 to 1e4, token by token": lambda x: (
            x * 10 ** (8 * torch.rand(len(x), 1, generator=generator) - 4)
        ),
        "two opposite tokens, 1e4 long": lambda x: 1e4 * normal(1, dim) * (-1) ** torch.arange(len(x)).unsqueeze(1),
    }
    for name in cycle(kinds):
        if not tokens:
            return
        length = min(int(torch.randint(1, LONGEST + 1, (), generator=generator)), tokens)
        ids = torch.tensor(list(islice(text, length)))
        yield name, kinds[name](embedding[ids]).unsqueeze(0)
        tokens -= length


def read(variant: str, memory: str, dtype: torch.dtype, tokens: int) -> dict[str, Any]:
    """Reads so many tokens. Norms are those of single linear maps, the largest of all heads and layers, per stretch.

    Raises:
        ValueError: an output or a memory is not finite; the message names the stretch.
    """
    model = build(variant, memory).to(dtype)
    embedding, cache = model.embed_tokens.weight.float(), TitansCache(len(model.layers))
    done, output, began = 0, 0.0, time.process_time()
    first = largest_norm(model, [block.initial_state(1) for block in model.layers])
    norms: list[tuple[float, str]] = []
    for kind, x in stretches(embedding, tokens):
        y = model(inputs_embeds=x.to(dtype), cache=cache).last_hidden_state
        states = [layer.state for layer in cache.layers]
        held = (t for state in states for t in state.tensors().values())
        if not all(t.isfinite().all() for t in chain([y], held)):
            raise ValueError(
                f"{variant}, {memory}, in {dtype} is not finite in a stretch of {kind!r} after {done:,} tokens"
            )
        norms.append((largest_norm(model, states), kind))
        output, done = max(output, float(y.abs().max())), done + x.shape[1]
    return {
        "variant": variant,
        "memory": memory,
        "dtype": str(dtype).removeprefix("torch."),
        "tokens": done,
        "first_norm": first,
        "largest_norm": max(norms)[0],
        "largest_in": max(norms)[1],
        "largest_in_halves": [max(norms[: len(norms) // 2])[0], max(norms[len(norms) // 2 :])[0]],
        "last_norm": norms[-1][0],
        "largest_output": output,
        "cpu_seconds": round(time.process_time() - began, 1),
    }


def largest_norm(model: TitansModel, states: list[Any]) -> float:
    """The largest Frobenius norm of a linear map of any memory as it stands."""
    norms = []
    for block, state in zip(model.layers, states, strict=True):
        memory = state if isinstance(state, MemoryState) else state.memory
        norms += [float(torch.linalg.matrix_norm(m).max()) for m in block.memory.current_maps(memory)]
    return max(norms)


@torch.no_grad()
def main(tokens: int = 1_000_000) -> None:
    rows = []
    for memory, variant, dtype in product(MEMORIES, VARIANTS, (torch.float32, torch.bfloat16)):
        rows.append(read(variant, memory, dtype, tokens))
        print(json.dumps(rows[-1]), flush=True)
    write_atomically(RESULTS, json.dumps({"sizes": SIZES, "rows": rows, **provenance()}, indent=1) + "\n")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
