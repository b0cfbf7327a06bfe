"""Arrays in and out of one Orbax checkpoint: a flat dictionary, parameter path -> array, each in its own dtype."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp

# Many small leaves go into one OCDBT store (1,200 of 400 bytes: saved in 0.8, restored in 0.4 of the time of files of
# their own); few large ones are faster as plain zarr3 files (saving 17 MB leaves: 0.7 of the time). Neither is
# compressed: codes do not shrink, bfloat16 weights by a fifth, at a third of the speed of saving, half of restoring.
_SMALL_LEAF_BYTES = 2**20

# Orbax tells each save and restore at length; what a caller must know comes as an exception.
logging.getLogger("absl").setLevel(logging.ERROR)


def save(folder: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes arrays to a new folder. An existing one is an error of Orbax."""
    sizes = [array.nbytes for array in arrays.values()]
    small = sum(sizes) / max(len(sizes), 1) < _SMALL_LEAF_BYTES
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=small, use_zarr3=True, use_compression=False)
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(folder.resolve(), args=ocp.args.PyTreeSave(dict(arrays)))


def restore(folder: Path) -> dict[str, np.ndarray]:
    """Reads what `save` wrote, to host memory."""
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_zarr3=True)) as checkpointer:
        tree: Any = checkpointer.metadata(folder.resolve())
        tree = getattr(tree, "item_metadata", tree)
        tree = getattr(tree, "tree", tree)
        arguments = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in tree}
        return checkpointer.restore(folder.resolve(), args=ocp.args.PyTreeRestore(restore_args=arguments))
