"""What the benchmarks share: cases measured in turn, random weights, peers that may be missing, a table, JSON out."""

import importlib
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from convert.mapping import Rule, Table, flatten
from ltx_jax.abstract import abstract

# What decides how fast a CPU multiplies in each dtype.
_INSTRUCTIONS = "avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16"


class Seconds(NamedTuple):
    """Of the rounds of one case. The best is what a busy machine disturbs least."""

    median: float
    best: float


def interleaved(cases: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, Seconds]:
    """Seconds of each case, after one call of each that compiles.

    The cases run in turn, round after round, so that a slow moment of the machine hits them alike.
    """
    for case in cases.values():
        jax.block_until_ready(case())
    times: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, case in cases.items():
            start = time.perf_counter()
            jax.block_until_ready(case())
            times[name].append(time.perf_counter() - start)
    return {name: Seconds(statistics.median(values), min(values)) for name, values in times.items()}


def published_shapes(make: Callable[[nnx.Rngs], nnx.Module], table: Table) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that fills a model through its table, as published files hold it."""
    inverses = [Rule(r.target, r.source, " -> ".join(reversed(r.pattern.split(" -> ")))) for r in flatten(table)]
    _, state = nnx.split(abstract(make))
    shapes = {}
    for path, leaf in nnx.to_flat_state(state):
        for inverse in inverses:
            if (name := inverse.match(".".join(map(str, path)))) is not None:
                shape = inverse.shape(tuple(leaf.get_value().shape))
                assert shape is not None
                shapes[name] = shape
    return shapes


def draw_weights(make: Callable[[nnx.Rngs], nnx.Module], table: Table) -> dict[str, np.ndarray]:
    """Random float32 tensors by published name: weights that keep the size of what they multiply, the rest small."""
    rng = np.random.default_rng(0)
    weights = {}
    for name, shape in published_shapes(make, table).items():
        values = rng.standard_normal(shape, dtype=np.float32)
        if name.endswith("norm.weight"):
            weights[name] = 1 + np.float32(0.1) * values
        elif len(shape) > 1 and not name.endswith("table"):
            weights[name] = values * np.float32(np.prod(shape[1:]) ** -0.5)
        else:
            weights[name] = np.float32(0.1) * values
    return weights


def relative_error(value: np.ndarray, reference: np.ndarray) -> float:
    return float(np.linalg.norm(value - reference) / np.linalg.norm(reference))


@dataclass
class Peers:
    """Packages to compare with: those that can be imported, and those that are missing."""

    missing: list[str] = field(default_factory=list)

    def load(self, *names: str) -> list[Any] | None:
        """The modules, or None (and a note) where one of them is not installed."""
        try:
            return [importlib.import_module(name) for name in names]
        except ImportError as error:
            self.missing.append(f"{names[-1].split('.')[0]} ({error})")
            return None

    def say(self) -> None:
        for note in self.missing:
            print(f"not compared, missing: {note}")


def show(title: str, seconds: Mapping[str, Seconds], *, against: str | None = None) -> None:
    """Prints one table: seconds, and how many times those of the case `against` (the first) each one takes."""
    against = next(iter(seconds)) if against is None else against
    print(f"{title}\n  {'seconds':44}{'median':>10}{'best':>10}  times {against!r}: median, best")
    for name, (median, best) in seconds.items():
        ratios = f"{median / seconds[against].median:10.2f}{best / seconds[against].best:8.2f}"
        print(f"  {name:44}{median:10.4f}{best:10.4f}{ratios}", flush=True)


def as_json(seconds: Mapping[str, Seconds]) -> dict[str, dict[str, float]]:
    return {name: value._asdict() for name, value in seconds.items()}


def machine(packages: Sequence[str] = ()) -> dict[str, Any]:
    """What the figures depend on: the device, the CPU's instructions, versions."""
    info: dict[str, Any] = {"device": jax.devices()[0].device_kind, "cores": os.cpu_count(), "jax": jax.__version__}
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = dict(line.split(":", 1) for line in cpuinfo.read_text().split("\n\n")[0].splitlines() if ":" in line)
        fields = {key.strip(): value.strip() for key, value in lines.items()}
        flags = fields.get("flags", "").split()
        info["cpu"] = fields.get("model name", platform.machine())
        info["instructions"] = [name for name in _INSTRUCTIONS if name in flags]
    for package in packages:
        try:
            info[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            info[package] = None
    return info


def write_json(path: Path | None, report: Mapping[str, Any]) -> None:
    if path is not None:
        path.write_text(json.dumps(report, indent=2) + "\n")
        print(f"wrote {path}")
