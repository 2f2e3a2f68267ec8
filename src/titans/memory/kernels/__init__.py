"""Fused Triton kernels for whole chunks in a row; triton is imported with ``kernels.scan``, when they are taken."""

import os
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor

from titans.memory.network import MemoryMLP

CHUNK_SIZES = HEAD_DIMS = (16, 32, 64, 128)
CHECKED = (3, 9)  # Triton, from here on: on a GPU, hundreds of runs were alike and right
LARGEST_FLOAT32 = 8192  # chunk size times head dim: what the 227 KB of an H100 take


def unsupported(q: Tensor, network: MemoryMLP, chunk_size: int) -> str | None:
    """What keeps the kernels from queries q [B, T, H, D] in such memories, and the mend; None: nothing does."""
    head_dim, (_, hidden) = q.shape[-1], network.shapes(q.shape[-1])[0]
    if find_spec("triton") is None:
        return "triton is not installed; pip install 'titans[kernels]'"
    if not q.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        return f"q is on {q.device}; move it to a GPU (or set TRITON_INTERPRET=1 before triton is imported, for tests)"
    if q.dtype not in (torch.float32, torch.bfloat16):
        return f"q is {q.dtype}; use float32 or bfloat16"
    if network.depth > 2:
        return f"network.depth={network.depth}; use 1 or 2"
    if head_dim not in HEAD_DIMS:
        return f"q has head dim {head_dim}; use one of {HEAD_DIMS}"
    if hidden % 16:
        return f"network.expansion={network.expansion} makes {hidden} hidden units; use a multiple of 16"
    if chunk_size not in CHUNK_SIZES:
        return f"chunk_size={chunk_size}; use one of {CHUNK_SIZES}"
    if q.dtype == torch.float32 and chunk_size * head_dim > LARGEST_FLOAT32:
        return f"chunk_size={chunk_size} is too much for shared memory in float32; use bfloat16 or a smaller one"
    return None


def unproven(network: MemoryMLP) -> str | None:
    """Why ``backend="auto"`` leaves kernels alone that it could take, and the mend; None: it takes them."""
    if network.online:
        return "of an online memory they have not run on a GPU; backend='triton' takes them"
    installed = import_module("triton").__version__  # its package may have another name
    if tuple(int(part) for part in installed.split(".")[:2]) < CHECKED:
        return f"they are checked with Triton {'.'.join(map(str, CHECKED))} or newer, and {installed} is installed"
    return None
