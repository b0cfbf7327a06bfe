"""Files that outlast a power cut: written, forced to the disk, renamed. A conversion writes through nothing else."""

import ctypes
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Bytes = bytes | memoryview


def write(path: Path, chunks: Iterable[Bytes]) -> None:
    """Writes a new file. It is on the disk only after `sync`, or after `rename` of a file that was synced."""
    with open(path, "xb") as file:
        for chunk in chunks:
            file.write(chunk)


def append(path: Path, data: bytes) -> None:
    """Adds to a file, and returns when the addition is on the disk."""
    with open(path, "ab") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def truncate(path: Path, size: int) -> None:
    """Cuts a file off, and returns when that is on the disk."""
    with open(path, "r+b") as file:
        file.truncate(size)
        os.fsync(file.fileno())


def sync(folder: Path) -> None:
    """Forces everything in and below a folder to the disk, names included."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        # One call for the file system: a sync of each of its thousands of small files would take a model minutes.
        flush: Any = getattr(ctypes.CDLL(None, use_errno=True), "syncfs", None)
        if flush is not None:
            if flush(descriptor):
                code = ctypes.get_errno()
                raise OSError(code, os.strerror(code), str(folder))
            return
    finally:
        os.close(descriptor)
    for place, _, files in os.walk(folder):
        for name in (*files, "."):
            _sync_one(Path(place, name))


def replace(path: Path, data: bytes) -> None:
    """Writes a small file that is there whole or not at all, and on the disk when this returns."""
    temporary = path.with_name(f"{path.name}.partial")
    temporary.unlink(missing_ok=True)
    write(temporary, [data])
    _sync_one(temporary)
    rename(temporary, path)


def rename(old: Path, new: Path) -> None:
    """Renames, and returns when the new name is on the disk."""
    os.rename(old, new)
    for parent in {old.parent, new.parent}:
        _sync_one(parent)


def _sync_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
