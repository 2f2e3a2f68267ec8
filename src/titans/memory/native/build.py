"""Compiles C for this machine, once; what comes out is kept in the user's cache."""

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

HEADERS = Path(__file__).parent
MEND = "install gcc or clang, or name one in the environment variable CC"
FLAGS = ["-std=gnu11", "-O3", "-march=native", "-shared", "-fPIC"]


@cache
def library(source: Path) -> ctypes.CDLL:
    """The compiled functions of ``source``, which may use the headers here.

    The compiler is ``CC``, or what the system calls cc, gcc or clang.

    Raises:
        OSError: there is no compiler, it fails, or its result cannot be kept; the message says which.
    """
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CC") or "cc", "gcc", "clang"))), None)
    if compiler is None:
        raise OSError(f"there is no C compiler; {MEND}")
    sources = [path.read_bytes() for path in (source, *sorted(HEADERS.glob("*.h")))]
    machine = subprocess.run([compiler, *FLAGS, "-dM", "-E", "-xc", os.devnull], capture_output=True).stdout
    name = hashlib.sha256(b"\n".join([*sources, " ".join(FLAGS).encode(), machine])).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "titans"
    built = folder / f"{source.stem}-{name}.so"
    if not built.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as new:  # another process may be at it, too
            made = Path(new) / built.name
            command = [compiler, *FLAGS, f"-I{HEADERS}", source, "-o", made, "-lm"]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise OSError(f"{compiler} cannot compile {source.name}; {MEND}: {done.stderr.strip()[-500:]}")
            made.replace(built)
    return ctypes.CDLL(str(built))
