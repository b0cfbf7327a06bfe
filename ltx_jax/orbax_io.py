"""Arrays in and out of one Orbax checkpoint: a flat dictionary, parameter path -> array, each in its own dtype.

Orbax reads it; it is written here. Orbax's own writer takes whole arrays from memory, and leaves the time and random
names in its files. Here an array comes in pieces and need not fit in memory, and the same arrays give the same bytes:

    FOLDER/_METADATA, _CHECKPOINT_METADATA      Orbax's description of the dictionary
    FOLDER/<name>/zarr.json, c.0.0, c.1.0, ...  a Zarr 3 array, in pieces along its first axis

Source: Orbax's "Checkpoint Format Guide", and the Zarr 3 core specification.
"""

import ctypes
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from hashlib import sha256
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_dtypes  # noqa: F401  numpy knows the names of its dtypes from here on
import numpy as np
import orbax.checkpoint as ocp

from ltx_jax import durable

# A large array is written, and read, in pieces: reading one in a single piece takes its memory twice. It is not
# compressed: codes do not shrink, bfloat16 weights by a fifth, at a third of the speed of saving, half of restoring.
PIECE_BYTES = 2**26
_READ_BYTES = 2**24
_TREE, _STEP, _ARRAY = "_METADATA", "_CHECKPOINT_METADATA", "zarr.json"
_HANDLER = "orbax.checkpoint._src.handlers.pytree_checkpoint_handler.PyTreeCheckpointHandler"

# Orbax tells each restore at length; what a caller must know comes as an exception.
logging.getLogger("absl").setLevel(logging.ERROR)


class Stored(NamedTuple):
    """An array of a checkpoint: what `write_array` wrote."""

    sha256: str  # of its little-endian bytes in C order
    dtype: str
    shape: tuple[int, ...]


# -------------------------------------------------------------------- writing


def save(folder: Path, arrays: Mapping[str, np.ndarray]) -> dict[str, Stored]:
    """Writes arrays to a new folder. Raises FileExistsError where there is one."""
    folder.mkdir(parents=True)
    stored = {name: write_array(folder, name, x.shape, x.dtype, pieces_of(x)) for name, x in arrays.items()}
    write_tree(folder, arrays)
    return stored


def write_array(folder: Path, name: str, shape: tuple[int, ...], dtype: Any, pieces: Iterable[np.ndarray]) -> Stored:
    """Writes one array, given in pieces of `piece_rows` rows, the last one with what is left.

    Raises ValueError for pieces of another dtype or size.
    """
    dtype, digest = np.dtype(dtype), sha256()
    place = folder / name
    place.mkdir()
    durable.write(place / _ARRAY, [_array_json(shape, dtype)])
    for chunk, piece in zip(_chunks(shape, dtype), pieces, strict=True):
        if piece.dtype != dtype or piece.nbytes != chunk.nbytes:
            raise ValueError(
                f"{name}: a piece of {piece.nbytes} bytes of {piece.dtype}, expected {chunk.nbytes} of {dtype}"
            )
        data = np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data
        digest.update(data)
        durable.write(place / chunk.name, [data, bytes(chunk.padding)])
    return Stored(digest.hexdigest(), dtype.name, tuple(shape))


def write_tree(folder: Path, names: Iterable[str]) -> None:
    """Writes what Orbax must know of the arrays in a folder: it is a checkpoint then."""
    for name, content in _tree_files(names).items():
        durable.write(folder / name, [content])


def piece_rows(shape: tuple[int, ...], dtype: Any) -> int:
    """Entries of the first axis in a piece: equally many in each, as far as they divide."""
    if not prod(shape) or not shape:
        return 1
    row = prod(shape[1:]) * np.dtype(dtype).itemsize
    num_pieces = -(-shape[0] // max(PIECE_BYTES // row, 1))
    return -(-shape[0] // num_pieces)


def pieces_of(array: np.ndarray) -> Iterator[np.ndarray]:
    """An array that is in memory, as `write_array` takes it."""
    if not array.ndim:
        yield array
    elif array.size:
        rows = piece_rows(array.shape, array.dtype)
        yield from (array[start : start + rows] for start in range(0, len(array), rows))


def proves(folder: Path, arrays: Mapping[str, Stored]) -> bool:
    """Whether a folder is to the byte what `write_array` and `write_tree` made of these arrays, and nothing else."""
    return next(faults(folder, arrays), None) is None


def faults(
    folder: Path, arrays: Mapping[str, Stored], advance: Callable[[int], None] = lambda count: None
) -> Iterator[tuple[str, str]]:
    """What in a folder is not as `write_array` and `write_tree` made it: arrays and files, each with what is wrong.

    `advance(bytes)` is called as arrays are read.
    """
    small = {(name, name): content for name, content in _tree_files(arrays).items()}
    small |= {(name, f"{name}/{_ARRAY}"): _array_json(x.shape, np.dtype(x.dtype)) for name, x in arrays.items()}
    chunks = {name: list(_chunks(x.shape, np.dtype(x.dtype))) for name, x in arrays.items()}
    names = {file for _, file in small} | {f"{name}/{chunk.name}" for name, found in chunks.items() for chunk in found}
    there = {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}
    yield from ((name, "extra") for name in sorted(there - names))
    lacking: dict[str, list[str]] = {}
    for name in sorted(names - there):
        lacking.setdefault(name.rpartition("/")[0] or name, []).append(name.rpartition("/")[2])
    for name, files in lacking.items():
        whole = len(files) == 1 + len(chunks.get(name, ()))
        yield name, "missing" if whole else f"missing {', '.join(files)}"
    for (name, file), content in small.items():
        if name not in lacking and (folder / file).read_bytes() != content:
            yield file, "damaged: its text is not that of a conversion"
    for name, array in arrays.items():
        if name in lacking:
            continue
        found = _digest(folder / name, chunks[name], advance)
        if found != array.sha256:
            what = f"its SHA-256 is {found}" if found else "a piece has another size, or something in its padding"
            yield name, f"damaged: {what}, expected {array.sha256}"


class _Chunk(NamedTuple):
    name: str
    nbytes: int
    padding: int  # bytes: every piece takes the same place in its file


def _chunks(shape: tuple[int, ...], dtype: np.dtype) -> Iterator[_Chunk]:
    if not shape:
        yield _Chunk("c", dtype.itemsize, 0)
        return
    rows, row = piece_rows(shape, dtype), prod(shape[1:]) * dtype.itemsize
    for start in range(0, shape[0] if row else 0, rows):
        count = min(rows, shape[0] - start)
        yield _Chunk(".".join(["c", str(start // rows), *"0" * (len(shape) - 1)]), count * row, (rows - count) * row)


def _digest(place: Path, chunks: Iterable[_Chunk], advance: Callable[[int], None]) -> str | None:
    """SHA-256 of the array in a folder; None where a piece has another size or something in its padding."""
    digest = sha256()
    for chunk in chunks:
        path = place / chunk.name
        if path.stat().st_size != chunk.nbytes + chunk.padding:
            return None
        with open(path, "rb") as file:
            left = chunk.nbytes
            while left:
                data = file.read(min(left, _READ_BYTES))
                if not data:
                    return None
                digest.update(data)
                left -= len(data)
                advance(len(data))
            if file.read().strip(b"\0"):
                return None
    return digest.hexdigest()


def _array_json(shape: tuple[int, ...], dtype: np.dtype) -> bytes:
    chunk_shape = [piece_rows(shape, dtype), *shape[1:]] if shape else []
    return _json(
        {
            "zarr_format": 3,
            "node_type": "array",
            "shape": list(shape),
            "data_type": dtype.name,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [max(n, 1) for n in chunk_shape]}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
            "fill_value": False if dtype.kind == "b" else 0,
            "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
        }
    )


def _tree_files(names: Iterable[str]) -> dict[str, bytes]:
    leaf = {"value_type": "np.ndarray", "skip_deserialize": False}
    tree = {
        str((name,)): {"key_metadata": [{"key": name, "key_type": 2}], "value_metadata": leaf} for name in sorted(names)
    }
    description = {
        "tree_metadata": tree,
        "use_ocdbt": False,
        "use_zarr3": True,
        "store_array_data_equal_to_fill_value": True,
        "custom_metadata": None,
    }
    step = {"item_handlers": _HANDLER, "metrics": {}, "performance_metrics": {}, "custom_metadata": {}}
    return {_TREE: _json(description), _STEP: _json(step)}


def _json(value: Any) -> bytes:
    return json.dumps(value).encode()


# -------------------------------------------------------------------- reading


def describe(folder: Path) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of what is stored, without reading it."""
    tree = json.loads((folder / _TREE).read_bytes())
    if tree["use_ocdbt"]:  # written by Orbax
        return _describe_by_orbax(folder)
    shapes = {}
    # Orbax opens every array for this, which takes it as long as restoring small ones.
    for entry in tree["tree_metadata"].values():
        name = entry["key_metadata"][0]["key"]
        array = json.loads((folder / name / _ARRAY).read_bytes())
        shapes[name] = jax.ShapeDtypeStruct(tuple(array["shape"]), np.dtype(array["data_type"]))
    return shapes


def _describe_by_orbax(folder: Path) -> dict[str, jax.ShapeDtypeStruct]:
    with _reader() as checkpointer:
        tree: Any = checkpointer.metadata(folder.resolve())
    tree = getattr(tree, "item_metadata", tree)
    tree = getattr(tree, "tree", tree)
    return {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in tree.items()}


def restore(folder: Path, shapes: Mapping[str, jax.ShapeDtypeStruct] | None = None) -> dict[str, np.ndarray]:
    """Reads what `save` wrote to host memory: the arrays of `shapes`, which `describe` gave, or all."""
    shapes = describe(folder) if shapes is None else dict(shapes)
    arguments = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in shapes}
    wanted = ocp.args.PyTreeRestore(item=shapes, restore_args=arguments, partial_restore=True)
    with _reader() as checkpointer:
        return checkpointer.restore(folder.resolve(), args=wanted)


def release_freed_memory() -> None:
    """Gives freed memory back to the system, where the C library (glibc) has a function for it.

    Restoring allocates in many threads, and what is freed stays with each of them: gigabytes after a large model.
    """
    with suppress(AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def _reader() -> ocp.Checkpointer:
    return ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_zarr3=True))
