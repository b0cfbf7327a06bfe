"""Arrays in and out of one Orbax checkpoint: a flat dictionary, parameter path -> array."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp


def save(folder: Path, arrays: Mapping[str, Any]) -> None:
    """Writes the arrays to a new folder."""
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(folder.resolve(), dict(arrays))


def restore(folder: Path) -> dict[str, jax.Array]:
    """Reads what `save` wrote, each array in its own dtype."""
    with ocp.PyTreeCheckpointer() as checkpointer:
        return checkpointer.restore(folder.resolve())
