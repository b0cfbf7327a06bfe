"""What a conversion has finished, so that another run goes on from there; and what its result says of every array.

DEST/inventory.json, whose SHA-256 is in manifest.json (provenance.inventory_sha256):
arrays   component/part -> array -> sha256 of its little-endian bytes in C order, dtype, shape
files    path -> sha256, of the tokenizer's files
tensors  published name -> from (file), rule, to (component/path, or null), why
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from convert.files import ConvertError
from ltx_jax import durable
from ltx_jax.orbax_io import Stored

INVENTORY = "inventory.json"


def read_inventory(folder: Path) -> dict[str, Any]:
    """The inventory of a checkpoint. Raises ConvertError where there is none, or a damaged one.

    Whether it is the one that the manifest names, its `file_digest` tells.
    """
    path = folder / INVENTORY
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise ConvertError(f"{folder} has no {INVENTORY}, so nothing proves its arrays; convert again") from error
    except (ValueError, RecursionError) as error:
        raise ConvertError(f"{path} is damaged: {error}; convert again") from error
    sections = content if isinstance(content, dict) else {}
    if not all(isinstance(sections.get(name), dict) for name in ("arrays", "files", "tensors")):
        raise ConvertError(f"{path} is not the inventory of a conversion; convert again")
    return content


def array_digest(array: np.ndarray) -> str:
    """SHA-256 of an array's little-endian bytes in C order, as in the inventory."""
    return sha256(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data).hexdigest()


def file_digest(path: Path, advance: Callable[[int], None] = lambda count: None) -> str:
    """SHA-256 of a file; `advance(bytes)` is called as it is read."""
    digest = sha256()
    with open(path, "rb") as file:
        while data := file.read(2**22):
            digest.update(data)
            advance(len(data))
    return digest.hexdigest()


@dataclass(frozen=True, kw_only=True)
class Part:
    """A part that is on the disk: its arrays, and what only writing it could tell."""

    arrays: Mapping[str, Stored]
    quantized: Mapping[str, Any] = field(default_factory=dict)  # path of a linear that was packed here -> how it went


class Journal:
    """Lines of JSON, each on the disk when its method returns; a last line that was cut off counts for nothing.

    The first line holds the key of the conversion: all that decides its result. The others are finished parts, and
    the step that the destination is at.
    """

    def __init__(self, path: Path):
        self.path = path
        self.key: Any = None
        self.parts: dict[str, Part] = {}
        self.step: dict[str, Any] = {}  # the last one
        self._lock = Lock()
        data = path.read_bytes() if path.is_file() else b""
        whole = 0
        for line in data.splitlines(keepends=True):
            try:
                entry = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:
                entry = None
            if not isinstance(entry, dict):
                break
            self._take(entry)
            whole += len(line)
        if whole < len(data):
            durable.truncate(path, whole)

    def clear(self) -> None:
        """Forgets everything."""
        durable.truncate(self.path, 0)
        self.key, self.parts, self.step = None, {}, {}

    def start(self, key: Any) -> None:
        self._append({"key": key})

    def finish_part(self, name: str, part: Part) -> None:
        arrays = {array: list(facts) for array, facts in part.arrays.items()}
        self._append({"part": name, "arrays": arrays, "quantized": dict(part.quantized)})

    def set_step(self, **step: Any) -> None:
        self._append(step)

    def _append(self, entry: dict[str, Any]) -> None:
        line = _line(entry)
        with self._lock:
            durable.append(self.path, line)
            self._take(json.loads(line))

    def _take(self, entry: dict[str, Any]) -> None:
        if "key" in entry:
            self.key = entry["key"]
        elif "part" in entry:
            arrays = {name: Stored(sha, dtype, tuple(shape)) for name, (sha, dtype, shape) in entry["arrays"].items()}
            self.parts[entry["part"]] = Part(arrays=arrays, quantized=entry["quantized"])
        else:
            self.step = entry


def _line(entry: Any) -> bytes:
    return json.dumps(entry).encode() + b"\n"
