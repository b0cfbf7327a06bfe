"""Streams a planned source into a checkpoint folder, one part of one model at a time, the manifest last."""

import json
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict
from functools import cache, cached_property, partial
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
from einops import rearrange
from rich.console import Console

from convert.arrays import Pieces, moved, planes
from convert.destination import MARKER, WORKING, Work, check_space, claim
from convert.files import ConvertError, open_source, repository_of
from convert.inventory import Inventory, take_inventory
from convert.journal import INVENTORY, Part, file_digest
from convert.layout import kept_tensors, layout_of, write_kept
from convert.progress import Advance, progress_bar
from convert.quantizing import BITS, BLOCK_SIZE, GROUPS, RECIPE, RECIPES, Quantizing
from convert.report import Report, make_report, size_text, to_text
from convert.tasks import PACKED, QUANTISED, UNPACKED, Task, all_tasks, tensor_facts
from hlwq_jax import FormatError, StoredWeight
from ltx_jax import durable
from ltx_jax.cache import digest, source_digest
from ltx_jax.checkpoint import MANIFEST, TOKENIZER, Manifest, QuantizedShape
from ltx_jax.config import ConfigError
from ltx_jax.orbax_io import Stored, proves, release_freed_memory, write_array, write_tree
from ltx_jax.text import TextError, load_tokenizer

__all__ = ["MARKER", "WORKING", "convert", "refuse_incomplete"]

SHOWN = 100  # problems told in full; `inspect --json` tells all
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_PARTS_AT_ONCE = 2  # each needs memory for its largest array
_PARTIAL = ".partial"  # of a part that is being written


def convert(
    source: str | Path,
    dest: str | Path,
    *,
    gemma: str | Path | None = None,
    upscalers: tuple[str | Path, ...] = (),
    base: str | Path | None = None,
    gemma_bits: int = BITS,
    quantize: Iterable[str] = (),
    bits: str = "",
    recipe: str = RECIPE,
    block_size: int = BLOCK_SIZE,
    overwrite: bool = False,
    progress: bool = False,
) -> Manifest:
    """Converts published files into a checkpoint folder; returns its manifest.

    What arrives packed stays so. The text encoder's linears are packed at `gemma_bits` (2 to 8; 16 leaves them as they
    are), and those of the groups in `quantize` (blocks, connectors, projection, adaln) at 5 bits, but for what `bits`
    says of some (`blocks.0=8,blocks.43-47=6`). `recipe` is one of `convert.quantizing.RECIPES`, and
    `block_size` (128, 64 or 32) how many weights of a row share a norm.

    What a package lacks comes from `base`, the official checkpoint that it was made from, packed as the package packs
    its like.

    Everything is planned from headers first. The folder appears under its name only when it is complete. A conversion
    that was cut off, however, is gone on with by the next one into the same folder, if source and options are the same
    ones: what its digests prove is kept. The result does not depend on that, to the byte.

    Raises ConvertError, FormatError or ConfigError for a source that is short, damaged or foreign, for a destination
    that is there already (unless `overwrite`, and only if it is a checkpoint), or that another process writes.
    """
    quantizing = Quantizing.of(gemma_bits=gemma_bits, groups=quantize, bits=bits, recipe=recipe, block_size=block_size)
    dest = Path(dest).resolve()
    opened = open_source(
        Path(source), gemma=None if gemma is None else Path(gemma), upscalers=tuple(map(Path, upscalers))
    )
    inventory = take_inventory(opened, None if base is None else open_source(Path(base)))
    report = make_report(inventory)
    refuse_incomplete(report)
    text_length = _check_tokenizer(inventory)
    conversion = Conversion(inventory, report, quantizing, text_length)
    console = Console(stderr=True, quiet=not progress)
    with claim(dest, overwrite=overwrite) as work:
        different = work.begin(conversion.key)
        written = sum(task.nbytes for task in conversion.tasks)
        check_space(dest, int(1.02 * conversion.disk_bytes) + 2**20)
        lines = [to_text(report), *_quantising(inventory, quantizing, conversion.tasks)]
        lines.append(f"writes         {dest}, {size_text(written)}")
        if different:
            lines.append(f"starts over    an unfinished conversion was of other {', '.join(different)}")
        elif work.journal.parts:
            lines.append(f"goes on        {len(work.journal.parts)} of {len(conversion.parts)} parts are written")
        console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)
        try:
            with (
                progress_bar("convert", conversion.total_bytes, shown=progress) as advance,
                _discarded_if_refused(work),
            ):
                manifest = conversion.run(work, advance)
            work.finish()
        except OSError as error:
            raise ConvertError(
                f"{error}\nWhat is written so far is kept in {work.folder}: the same command goes on from there"
            ) from error
    return manifest


@contextmanager
def _discarded_if_refused(work: Work) -> Iterator[None]:
    try:
        yield
    except (ConvertError, FormatError, ConfigError):
        work.remove()  # nothing of a source that is refused can be used later
        raise


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
                "package with less cannot hold them all"
            )
        lines.append("Download the missing files; or give the official checkpoint, which has them, with --base")
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


def _quantising(inventory: Inventory, quantizing: Quantizing, tasks: list[Task]) -> Iterator[str]:
    """What will be quantised, a line a group."""
    for group in quantizing.bits:
        if GROUPS[group][0] not in inventory.plans:
            continue
        found = [task for task in tasks if task.group == group]
        before = size_text(sum(task.stored.nbytes for task in found))
        after = size_text(sum(task.nbytes for task in found))
        widths = sorted({task.recipe.bits for task in found if task.recipe is not None})
        bits = f"{', '.join(map(str, widths))} bits, recipe {quantizing.recipe}"
        what = f"{len(found)} linears at {bits}: {before} become {after}"
        yield f"quantises      {group}: {what if found else 'nothing, as its linears are packed already'}"


# ----------------------------------------------------------------- conversion


class _Stopped(Exception):
    """Raised in threads whose work is not wanted any more."""


class Conversion:
    """A planned source, and how it becomes the parts of a checkpoint."""

    def __init__(self, inventory: Inventory, report: Report, quantizing: Quantizing, text_length: int | None):
        self.inventory, self.report, self.quantizing, self.text_length = inventory, report, quantizing, text_length
        self.tasks = list(all_tasks(inventory, quantizing))
        self.parts: dict[str, list[Task]] = defaultdict(list)
        for task in self.tasks:
            self.parts[task.part].append(task)
        self.layout = layout_of(inventory, self.tasks)
        self.kept = kept_tensors(inventory, self.layout)
        self.files = _source_files(inventory)
        self.stamps = _stamps(self.files)

    @property
    def total_bytes(self) -> int:
        """That are converted, and read for the digests of the sources."""
        return sum(task.stored.nbytes for task in self.tasks) + sum(size for size, _ in self.stamps.values())

    @property
    def disk_bytes(self) -> int:
        return sum(task.disk_bytes for task in self.tasks) + sum(tensor.nbytes for tensor in self.kept.values())

    @cached_property
    def options(self) -> dict[str, Any]:
        source = self.inventory.source
        return {
            "source": str(source.path),
            "gemma": None if source.gemma is None else str(source.gemma.path),
            "upscalers": {name: str(upscaler.path) for name, upscaler in source.upscalers.items()},
            "base": None if self.inventory.base is None else str(self.inventory.base.path),
            "quantizing": self.quantizing.options,
        }

    @property
    def key(self) -> dict[str, Any]:
        """All that decides the result: work is gone on with only where none of it has changed."""
        source = self.inventory.source
        gemma = None if source.gemma is None else [source.gemma.metadata, _tokenizer_digests(source.gemma.path)]
        return {
            "source files": self.stamps,
            "configuration": digest(self.inventory.metadata, source.sidecar, gemma, self.text_length),
            "options": self.options,
            "versions": [_versions(), _program_digest()],
        }

    def run(self, work: Work, advance: Advance) -> Manifest:
        """Writes what is not there yet; returns the manifest, which is written last."""
        stop = Event()

        def checked(what: str, count: int) -> None:
            if stop.is_set():
                raise _Stopped
            advance(what, count)

        with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(_PARTS_AT_ONCE) as writers:
            sources: dict[str, Future[str]] = {}
            parts: dict[str, Future[Part]] = {}
            try:
                for path in self.files:
                    sources[str(path)] = reader.submit(file_digest, path, partial(checked, "digests of the sources"))
                for name in sorted(self.parts):
                    parts[name] = writers.submit(self._finish_part, work, name, checked)
                for future in as_completed([*sources.values(), *parts.values()]):
                    future.result()
            except BaseException:
                stop.set()
                for pool in (reader, writers):
                    pool.shutdown(cancel_futures=True)
                raise
        changed = [path for path, stamp in _stamps(self.files).items() if stamp != self.stamps[path]]
        if changed:
            raise ConvertError(f"{changed[0]} was changed while it was read; convert again when it stays as it is")
        finished = {name: future.result() for name, future in parts.items()}
        files = self._copy_tokenizer(work.tree) | write_kept(work.tree, self.kept)
        inventory = json.dumps(
            {
                "arrays": {
                    name: {array: facts._asdict() for array, facts in sorted(part.arrays.items())}
                    for name, part in finished.items()
                },
                "files": files,
                "tensors": tensor_facts(self.inventory, self.tasks),
                "layout": self.layout,
            },
            indent=1,
        ).encode()
        durable.replace(work.tree / INVENTORY, inventory)
        digests = {path: future.result() for path, future in sources.items()}
        manifest = self._manifest(finished, digests, sha256(inventory).hexdigest())
        durable.replace(work.tree / MANIFEST, manifest.to_json().encode() + b"\n")
        return manifest

    def _finish_part(self, work: Work, name: str, advance: Advance) -> Part:
        """Writes a part, unless one is there whose digests prove it."""
        place, known = work.tree / name, work.journal.parts.get(name)
        if known is not None and place.is_dir() and proves(place, known.arrays):
            advance(f"{name} is there", sum(task.stored.nbytes for task in self.parts[name]))
            return known
        unfinished = place.with_name(place.name + _PARTIAL)
        for folder in (place, unfinished):
            if folder.exists():
                shutil.rmtree(folder)
        unfinished.mkdir(parents=True)
        arrays: dict[str, Stored] = {}
        quantized: dict[str, Any] = {}
        for task in self.parts[name]:
            for target, array in self._arrays(task, quantized):
                pieces = _with_pauses(array.pieces, partial(advance, name, 0))
                arrays[target] = write_array(unfinished, target, array.shape, array.dtype, pieces)
            advance(name, task.stored.nbytes)
        write_tree(unfinished, arrays)
        durable.sync(unfinished)
        durable.rename(unfinished, place)
        part = Part(arrays=arrays, quantized=quantized)
        work.journal.finish_part(name, part)
        release_freed_memory()
        return part

    def _arrays(self, task: Task, quantized: dict[str, Any]) -> Iterator[tuple[str, Pieces]]:
        """The arrays of a checkpoint that a tensor becomes."""
        stored, found = task.stored, {}
        if isinstance(stored, StoredWeight) and task.rule == PACKED:
            found = planes(stored)
        elif isinstance(stored, StoredWeight):
            whole = rearrange(stored.dequantize().reshape(task.shape), task.pattern)
            yield task.target, Pieces.of(whole)
        elif task.rule == QUANTISED:
            assert task.group is not None
            assert task.recipe is not None
            packed = self.quantizing.pack(stored, task.group, task.recipe)
            found = packed.arrays
            quantized[task.path] = {
                "shape": asdict(packed.shape),
                "facts": {
                    "published": task.name,
                    "bits": packed.shape.bits,
                    "relative_error": round(packed.relative_error, 5),
                },
            }
        else:
            yield task.target, moved(stored, task.pattern)
        for key, array in found.items():
            yield f"{task.path}.{key}", Pieces.of(array)

    def _copy_tokenizer(self, tree: Path) -> dict[str, str]:
        """Copies the files of the tokenizer; returns their digests."""
        gemma = self.inventory.source.gemma
        if gemma is None:
            return {}
        folder = tree / TOKENIZER
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir()
        for name in TOKENIZER_FILES:
            if (gemma.path / name).is_file():
                durable.write(folder / name, [(gemma.path / name).read_bytes()])
        durable.sync(folder)
        return {f"{TOKENIZER}/{name}": found for name, found in _tokenizer_digests(folder).items()}

    def _manifest(self, finished: dict[str, Part], sources: dict[str, str], inventory_sha256: str) -> Manifest:
        inventory, gemma = self.inventory, self.inventory.source.gemma
        parts: dict[str, list[str]] = {component: [] for component in inventory.plans}
        quantized: dict[str, dict[str, QuantizedShape]] = {component: {} for component in inventory.plans}
        here = {}
        for name in sorted(self.parts):
            component, part = name.split("/")
            parts[component].append(part)
            for task in self.parts[name]:
                if task.rule == PACKED:
                    quantized[component][task.path] = task.packed_shape
                elif task.rule == QUANTISED:
                    how = finished[name].quantized[task.path]
                    quantized[component][task.path] = QuantizedShape(**how["shape"])
                    here[f"{component}/{task.path}"] = how["facts"]
        return Manifest(
            metadata=inventory.metadata,
            gemma_metadata=None if gemma is None else gemma.metadata,
            upscaler_metadata={name: upscaler.metadata for name, upscaler in inventory.source.upscalers.items()},
            num_hidden_states=inventory.num_hidden_states,
            text_length=self.text_length,
            model_version=inventory.source.model_version,
            parts=parts,
            quantized={component: layers for component, layers in quantized.items() if layers},
            linear_names=inventory.expected.linear_names,
            provenance={
                "sources": {path: {"bytes": self.stamps[path][0], "sha256": sources[path]} for path in sources},
                "repositories": _repositories(self.files),
                "inventory_sha256": inventory_sha256,
                "options": self.options,
                "quantized": [asdict(group) for group in self.report.quantized],  # as it arrived
                "quantized_here": {
                    "recipe": asdict(RECIPES[self.quantizing.recipe]) | {"block_size": self.quantizing.block_size},
                    "linears": here,
                },
                "configuration": self.report.configuration,
                "unpacked_to_bfloat16": [task.name for task in self.tasks if task.rule == UNPACKED],
                "skipped": list(inventory.skipped) + ([] if gemma is None else list(gemma.skipped)),
                "ignored": inventory.source.ignored,
                "warnings": list(self.report.warnings),
                "versions": _versions(),
            },
        )


def _with_pauses(pieces: Iterable[np.ndarray], pause: Callable[[], None]) -> Iterator[np.ndarray]:
    """The pieces, and before each one a moment in which the work may be stopped: a large array takes seconds."""
    for piece in pieces:
        pause()
        yield piece


def _source_files(inventory: Inventory) -> list[Path]:
    source, base = inventory.source, inventory.base
    gemma = () if source.gemma is None else source.gemma.files
    upscalers = (upscaler.path for upscaler in source.upscalers.values())
    return [*source.files, *upscalers, *gemma, *(() if base is None else base.files)]


def _repositories(files: Iterable[Path]) -> dict[str, str]:
    """The commit of every repository of the Hugging Face Hub that sources are from."""
    found = filter(None, map(repository_of, files))
    return {name: commit for name, commit, _ in found}


def _stamps(files: Iterable[Path]) -> dict[str, list[int]]:
    """Size and time of change of files."""
    return {str(path): [path.stat().st_size, path.stat().st_mtime_ns] for path in files}


def _tokenizer_digests(folder: Path) -> dict[str, str]:
    return {name: file_digest(folder / name) for name in TOKENIZER_FILES if (folder / name).is_file()}


@cache
def _program_digest() -> str:
    """Of the code that converts: another version may write other bytes."""
    files = sorted(Path(__file__).parent.rglob("*.py"))
    return digest(source_digest(), [path.read_text() for path in files])


def _versions() -> dict[str, str | None]:
    return {name: _version(name) for name in ("ltx-jax", "jax", "flax", "orbax-checkpoint", "numpy")}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:  # run from a checkout that is not installed
        return None
