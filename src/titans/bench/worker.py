"""One case in one process: a first line on standard input builds it, every other asks for one timed repetition."""

import json
import sys
import time
from typing import Any

import torch

from titans.bench.case import Case, builder
from titans.training.peak import PeakMemory, resident


def main() -> None:
    case = Case(**json.loads(sys.argv[1]))
    torch.set_num_threads(case.threads)
    torch.manual_seed(0)
    try:
        build = builder(case)
        sys.stdin.readline()
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


if __name__ == "__main__":
    main()
