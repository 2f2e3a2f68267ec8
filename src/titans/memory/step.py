"""Single tokens, the state in place: what generation runs (README.md, section 4)."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from titans.memory.network import MemoryMLP
from titans.memory.scan import advance_all, weights_of
from titans.memory.state import MemoryState


def turned(maps: Sequence[Tensor]) -> list[Tensor]:
    """Linear maps [..., d_in, d_out] as a stepper lays them out, all but the first [..., d_out, d_in]; or back."""
    return [map.mT if i else map for i, map in enumerate(maps)]


class Stepper:
    """A memory that goes on from ``state`` token by token, without gradients; the same numbers as ``neural_memory``.

    It works in the state's dtype on buffers of its own, [G, ...] with G = batch x heads. A token costs one reading of
    the maps and one of the open chunk; the maps change where a chunk ends.

    Args:
        state: where reading stopped; every row at the same place of its chunk.
        weights, network, forget: as in ``neural_memory``.
        keep: makes the copies that it works on, contiguous.
    """

    def __init__(
        self, state: MemoryState, weights: Sequence[Tensor], network: MemoryMLP, forget: str,
        keep: Callable[[Tensor], Tensor],
    ):  # fmt: skip
        B, H, C, _ = state.pending.shape
        dtype = state.pending.dtype
        maps, affine = network.split(weights)
        self.network, self.shape, self.chunk_size = network, (B, H), C
        self.value, self.slope = network.functions.value, network.functions.slope
        self.affine = affine and tuple(a.to(dtype).repeat(B, 1).unsqueeze(1) for a in affine)
        # every map as M_0, memory and momentum: keys meet the first two, queries all three
        self.maps: list[Tensor] = []
        for i, (map, w) in enumerate(zip(state.maps, maps, strict=True)):
            base = (w.mT if i else w).to(dtype).repeat(B, 1, 1).unsqueeze(1)
            base = base if forget == "start" else torch.zeros_like(base)
            self.maps.append(keep(torch.cat([base, map.flatten(0, 1)], 1)))
        self.three = [map.flatten(1, 2).mT if i else map.flatten(1, 2) for i, map in enumerate(self.maps)]
        self.two = [map[:, :2].flatten(1, 2) for map in self.maps]
        self.inputs, self.signals = ([keep(t.flatten(0, 1)) for t in ts] for ts in (state.inputs, state.signals))
        # weights in memory and in momentum as they stand, of M_0, of the two maps the chunk began with, of its tokens
        since = torch.cat([state.since_start().mT, state.pending], 2).flatten(0, 1).movedim(-1, 0)
        self.weights = torch.cat([torch.ones_like(since[..., :1]), since], -1).unsqueeze(2)  # [2, G, 1, 3 + C]
        self.fading, self.mix = self.weights[..., 1:], self.weights[0, ..., :3]
        self.read, self.conv = int(state.position[0]), None if state.conv is None else keep(state.conv)

    @property
    def state(self) -> MemoryState:
        """A copy of the state as it is now."""
        maps, inputs, signals = (
            tuple(t.unflatten(0, self.shape).clone() for t in ts)
            for ts in ([m[:, 1:] for m in self.maps], self.inputs, self.signals)
        )
        weights = self.fading.squeeze(2).movedim(0, -1).unflatten(0, self.shape).clone()
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
        """Writes one token and reads; ``advance`` has to follow.

        q, k, v [G, 1, D], gates [3, G, 1, 1] = (lr, log_momentum, log_retention).
        """
        network = self.network
        self._write(k, v)
        write, h = self._weigh(gates), q
        for i in range(network.depth):
            r = self._linear(i, h, self.mix, write)
            h = self.value(r) if i < network.depth - 1 else r
        return network.finish(q, h, self.affine)  # type: ignore[arg-type]

    def advance(self) -> None:
        """After every token: the next one's place, in the next chunk if this one is full."""
        self.read += 1
        if self.slot == 0:
            self._close()

    def _linear(self, i: int, h: Tensor, mix: Tensor, write: Tensor) -> Tensor:
        """The i-th map at h: its three parts weighted by mix [G, 1, 3], the open chunk's tokens by write [G, 1, n]."""
        n = write.shape[-1]
        if i:
            r = torch.bmm(mix, torch.bmm(h, self.three[i]).view(len(h), 3, -1))
        else:
            r = torch.bmm((h * mix.mT).view(len(h), 1, -1), self.three[i])
        scores = torch.bmm(h, self.inputs[i][:, :n].mT) * write
        return torch.baddbmm(r, scores, self.signals[i][:, :n], alpha=-1)

    def _weigh(self, gates: Tensor) -> Tensor:
        """Brings ``weights`` to the new token; weights of the chunk's tokens in the memory [G, 1, n]."""
        momentum, retention = gates[1:].exp().unbind(0)
        memory, surprise = self.fading.unbind(0)
        memory.mul_(retention).add_(surprise.mul_(momentum))
        end = self.slot + 3
        self.weights[..., end : end + 1] = gates[0]
        return self.weights[0, ..., 3 : end + 1]

    def _write(self, k: Tensor, v: Tensor) -> None:
        """The token's input and gradient at every map, at the memory the chunk began with (online: as it stands)."""
        network, slot = self.network, self.slot
        x, outputs = k, []
        for i, (two, inputs) in enumerate(zip(self.two, self.inputs, strict=True)):
            if network.online:
                outputs.append(self._linear(0, k, self.mix, self.weights[0, ..., 3 : slot + 3]))
            elif i:
                x = self.value(outputs[-1])
                z = torch.bmm(x, two.mT)
                outputs.append(torch.add(*z.chunk(2, -1)))
            else:
                outputs.append(torch.bmm(torch.cat([k, k], 2), two))
            inputs[:, slot : slot + 1] = x
        gain = self.affine and self.affine[0]
        d = network.output_signal(outputs[-1], gain, network.offset(k, v, self.affine))[0]  # type: ignore[arg-type]
        for i in reversed(range(network.depth)):
            self.signals[i][:, slot : slot + 1] = d
            if i:
                d = self.slope(torch.bmm(torch.cat([d, d], 2), self.two[i]), outputs[i - 1])

    def recall(self, q: Tensor, maps: Sequence[Tensor]) -> Tensor:
        """Asks a memory that stands still: q [G, 1, D], its linear maps [B, H, d_in, d_out]; nothing is written."""
        h = q
        for i, map in enumerate(maps):
            h = torch.bmm(self.value(h) if i else h, map.flatten(0, 1))
        return self.network.finish(q, h, self.affine)  # type: ignore[arg-type]

    def _advanced(self) -> list[Tensor]:
        """Memory and momentum of every map after the open chunk's tokens."""
        held, weights = [map[:, 1:] for map in self.maps], self.fading.squeeze(2).movedim(0, -1)
        return advance_all(held, self.inputs, self.signals, weights[:, 2:], weights[:, :2].mT)

    def _close(self) -> None:
        """Moves the full chunk into the maps."""
        for map, new in zip(self.maps, self._advanced(), strict=True):
            map[:, 1:] = new
        for emptied in (*self.inputs, *self.signals, self.fading):
            emptied.zero_()
        self.fading[:, :, 0, :2] = torch.eye(2, device=self.weights.device).unsqueeze(1)

    def current_maps(self) -> list[Tensor]:
        """The memory's linear maps [B, H, d_in, d_out] after the last token."""
        now = weights_of(self._advanced(), [map[:, 0] for map in self.maps], self.weights.dtype)
        return [w.unflatten(0, self.shape) for w in now]
