"""Counts what a run of a paper's size costs, one block on a CPU: counting needs no GPU.

python examples/paper/count.py examples/paper/340m.yaml [--model.variant mag]
"""

import sys
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from titans.layers import NeuralMemory
from titans.memory.pieces import PIECE
from titans.models import TitansConfig
from titans.models.causal_lm import build_block
from titans.tasks import get_task
from titans.training.config import parse_config

TOKENS = 1024  # two segments, or windows: a block's work per token does not grow beyond them


def flops(block: torch.nn.Module, x: torch.Tensor) -> float:
    """Of matrix products, per token, forward and backward; the counter would take our convolution for a dense one."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        block(x)[0].sum().backward()
    counts = counter.get_flop_counts()["Global"]
    return sum(n for op, n in counts.items() if "convolution" not in str(op)) / TOKENS


def kept(block: torch.nn.Module, x: torch.Tensor) -> tuple[float, int]:
    """Bytes per token that are kept for the backward pass in bfloat16, of a long call, and bytes of the state."""
    seen = {p.untyped_storage().data_ptr(): (0, p) for p in block.parameters()}

    def keep(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        seen.setdefault(storage.data_ptr(), (storage.nbytes(), t))  # held, so that no other takes its place
        return t

    with torch.autocast("cpu", torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        _, state = block(torch.cat([x, x], 1))
    per_token = sum(size for size, _ in seen.values()) / (2 * TOKENS)
    return per_token + state.nbytes / PIECE, state.nbytes  # every piece keeps the state it began with


def main(path: str, *options: str) -> None:
    run = parse_config(get_task("language"), arguments=["--config", path, *options])
    config = TitansConfig(**run.model | {"vocab_size": 32_000})
    layers, width, head = config.num_hidden_layers, config.hidden_size, config.vocab_size * config.hidden_size
    torch.manual_seed(0)
    block, x = build_block(config), torch.randn(1, TOKENS, width, requires_grad=True)
    for part in block.modules():
        if isinstance(part, NeuralMemory):
            part.backend = "chunked"  # whose products the counter sees
    work = layers * flops(block, x) + 6 * head  # the output map: 2 forward, 4 backward
    (room, state), weights = kept(block, x), layers * sum(p.numel() for p in block.parameters()) + head + width
    print(f"{Path(path).stem} {config.variant}: {weights:,} parameters")
    print(f"  {work:.3e} FLOPs a token, {work * run.training.tokens:.3e} for {run.training.tokens:.1e} tokens")
    print(f"  {16 * weights:.3e} bytes of weights, gradients and AdamW's moments in float32")
    print(f"  {layers * room:.3e} bytes a token kept by the blocks; checkpointed {layers * 4 * width:.3e}")
    print(f"  {layers * state:.3e} bytes of memory state a sequence")


if __name__ == "__main__":
    main(*sys.argv[1:])
