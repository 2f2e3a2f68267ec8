"""Compiles the kernels for an H100 (compute capability 9.0) instead of running them; needs no GPU."""

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from titans.memory import MemoryMLP
from titans.memory.kernels import scan

TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int32: "*i32", int: "i32", float: "fp32"}


def compile_instead(kernel, *arguments, grid, warmup, num_warps, num_stages, enable_fp_fusion, **constants) -> None:
    kinds = [x.dtype if isinstance(x, torch.Tensor) else type(x) for x in arguments]
    signature = dict(zip(kernel.arg_names, (TYPES[kind] for kind in kinds), strict=False))
    source = ASTSource(kernel, signature | dict.fromkeys(constants, "constexpr"), constants)
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": enable_fp_fusion}
    triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    print(kernel.__name__)


triton.JITFunction.run = compile_instead
scan.parts_of = lambda q, network: network.depth  # of two maps, two programs a memory
C = D = 16
for network in (MemoryMLP(1), MemoryMLP(1, norm=False, online=True), MemoryMLP(2, expansion=2)):
    depth = network.depth
    q, k, v = (torch.zeros(1, C, 1, D, dtype=torch.bfloat16).requires_grad_() for _ in range(3))
    maps = [torch.zeros(1, 2, D, D * depth) for _ in range(depth)]
    base, affine = (
        [m[:, 0].mT if i else m[:, 0] for i, m in enumerate(maps)],
        (torch.ones(1, 1, D), torch.zeros(1, 1, D)) if network.norm else None,
    )
    scan.scan(q, k, v, torch.zeros(1, C, 1, 3), maps, base, affine, network, C)[0].sum().backward()
