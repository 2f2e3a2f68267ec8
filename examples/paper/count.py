"""Counts what a run of a paper's size costs, block by block on a CPU, as no GPU is needed to count.

python examples/paper/count.py examples/paper/340m.yaml [--model.variant mag]
"""

import sys
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from titans.models import TitansConfig
from titans.models.causal_lm import build_block
from titans.tasks import get_task
from titans.training.config import parse_config

TOKENS = 1024  # two segments, or windows: a block's work per token does not grow beyond them


def count(block: torch.nn.Module, width: int) -> tuple[float, float, float]:
    """A block's FLOPs per token (forward and backward), bytes per token kept for the backward pass, bytes of state."""
    parameters, kept = {p.untyped_storage().data_ptr() for p in block.parameters()}, {}

    def keep(t: torch.Tensor) -> torch.Tensor:
        if (storage := t.untyped_storage()).data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes(), t  # held, so that no other storage takes its place
        return t

    x = torch.randn(1, TOKENS, width, requires_grad=True)
    with FlopCounterMode(display=False) as counter, torch.autocast("cpu", torch.bfloat16):
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            y, state = block(x)
        saved = sum(size for size, _ in kept.values())
        kept.clear()
        y.float().sum().backward()
    return counter.get_total_flops() / TOKENS, saved / TOKENS, state.nbytes


def main(path: str, *options: str) -> None:
    run = parse_config(get_task("language"), arguments=["--config", path, *options])
    config = TitansConfig(**run.model | {"vocab_size": 32_000})
    layers, width = config.num_hidden_layers, config.hidden_size
    torch.manual_seed(0)
    block = build_block(config)
    flops, saved, state = count(block, width)
    weights = layers * sum(p.numel() for p in block.parameters()) + config.vocab_size * width + width
    total = layers * flops + 6 * config.vocab_size * width  # the output map: 2 forward, 4 backward
    print(f"{Path(path).stem} {config.variant}: {weights:,} parameters")
    print(f"  {total:.3e} FLOPs a token, {total * run.training.tokens:.3e} for {run.training.tokens:.1e} tokens")
    print(f"  {16 * weights:.3e} bytes of weights, gradients and AdamW's moments in float32")
    print(f"  {layers * saved:.3e} bytes a token kept by the blocks in bfloat16; checkpointed {layers * 4 * width:.3e}")
    print(f"  {layers * state:.3e} bytes of memory state a sequence")


if __name__ == "__main__":
    main(*sys.argv[1:])
