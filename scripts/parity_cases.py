"""What a comparison with the reference is made of: reference files, rows of the table, and the runners' frame.

A runner takes one reference file and adds rows. Whatever it does not read becomes a failing row, so a case that nobody
knows cannot pass unseen; whatever raises becomes a failing row, and the other cases still run.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from safetensors import safe_open

from convert.mapping import Rule, Table, plan
from ltx_jax.stack import module_at

# Tolerances, absolute, in float32 with matrix products at highest precision, as the README of the reference suggests.
# One forward pass of a transformer or an upscaler: rounding of other summation orders.
FORWARD = 2e-5
# A few tens to hundreds of convolutions one after the other: autoencoders and vocoder.
AUTOENCODER = 5e-5
# Several model calls with guidance, which feed on each other's rounding: a perturbation of 1e-6 moves these by 1.3e-5.
RUN = 2e-4
# Positions, schedules and steps: a few operations on numbers, relative to the largest of them.
EXACT = 1e-6


def relative(array: np.ndarray, tolerance: float = EXACT) -> float:
    """A tolerance relative to the size of an array, but no smaller than for size 1."""
    return tolerance * max(1.0, float(np.max(np.abs(array), initial=0.0)))


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    case: str
    error: float  # the largest absolute difference; nan where there is none to state
    tolerance: float
    ok: bool
    note: str = ""


def failure(case: str, note: str) -> Row:
    return Row(case, float("nan"), float("nan"), False, note)


Arrays = Any  # one array, or a mapping of them by name


def compare(case: str, ours: Arrays, theirs: Arrays, tolerance: float, mask: np.ndarray | None = None) -> Row:
    """The largest absolute difference between two arrays, or over two mappings of arrays by name.

    `mask` (over the leading axes) says what counts. Other shapes, names missing on either side, numbers that are not
    finite and nothing to compare fail, with a note.
    """
    if not isinstance(theirs, Mapping):
        ours, theirs = {"": ours}, {"": theirs}
    if ours.keys() != theirs.keys():
        lacking, beyond = sorted(theirs.keys() - ours.keys()), sorted(ours.keys() - theirs.keys())
        return failure(case, f"the reference lacks {beyond or 'nothing'}; ours lacks {lacking or 'nothing'}")
    if not theirs:
        return failure(case, "nothing to compare")
    worst, where = -1.0, ""
    for name in theirs:
        a, b = (np.asarray(x).astype(np.float64) for x in (ours[name], theirs[name]))
        label = f"{name}: " if name else ""
        if a.shape != b.shape:
            return failure(case, f"{label}shape {list(a.shape)}, need {list(b.shape)}")
        if mask is not None:
            if a.shape[: mask.ndim] != mask.shape:
                return failure(case, f"{label}the mask is {list(mask.shape)}, the array {list(a.shape)}")
            a, b = a[mask], b[mask]
        if a.size == 0:
            return failure(case, f"{label}nothing to compare")
        bad = [who for who, x in (("ours", a), ("the reference", b)) if not np.isfinite(x).all()]
        if bad:
            return failure(case, f"{label}not finite in {' and '.join(bad)}")
        error = float(np.max(np.abs(a - b)))
        if error > worst:
            worst, where = error, name
    note = f"largest at {where}" if len(theirs) > 1 else ""
    return Row(case, worst, tolerance, worst <= tolerance, note)


class Reference:
    """The arrays of one reference file by name, and which of them were read."""

    def __init__(self, path: Path, info: Mapping[str, Any] | None = None):
        """`info` are the notes of index.json; without them those in the file's own metadata are taken."""
        self.name = path.stem
        with safe_open(path, "np") as file:
            self.arrays: dict[str, np.ndarray] = {name: file.get_tensor(name) for name in list(file.keys())}
            metadata = file.metadata() or {}
        self.info: dict[str, Any] = dict(json.loads(metadata.get("info", "{}")) if info is None else info)
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> np.ndarray:
        self.read.add(name)
        return self.arrays[name]

    def __contains__(self, name: str) -> bool:
        return name in self.arrays

    def get(self, name: str) -> np.ndarray | None:
        return self[name] if name in self.arrays else None

    def names(self, prefix: str = "") -> list[str]:
        """What comes behind `prefix` in the names that begin with it."""
        return [name.removeprefix(prefix) for name in self.arrays if name.startswith(prefix)]

    def under(self, prefix: str) -> dict[str, np.ndarray]:
        """Every array below `prefix`, by the rest of its name; counts as read."""
        return {name: self[prefix + name] for name in self.names(prefix)}

    def groups(self, *excluded: str) -> list[str]:
        """The first parts of all names, in order, without `excluded`."""
        return [g for g in dict.fromkeys(name.split(".")[0] for name in self.arrays) if g not in excluded]

    def unread(self) -> list[str]:
        return [name for name in self.arrays if name not in self.read]


@dataclass
class Report:
    """The rows so far."""

    rows: list[Row] = field(default_factory=list)

    @contextmanager
    def case(self, case: str, reference: Reference | None = None, prefix: str | None = None) -> Iterator[None]:
        """What is raised inside becomes a failing row, which then also stands for the unread arrays below `prefix`."""
        try:
            yield
        except Exception as error:  # any: one broken case must not hide the others
            self.rows.append(failure(case, f"{type(error).__name__}: {error}"))
            if reference is not None and prefix is not None:
                reference.read.update(prefix + name for name in reference.names(prefix))

    def add(self, case: str, ours: Arrays, theirs: Arrays, tolerance: float, mask=None, note: str = "") -> None:
        """One row; a note is set in front of the comparison's own."""
        row = compare(case, ours, theirs, tolerance, mask)
        notes = "; ".join(filter(None, (note, row.note)))
        self.rows.append(Row(row.case, row.error, row.tolerance, row.ok, notes))

    def finish(self, reference: Reference) -> None:
        """A failing row for every array that no case has read."""
        for name in reference.unread():
            self.rows.append(failure(f"{reference.name}/unknown: {name}", "no case that this script knows has read it"))


def read_index(directory: Path) -> dict[str, dict[str, Any]]:
    path = directory / "index.json"
    return json.loads(path.read_text()) if path.exists() else {}


Runner = Callable[[Report, Reference], None]


def run_files(report: Report, directory: Path, runner_of: Callable[[str], Runner | None], inputs: set[str]) -> None:
    """Runs every reference file of a directory; `inputs` are the files that hold weights and are no cases themselves.

    Files without a runner, files that index.json lists and that are not there, and listed tensors that a file lacks
    fail.
    """
    index = read_index(directory)
    found = {path.stem for path in directory.glob("*.safetensors")}
    for name in [*(n for n in index if n in found), *sorted(found - set(index))]:
        if name in inputs:
            continue
        runner = runner_of(name)
        if runner is None:
            report.rows.append(failure(f"unknown: {name}.safetensors", "no runner knows this file"))
            continue
        with report.case(name):
            entry = index.get(name, {})
            reference = Reference(directory / f"{name}.safetensors", entry.get("info"))
            with report.case(name, reference, ""):
                runner(report, reference)
            report.finish(reference)
            for tensor in entry.get("tensors", {}):
                if tensor not in reference:
                    report.rows.append(failure(f"{name}/missing: {tensor}", "index.json lists it, the file lacks it"))
    for name in index:
        if name not in found:
            report.rows.append(failure(f"missing: {name}.safetensors", "index.json lists it"))


# ---------------------------------------------------------------------- models


def read_prefix(path: Path, *prefixes: str, without: tuple[str, ...] = ()) -> dict[str, np.ndarray]:
    """Tensors of a file whose names begin with one of `prefixes`, but none of `without`. One prefix is cut off."""
    cut = prefixes[0] if len(prefixes) == 1 else ""
    with safe_open(path, "np") as file:
        names = [name for name in list(file.keys()) if name.startswith(prefixes) and not name.startswith(without)]
        return {name.removeprefix(cut): file.get_tensor(name) for name in names}


def fill(
    make: Callable[[], nnx.Module], table: Table, tensors: Mapping[str, np.ndarray], skip: tuple[str, ...] = ()
) -> Any:
    """A model built from shapes alone and filled from published tensors through its table.

    Raises ValueError that lists every tensor that is unknown (and not in `skip`), missing, doubled or of a wrong shape.
    """
    graphdef, state = nnx.split(nnx.eval_shape(make))
    flat = dict(nnx.to_flat_state(state))
    paths = {".".join(map(str, path)): path for path in flat}
    shapes = {name: tuple(flat[path].get_value().shape) for name, path in paths.items()}
    planned = plan(table, {name: tensor.shape for name, tensor in tensors.items()}, shapes)
    planned.unknown = [name for name in planned.unknown if not any(fnmatch(name, pattern) for pattern in skip)]
    if not planned.ok:
        kinds = "unknown", "missing", "doubled", "misshaped"
        raise ValueError("; ".join(f"{kind}: {', '.join(v)}" for kind in kinds if (v := getattr(planned, kind))))
    for step in planned.steps:
        path = paths[step.target]
        flat[path] = flat[path].replace(jnp.asarray(rearrange(tensors[step.source], step.pattern)))
    return nnx.merge(graphdef, nnx.from_flat_state(flat))


def our_path(table: Table, published: str) -> str | None:
    """Where a published module (not a tensor) lies in our model, by the table of its tensors."""
    parts = published.split(".")
    for source, (target, below) in table.items():
        rule = Rule(source, target, "")
        for cut in range(1, len(parts) + 1):
            ours = rule.match(".".join(parts[:cut]))
            if ours is None or isinstance(below, str):
                continue
            if cut == len(parts):
                return ours
            rest = our_path(below, ".".join(parts[cut:]))
            if rest is not None:
                return f"{ours}.{rest}"
    return None


@contextmanager
def recording(modules: Mapping[str, nnx.Module]) -> Iterator[dict[str, Any]]:
    """What the named modules return while this is open, by name."""
    names = {id(module): name for name, module in modules.items()}
    records: dict[str, Any] = {}

    def recorded(original: Callable) -> Callable:
        def call(self, *args, **kwargs):
            result = original(self, *args, **kwargs)
            if id(self) in names:
                records[names[id(self)]] = result
            return result

        return call

    with ExitStack() as stack:
        for kind in {type(module) for module in modules.values()}:
            stack.enter_context(mock.patch.object(kind, "__call__", recorded(kind.__call__)))
        yield records


@partial(jax.jit, static_argnames=("method", "paths"))
def _call(model, args, kwargs, *, method: str, paths: tuple[str, ...]):
    with recording({path: module_at(model, path) for path in paths}) as records:
        return getattr(model, method)(*args, **kwargs), dict(records)


def call(model: nnx.Module, *args, method: str = "__call__", **kwargs) -> Any:
    """A jitted call of a model or of one of its methods; programs are shared between equal shapes."""
    return _call(model, args, kwargs, method=method, paths=())[0]


def call_recorded(model: nnx.Module, paths: tuple[str, ...], *args, method: str = "__call__", **kwargs):
    """The same, and what the modules at `paths` returned on the way. Layers under scan cannot be looked into."""
    return _call(model, args, kwargs, method=method, paths=tuple(sorted(set(paths))))
