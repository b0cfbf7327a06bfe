"""A package of HLWQ weights in any published layout: what it holds, how it was written, and its decoded weights.

Opening reads headers, sidecar, small vectors and a sample of blocks of every weight; the rest is read weight by weight.
Nothing is decoded on a guess: widths, packing and table come from shapes, stored tables and the energy of the codes,
and a weight that contradicts them raises `FormatError` with its name and the evidence.
"""

from collections.abc import Container, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from hlwq_jax.codebook import TABLES, TableName, lloyd_max
from hlwq_jax.energy import ENOUGH_BLOCKS, Measurement, clear_winner, measure, measure_tables, plausible
from hlwq_jax.format import Parts, gather
from hlwq_jax.geometry import BitOrder, Sidecar, describe
from hlwq_jax.names import PREFIXES, resolve_stems
from hlwq_jax.stored import StoredWeight
from hlwq_jax.tensors import PICKLES, FormatError, LazyTensor, TensorFile, read_json

SIDECARS = ("polar_config.json", "hlwq_config.json")


@dataclass(frozen=True, kw_only=True)
class Package:
    """The quantized weights of a package by name, and everything that lies beside them."""

    layout: str  # "V1" to "V7", or several joined by "+"
    weights: dict[str, StoredWeight]
    plain: dict[str, LazyTensor]
    unknown_stems: tuple[str, ...]  # quantized, but not in the model
    missing: tuple[str, ...]  # model parameters found neither as codes nor plain
    warnings: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        return sum(weight.nbytes for weight in self.weights.values())


def open_folder(
    folder: Path | str,
    *,
    model_shapes: Mapping[str, tuple[int, ...]] | None = None,
    table: TableName | None = None,
    bit_order: BitOrder | None = None,
) -> Package:
    """Reads the package made up of all safetensors files in a folder and below it, and its sidecar if there is one."""
    tensors, warnings = find_tensors(folder)
    package = read_package(
        tensors, sidecar=find_sidecar(folder), model_shapes=model_shapes, table=table, bit_order=bit_order
    )
    return replace(package, warnings=(*warnings, *package.warnings))


def find_tensors(folder: Path | str) -> tuple[dict[str, LazyTensor], tuple[str, ...]]:
    """The union of all safetensors files in a folder and below it, and warnings.

    A name that two files share is left out with a warning (two models beside each other may do that), unless it is part
    of a quantized weight: that raises. So does a shard that an index lists and that is not there.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder} is not a folder")
    check_indexes(folder)
    paths = sorted(folder.rglob("*.safetensors"))
    if not paths:
        others = [path.name for path in find_pickles(folder)][:3]
        hint = f"; {', '.join(others)} are torch pickles (torchao?), not HLWQ, and not opened" if others else ""
        raise FormatError(f"{folder}: no .safetensors files in it or below it{hint}")
    owners: dict[str, list[LazyTensor]] = {}
    for path in paths:
        for name, tensor in TensorFile(path).items():
            owners.setdefault(name, []).append(tensor)
    shared = {name: where for name, where in owners.items() if len(where) > 1}
    for name, where in shared.items():
        if name.endswith(("__packed", "__codes", "__norms", "__meta", ".codes", ".codes_packed", ".norms")):
            raise FormatError(
                f"{name} is in {where[0].path} and in {where[1].path}: a package may hold a weight only once"
            )
    warnings = ()
    if shared:
        name, where = next(iter(shared.items()))
        warnings = (
            f"{len(shared)} plain tensors are in more than one file and left out, such as {name} in "
            f"{' and '.join(str(tensor.path) for tensor in where)}: open those files by themselves",
        )
    return {name: where[0] for name, where in owners.items() if len(where) == 1}, warnings


def find_pickles(folder: Path) -> list[Path]:
    """Files in or below a folder that are pickles by their names: they can run any program, so none is ever opened."""
    return sorted(path for path in folder.rglob("*") if path.suffix in PICKLES and path.is_file())


def check_indexes(folder: Path, elsewhere: Container[Path] = ()) -> None:
    """Raises `FormatError` for shards that an index in or below a folder lists and that are neither there nor among
    those `elsewhere`."""
    for path in sorted(folder.rglob("*.safetensors.index.json")):
        weight_map = read_json(path).get("weight_map")
        if not isinstance(weight_map, dict):
            raise FormatError(f"{path}: expected a weight_map from tensor to file")
        for tensor, shard in weight_map.items():
            if not isinstance(shard, str) or not _stays_below(shard):
                raise FormatError(f"{path}: {tensor!a} is said to be in {shard!a}; expected a file below the index")
        missing = [
            name
            for name in sorted(set(weight_map.values()))
            if not (path.parent / name).is_file() and path.parent / name not in elsewhere
        ]
        if missing:
            listed = ", ".join(missing[:8]) + (f" and {len(missing) - 8} more" if len(missing) > 8 else "")
            raise FormatError(f"{path} lists {listed}, which is not there: download what is missing")


def _stays_below(name: str) -> bool:
    """Whether a name is that of a file in a folder or below it, on every system."""
    parts = name.split("/")
    return name.isprintable() and not {"", ".", ".."} & set(parts) and not set(name) & set("\\:") and len(name) < 1000


def find_sidecar(folder: Path | str) -> dict[str, Any] | None:
    """The parsed `polar_config.json` or `hlwq_config.json` of a folder, or below it; None without one.

    Raises `FormatError`, with its path, for one that says what cannot be.
    """
    for name in SIDECARS:
        paths = sorted(Path(folder).rglob(name), key=lambda path: (len(path.parts), path))
        if paths:
            content = read_json(paths[0])
            Sidecar.parse(content, where=str(paths[0]))
            return content
    return None


def read_package(
    tensors: Mapping[str, LazyTensor],
    *,
    sidecar: Mapping[str, Any] | None = None,
    model_shapes: Mapping[str, tuple[int, ...]] | None = None,
    table: TableName | None = None,
    bit_order: BitOrder | None = None,
    max_sampled: int | None = None,
) -> Package:
    """Detects the layout and describes every quantized weight of a package.

    `model_shapes` (parameter name to `[out, in]`) resolves stems to names and fills in sizes that the package lacks;
    without it weights keep their stems. `table` overrides the table where none is stored, `bit_order` the order in
    dense streams (that of 1- and 2-bit streams cannot be told from the codes). Codes are sampled of every weight, or of
    `max_sampled` of each kind, spread over the model; the others are taken to be alike and have no `energy`. Raises
    `FormatError` for anything that does not fit.
    """
    if table is not None and table not in TABLES:
        raise ValueError(f"table must be one of {', '.join(TABLES)}, got {table!r}")
    parts, plain = gather(tensors)
    facts = Sidecar.parse(sidecar)
    names = {part.stem: part.stem for part in parts}
    unknown: tuple[str, ...] = ()
    if model_shapes is not None:
        try:
            resolved = resolve_stems(names, model_shapes)
        except FormatError as error:
            files = sorted({str(part.codes.path) for part in parts})
            raise FormatError(f"{error} ({', '.join(files)})") from error
        names, unknown = dict(resolved.names), resolved.unknown
    warnings: list[str] = []
    weights = []
    sampled = _spread(parts, max_sampled)
    first: dict[Hashable, StoredWeight] = {}  # of each kind; it is always sampled
    for part in parts:
        name = names[part.stem]
        alike = None if part.stem in sampled else first[_kind(part)]
        shape = None if model_shapes is None or part.stem in unknown else tuple(model_shapes[name])
        weight = describe(
            part,
            name=name,
            sidecar=facts,
            model_shape=shape,
            bit_order=bit_order,
            warn=warnings.append,
            alike=alike,
        )
        weights.append(weight)
        first.setdefault(_kind(part), weight)
        if name in plain:
            raise FormatError(f"{name} is there both as codes ({part.codes.where}) and plain ({plain[name].where})")
    _refuse_lost_tables(weights)
    weights = _decide_tables(weights, sampled, table or facts.table, warnings)
    for weight in weights:
        if weight.energy is not None and not plausible(weight.energy, weight.centroids, weight.block_size):
            raise FormatError(weight.evidence(weight.energy))
    if unknown:
        warnings.append(f"{len(unknown)} quantized weights are not in the model, such as {unknown[0]}")
    return Package(
        layout="+".join(sorted({weight.layout for weight in weights})),
        weights={weight.name: weight for weight in weights},
        plain=plain,
        unknown_stems=unknown,
        missing=_missing(model_shapes or (), {weight.name for weight in weights}, plain),
        warnings=tuple(warnings),
    )


def _kind(parts: Parts) -> Hashable:
    """What weights that were packed alike have in common, before anything of them is read."""
    table = None if parts.table is None else parts.table.size
    return parts.layout, parts.codes.dtype, len(parts.codes.shape), parts.codes.size / max(parts.norms.size, 1), table


def _spread(parts: Sequence[Parts], count: int | None) -> set[str]:
    """The stems of at most `count` weights of each kind, the first one among them; of all without a count."""
    kinds: dict[Hashable, list[str]] = {}
    for part in parts:
        kinds.setdefault(_kind(part), []).append(part.stem)
    return {stem for stems in kinds.values() for stem in stems[:: -(-len(stems) // (count or len(stems)))]}


def _refuse_lost_tables(weights: Iterable[StoredWeight]) -> None:
    """A layout stores its tables or does not: a weight that lacks one among others that have theirs has lost it."""
    stored = {weight.layout: weight.name for weight in weights if weight.table == "stored"}
    for weight in weights:
        if weight.table != "stored" and weight.layout in stored:
            raise FormatError(
                f"{weight.name}: its levels (ct or ct_scaled) are missing, {stored[weight.layout]} has some "
                f"({weight.code_tensor.where})"
            )


def _missing(model_names: Iterable[str], quantized: set[str], plain: Mapping[str, LazyTensor]) -> tuple[str, ...]:
    spellings = {spelling for name in plain for spelling in (name, *(name.removeprefix(p) for p in PREFIXES))}
    return tuple(
        name
        for name in model_names
        if name not in quantized
        and name not in spellings
        and not any(name.removeprefix(p) in spellings for p in PREFIXES)
    )


def _decide_tables(
    weights: list[StoredWeight], sampled: set[str], told: TableName | None, warnings: list[str]
) -> list[StoredWeight]:
    """Gives every weight its table: stored, else as told, else by energy, one for all weights of a width.

    Where a width has too few blocks to decide, or tables hardly differ (A and B at 2, 3, 7 and 8 bits), the package's
    best decision at another width holds, as one packer wrote them all, and else the layout's default.
    """
    samples = {weight.name: weight.sample() for weight in weights if weight.stem in sampled}
    groups: dict[tuple[int, int], list[StoredWeight]] = {}
    for weight in weights:
        if weight.table != "stored":
            groups.setdefault((weight.bits, weight.block_size), []).append(weight)
    clear: dict[tuple[int, int], tuple[TableName, Measurement]] = {}
    for key, group in groups.items():
        found = [samples[weight.name] for weight in group if weight.name in samples]
        if told is None and any(map(len, found)):
            measured = measure_tables(np.concatenate(found), key[0])
            winner = clear_winner(measured)
            if winner is not None:
                clear[key] = winner, measured[winner]
                if measured[winner].num_blocks < ENOUGH_BLOCKS:
                    warnings.append(
                        f"{key[0]}-bit weights: table {winner} was decided from few blocks: {measured[winner]}"
                    )
    best = max(clear, key=lambda key: clear[key][1].num_blocks, default=None)
    result = []
    for weight in weights:
        key = (weight.bits, weight.block_size)
        if weight.table != "stored":
            # The V5 writer most likely used B; the readers of all other layouts use A.
            table, reason = ("B" if weight.layout == "V5" else "A"), "default"
            if told is not None:
                table, reason = told, "as told"
            elif key in clear:
                table, reason = clear[key][0], str(clear[key][1])
            elif best is not None:
                table, reason = clear[best][0], f"as the {best[0]}-bit weights of the package"
            levels = lloyd_max(weight.bits, table)
            if weight.layout == "V7" and weight.bits in (2, 3):
                levels = levels.round(4)  # that code kept these two tables as decimals
            weight = replace(weight, table=table, table_reason=reason, centroids=levels)
        if weight.name in samples:
            weight = replace(weight, energy=measure(samples[weight.name], weight.centroids))
        result.append(weight)
    guessed = sorted({weight.bits for weight in result if weight.table_reason == "default"})
    if guessed:
        warnings.append(f"the codes do not tell the table of weights at {guessed} bits: using the layout's default")
    _warn_of_saturation(result, warnings)
    return result


def _warn_of_saturation(weights: list[StoredWeight], warnings: list[str]) -> None:
    energies = {weight.name: weight.energy for weight in weights if weight.energy is not None}
    saturated = sum(energy.num_saturated for energy in energies.values())
    total = saturated + sum(energy.num_blocks for energy in energies.values())
    if saturated > 0.01 * total:
        worst = max(energies, key=lambda name: energies[name].num_saturated)
        warnings.append(
            f"{saturated} of {total} sampled blocks were nearly constant before quantization and decode badly, most of "
            f"them in {worst}"
        )
