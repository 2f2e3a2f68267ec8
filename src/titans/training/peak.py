"""How much memory a process has needed at most."""

import ctypes
import gc
from pathlib import Path

import torch


class PeakMemory:
    """Memory at its highest, above what was in use when this was made."""

    def __init__(self, device: str):
        self.device = device
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        elif Path("/proc/self/clear_refs").exists():
            gc.collect()
            trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
            if trim is not None:
                trim(0)  # what earlier work left free would hide what comes
            Path("/proc/self/clear_refs").write_text("5")  # the kernel's high-water mark starts anew
        self.start = self._bytes("VmRSS", "memory_allocated")

    def above_start(self) -> int | None:
        """Bytes; None where the system does not tell."""
        peak = self.highest()
        return None if peak is None or self.start is None else max(0, peak - self.start)

    def highest(self) -> int | None:
        """Bytes in all; None where the system does not tell."""
        return self._bytes("VmHWM", "max_memory_allocated")

    def _bytes(self, field: str, function: str) -> int | None:
        return getattr(torch.cuda, function)() if self.device == "cuda" else resident(field)


def resident(field: str) -> int | None:
    """VmRSS (now) or VmHWM (highest) of this process in bytes; None off Linux."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    lines = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
    return 1024 * int(lines[field].split()[0])
