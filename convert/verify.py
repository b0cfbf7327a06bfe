"""Whether a checkpoint is what its conversion wrote: every array and file against the inventory, that by the manifest.

And, with an unquantised checkpoint beside it, how close it comes to that one (see `compare`).
"""

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from convert.compare import compare, plot, print_comparison, to_json
from convert.files import ConvertError
from convert.hub import Hub
from convert.journal import INVENTORY, file_digest, read_inventory
from convert.progress import progress_bar
from convert.report import size_text
from convert.sources import bring
from ltx_jax.checkpoint import MANIFEST, Manifest
from ltx_jax.orbax_io import Stored, faults

_PARTS_AT_ONCE = 2  # digests of one keep one core busy


@dataclass(frozen=True, kw_only=True)
class Verify:
    """Proves that a checkpoint is what its conversion wrote; exit code 0, or 1 with a list of what is not.

    With --against, tells besides how far each linear is from the checkpoint that it was made from.
    """

    checkpoint: tyro.conf.Positional[Path]
    """The folder that convert made."""
    against: str | None = None
    """The official checkpoint (a file, a folder or a repository), unquantised: every tensor is compared with it."""
    gemma: str | None = None
    """Gemma 3 in the Hugging Face layout, to compare the text encoder with."""
    json: bool = False
    """Print JSON."""
    all: bool = False
    """List every linear, not only groups of them."""
    plot: Path | None = None
    """Draw the errors by layer and kind into this PNG file; needs matplotlib."""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """Something in a checkpoint that is not as it was written."""

    item: str
    what: str  # begins with "missing", "damaged" or "extra"


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What was checked, and what is wrong with it."""

    checkpoint: str
    manifest_sha256: str
    num_arrays: int
    num_files: int
    num_bytes: int
    faults: tuple[Fault, ...]

    @property
    def ok(self) -> bool:
        return not self.faults


def run_verify(options: Verify) -> int:
    """Verifies, compares where that is asked for, and prints; returns 0 where all is well, else 1."""
    if (options.plot or options.gemma or options.all) and not options.against:
        raise ConvertError("--plot, --gemma and --all go with --against CHECKPOINT")
    found = verify(options.checkpoint, progress=not options.json)
    comparison = None
    if options.against is not None and found.ok:
        here = bring(Hub(), options.against, gemma=options.gemma, progress=not options.json)
        comparison = compare(options.checkpoint, here.source, gemma=here.gemma, progress=not options.json)
        if options.plot is not None:
            plot(comparison, options.plot)
    if options.json:
        facts: dict[str, Any] = asdict(found) | {"ok": found.ok}
        if comparison is not None:
            facts["against"] = to_json(comparison)
        print(json.dumps(facts, indent=1))
    else:
        print("\n".join(_lines(found)))
        if comparison is not None:
            print_comparison(comparison, every=options.all)
        elif options.against is not None:
            print("not compared, as it is damaged")
    return 0 if found.ok and (comparison is None or comparison.ok) else 1


def _lines(found: Verification) -> Iterator[str]:
    for fault in found.faults:
        yield f"{fault.item}: {fault.what}"
    what = f"{found.num_arrays} arrays and {found.num_files} files, {size_text(found.num_bytes)}"
    if found.ok:
        yield f"{found.checkpoint}: {what}, all as they were written"
    else:
        yield f"{found.checkpoint}: {len(found.faults)} of {what} are not as they were written; convert again"
    yield f"SHA-256 of its {MANIFEST}: {found.manifest_sha256}"


def verify(checkpoint: str | Path, *, progress: bool = False) -> Verification:
    """Reads all of a checkpoint folder once, in little memory, and lists what is damaged, missing or extra.

    Raises CheckpointError where it has no manifest, or a foreign one.
    """
    folder = Path(checkpoint)
    manifest = Manifest.read(folder)
    manifest_sha256 = file_digest(folder / MANIFEST)
    known = manifest.provenance.get("inventory_sha256")
    try:
        inventory = read_inventory(folder)
        parts = _parts(inventory)
        wrong = None if file_digest(folder / INVENTORY) == known else f"damaged: its SHA-256 is not {known}"
    except ConvertError as error:
        inventory, parts = {"files": {}}, {}
        wrong = f"{'damaged' if (folder / INVENTORY).exists() else 'missing'}: {error}"
    if wrong:
        fault = Fault(item=INVENTORY, what=f"{wrong}; without it no array can be proved, so none was read")
        return _verification(folder, manifest_sha256, {}, {}, [fault])
    files: dict[str, str] = inventory["files"]
    total = sum(_nbytes(array) for arrays in parts.values() for array in arrays.values())
    found = list(_wrong_parts(manifest, parts))
    with progress_bar("verify", total, shown=progress) as advance, ThreadPoolExecutor(_PARTS_AT_ONCE) as pool:
        checks = [pool.submit(_part_faults, folder, name, parts[name], advance) for name in sorted(parts)]
        found += [fault for check in checks for fault in check.result()]
        found += _file_faults(folder, files)
    found += _extra(folder, parts, files)
    return _verification(folder, manifest_sha256, parts, files, found)


def _verification(
    folder: Path, manifest_sha256: str, parts: dict[str, dict[str, Stored]], files: dict[str, str], found: list[Fault]
) -> Verification:
    arrays = [array for part in parts.values() for array in part.values()]
    return Verification(
        checkpoint=str(folder),
        manifest_sha256=manifest_sha256,
        num_arrays=len(arrays),
        num_files=len(files),
        num_bytes=sum(map(_nbytes, arrays)),
        faults=tuple(found),
    )


def _parts(inventory: dict[str, Any]) -> dict[str, dict[str, Stored]]:
    """The arrays of every part. Raises ConvertError for what is no inventory."""
    try:
        parts = {
            part: {name: Stored(x["sha256"], x["dtype"], tuple(map(int, x["shape"]))) for name, x in arrays.items()}
            for part, arrays in inventory["arrays"].items()
        }
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise ConvertError(f"it is not that of a conversion ({type(error).__name__}: {error})") from error
    names = [*inventory["files"], *parts, *(f"{part}/{name}" for part, arrays in parts.items() for name in arrays)]
    outside = [name for name in names if Path(name).is_absolute() or ".." in Path(name).parts]
    if outside:
        raise ConvertError(f"it names {outside[0]}, which lies outside of the checkpoint")
    return parts


def _nbytes(array: Stored) -> int:
    return prod(array.shape) * np.dtype(array.dtype).itemsize


def _wrong_parts(manifest: Manifest, parts: dict[str, dict[str, Stored]]) -> Iterator[Fault]:
    named = {f"{component}/{part}" for component, names in manifest.parts.items() for part in names}
    for part in sorted(named ^ parts.keys()):
        where, other = (MANIFEST, INVENTORY) if part in named else (INVENTORY, MANIFEST)
        yield Fault(item=MANIFEST, what=f"damaged: {part} is in {where} and not in {other}")


def _part_faults(
    folder: Path, part: str, arrays: dict[str, Stored], advance: Callable[[str, int], None]
) -> list[Fault]:
    if not (folder / part).is_dir():
        return [Fault(item=part, what=f"missing, with its {len(arrays)} arrays")]
    found = faults(folder / part, arrays, lambda count: advance(part, count))
    return [Fault(item=f"{part}/{name}", what=what) for name, what in found]


def _file_faults(folder: Path, files: dict[str, str]) -> Iterator[Fault]:
    for name, expected in sorted(files.items()):
        if not (folder / name).is_file():
            yield Fault(item=name, what="missing")
        elif (found := file_digest(folder / name)) != expected:
            yield Fault(item=name, what=f"damaged: its SHA-256 is {found}, expected {expected}")


def _extra(folder: Path, parts: dict[str, dict[str, Stored]], files: dict[str, str]) -> Iterator[Fault]:
    """What lies outside of the parts and was not written; a folder of nothing else is told as one."""
    ours = {Path(name) for name in (*parts, *files, MANIFEST, INVENTORY)}
    above = {parent for path in ours for parent in path.parents}

    def walk(place: Path) -> Iterator[Fault]:
        for path in sorted((folder / place).iterdir()):
            name = path.relative_to(folder)
            if name in above and path.is_dir():
                yield from walk(name)
            elif name not in ours:
                yield Fault(item=name.as_posix(), what="extra: no conversion wrote it")

    yield from walk(Path())
