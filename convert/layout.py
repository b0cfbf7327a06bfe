"""How the published files lay, so that `export` can write them back: their headers, and where each tensor is now.

In DEST/inventory.json, `layout`:

files      one each: name, path (as in the manifest's sources), header (its text), tensors (published name -> place)
texts      name -> content, of sidecars and indexes
elsewhere  published name -> place, of what lies in no file as it is in the checkpoint: filled from a base, unpacked

A place is one of

    {"array": A, "pattern": P}                               a plain array of the checkpoint, its axes moved by P
    {"codes": L, "packing": P}                               the codes of a packed linear
    {"norms": L}                                             its norms
    {"quantised": L}                                         a linear that was packed here: its original is gone
    {"kept": true}                                           in the safetensors file DEST/kept/tensors, as it came

where A and L are component/part/path. A place of codes may have "kept" too, where their stream ends in bits that are no
codes. `name` tells the full published name of a tensor whose own lacks a prefix, or of the weight that codes belong to.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from convert.files import ConvertError
from convert.inventory import Inventory
from convert.journal import file_digest
from convert.tasks import KEPT, PACKED, QUANTISED, UNPACKED, Task
from hlwq_jax import LazyTensor, StoredWeight, pack, packed_length, unpack
from hlwq_jax.reader import SIDECARS
from ltx_jax import durable
from ltx_jax.checkpoint import KEPT_FOLDER
from ltx_jax.orbax_io import pieces_of

KEPT_TENSORS = f"{KEPT_FOLDER}/tensors"  # safetensors, but not called so: no search for sources must find it
_INDEX = "*.safetensors.index.json"
_PIECE_VALUES = 2**24
DTYPES = {
    "bool": "BOOL",
    "uint8": "U8",
    "int8": "I8",
    "uint16": "U16",
    "int16": "I16",
    "uint32": "U32",
    "int32": "I32",
    "uint64": "U64",
    "int64": "I64",
    "float16": "F16",
    "bfloat16": "BF16",
    "float32": "F32",
    "float64": "F64",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "float8_e8m0fnu": "F8_E8M0",
    "complex64": "C64",
}  # numpy's names of dtypes -> those of safetensors


def layout_of(inventory: Inventory, tasks: Iterable[Task]) -> dict[str, Any]:
    """What an export must know of a source and of where its tensors went; JSON. The text encoder is not exported.

    Raises ConvertError for two files of one name.
    """
    source = inventory.source
    places: dict[tuple[Path | None, str], dict[str, Any]] = {}
    elsewhere: dict[str, dict[str, Any]] = {}
    for task in tasks:
        if task.component == "gemma":
            continue
        for tensor, place in _places(task):
            if tensor is None or task.full_name in inventory.filled:
                elsewhere[task.full_name] = place
            else:
                places[tensor.path, tensor.name] = place
    files = [(path, _relative(path, source.path)) for path in source.files]
    for upscaler in source.upscalers.values():
        inside = upscaler.path.is_relative_to(source.path)
        files.append((upscaler.path, _relative(upscaler.path, source.path if inside else upscaler.path.parent)))
    names = [name for _, name in files]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConvertError(f"two files of the source would be called {twice[0]} when exported; rename one of them")
    return {
        "files": [_file(path, name, places) for path, name in files],
        "texts": dict(_texts(source.path)),
        "elsewhere": elsewhere,
    }


def _places(task: Task) -> Iterator[tuple[LazyTensor | None, dict[str, Any]]]:
    """The published tensors that a task is of, and where they are; None for what lies in no file like that."""
    where, stored = f"{task.part}/{task.target}", task.stored
    linear = where.removesuffix(".kernel")
    if isinstance(stored, LazyTensor):
        name = {} if stored.name == task.full_name.rpartition(":")[2] else {"name": task.full_name}
        if task.rule == QUANTISED:
            yield stored, {"quantised": linear} | name
        else:
            assert task.rule == KEPT
            yield stored, {"array": where, "pattern": task.pattern} | name
    elif task.rule == PACKED:
        place = {"codes": linear, "packing": stored.packing, "name": task.full_name}
        yield stored.code_tensor, place | ({} if _round_trips(stored) else {"kept": True})
        yield stored.norm_tensor, {"norms": linear}
    else:
        assert task.rule == UNPACKED
        yield None, {"array": where, "pattern": task.pattern}


def _round_trips(weight: StoredWeight) -> bool:
    """Whether codes packed again are the bytes that came: a stream may end in bits that belong to no code."""
    total = weight.norm_tensor.size * weight.block_size
    tail = total % 8
    if not tail or weight.packing == "H":  # which has whole blocks alone
        return True
    start = packed_length(total - tail, bits=weight.bits, packing=weight.packing)
    data = weight.code_tensor.read_flat(start, weight.code_tensor.size).view(np.uint8)
    codes = unpack(data, num_codes=tail, bits=weight.bits, packing=weight.packing)
    return bool((pack(codes, bits=weight.bits, packing=weight.packing).view(np.uint8) == data).all())


def _relative(path: Path, root: Path) -> str:
    return path.name if path == root else path.relative_to(root).as_posix()


def _file(path: Path, name: str, places: Mapping[tuple[Path | None, str], dict[str, Any]]) -> dict[str, Any]:
    header = read_header(path)
    own = [tensor for tensor in json.loads(header) if tensor != "__metadata__"]
    tensors = {tensor: places.get((path, tensor), {"kept": True}) for tensor in own}
    return {"name": name, "path": str(path), "header": header, "tensors": tensors}


def _texts(root: Path) -> Iterator[tuple[str, str]]:
    """Sidecars and indexes of a folder, in what is no text encoder."""
    if not root.is_dir():
        return
    encoders = [file.parent for file in root.rglob("tokenizer.json")]
    for path in sorted(path for pattern in (*SIDECARS, _INDEX) for path in root.rglob(pattern)):
        if not any(folder in path.parents for folder in encoders):
            yield path.relative_to(root).as_posix(), path.read_bytes().decode()


def read_header(path: Path) -> str:
    """The header of a safetensors file that was opened before, as it stands."""
    with open(path, "rb") as file:
        return file.read(int.from_bytes(file.read(8), "little")).decode()


def kept_tensors(inventory: Inventory, layout: Mapping[str, Any]) -> dict[str, LazyTensor]:
    """The tensors that `layout_of` says are kept: vectors that no model reads, and weights that were unpacked."""
    groups = [inventory.source.tensors, *(upscaler.tensors for upscaler in inventory.source.upscalers.values())]
    tensors = {(str(tensor.path), tensor.name): tensor for group in groups for tensor in group.values()}
    return {
        name: tensors[file["path"], name]
        for file in layout["files"]
        for name, place in file["tensors"].items()
        if place.get("kept")
    }


def write_kept(folder: Path, tensors: Mapping[str, LazyTensor]) -> dict[str, str]:
    """Writes kept tensors into a checkpoint, if there are any; returns what the inventory's `files` say of it."""
    path = folder / KEPT_TENSORS
    path.unlink(missing_ok=True)
    if not tensors:
        return {}
    path.parent.mkdir(exist_ok=True)
    write_safetensors(path, {name: Payload.of(tensor) for name, tensor in tensors.items()})
    durable.sync(path.parent)
    return {KEPT_TENSORS: file_digest(path)}


# ------------------------------------------------------------------- writing


@dataclass(frozen=True, kw_only=True)
class Payload:
    """A tensor that is to be written: its bytes come when they are asked for, in pieces."""

    dtype: np.dtype
    shape: tuple[int, ...]
    pieces: Callable[[], Iterable[np.ndarray]]

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    @classmethod
    def of(cls, tensor: LazyTensor | np.ndarray) -> "Payload":
        """A tensor as it is."""
        if isinstance(tensor, np.ndarray):
            return cls(dtype=tensor.dtype, shape=tensor.shape, pieces=lambda: pieces_of(tensor))
        steps = range(0, tensor.size, _PIECE_VALUES)
        return cls(
            dtype=tensor.dtype,
            shape=tensor.shape,
            pieces=lambda: (tensor.read_flat(at, min(at + _PIECE_VALUES, tensor.size)) for at in steps),
        )


def header_of(tensors: Mapping[str, Payload], metadata: Mapping[str, str] | None = None) -> str:
    """The header of a safetensors file that holds tensors in this order; filled up to a multiple of eight bytes."""
    header: dict[str, Any] = {} if not metadata else {"__metadata__": dict(metadata)}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": DTYPES[tensor.dtype.name],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":"))
    return text + " " * (-len(text.encode()) % 8)


def write_safetensors(
    path: Path,
    tensors: Mapping[str, Payload],
    *,
    header: str | None = None,
    advance: Callable[[bytes | memoryview], None] = lambda data: None,
) -> None:
    """Writes a new file, tensor after tensor; `advance` sees its bytes as they go.

    Raises ValueError for a tensor whose bytes are more or fewer than its shape says.
    """
    text = (header_of(tensors) if header is None else header).encode()

    def chunks() -> Iterator[bytes | memoryview]:
        yield len(text).to_bytes(8, "little")
        yield text
        for name, tensor in tensors.items():
            count = 0
            for piece in tensor.pieces():
                data = np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data
                count += data.nbytes
                yield data
            if count != tensor.nbytes:
                raise ValueError(f"{name} has {count} bytes, its shape says {tensor.nbytes}")

    def told() -> Iterator[bytes | memoryview]:
        for chunk in chunks():
            advance(chunk)
            yield chunk

    durable.write(path, told())
