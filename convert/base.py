"""What an incomplete package lacks, taken from the official checkpoint that it was made from.

That it is that one, and not another version of the model, is held against everything that both have: configurations,
shapes, the beginning of every plain tensor, and a few packed weights.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from convert.files import ConvertError, Source
from convert.quantizing import GROUPS
from hlwq_jax import TABLES, LazyTensor, Recipe, StoredWeight, TableName, dequantize, lloyd_max
from ltx_jax.checkpoint import Configs

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
_VALUES = 4096  # of a plain tensor that are compared
_WEIGHTS, _ROWS = 16, 8  # that are decoded to compare
_FACTOR = 2.0  # packed weights of the base itself have 1 time the error of rounding; clipped blocks add little
_LISTED = 8


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """A tensor that a model needs and a package lacks."""

    component: str
    path: str  # our parameter
    shape: tuple[int, ...]  # as published
    linear: bool


def refuse_packed(base: Source) -> None:
    """Raises ConvertError for a base that is packed itself."""
    if any(tensor.dtype in (np.uint8, np.int8) for tensor in base.tensors.values()):
        raise ConvertError(f"{base.path} is packed itself; --base wants the official checkpoint, unquantised")


def check_configs(ours: Configs, base: Configs, path: Path) -> None:
    """Raises ConvertError where the models of a base have other settings."""
    lines = []
    for component in ("transformer", "connectors", "video_vae", "audio_vae", "vocoder"):
        theirs = dict(_flat(asdict(base.of(component))))
        lines += [
            f"  {component}: {name} is {value}, in the base {theirs.get(name)}"
            for name, value in _flat(asdict(ours.of(component)))
            if theirs.get(name) != value
        ]
    if lines:
        raise ConvertError(
            "\n".join([f"{path} is of another model, its configuration differs:", *lines[:_LISTED]])
            + "\ngive the checkpoint that the package was made from"
        )


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def fill(
    wanted: Mapping[str, Wanted],
    base: Mapping[str, LazyTensor],
    plain: Mapping[str, LazyTensor],
    weights: Mapping[str, StoredWeight],
    *,
    path: Path,
) -> dict[str, Recipe | None]:
    """What a package lacks and its base has, each with the recipe to pack it by: the package's own, or None.

    All by published name. Raises ConvertError where the base is not what the package was made from.
    """
    misshaped = [
        f"  {name} is {list(base[name].shape)}, expected {list(lacking.shape)}"
        for name, lacking in wanted.items()
        if name in base and base[name].shape != lacking.shape
    ]
    if misshaped:
        raise ConvertError("\n".join([f"{path} is of another model:", *misshaped[:_LISTED]]))
    _check_version(base, plain, weights, path)
    recipes = _Recipes(plain, weights)
    return {name: recipes.of(name, lacking) for name, lacking in wanted.items() if name in base}


def _check_version(
    base: Mapping[str, LazyTensor], plain: Mapping[str, LazyTensor], weights: Mapping[str, StoredWeight], path: Path
) -> None:
    """Raises ConvertError where what both have is not the same."""
    common = [name for name in plain if name in base]
    different = [name for name in common if not _begin_alike(plain[name], base[name])]
    ratios = {name: _error_ratio(weights[name], base[name]) for name in _some(weights, base)}
    off = [name for name, ratio in ratios.items() if not ratio <= _FACTOR]
    evidence = []
    if different:
        evidence.append(f"{len(different)} of the {len(common)} tensors that both have differ, such as {different[0]}")
    if ratios and not median(ratios.values()) <= _FACTOR:
        evidence.append(
            f"{len(off)} of {len(ratios)} packed weights are further from it than by their rounding, such as {off[0]} "
            f"with {ratios[off[0]]:.3g} times the squared error"
        )
    if evidence:
        raise ConvertError(
            f"{path} is not what the package was made from (dev and distilled are different checkpoints, and so are "
            f"versions): {'; '.join(evidence)}. Give the one that it was made from"
        )
    if not common and not ratios:
        raise ConvertError(
            f"{path} and the package have no tensor in common, so nothing shows that they belong together"
        )


def _begin_alike(ours: LazyTensor, theirs: LazyTensor) -> bool:
    if ours.shape != theirs.shape:
        return False
    count = min(_VALUES, ours.size)
    return ours.read_flat(0, count).tobytes() == theirs.read_flat(0, count).astype(ours.dtype).tobytes()


def _some(weights: Mapping[str, StoredWeight], base: Mapping[str, LazyTensor]) -> list[str]:
    """Names of packed weights all over the model that the base has too, and that are read in rows."""
    names = [
        name
        for name, weight in weights.items()
        if name in base and not weight.flattened and (weight.out_features, weight.in_features) == base[name].shape
    ]
    return names[:: max(-(-len(names) // _WEIGHTS), 1)]


def _error_ratio(weight: StoredWeight, original: LazyTensor) -> float:
    """The squared error of some rows of a packed weight, in those that rounding Gaussian values to its levels makes."""
    rows = min(_ROWS, original.shape[0])
    decoded = dequantize(
        weight.codes()[:rows],
        weight.norms()[:rows],
        weight.centroids,
        block_size=weight.block_size,
        in_features=weight.in_features,
    ).astype(np.float64)
    reference = original.read_rows(0, rows).astype(np.float64)
    scale = float(np.square(reference).sum())
    error = float(np.square(decoded - reference).sum())
    return error / scale / _rounding_error(weight.centroids) if scale else float(error > 0)


def _rounding_error(centroids: np.ndarray) -> float:
    """The mean squared error of standard normal values rounded to levels."""
    values = np.linspace(-7, 7, 14001)
    density = np.exp(-(values**2) / 2)
    nearest = centroids[np.searchsorted((centroids[:-1] + centroids[1:]) / 2, values)]
    return float((density * (values - nearest) ** 2).sum() / density.sum())


class _Recipes:
    """How a package packs: weights of a kind alike, and the linears of blocks even where it has none of that kind."""

    def __init__(self, plain: Mapping[str, LazyTensor], weights: Mapping[str, StoredWeight]):
        self.plain = {_kind(name) for name in plain}
        self.packed: dict[str, Counter[Recipe]] = {}
        for name, weight in weights.items():
            if weight.bits >= 2:
                recipe = Recipe(bits=weight.bits, block_size=weight.block_size, table=_table(weight))
                self.packed.setdefault(_kind(name), Counter())[recipe] += 1
        self.all = sum(self.packed.values(), Counter())

    def of(self, name: str, wanted: Wanted) -> Recipe | None:
        owner, paths = GROUPS["blocks"]
        path = wanted.path.removesuffix(".kernel")
        in_block = wanted.component == owner and paths.fullmatch(path) is not None
        seen = self.packed.get(_kind(name))
        if seen is None and in_block and _kind(name) not in self.plain:
            seen = self.all
        if not seen or not wanted.linear:
            return None
        return seen.most_common(1)[0][0]


def _table(weight: StoredWeight) -> TableName:
    """The table of a weight; A for stored levels that are of none."""

    for table in TABLES:
        stored = weight.table == "stored" and np.allclose(lloyd_max(weight.bits, table), weight.centroids, rtol=1e-5)
        if stored or weight.table == table:
            return table
    return "A"


def _kind(name: str) -> str:
    """A name without the numbers of its layers."""
    return _NUMBER.sub("*", name)
