"""Everything a training run needs to go on, kept with Orbax: the newest few, each there whole or not at all."""

from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

State = TypeVar("State")


class Snapshots:
    """The snapshots of one run in a folder."""

    def __init__(self, folder: Path, *, keep: int = 2):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=False)
        handler = ocp.StandardCheckpointHandler()  # named, it can describe what another process saved
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options, item_handlers=handler)

    def save(self, step: int, state: Any) -> None:
        """Saves every array of a tree; returns when it is there whole."""
        self._manager.save(step, args=ocp.args.StandardSave(_flat(state)))

    def newest(self, state: State) -> State:
        """The newest snapshot in the form of `state`; `state` itself where there is none.

        Raises ValueError where a snapshot has other arrays than `state`.
        """
        step = self._manager.latest_step()
        if step is None:
            return state
        expected = _flat(state)
        found = self._manager.item_metadata(step)
        shapes = {name: tuple(x.shape) for name, x in found.items()} if found is not None else {}
        if shapes != {name: x.shape for name, x in expected.items()}:
            odd = sorted(
                name for name in shapes.keys() | expected.keys()
                if name not in expected or shapes.get(name) != expected[name].shape
            )  # fmt: skip
            raise ValueError(
                f"the snapshot of step {step} is of another model or optimiser: {len(odd)} of {len(expected)} arrays "
                f"differ, among them {', '.join(odd[:4])}. Give another folder, or the settings it was begun with"
            )
        arrays = self._manager.restore(step, args=ocp.args.StandardRestore(expected))
        leaves = [jnp.asarray(arrays[name]) for name in expected]
        return jax.tree.unflatten(jax.tree.structure(state), leaves)

    def close(self) -> None:
        self._manager.close()


def _flat(state: Any) -> dict[str, np.ndarray]:
    """The arrays of a tree by numbered names: Orbax keeps dictionaries whatever the classes of the tree become."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(leaf) for path, leaf in leaves}
