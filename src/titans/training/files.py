"""Files and folders that are whole or not there, whatever stops the machine. No torch here."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"


def write_atomically(path: Path, text: str) -> None:
    """Whole or not at all: a reader never meets half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_text(text, encoding="utf-8")
    replace_durably(temporary, path)


def replace_durably(part: Path, path: Path) -> None:
    """``os.replace`` that a power cut undoes or leaves, but never empties: contents reach the disk before the name."""
    for file in [part, *part.rglob("*")] if part.is_dir() else [part]:
        _sync(file)
    os.replace(part, path)
    _sync(path.parent)


def publish(part: Path, folder: Path, about: dict[str, Any] | None = None) -> None:
    """Gives the folder ``part`` a manifest (size and sha256 of every file, and ``about``) and the name ``folder``.

    ``folder`` must not be there, or be empty.
    """
    files = {
        path.relative_to(part).as_posix(): {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        for path in sorted(part.rglob("*"))
        if path.is_file()
    }
    (part / MANIFEST).write_text(json.dumps({**(about or {}), "files": files}, indent=1), encoding="utf-8")
    replace_durably(part, folder)


def read_manifest(folder: Path, *, hashes: bool = True) -> dict[str, Any]:
    """The manifest of a published folder, once its files are found to be those that were published.

    Args:
        hashes: read every file and compare its sha256; otherwise the sizes alone are compared.

    Raises:
        ValueError: no manifest, or a file that is missing, shorter or changed, named.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        files = [(name, file["bytes"], file["sha256"]) for name, file in manifest["files"].items()]
    except FileNotFoundError as error:
        raise ValueError(f"{folder} has no {MANIFEST}: it was not written to its end") from error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error})") from error
    for name, length, sha256 in files:
        path = folder / name
        size = path.stat().st_size if path.is_file() else "no"
        if size != length:
            raise ValueError(f"{path} holds {size} bytes instead of {length}")
        if hashes and _sha256(path) != sha256:
            raise ValueError(f"{path} is damaged: its sha256 is not the one in {MANIFEST}")
    return manifest


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    if os.name == "nt":
        return  # Windows flushes nothing that was opened for reading
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
