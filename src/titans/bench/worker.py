"""One case in one process: builds it, then answers every line on standard input with one timed repetition."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from titans.bench.case import Case, build


def main() -> None:
    case = Case(**json.loads(sys.argv[1]))
    torch.set_num_threads(case.threads)
    torch.manual_seed(0)
    try:
        subject = build(case)
        if subject.check is not None:
            subject.check()
    except (ImportError, AssertionError, ValueError) as error:
        answer({"error": str(error)})
        return
    memory = PeakMemory(case.device)
    subject.run()  # warm-up, and the only run whose memory begins from nothing
    answer({"tokens": subject.tokens, "peak_bytes": memory.above_start()})
    for _ in sys.stdin:
        if case.device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        try:
            subject.run()
        except AssertionError as error:
            answer({"error": str(error)})
            return
        if case.device == "cuda":
            torch.cuda.synchronize()
        answer({"seconds": time.perf_counter() - start, "resident_bytes": resident("VmRSS")})


def answer(values: dict[str, Any]) -> None:
    print(json.dumps(values), flush=True)


class PeakMemory:
    """Memory at its highest, above what was in use when this was made."""

    def __init__(self, device: str):
        self.device = device
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        elif Path("/proc/self/clear_refs").exists():
            Path("/proc/self/clear_refs").write_text("5")  # the kernel's high-water mark starts anew
        self.start = self._bytes("VmRSS", "memory_allocated")

    def above_start(self) -> int | None:
        """Bytes; None where the system does not tell."""
        peak = self._bytes("VmHWM", "max_memory_allocated")
        return None if peak is None or self.start is None else max(0, peak - self.start)

    def _bytes(self, field: str, function: str) -> int | None:
        return getattr(torch.cuda, function)() if self.device == "cuda" else resident(field)


def resident(field: str) -> int | None:
    """VmRSS (now) or VmHWM (highest) of this process in bytes; None off Linux."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    lines = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
    return 1024 * int(lines[field].split()[0])


if __name__ == "__main__":
    main()
