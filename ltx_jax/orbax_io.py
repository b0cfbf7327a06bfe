"""Arrays in and out of one Orbax checkpoint: a flat dictionary, parameter path -> array, each in its own dtype."""

import ctypes
import logging
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import type_handlers

# Many small leaves go into one OCDBT store (1,200 of 400 bytes: saved in 0.8, restored in 0.4 of the time of files of
# their own); few large ones are faster as plain zarr3 files (saving 17 MB leaves: 0.7 of the time). Neither is
# compressed: codes do not shrink, bfloat16 weights by a fifth, at a third of the speed of saving, half of restoring.
_SMALL_LEAF_BYTES = 2**20
# A large leaf is written, and read, in pieces: reading one in a single piece takes its memory twice.
_PIECE_BYTES = 2**26
# And arrays are written from where they lie: by default Orbax copies all of a tree first, as training goes on with it.
_HANDLERS = type_handlers.create_type_handler_registry(
    (np.ndarray, type_handlers.NumpyHandler(deepcopy_host_arrays=False))
)

# Orbax tells each save and restore at length; what a caller must know comes as an exception.
logging.getLogger("absl").setLevel(logging.ERROR)


def save(folder: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes arrays to a new folder. An existing one is an error of Orbax."""
    sizes = [array.nbytes for array in arrays.values()]
    small = sum(sizes) / max(len(sizes), 1) < _SMALL_LEAF_BYTES
    handler = ocp.PyTreeCheckpointHandler(
        use_ocdbt=small, use_zarr3=True, use_compression=False, type_handler_registry=_HANDLERS
    )
    pieces = {name: ocp.SaveArgs(chunk_byte_size=_PIECE_BYTES) for name in arrays}
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(folder.resolve(), args=ocp.args.PyTreeSave(dict(arrays), save_args=pieces))


def describe(folder: Path) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of what `save` wrote, without reading it."""
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
