"""Single tokens, the state in place: what generation runs (README.md, section 4)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from titans.memory.network import MemoryMLP
from titans.memory.scan import advance_all, weights_of
from titans.memory.state import MemoryState


class Stepper:
    """A memory that goes on from ``state`` token by token, without gradients; the same numbers as ``neural_memory``.

    It works in the state's dtype on buffers of its own, [G, ...] with G = batch x heads. A token costs one reading of
    the maps and one of the open chunk; the maps change where a chunk ends.

    Args:
        state: where reading stopped; every row at the same place of its chunk.
        weights, network, forget: as in ``neural_memory``.
    """

    def __init__(self, state: MemoryState, weights: Sequence[Tensor], network: MemoryMLP, forget: str):
        B, H, C, _ = state.pending.shape
        dtype = state.pending.dtype
        maps, affine = network.split(weights)
        self.network, self.shape, self.chunk_size = network, (B, H), C
        self.affine = affine and tuple(a.to(dtype).repeat(B, 1).unsqueeze(1) for a in affine)
        # every map as memory, M_0 and momentum: keys meet the first two, queries all three
        self.maps = []
        for i, (map, w) in enumerate(zip(state.maps, maps, strict=True)):
            base = (w.mT if i else w).to(dtype).repeat(B, 1, 1)
            base = base if forget == "start" else torch.zeros_like(base)
            self.maps.append(torch.stack([map[:, :, 0].flatten(0, 1), base, map[:, :, 1].flatten(0, 1)], 1))
        self.inputs, self.signals = ([t.flatten(0, 1).clone() for t in ts] for ts in (state.inputs, state.signals))
        # weights in memory and momentum as they stand: of the two maps the chunk began with, then of its tokens
        self.weights = torch.cat([state.since_start().mT, state.pending], 2).flatten(0, 1)
        self.read, self.conv = int(state.position[0]), state.conv
        self.mix = torch.ones_like(self.weights[:, :1, :1]).repeat(1, 1, 3)  # of a map's three, at the query

    @property
    def state(self) -> MemoryState:
        """A copy of the state as it is now."""
        maps, inputs, signals = (
            tuple(t.unflatten(0, self.shape).clone() for t in ts)
            for ts in ([m[:, ::2] for m in self.maps], self.inputs, self.signals)
        )
        weights = self.weights.unflatten(0, self.shape).clone()
        return MemoryState(
            maps, inputs, signals, pending=weights[:, :, 2:], transition=weights[:, :, :2].mT,
            position=torch.full(self.shape[:1], self.read, device=weights.device),
            conv=self.conv if self.conv is None else self.conv.clone(), read=self.read,
        )  # fmt: skip

    @property
    def slot(self) -> int:
        """Place of the next token in its chunk."""
        return self.read % self.chunk_size

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, gates: Tensor) -> Tensor:
        """Writes one token and reads: q, k, v [G, 1, D], gates [G, 3] = (lr, log_momentum, log_retention)."""
        network, value = self.network, self.network.functions[0]
        write, new, h, slot = self._weigh(gates), self._write(k, v), q, self.slot
        for i, (map, x, d) in enumerate(zip(self.maps, self.inputs, self.signals, strict=True)):
            x[:, slot], d[:, slot] = (t[:, 0] for t in new[i])
            if i:
                held = torch.bmm(h, map.flatten(1, 2).mT)
                r = torch.bmm(self.mix, held.view(len(h), 3, -1))
            else:
                r = torch.bmm((h * self.mix.mT).flatten(1).unsqueeze(1), map.flatten(1, 2))
            scores = torch.bmm(h, x[:, : slot + 1].mT) * write
            r = torch.baddbmm(r, scores, d[:, : slot + 1], alpha=-1)
            h = value(r) if i < network.depth - 1 else r
        out = network.finish(q, h, self.affine)  # type: ignore[arg-type]
        self.read += 1
        if self.slot == 0:
            self._close()
        return out

    def _weigh(self, gates: Tensor) -> Tensor:
        """Brings ``weights`` and ``mix`` to the new token; weights of the chunk's tokens in the memory [G, 1, n]."""
        momentum, retention = gates[:, 1:].exp().unbind(1)
        step = torch.stack([retention, torch.zeros_like(momentum), momentum, momentum], -1).view(-1, 2, 2)
        now = self.weights[:, : self.slot + 3]
        now.copy_(torch.bmm(now, step))
        now[:, -1] = gates[:, :1]
        self.mix[:, 0, ::2] = now[:, :2, 0]
        return now[:, 2:, 0].unsqueeze(1)

    def _write(self, k: Tensor, v: Tensor) -> list[tuple[Tensor, Tensor]]:
        """The token's input and gradient at every map, at the memory the chunk began with."""
        network, (value, slope, _) = self.network, self.network.functions
        x, outputs = [k], []
        for i, map in enumerate(self.maps):
            both = map[:, :2].flatten(1, 2)
            if i:
                x.append(value(outputs[-1]))
                outputs.append(torch.bmm(x[-1], both.mT).view(len(k), 2, -1).sum(1, keepdim=True))
            else:
                outputs.append(torch.bmm(torch.cat([k, k], 2), both))
        gain = self.affine and self.affine[0]
        d = [network.output_signal(outputs[-1], gain, network.offset(k, v, self.affine))[0]]  # type: ignore[arg-type]
        for map, z in zip(self.maps[:0:-1], outputs[-2::-1], strict=True):
            d.insert(0, slope(torch.bmm(torch.cat([d[0], d[0]], 2), map[:, :2].flatten(1, 2)), z))
        return list(zip(x, d, strict=True))

    def _advanced(self) -> list[Tensor]:
        """Memory and momentum of every map after the open chunk's tokens."""
        held = [map[:, ::2] for map in self.maps]
        return advance_all(held, self.inputs, self.signals, self.weights[:, 2:], self.weights[:, :2].mT)

    def _close(self) -> None:
        """Moves the full chunk into the maps."""
        for map, new in zip(self.maps, self._advanced(), strict=True):
            map[:, ::2] = new
        for emptied in (*self.inputs, *self.signals, self.weights):
            emptied.zero_()
        self.weights[:, :2] = torch.eye(2, device=self.weights.device)

    def current_maps(self) -> list[Tensor]:
        """The memory's linear maps [B, H, d_in, d_out] after the last token."""
        now = weights_of(self._advanced(), [map[:, 1] for map in self.maps], self.weights.dtype)
        return [w.unflatten(0, self.shape) for w in now]
