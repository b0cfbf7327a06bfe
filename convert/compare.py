"""How close a checkpoint comes to the unquantised one that it was made from: tensor by tensor, by published names."""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from math import sqrt
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from convert.arrays import moved
from convert.files import TEXT_PREFIXES, ConvertError, Source, open_source
from convert.inventory import PREFIX
from convert.journal import read_inventory
from convert.mapping import Rule, flatten
from convert.parts import ArrayTensor, PackedLinear
from convert.progress import progress_bar
from convert.tables import MAIN, table_of
from convert.tasks import UNPACKED
from hlwq_jax import LazyTensor, dequantize_planes
from ltx_jax.checkpoint import Manifest, part_of
from ltx_jax.load import load_configs

FAR = 0.9  # a cosine below this is no rounding at 2 bits or more, which is 0.94 on Gaussian weights
_LAYER = re.compile(r"(?:^|(?<=\.))(?:transformer_blocks|transformer_1d_blocks|layers)\.(\d+)\.")
_LISTED, _WIDTH = 20, 120


@dataclass(frozen=True, kw_only=True)
class Distance:
    """How far a stored tensor is from the original."""

    name: str  # as published
    component: str
    bits: int | None  # None: stored unpacked
    relative_error: float  # root mean square
    relative_squared_error: float
    cosine: float
    largest: float  # absolute error of a value

    @property
    def layer(self) -> int | None:
        found = _LAYER.search(self.name)
        return int(found[1]) if found else None

    @property
    def kind(self) -> str:
        """The name without the number of its layer, and what goes before it."""
        prefix = next((prefix for prefix in (PREFIX, *TEXT_PREFIXES) if self.name.startswith(prefix)), "")
        return _LAYER.sub("*.", self.name.removeprefix(prefix)).removesuffix(".weight")


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A checkpoint beside the one that it was made from."""

    checkpoint: str
    against: str
    versions: tuple[str | None, str | None]
    linears: tuple[Distance, ...]  # all that was quantised, the worst first
    num_equal: int  # plain tensors
    num_rounded: int  # plain tensors that are the original's, rounded to another dtype
    different: tuple[Distance, ...]  # plain tensors that are not
    wrong_shape: tuple[str, ...]
    not_compared: tuple[str, ...]  # that the other checkpoint lacks

    @property
    def far(self) -> tuple[Distance, ...]:
        """Linears as far off as another model's weights would be."""
        return tuple(linear for linear in self.linears if not linear.cosine >= FAR)

    @property
    def ok(self) -> bool:
        """Whether all that was never quantised is the same, and no linear is far off."""
        return not (self.different or self.wrong_shape or self.far)


def compare(
    checkpoint: str | Path, against: str | Path, *, gemma: str | Path | None = None, progress: bool = False
) -> Comparison:
    """Decodes a checkpoint slice by slice and holds it against an unquantised one.

    Raises ConvertError where that one is quantised too, or holds nothing that the checkpoint was made from.
    """
    folder = Path(checkpoint)
    manifest, known = Manifest.read(folder), read_inventory(folder)["tensors"]
    source = open_source(Path(against), gemma=None if gemma is None else Path(gemma))
    if any(tensor.dtype in (np.uint8, np.int8) for tensor in source.tensors.values()):
        raise ConvertError(f"{against} is quantised itself; give the official checkpoint")
    components = {name: facts["to"].partition("/")[0] for name, facts in known.items() if facts["to"] is not None}
    originals = {name: _original(source, name, component) for name, component in components.items()}
    met = {name: tensor for name, tensor in originals.items() if tensor is not None}
    if not met:
        raise ConvertError(f"{against} holds nothing that {folder} was made from; give the checkpoint that it was")
    stored = _Stored(folder, manifest)
    linears, different, wrong_shape = [], [], []
    num_equal = num_rounded = 0
    with progress_bar("compare", sum(tensor.nbytes for tensor in met.values()), shown=progress) as advance:
        for name, original in met.items():
            component = components[name]
            found = stored.find(component, _below_prefix(name, component))
            if found.shape != original.shape:
                wrong_shape.append(f"{name} is {list(found.shape)}, the original {list(original.shape)}")
            elif found.packed is not None or known[name]["rule"] == UNPACKED:
                linears.append(_distance(found, original, name, component))
            elif _same(found, original):
                num_equal += found.dtype == original.dtype
                num_rounded += found.dtype != original.dtype
            else:
                different.append(_distance(found, original, name, component))
            advance(component, original.nbytes)
    return Comparison(
        checkpoint=str(folder),
        against=str(against),
        versions=(manifest.model_version, source.model_version),
        linears=tuple(sorted(linears, key=lambda linear: -linear.relative_error)),
        num_equal=num_equal,
        num_rounded=num_rounded,
        different=tuple(sorted(different, key=lambda tensor: -tensor.relative_error)),
        wrong_shape=tuple(wrong_shape),
        not_compared=tuple(sorted(components.keys() - met.keys())),
    )


def _original(source: Source, name: str, component: str) -> LazyTensor | None:
    """The tensor of a published name in the other checkpoint, where prefixes may be others."""
    if component == "gemma":
        return None if source.gemma is None else source.gemma.tensors.get(_below_prefix(name, component))
    if component not in MAIN:
        upscaler = source.upscalers.get(component)
        return None if upscaler is None else upscaler.tensors.get(_below_prefix(name, component))
    spellings = (name.removeprefix(prefix) for prefix in ("", "model.", PREFIX))
    return next((source.tensors[spelling] for spelling in spellings if spelling in source.tensors), None)


def _below_prefix(name: str, component: str) -> str:
    """A published name as the table of its component has it."""
    prefixes = (MAIN[component][0],) if component in MAIN else (f"{component}:", *TEXT_PREFIXES)
    return name.removeprefix(next((prefix for prefix in prefixes if name.startswith(prefix)), ""))


@dataclass(frozen=True, kw_only=True)
class _Found:
    """A stored tensor in its published shape: packed, or in pieces along its first axis."""

    shape: tuple[int, ...]
    dtype: np.dtype
    packed: PackedLinear | None = None
    pieces: Callable[[], Iterable[np.ndarray]] = tuple


class _Stored:
    """The tensors of a checkpoint folder, by published name."""

    def __init__(self, folder: Path, manifest: Manifest):
        self.folder, self.manifest = folder, manifest
        self.upscalers = load_configs(manifest).upscalers
        self.rules: dict[str, list[Rule]] = {}

    def find(self, component: str, name: str) -> _Found:
        if component not in self.rules:
            self.rules[component] = list(flatten(table_of(component, self.upscalers)[1]))
        rule = next((rule for rule in self.rules[component] if rule.match(name)), None)
        if rule is None:
            raise ConvertError(f"no table of {component} has {name}: another version converted it; convert again")
        target = rule.match(name) or ""
        path, part = target.removesuffix(".kernel"), self.folder / component / part_of(component, target)
        shape = self.manifest.quantized.get(component, {}).get(path)
        if shape is not None:
            linear = PackedLinear(path, part, shape)
            return _Found(
                shape=(shape.out_features, shape.in_features), dtype=np.dtype(ml_dtypes.bfloat16), packed=linear
            )
        array = ArrayTensor(target, part)
        left, right = rule.pattern.split("->")
        back = f"{right.strip()} -> {left.strip()}"
        published = moved(array, back)
        return _Found(shape=published.shape, dtype=published.dtype, pieces=lambda: moved(array, back).pieces)


def _same(found: _Found, original: LazyTensor) -> bool:
    """Whether a plain tensor is the original, rounded to its dtype."""
    return all(
        piece.tobytes() == reference.astype(piece.dtype).tobytes() for piece, reference in _pairs(found, original)
    )


def _pairs(found: _Found, original: LazyTensor) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    start = 0
    for piece in found.pieces():
        flat = piece.reshape(-1)
        yield flat, original.read_flat(start, start + flat.size)
        start += flat.size


def _distance(found: _Found, original: LazyTensor, name: str, component: str) -> Distance:
    linear, total, largest = found.packed, np.zeros(4), 0.0
    if linear is None:
        parts = (_row_sums(piece[None], reference[None]) for piece, reference in _pairs(found, original))
    else:
        parts = (_packed_sums(linear, rows, original.read_rows(rows.start, rows.stop)) for rows in linear.slices())
    for sums, highest in parts:
        total += np.asarray(sums, np.float64).sum(axis=1)
        largest = max(largest, float(highest))
    error, ours, theirs, product = total
    squared = error / theirs if theirs else (0.0 if not error else float("inf"))
    lengths = sqrt(ours * theirs)
    return Distance(
        name=name,
        component=component,
        bits=None if linear is None else linear.shape.bits,
        relative_error=sqrt(squared),
        relative_squared_error=squared,
        cosine=product / lengths if lengths else float(ours == theirs),
        largest=largest,
    )


def _packed_sums(linear: PackedLinear, rows: slice, original: np.ndarray):
    shape = linear.shape
    return _sums_of_planes(
        *linear.planes(rows),
        linear.scaled_centroids,
        linear.signs,
        original,
        code=(shape.bits, shape.block_size, shape.history_bits),
    )


def _row_sums(decoded, original):
    """Of each row: squares of the error, of the decoded and of the original values, and their products; and the
    largest error of all."""
    decoded, original = (jnp.asarray(x).astype(jnp.float32) for x in (decoded, original))
    error = decoded - original
    products = (error * error, decoded * decoded, original * original, decoded * original)
    return jnp.stack([x.sum(axis=1) for x in products]), jnp.abs(error).max(initial=0.0)


def _decode_and_sum(lo, hi, norms, scaled_centroids, signs, original, *, code: tuple[int, int, int]):
    bits, block_size, history_bits = code
    weight = dequantize_planes(
        lo,
        hi,
        norms,
        scaled_centroids,
        bits=bits,
        block_size=block_size,
        history_bits=history_bits,
        signs=signs,
    )
    return _row_sums(weight[:, : original.shape[1]], original)


_sums_of_planes = jax.jit(_decode_and_sum, static_argnames=("code",))


# -------------------------------------------------------------------- telling


def to_json(comparison: Comparison) -> dict[str, Any]:
    """Everything, as plain values."""
    return {"ok": comparison.ok, **asdict(comparison)}


def print_comparison(comparison: Comparison, *, every: bool = False) -> None:
    """The comparison for people: a table of groups, or of every linear, the worst first."""
    console = Console()
    console.width = max(console.width, _WIDTH)
    console.print(_table_of_all(comparison.linears) if every else _table_of_groups(comparison.linears))
    lines = [f"plain tensors  {comparison.num_equal} equal, {comparison.num_rounded} equal when rounded to their dtype"]
    lines += [
        f"DIFFERENT      {tensor.name}: relative error {tensor.relative_error:.3g}, cosine {tensor.cosine:.5f}"
        for tensor in comparison.different[:_LISTED]
    ]
    lines += [f"WRONG SHAPE    {text}" for text in comparison.wrong_shape[:_LISTED]]
    lines += [f"FAR OFF        {linear.name}: cosine {linear.cosine:.4f}" for linear in comparison.far[:_LISTED]]
    hidden = sum(max(len(x) - _LISTED, 0) for x in (comparison.different, comparison.wrong_shape, comparison.far))
    if hidden:
        lines.append(f"               and {hidden} more: --json lists all")
    if comparison.not_compared:
        some = ", ".join(comparison.not_compared[:3])
        lines.append(f"not compared   {len(comparison.not_compared)} tensors that {comparison.against} lacks: {some}")
    ours, theirs = comparison.versions
    if ours != theirs and ours and theirs:
        lines.append(f"versions       {ours}, the original {theirs}")
    if not comparison.ok:
        lines.append(f"{comparison.checkpoint} was not made from {comparison.against}, or is damaged")
    console.print("\n".join(lines), highlight=False, soft_wrap=True, markup=False)


def _grouped(linears: Sequence[Distance]) -> list[list[Distance]]:
    """Linears of one kind and width, the worst of each first; the group with the worst one first."""
    groups: dict[tuple[str, str, int | None], list[Distance]] = defaultdict(list)
    for linear in linears:
        groups[linear.component, linear.kind, linear.bits].append(linear)
    return list(groups.values())


def _table_of_groups(linears: Sequence[Distance]) -> Table:
    table = _empty_table(
        "kind, the worst first", "linears", "bits", "error", "worst", "at", "squared", "cosine", "largest"
    )
    for group in _grouped(linears):
        worst = group[0]
        table.add_row(
            f"{worst.component} {worst.kind}",
            str(len(group)),
            _bits(worst),
            f"{median(linear.relative_error for linear in group):.5f}",
            f"{worst.relative_error:.5f}",
            "" if worst.layer is None else str(worst.layer),
            f"{worst.relative_squared_error:.6f}",
            f"{min(linear.cosine for linear in group):.6f}",
            f"{max(linear.largest for linear in group):.3g}",
        )
    return table


def _table_of_all(linears: Sequence[Distance]) -> Table:
    table = _empty_table("linear, the worst first", "bits", "error", "squared", "cosine", "largest")
    for linear in linears:
        table.add_row(
            f"{linear.component} {linear.name.removeprefix(PREFIX)}",
            _bits(linear),
            f"{linear.relative_error:.5f}",
            f"{linear.relative_squared_error:.6f}",
            f"{linear.cosine:.6f}",
            f"{linear.largest:.3g}",
        )
    return table


def _empty_table(first: str, *numbers: str) -> Table:
    table = Table(box=SIMPLE_HEAD)
    table.add_column(first, overflow="fold")
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _bits(linear: Distance) -> str:
    return "unpacked" if linear.bits is None else str(linear.bits)


def plot(comparison: Comparison, path: Path) -> None:
    """Draws the relative error of every linear by layer, a line a kind and a picture a component, as PNG.

    Raises ConvertError where matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports]  # optional
    except ImportError as error:
        raise ConvertError("--plot needs matplotlib: pip install matplotlib") from error
    components = sorted({linear.component for linear in comparison.linears})
    figure = Figure(figsize=(11, 1 + 4.5 * max(len(components), 1)), layout="constrained")
    for axes, component in zip(
        figure.subplots(max(len(components), 1), 1, squeeze=False)[:, 0], components, strict=False
    ):
        ours = [linear for linear in comparison.linears if linear.component == component]
        for number, group in enumerate(sorted(_grouped(ours), key=lambda group: group[0].kind)):
            points = sorted((linear.layer or 0, linear.relative_error) for linear in group)
            label = f"{group[0].kind} ({_bits(group[0])})"
            marker = "os^vD"[number // 10 % 5]  # after ten kinds colours come again
            axes.plot(*zip(*points, strict=True), marker=marker, markersize=4, linewidth=1, label=label)
        axes.set(title=component, xlabel="layer", ylabel="relative error", yscale="log")
        axes.legend(fontsize="x-small", loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, format="png", dpi=120)
