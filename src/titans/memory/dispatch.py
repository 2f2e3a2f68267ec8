"""``neural_memory``: one signature for every backend."""

import warnings
from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from typing import NamedTuple

import torch
from torch import Tensor

from titans.memory import kernels, native
from titans.memory.chunked import chunked
from titans.memory.network import MemoryMLP
from titans.memory.pieces import align, check_mask, in_pieces, take
from titans.memory.reference import reference
from titans.memory.scan import scan
from titans.memory.state import MemoryState

FUSED = {"triton": kernels, "native": native}
BACKENDS = ("auto", "chunked", *FUSED, "reference")
FORGET = ("zero", "start")


class MemoryInfo(NamedTuple):
    """What the memory felt, all [B, T, H], at the weights its chunk began with (online: as it stood).

    ``surprise``: norm of the gradient of the loss; ``loss``: ``||M(k) - v||^2`` before the token was written.
    """

    surprise: Tensor
    loss: Tensor


def neural_memory(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lr: Tensor,
    log_momentum: Tensor,
    log_retention: Tensor,
    weights: Sequence[Tensor],
    *,
    network: MemoryMLP,
    chunk_size: int = 64,
    state: MemoryState | None = None,
    mask: Tensor | None = None,
    forget: str = "zero",
    backend: str = "auto",
    return_info: bool = False,
) -> tuple[Tensor, MemoryState] | tuple[Tensor, MemoryState, MemoryInfo]:
    """Neural memory that learns while it reads (arXiv 2501.00663, eqs. 12-16 and 18; memory/README.md).

    For every token: ``S = eta S - theta grad ||M(k) - v||^2``, ``M = (1 - alpha) M + S``, ``y = M(q)``, with the
    gradient taken at the memory with which the token's chunk began (but see ``MemoryMLP.online``). The read includes
    the token just written.

    Args:
        q, k, v: queries, keys, values [B, T, H, D], all of one floating dtype; bfloat16 and float16 compute matrix
            products in that dtype, while gates, masks, weights and momentum stay float32.
        lr: theta [B, T, H], >= 0; exactly 0 writes nothing.
        log_momentum, log_retention: log eta and log(1 - alpha) [B, T, H], <= 0; exactly 0 keeps everything.
        weights: M_0: the network's linear maps [H, d_in, d_out] in order, then, if it has a norm, optionally gain and
            bias [H, D] (ones and zeros when absent). After the first call only gain and bias are read from it (but see
            ``forget``).
        network: the memory network's shape.
        chunk_size: tokens whose gradients are taken at the same point; 1 is fully online.
        state: where an earlier call stopped; None: M_0 and no momentum.
        mask: [B, T], zero at padding, anywhere: a padded token neither writes, decays nor advances its row's chunk, and
            its output is zero.
        forget: "zero", the paper's ``M = (1 - alpha) M + S``; "start", ``M = (1 - alpha) M + alpha M_0 + S``: what was
            written fades, what was learned in training does not. The state is then relative to M_0 (``M - M_0``), and
            the maps of ``weights`` are read in every call.
        backend: "chunked", in plain PyTorch; for whole chunks in a row (which ``return_info`` and masks rule out)
            two faster ways to the same numbers: "triton", fused kernels on a GPU, and "native", C on a CPU, compiled
            when it is first taken, for widths and chunks that are multiples of 16; "reference", token by token, for
            tests; "auto", the fastest there is (a warning, once, says what keeps a GPU from its kernels, or that there
            is no compiler), but "chunked" under ``torch.compile``, which looks into nothing else.
        return_info: also return ``MemoryInfo``.

    Returns:
        out [B, T, H, D] and the state after the last token (and ``MemoryInfo``, if asked for).

    Raises:
        ValueError: shapes, dtypes or the state do not fit, or the backend cannot be taken; the message names the
            argument.
        OSError: backend="native" cannot be compiled.
    """
    maps, affine = network.split(weights)
    _check(q, k, v, (lr, log_momentum, log_retention), maps, affine, network, chunk_size, forget, backend)
    mask = check_mask(mask, *q.shape[:2])
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    gates = torch.stack([lr, log_momentum, log_retention], -1).to(dtype)
    maps = tuple(w.to(dtype) for w in maps)
    base = maps if forget == "start" else ()
    if state is None:
        state = MemoryState.initial([torch.zeros_like(w) for w in maps] if base else maps, q.shape[0], chunk_size)
    _check_state(state, q, maps, chunk_size)

    norm = tuple(a.to(dtype) for a in affine) if affine else ()
    fast = _fast_path(backend, q, network, chunk_size)
    with torch.autocast(q.device.type, enabled=False):  # precision here follows the arguments, never a context
        if backend == "reference":
            out, end, info = reference(q, k, v, gates, norm, network, base, state, mask)
        elif return_info:
            out, end, info = _chunked(q, k, v, gates, mask, norm, network, base, state, True, fast)
        else:

            def step(q, k, v, gates, mask, state):
                return _chunked(q, k, v, gates, mask, norm, network, base, state, False, fast)[:2]

            out, end = in_pieces(step, (q, k, v, gates, mask), state, chunk_size)
    return (out, end, MemoryInfo(*info)) if return_info else (out, end)


def _fast_path(backend: str, q: Tensor, network: MemoryMLP, chunk_size: int) -> Callable:
    """What works through whole chunks in a row."""
    auto = backend == "auto"
    if backend not in ("auto", *FUSED) or (auto and torch.compiler.is_compiling()):
        return scan
    name = ("triton" if q.is_cuda else "native") if auto else backend
    reason = FUSED[name].unsupported(q, network, chunk_size)
    if auto and name == "native" and reason is not None:
        return scan  # float64, or small: no news to who did not ask
    if auto:
        reason = reason or FUSED[name].unproven(network)
    if reason is None:
        return import_module(f"{FUSED[name].__name__}.scan").scan
    if not auto:
        raise ValueError(f"backend='{backend}' cannot be taken: {reason}, or take backend='chunked'")
    _warn_once(f"backend='auto' takes 'chunked', not the faster '{name}': {reason}")
    return scan


@cache
def _warn_once(text: str) -> None:
    warnings.warn(text, stacklevel=4)


def _chunked(q, k, v, gates, mask: Tensor | None, norm, network: MemoryMLP, base, state, info: bool, fast: Callable):
    """``chunked`` for any mask."""
    if mask is None:
        return chunked(q, k, v, gates, norm, network, base, state, None, info, fast)
    index, lengths, undo = align(mask)
    q, k, v, gates = (take(x, index) for x in (q, k, v, gates))
    out, end, seen = chunked(q, k, v, gates, norm, network, base, state, lengths, info, fast)
    return take(out, undo), end, tuple(take(x, undo) for x in seen)


def _check(q, k, v, gates, maps, affine, network: MemoryMLP, chunk_size: int, forget: str, backend: str) -> None:
    if q.dim() != 4 or not q.is_floating_point():
        raise ValueError(f"q must be floating point [B, T, H, D], got {q.dtype} {list(q.shape)}")
    for name, x in (("k", k), ("v", v)):
        if x.shape != q.shape or x.dtype != q.dtype:
            raise ValueError(f"{name} must be like q, {q.dtype} {list(q.shape)}, got {x.dtype} {list(x.shape)}")
    for name, x in zip(("lr", "log_momentum", "log_retention"), gates, strict=True):
        if x.shape != q.shape[:3]:
            raise ValueError(f"{name} must be [B, T, H] = {list(q.shape[:3])}, got {list(x.shape)}")
    H, D = q.shape[2:]
    wanted = [(H, i, o) for i, o in network.shapes(D)]
    if [tuple(w.shape) for w in maps] != wanted:
        raise ValueError(f"weights must be linear maps {wanted} for this network, got {[tuple(w.shape) for w in maps]}")
    if affine and (not network.norm or [tuple(a.shape) for a in affine] != [(H, D)] * 2):
        raise ValueError(
            f"after the linear maps, weights may hold gain and bias {(H, D)} if network.norm is True, "
            f"got {[tuple(a.shape) for a in affine]} with norm={network.norm}"
        )
    if not isinstance(chunk_size, int) or chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size!r}; use an integer")
    if forget not in FORGET:
        raise ValueError(f"forget must be one of {FORGET}, got {forget!r}")
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}")


def _check_state(state: MemoryState, q: Tensor, maps, chunk_size: int) -> None:
    if state.chunk_size != chunk_size:
        raise ValueError(f"state was made with chunk_size={state.chunk_size}, got chunk_size={chunk_size}")
    (B, _, H, _), C = q.shape, chunk_size
    wanted = {"pending": (B, H, C, 2), "transition": (B, H, 2, 2), "position": (B,)}
    for i, w in enumerate(maps):
        d_in, d_out = w.shape[1:]
        wanted[f"maps.{i}"] = (B, H, 2, d_out, d_in) if i else (B, H, 2, d_in, d_out)
        wanted |= {f"inputs.{i}": (B, H, C, d_in), f"signals.{i}": (B, H, C, d_out)}
    held = state.tensors()
    for name in sorted((wanted.keys() | held.keys()) - {"conv"}):
        dtype, t = torch.int64 if name == "position" else maps[0].dtype, held.get(name)
        if t is None or name not in wanted or t.shape != wanted[name] or t.dtype != dtype:
            want = f"{dtype} {list(wanted[name])}" if name in wanted else "nothing"
            got = "nothing" if t is None else f"{t.dtype} {list(t.shape)}"
            raise ValueError(f"state must hold as {name} {want}, got {got}; take the state of a call like this one")
