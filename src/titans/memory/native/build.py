"""Compiles ``scan.c`` for this machine, once; what comes out is kept in the user's cache."""

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

SOURCE = Path(__file__).with_name("scan.c")
MEND = "install gcc or clang, or name one in the environment variable CC"
FLAGS = ["-std=gnu11", "-O3", "-march=native", "-shared", "-fPIC"]


@cache
def library() -> ctypes.CDLL:
    """The compiled functions of ``scan.c``, by ``CC`` or what the system calls cc, gcc or clang.

    Raises:
        OSError: there is no compiler, it fails, or its result cannot be kept; the message says which.
    """
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CC") or "cc", "gcc", "clang"))), None)
    if compiler is None:
        raise OSError(f"there is no C compiler; {MEND}")
    sources = [path.read_bytes() for path in sorted(SOURCE.parent.glob("*.[ch]"))]
    machine = subprocess.run([compiler, *FLAGS, "-dM", "-E", "-xc", os.devnull], capture_output=True).stdout
    name = hashlib.sha256(b"\n".join([*sources, " ".join(FLAGS).encode(), machine])).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "titans"
    built = folder / f"scan-{name}.so"
    if not built.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as new:  # another process may be at it, too
            made = Path(new) / built.name
            done = subprocess.run([compiler, *FLAGS, SOURCE, "-o", made, "-lm"], capture_output=True, text=True)
            if done.returncode:
                raise OSError(f"{compiler} cannot compile {SOURCE.name}; {MEND}: {done.stderr.strip()[-500:]}")
            made.replace(built)
    functions = ctypes.CDLL(str(built))
    functions.tape_size.restype = ctypes.c_int64
    return functions
