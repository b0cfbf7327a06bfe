"""What the model said at each call of a run, on the disk as it is said, so that a run that was cut off can go on.

A resumed run starts its samplers anew from the same noise and hands them the same estimates, as far as there are any:
whatever a sampler remembers between steps, it ends up in the same state, bit for bit.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.flax import save

from ltx_jax import durable
from ltx_jax.denoise import Estimates, Pair

KEY = "run.json"


class ReplayError(ValueError):
    """A run that cannot be resumed; the text says why."""


class Replay:
    """The estimates of one run, in a folder that is removed when the run is done."""

    def __init__(self, folder: Path, key: Mapping[str, Any], *, resume: bool):
        """`key` is all that decides the result; its values are JSON.

        Without `resume` what an earlier run left is removed. With it, raises ReplayError where there is nothing to go
        on from, or where that was another run, naming what differs.
        """
        self.folder = folder
        known = self._known()
        if resume and known is None:
            raise ReplayError(f"there is no unfinished run at {folder}; start without --resume")
        different = (
            [] if known is None else [name for name in key if known.get(name) != json.loads(json.dumps(key))[name]]
        )
        if resume and different:
            raise ReplayError(
                f"the unfinished run at {folder} was another one: {', '.join(different)} differ; give what was given "
                "then, or start without --resume"
            )
        if not resume:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            durable.replace(folder / KEY, json.dumps(dict(key), indent=1).encode())

    def _known(self) -> dict[str, Any] | None:
        try:
            return json.loads((self.folder / KEY).read_bytes())
        except (OSError, ValueError):
            return None

    @property
    def num_calls(self) -> int:
        """Estimates that are there."""
        return len(list(self.folder.glob("*.safetensors")))

    def stage(self, name: str) -> "StageReplay":
        """The part of a run that `name` tells from the others."""
        return StageReplay(self.folder, name)

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


class StageReplay:
    """The estimates of one stage, by the number of the call."""

    def __init__(self, folder: Path, name: str):
        self.folder, self.name = folder, name

    def _path(self, call: int) -> Path:
        return self.folder / f"{self.name}-{call:04d}.safetensors"

    def recall(self, call: int) -> Estimates | None:
        """What the model said at a call; None where that is not known, or was cut off while it was written."""
        try:
            with safe_open(self._path(call), "flax") as file:
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError):
            return None
        estimate, held = (
            Pair(*(arrays.get(f"{kind}.{modality}") for modality in Pair._fields)) for kind in Estimates._fields
        )
        return Estimates(estimate, held)

    def keep(self, call: int, estimates: Estimates) -> None:
        """Writes what the model said at a call."""
        arrays = {
            f"{kind}.{modality}": array
            for kind, pair in estimates._asdict().items()
            for modality, array in pair._asdict().items()
            if array is not None
        }
        durable.replace(self._path(call), save(arrays))
