"""Streams a planned source into a checkpoint folder, one part of one model at a time, the manifest last."""

import hashlib
import json
import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from einops import rearrange
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from convert.files import ConvertError, Source, open_source
from convert.inventory import Inventory, take_inventory
from convert.mapping import Step
from convert.quantizing import BITS, BLOCK_SIZE, GROUPS, TABLE, Quantizing, packed_bytes
from convert.report import Report, make_report, size_text, to_text
from convert.tables import table_of
from hlwq_jax import LazyTensor, StoredWeight
from ltx_jax.checkpoint import MANIFEST, MODELS, TOKENIZER, Manifest, QuantizedShape, part_of
from ltx_jax.orbax_io import save
from ltx_jax.text import TextError, load_tokenizer

MARKER = ".converting.json"  # says that a folder is an unfinished conversion of ours
WORKING = ".converting"  # the unfinished conversion inside a DEST that was there before
SHOWN = 100  # problems told in full; `inspect --json` tells all
_SLICED, _SLICE_ROWS = 2**20, 256  # bytes; transposing by slices took a third of the time of the whole at once
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


def convert(
    source: str | Path,
    dest: str | Path,
    *,
    gemma: str | Path | None = None,
    upscalers: tuple[str | Path, ...] = (),
    gemma_bits: int = BITS,
    quantize: Iterable[str] = (),
    overwrite: bool = False,
    progress: bool = False,
) -> Manifest:
    """Converts published files into a checkpoint folder; returns its manifest.

    What arrives packed stays so. The text encoder's linears are packed at `gemma_bits` (2 to 8; 16 leaves them as they
    are), and those of the groups in `quantize` (connectors, projection, adaln) at 5 bits.

    Everything is planned from headers first. The folder appears under its name only when it is complete. Raises
    ConvertError, FormatError or ConfigError for a source that is short, damaged or foreign, and for a destination that
    is there already (unless `overwrite`, and only if it is a checkpoint).
    """
    quantizing = Quantizing.of(gemma_bits=gemma_bits, groups=quantize)
    dest = Path(dest).resolve()
    opened = open_source(
        Path(source), gemma=None if gemma is None else Path(gemma), upscalers=tuple(map(Path, upscalers))
    )
    inventory = take_inventory(opened)
    report = make_report(inventory)
    refuse_incomplete(report)
    text_length = _check_tokenizer(inventory)
    _check_dest(dest, overwrite=overwrite)
    written = _bytes_written(inventory, quantizing)
    _check_space(dest, written)
    console = Console(stderr=True, quiet=not progress)
    console.print(to_text(report), highlight=False, soft_wrap=True)
    for line in _quantising(inventory, quantizing):
        console.print(line, highlight=False, soft_wrap=True)
    console.print(f"writes         {dest}, {size_text(written)}", highlight=False, soft_wrap=True)

    files = _source_files(opened)
    total = opened.nbytes + sum(path.stat().st_size for path in files)  # converted, then read again for the digests
    with _working_folder(dest) as folder, _bar(console, total) as advance:
        return _write(inventory, report, quantizing, folder, text_length, files, advance)


def refuse_incomplete(report: Report) -> None:
    """Raises ConvertError, with the grouped list, for a source that lacks or doubles anything."""
    if report.complete:
        return
    lines = []
    if report.problems:
        lines += [f"{len(report.problems)} tensors do not fit:", *(f"  {text}" for text in report.problems[:SHOWN])]
        if len(report.problems) > SHOWN:
            lines.append(f"  and {len(report.problems) - SHOWN} more: `python -m convert inspect --json` lists all")
    if report.missing:
        lines += [f"{report.num_missing} tensors are missing:", *(f"  {text}" for text in report.missing)]
        total = report.num_blocks * report.linears_per_block
        covered = report.quantized_block_linears + report.plain_block_linears
        if covered < total:
            lines.append(
                f"{covered} of {total} block linears are here. At 5 bits a weight those of LTX-2.3 need 11.9 GB: a "
                "package with less cannot hold them all. Download the missing files, or use the official checkpoint"
            )
    raise ConvertError(f"{report.source} cannot be converted:\n" + "\n".join(lines))


def _check_tokenizer(inventory: Inventory) -> int | None:
    """The text length, from the tokenizer; TextError where it does not match the text encoder or the connectors."""
    gemma, config = inventory.source.gemma, inventory.expected.configs.gemma
    if gemma is None or config is None:
        return None
    length = load_tokenizer(gemma.path, vocab_size=config.vocab_size).text_length
    registers = inventory.expected.configs.connectors.video.num_registers
    if length % registers:
        raise TextError(
            f"the tokenizer in {gemma.path} cuts at {length} tokens (model_max_length), but the connectors need a "
            f"multiple of their {registers} registers; take the tokenizer that belongs to this checkpoint"
        )
    return length


# ------------------------------------------------------------------ destination


def _check_dest(dest: Path, *, overwrite: bool) -> None:
    if not dest.exists():
        return
    if not dest.is_dir():
        raise ConvertError(f"{dest} is a file; give the name of a folder to make")
    entries = {path.name for path in dest.iterdir()}
    if not entries:
        return
    if (dest / MANIFEST).is_file():
        Manifest.read(dest)  # raises if it is not ours
        if overwrite:
            return
        raise ConvertError(f"{dest} is a finished checkpoint; choose another folder, or --overwrite")
    if (dest / WORKING / MARKER).is_file() and all(name == WORKING or _is_ours(name) for name in entries):
        return  # a conversion that was killed
    raise ConvertError(f"{dest} is not empty and was not made by convert; choose another folder")


def _bytes_written(inventory: Inventory, quantizing: Quantizing) -> int:
    total = 0
    for component, step, name, stored in _steps(inventory):
        group = quantizing.group(component, step.target)
        if isinstance(stored, LazyTensor) and group is not None:
            total += packed_bytes(*stored.shape, bits=quantizing.bits[group])
        elif isinstance(stored, LazyTensor):
            total += stored.nbytes
        elif inventory.expected.targets[name].linear and _holds_as_planes(stored):
            shape = _shape(stored)
            total += packed_bytes(shape.out_features, shape.in_features, bits=shape.bits, block_size=shape.block_size)
        else:
            total += 2 * prod(inventory.expected.targets[name].shape)
    return total


def _quantising(inventory: Inventory, quantizing: Quantizing) -> Iterator[str]:
    """What will be quantised, a line a group."""
    found: dict[str, list[LazyTensor]] = defaultdict(list)
    for component, step, _, stored in _steps(inventory):
        group = quantizing.group(component, step.target)
        if group is not None and isinstance(stored, LazyTensor):
            found[group].append(stored)
    for group, bits in quantizing.bits.items():
        if GROUPS[group][0] not in inventory.plans:
            continue
        before = size_text(sum(tensor.nbytes for tensor in found[group]))
        after = size_text(sum(packed_bytes(*tensor.shape, bits=bits) for tensor in found[group]))
        what = f"{len(found[group])} linears at {bits} bits in blocks of {BLOCK_SIZE}: {before} become {after}"
        yield f"quantises      {group}: {what if found[group] else 'nothing, as its linears are packed already'}"


def _check_space(dest: Path, written: int) -> None:
    existing = next(folder for folder in (dest, *dest.parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    needed = int(written * 1.02) + 2**20
    if free < needed:
        raise ConvertError(f"{existing} has {free / 1e9:.3g} GB free, the checkpoint needs {needed / 1e9:.3g} GB")


@contextmanager
def _working_folder(dest: Path) -> Iterator[Path]:
    """A folder that becomes `dest` when the block ends well, and is gone when it does not.

    It lies beside `dest`, or inside where `dest` is there already: that may be the root of a disk of its own.
    """
    folder = dest / WORKING if dest.is_dir() else dest.with_name(f"{dest.name}.converting")
    if folder.exists():
        if not (folder / MARKER).is_file():
            raise ConvertError(f"{folder} is in the way and was not made by convert; move it")
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    (folder / MARKER).write_text(json.dumps({"dest": str(dest)}))
    try:
        yield folder
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    if not dest.is_dir():
        (folder / MARKER).unlink()
        folder.rename(dest)
        return
    _remove_checkpoint(dest)
    for path in sorted(folder.iterdir(), key=lambda path: path.name == MANIFEST):  # the manifest last
        if path.name != MARKER:
            path.rename(dest / path.name)
    shutil.rmtree(folder)


def _remove_checkpoint(folder: Path) -> None:
    """Removes what a conversion wrote, its manifest first, and nothing else that someone may have put beside it."""
    (folder / MANIFEST).unlink(missing_ok=True)
    for path in list(folder.iterdir()):
        if path.is_dir() and _is_ours(path.name):
            shutil.rmtree(path)


def _is_ours(name: str) -> bool:
    """Whether a folder of this name in a checkpoint is one that a conversion wrote."""
    return name in MODELS or name == TOKENIZER or name.startswith("upscaler_")


@contextmanager
def _bar(console: Console, total: int) -> Iterator[Callable[[str, int], None]]:
    columns = (
        TextColumn("{task.description:<32}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("convert", total=total)

        def advance(what: str, count: int) -> None:
            progress.update(task, description=what, advance=count)

        yield advance


# ------------------------------------------------------------------------ parts


def _write(
    inventory: Inventory,
    report: Report,
    quantizing: Quantizing,
    folder: Path,
    text_length: int | None,
    files: list[Path],
    advance: Callable[[str, int], None],
) -> Manifest:
    started = time.time()
    parts: dict[str, list[str]] = {}
    quantized: dict[str, dict[str, QuantizedShape]] = {}
    quantized_here: dict[str, dict[str, Any]] = {}
    unpacked: list[str] = []
    for component, plan in inventory.plans.items():
        by_part: dict[str, list[Step]] = defaultdict(list)
        for step in plan.steps:
            by_part[part_of(component, step.target)].append(step)
        parts[component] = sorted(by_part)
        quantized[component] = {}
        for part in parts[component]:
            arrays: dict[str, np.ndarray] = {}
            for step in by_part[part]:
                name, stored = _stored(inventory, component, step.source)
                path = step.target.removesuffix(".kernel")
                group = quantizing.group(component, step.target)
                if isinstance(stored, LazyTensor) and group is not None:
                    packed = quantizing.pack(stored, group)
                    arrays |= {f"{path}.{key}": array for key, array in packed.arrays.items()}
                    quantized[component][path] = packed.shape
                    quantized_here[f"{component}/{path}"] = {
                        "published": name,
                        "bits": packed.shape.bits,
                        "relative_error": round(packed.relative_error, 5),
                    }
                elif isinstance(stored, LazyTensor):
                    arrays[step.target] = _read(stored, step.pattern)
                elif inventory.expected.targets[name].linear and _holds_as_planes(stored):
                    arrays |= {f"{path}.{key}": array for key, array in _planes(stored).items()}
                    quantized[component][path] = _shape(stored)
                else:
                    shape = inventory.expected.targets[name].shape
                    arrays[step.target] = np.ascontiguousarray(
                        rearrange(stored.dequantize().reshape(shape), step.pattern)
                    )
                    unpacked.append(name)
                advance(f"{component}/{part}", stored.nbytes)
            save(folder / component / part, arrays)

    gemma = inventory.source.gemma
    if gemma is not None:
        (folder / TOKENIZER).mkdir()
        for name in TOKENIZER_FILES:
            if (gemma.path / name).is_file():
                shutil.copyfile(gemma.path / name, folder / TOKENIZER / name)
    manifest = Manifest(
        metadata=inventory.metadata,
        gemma_metadata=None if gemma is None else gemma.metadata,
        upscaler_metadata={name: upscaler.metadata for name, upscaler in inventory.source.upscalers.items()},
        num_hidden_states=inventory.num_hidden_states,
        text_length=text_length,
        model_version=inventory.source.model_version,
        parts=parts,
        quantized={component: layers for component, layers in quantized.items() if layers},
        linear_names=inventory.expected.linear_names,
        provenance={
            "sources": {str(path): _digest(path, advance) for path in files},
            "options": {
                "source": str(inventory.source.path),
                "gemma": None if gemma is None else str(gemma.path),
                "upscalers": {name: str(upscaler.path) for name, upscaler in inventory.source.upscalers.items()},
                "quantizing": dict(quantizing.bits),
            },
            "quantized": [asdict(group) for group in report.quantized],  # as it arrived
            "quantized_here": {"table": TABLE, "block_size": BLOCK_SIZE, "linears": quantized_here},
            "configuration": report.configuration,
            "unpacked_to_bfloat16": unpacked,
            "skipped": list(inventory.skipped) + ([] if gemma is None else list(gemma.skipped)),
            "ignored": inventory.source.ignored,
            "warnings": list(report.warnings),
            "seconds": round(time.time() - started, 3),
            "versions": {name: _version(name) for name in ("ltx-jax", "jax", "flax", "orbax-checkpoint", "numpy")},
        },
    )
    (folder / MANIFEST).write_text(manifest.to_json() + "\n")
    return manifest


def _read(tensor: LazyTensor, pattern: str) -> np.ndarray:
    """A tensor with its axes moved, slice by slice: a large one is never there twice, and its pages stay in cache."""
    left, right = (side.split() for side in pattern.split("->"))
    if tensor.nbytes < _SLICED:
        return np.ascontiguousarray(rearrange(tensor.read(), pattern))
    sizes = dict(zip(left, tensor.shape, strict=True))
    result = np.empty([sizes[axis] for axis in right], tensor.dtype)
    rows = np.moveaxis(result, right.index(left[0]), 0)
    moved = f"{pattern.split('->')[0]} -> {left[0]} {' '.join(axis for axis in right if axis != left[0])}"
    for start in range(0, tensor.shape[0], _SLICE_ROWS):
        stop = min(start + _SLICE_ROWS, tensor.shape[0])
        rows[start:stop] = rearrange(tensor.read_rows(start, stop), moved)
    return result


def _steps(inventory: Inventory) -> Iterator[tuple[str, Step, str, LazyTensor | StoredWeight]]:
    """Every planned tensor: its component, its step, its published name, itself."""
    for component, plan in inventory.plans.items():
        for step in plan.steps:
            yield component, step, *_stored(inventory, component, step.source)


def _stored(inventory: Inventory, component: str, source: str) -> tuple[str, LazyTensor | StoredWeight]:
    """The full published name of a planned tensor, and the tensor."""
    if component == "gemma":
        assert inventory.source.gemma is not None
        return source, inventory.source.gemma.tensors[source]
    if component in inventory.source.upscalers:
        return source, inventory.source.upscalers[component].tensors[source]
    name = table_of(component, {})[0] + source
    return name, inventory.weights[name] if name in inventory.weights else inventory.plain[name]


def _holds_as_planes(weight: StoredWeight) -> bool:
    """Whether blocks stay within rows, as the device layout needs, and its lookup is wide enough."""
    return not weight.flattened and 2 <= weight.bits <= 8


def _planes(weight: StoredWeight) -> Mapping[str, np.ndarray]:
    """The device layout of a packed weight, after all checks of its codes and norms."""
    weight.check()
    lo, hi = weight.planes()
    arrays = {"lo": lo, "norms": weight.norms(), "scaled_centroids": weight.scaled_centroids}
    return {key: np.asarray(array) for key, array in (arrays | ({} if hi is None else {"hi": hi})).items()}


def _shape(weight: StoredWeight) -> QuantizedShape:
    assert weight.in_features is not None
    assert weight.out_features is not None
    return QuantizedShape(
        in_features=weight.in_features,
        out_features=weight.out_features,
        bits=weight.bits,
        block_size=weight.block_size,
    )


def _source_files(source: Source) -> list[Path]:
    gemma = () if source.gemma is None else source.gemma.files
    return [*source.files, *(upscaler.path for upscaler in source.upscalers.values()), *gemma]


def _digest(path: Path, advance: Callable[[str, int], None]) -> dict[str, Any]:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(2**24):
            digest.update(chunk)
            advance("digests of the sources", len(chunk))
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:  # run from a checkout that is not installed
        return None
