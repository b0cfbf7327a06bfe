"""LTX-2.3 at its real size, with random weights: written as published, converted, loaded, one step denoised.

    python scripts/real_size.py --json real_size.json
    python scripts/real_size.py --blocks 2     less disk and time

Nothing is downloaded. The release has the names, shapes, files and metadata of the published 5-bit package: 5,947
tensors, the linears of the blocks packed (codes of random Gaussian weights, so that every check of a package holds),
the rest bfloat16. The published layout has no checksums; the converter's manifest has those of every file.

Conversion, every model's loading and the step each run in a process of their own, through `convert` and the ordinary
pipeline, so that a peak of host memory is that phase's alone. A text encoder at real size would be 24 GB more: by
default there is none, and the step reads random contexts of the right shape. What a run made is removed at its end,
unless --keep; a later run with other --phases goes on from what was kept. Exits with 1 where a bar is missed.
"""

import json
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # runs without installation

import jax
import jax.numpy as jnp
import numpy as np
import psutil
import tyro
from flax import nnx
from rich import box
from rich import progress as bars
from rich.console import Console
from rich.table import Table

from convert import ConvertError, convert
from ltx_jax.checkpoint import MANIFEST, CheckpointError, Manifest
from ltx_jax.denoise import Prompt
from ltx_jax.environment import prepare
from ltx_jax.memory import nbytes, peak_rss_bytes
from ltx_jax.pipeline import load_pipeline
from ltx_jax.presets import LTX_2_3
from ltx_jax.progress import TerminalProgress
from ltx_jax.settings import Settings
from ltx_jax.text import TEXT_LENGTH
from scripts._bench import machine, write_json
from scripts._real_release import PACKAGE, TEXT_ENCODER, Release, release_files, write_files

PHASES = "write", "convert", "load", "step"
CHECKPOINT = "checkpoint"
MARKER = "real_size.json"  # says that a folder is one of ours, and what was written there
HOST_BAR, STEP_BAR = 4 * 2**30, 18 * 2**30


class RealSizeError(Exception):
    """A run that cannot be, or that did not end; the text says what to do."""


# --------------------------------------------------------------------- phases


@dataclass(frozen=True, kw_only=True)
class Phase:
    """What one phase did."""

    name: str
    seconds: float
    moved_bytes: int  # written, converted, loaded; of a step: weights that it reads
    disk_bytes: int  # that it wrote
    weights_bytes: int  # that stay in memory
    note: str = ""
    peak_rss_bytes: int = 0

    @property
    def beyond_bytes(self) -> int:
        """Host memory at the peak, beyond weights that stay."""
        return self.peak_rss_bytes - self.weights_bytes


def write_release(folder: Path, release: Release) -> Phase:
    """Writes the package, and the text encoder if there is one, below a folder."""
    started = time.perf_counter()
    files = release_files(release)
    total = sum(file.nbytes for file in files.values())
    columns = bars.TextColumn("write"), bars.BarColumn(), bars.DownloadColumn(), bars.TransferSpeedColumn()
    with bars.Progress(*columns, bars.TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        task = progress.add_task("write", total=total)
        write_files(folder, release, files, lambda count: progress.advance(task, count))
    return Phase(
        name="write",
        seconds=time.perf_counter() - started,
        moved_bytes=total,
        disk_bytes=sum(disk_bytes(folder / name) for name in (PACKAGE, TEXT_ENCODER)),
        weights_bytes=0,
        note=f"{len(release.shapes):,} tensors, {len(release.packed):,} of them packed; {len(files)} files in all",
    )


def convert_release(folder: Path, quantize: Sequence[str] = ()) -> Phase:
    """Converts what `write_release` wrote."""
    gemma = folder / TEXT_ENCODER
    started = time.perf_counter()
    convert(
        folder / PACKAGE,
        folder / CHECKPOINT,
        gemma=gemma if gemma.is_dir() else None,
        quantize=quantize,
        overwrite=True,
        progress=True,
    )
    seconds = time.perf_counter() - started
    return Phase(
        name="convert",
        seconds=seconds,
        moved_bytes=sum(disk_bytes(source) for source in (folder / PACKAGE, gemma)),
        disk_bytes=disk_bytes(folder / CHECKPOINT),
        weights_bytes=0,
        note="source bytes a second, digests of the sources included",
    )


def load(folder: Path, component: str) -> Phase:
    """Loads one model as a pipeline does."""
    pipe = load_pipeline(folder / CHECKPOINT, progress=TerminalProgress())
    started = time.perf_counter()
    state = jax.block_until_ready(nnx.state(pipe.model(component)))
    seconds = time.perf_counter() - started
    size = nbytes(state)
    return Phase(name=f"load {component}", seconds=seconds, moved_bytes=size, disk_bytes=0, weights_bytes=size)


def step(folder: Path) -> Phase:
    """Denoises two steps of a small clip, through the pipeline, from random contexts; the second one is measured."""
    pipe = load_pipeline(folder / CHECKPOINT, progress=TerminalProgress())
    size = nbytes(nnx.state(pipe.model("transformer")))
    # The smallest clip with a time, a height and a width: 64 video tokens, and 16 of sound at this frame rate.
    scale = pipe.configs.video_vae.scale
    settings = Settings(
        num_frames=scale[0] + 1, height=4 * scale[1], width=8 * scale[2], fps=14.0, sigmas=(1.0, 0.9, 0.8)
    )
    rng = np.random.default_rng(0)
    config = pipe.configs.transformer
    length = pipe.manifest.text_length or TEXT_LENGTH
    prompt = Prompt(
        video=jnp.asarray(rng.standard_normal((1, length, config.video.context_dim), np.float32)),
        audio=jnp.asarray(rng.standard_normal((1, length, config.audio.context_dim), np.float32)),
    )
    tokens: list[int] = []
    ends = [time.perf_counter()]

    def after_call(stage, number, sigma, noisy, denoised) -> None:
        tokens[:] = [denoised.video.shape[1], denoised.audio.shape[1]]
        ends.append(time.perf_counter())

    latents = pipe.generate_latents(settings, prompt=prompt, callback=after_call)
    if not all(bool(jnp.isfinite(x).all()) for x in (latents.video, latents.audio)):
        raise RealSizeError("the step's latents are not finite: the weights were not restored as they were written")
    first, second = np.diff(ends)
    return Phase(
        name="step",
        seconds=float(second),
        moved_bytes=size,
        disk_bytes=0,
        weights_bytes=size,
        note=f"{tokens[0]} + {tokens[1]} tokens, contexts of {length}, {pipe.dtype.name}; the first step, with "
        f"compiling, took {first:.1f} s",
    )


def disk_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _with_peak(function: Callable[..., Phase], *args: Any) -> Phase:
    prepare()
    phase = function(*args)
    return replace(phase, peak_rss_bytes=peak_rss_bytes())


def alone(function: Callable[..., Phase], *args: Any) -> Phase:
    """Runs a phase in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            return pool.submit(_with_peak, function, *args).result()
        except BrokenProcessPool as error:
            raise RealSizeError(
                f"the process of {function.__name__} was killed, most likely for memory; free some, or take fewer "
                "--blocks"
            ) from error


# ------------------------------------------------------------------------ run


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Writes LTX-2.3 at its real size with random weights, converts it, loads it, denoises a step; measures each."""

    blocks: int = 48
    """Blocks of the transformer; fewer need less of everything."""
    folder: Path = Path("outputs/real-size")
    """Where to write: a folder that is not there, is empty, or was kept by an earlier run."""
    phases: str = ",".join(PHASES)
    """What to do, separated by commas; what is left out must have been kept."""
    keep: bool = False
    """Keep what was written."""
    upscalers: bool = True
    """Both latent upscalers too: 1.3 GB, not among the 5,947 tensors."""
    gemma_blocks: int = 0
    """Blocks of a text encoder at real width; 48 are 24 GB, 0 is none. With other than 48 the projection is as much
    narrower as it reads fewer hidden states."""
    quantize: str = ""
    """What the converter packs besides, separated by commas: connectors, projection, adaln."""
    json: Path | None = None
    """Write the configuration, the machine and all figures here."""


@dataclass
class Folder:
    """The folder of a run, which may hold what an earlier run kept; and what this run made, to be removed."""

    path: Path
    made: list[str] = field(default_factory=list)  # folders in it
    made_folders: list[Path] = field(default_factory=list)  # itself and those above it, from the inside

    @property
    def release(self) -> Release | None:
        """What an earlier run wrote and kept."""
        marker = self.path / MARKER
        return Release(**json.loads(marker.read_text())) if marker.is_file() else None

    def claim(self, release: Release) -> None:
        """Makes the folder, or takes an empty one or one of ours. Raises RealSizeError for any other."""
        marker = self.path / MARKER
        if self.path.exists() and not marker.is_file() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise RealSizeError(f"{self.path} was not made by this script; choose a --folder that is not there yet")
        self.made_folders = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
        self.path.mkdir(parents=True, exist_ok=True)
        marker.write_text(json.dumps(asdict(release)))

    def make(self, *names: str) -> None:
        """Says that this run makes these folders in it; what an earlier run kept under their names goes."""
        self.made += names
        self._clear(names)

    def leave(self, *, keep: bool) -> None:
        """Removes what this run made, unless it is to be kept, and the folder's marker where nothing is left."""
        if not keep:
            self._clear(self.made)
        if {path.name for path in self.path.iterdir()} <= {MARKER}:
            (self.path / MARKER).unlink(missing_ok=True)
        for folder in self.made_folders:
            if not any(folder.iterdir()):
                folder.rmdir()

    def _clear(self, names: Iterable[str]) -> None:
        for name in names:
            if (self.path / name).is_dir():
                shutil.rmtree(self.path / name)


def check_space(folder: Path, release: Release, phases: Sequence[str]) -> None:
    """Raises RealSizeError where the disk has no room for a release and its conversion."""
    replaced = {name: disk_bytes(folder / name) for name in (PACKAGE, TEXT_ENCODER, CHECKPOINT)}
    source = replaced[PACKAGE] + replaced[TEXT_ENCODER]
    free, needed = 0, 2**26
    if "write" in phases:
        free += source
        source = sum(file.nbytes for file in release_files(release).values())
        needed += source
    if "convert" in phases:
        free += replaced[CHECKPOINT]
        needed += source + source // 50  # no checkpoint is larger than its source; the converter keeps that much free
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free += shutil.disk_usage(existing).free
    if free < needed:
        raise RealSizeError(
            f"{existing} has {free / 1e9:.1f} GB free, {' and '.join(phases)} need {needed / 1e9:.1f} GB: choose "
            "another --folder, fewer --blocks, or --no-upscalers"
        )


def check_memory(folder: Path, component: str) -> None:
    """Raises RealSizeError where a model would push the machine's other programs out of memory."""
    needed = disk_bytes(folder / CHECKPOINT / component) + HOST_BAR
    free = psutil.virtual_memory().available
    if free < needed:
        raise RealSizeError(
            f"{component} needs {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free: --keep, and go on "
            "with --phases load,step when there is more, or take fewer --blocks"
        )


def run(
    release: Release, folder: Path, phases: Sequence[str], *, quantize: Sequence[str], keep: bool
) -> Iterator[Phase]:
    """Runs phases, each in a process of its own; yields what each did. Raises what they raise, and RealSizeError.

    `release` is what is to be written, or was kept.
    """
    owned = Folder(folder)
    owned.claim(release)
    try:
        check_space(folder, release, phases)
        if "write" in phases:
            owned.make(PACKAGE, TEXT_ENCODER)
            yield alone(write_release, folder, release)
        if "convert" in phases:
            if not (folder / PACKAGE).is_dir():
                raise RealSizeError(f"{folder} holds no release; add write to --phases")
            owned.make(CHECKPOINT, f"{CHECKPOINT}.converting")  # the second is left by a killed conversion
            yield alone(convert_release, folder, quantize)
        if {"load", "step"} & set(phases) and not (folder / CHECKPOINT / MANIFEST).is_file():
            raise RealSizeError(f"{folder} holds no checkpoint; add convert to --phases")
        if "load" in phases:
            for component in Manifest.read(folder / CHECKPOINT).parts:
                check_memory(folder, component)
                yield alone(load, folder, component)
        if "step" in phases:
            check_memory(folder, "transformer")
            yield alone(step, folder)
    finally:
        owned.leave(keep=keep)


def bars_of(results: Iterable[Phase], blocks: int) -> list[dict[str, Any]]:
    """The bars that the phases can be held against."""
    found = []
    for phase in results:
        name = phase.name.split()[0]
        if name in ("convert", "load"):
            what = "peak RSS beyond weights that stay"
            found.append({"phase": phase.name, "what": what, "bytes": phase.beyond_bytes, "bar": HOST_BAR})
        if name == "step" and blocks == LTX_2_3["transformer"]["num_layers"]:
            found.append({"phase": phase.name, "what": "peak RSS", "bytes": phase.peak_rss_bytes, "bar": STEP_BAR})
    return [bar | {"held": bar["bytes"] <= bar["bar"]} for bar in found]


def show(results: Sequence[Phase], title: str) -> None:
    table = Table(
        title=title,
        box=box.SIMPLE,
        pad_edge=False,
        caption="peak RSS, weights kept, peak beyond them: GiB; written to disk: GB",
    )
    table.add_column("phase", no_wrap=True)
    for name in ("s", "GB", "GB/s", "peak", "kept", "more", "disk"):
        table.add_column(name, justify="right")
    notes = []
    for phase in results:
        table.add_row(
            phase.name,
            f"{phase.seconds:.0f}" if phase.seconds >= 100 else f"{phase.seconds:.1f}",
            f"{phase.moved_bytes / 1e9:.1f}",
            f"{phase.moved_bytes / 1e9 / phase.seconds:.2f}",
            f"{phase.peak_rss_bytes / 2**30:.2f}",
            f"{phase.weights_bytes / 2**30:.2f}" if phase.weights_bytes else "",
            f"{phase.beyond_bytes / 2**30:.2f}",
            f"{phase.disk_bytes / 1e9:.1f}" if phase.disk_bytes else "",
        )
        notes += [f"{phase.name}: {phase.note}"] if phase.note else []
    console = Console()
    console.print(table)
    for note in notes:
        console.print(note, highlight=False, soft_wrap=True)


def main(argv: list[str] | None = None) -> int:
    """Runs; returns 0, 1 where a bar is missed, or 2 for a run that cannot be or did not end, with the reason."""
    args = tyro.cli(Arguments, args=argv, description=__doc__)
    prepare()
    phases = _names(args.phases)
    results: list[Phase] = []
    try:
        unknown = sorted(set(phases) - set(PHASES))
        if unknown or not phases:
            raise RealSizeError(f"--phases has {', '.join(unknown) or 'nothing'}; there are {', '.join(PHASES)}")
        if args.blocks < 1 or args.gemma_blocks < 0:
            raise RealSizeError(
                f"--blocks must be at least 1, --gemma-blocks 0, got {args.blocks}, {args.gemma_blocks}"
            )
        kept = None if "write" in phases else Folder(args.folder).release
        release = kept or Release.ltx_2_3(blocks=args.blocks, upscalers=args.upscalers, gemma_blocks=args.gemma_blocks)
        configs = release.configs
        blocks, gemma_blocks = configs.transformer.num_layers, configs.gemma.num_layers if configs.gemma else 0
        title = f"LTX-2.3 with {blocks} blocks, {len(release.shapes):,} tensors"
        text = f"with a text encoder of {gemma_blocks} blocks" if gemma_blocks else "without a text encoder"
        print(f"{title}, {text}; a step reads random contexts", file=sys.stderr)
        for phase in run(release, args.folder, phases, quantize=_names(args.quantize), keep=args.keep):
            results.append(phase)
            print(
                f"{phase.name}: {phase.seconds:.1f} s, peak RSS {phase.peak_rss_bytes / 2**30:.2f} GiB", file=sys.stderr
            )
    except (RealSizeError, ConvertError, CheckpointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; what this run made is gone, unless --keep was given", file=sys.stderr)
        return 130
    show(results, title)
    held = bars_of(results, blocks)
    for bar in held:
        verdict = "within" if bar["held"] else "OVER"
        print(f"{bar['phase']}: {bar['what']} {bar['bytes'] / 2**30:.2f} GiB, {verdict} {bar['bar'] / 2**30:.0f} GiB")
    report = {
        "machine": machine(("flax", "orbax-checkpoint", "numpy")),
        "blocks": blocks,
        "gemma_blocks": gemma_blocks,
        "upscalers": list(configs.upscalers),
        "tensors": len(release.shapes),
        "packed": len(release.packed),
        "quantize": _names(args.quantize),
        "phases": [asdict(phase) | {"beyond_bytes": phase.beyond_bytes} for phase in results],
        "bars": held,
    }
    write_json(args.json, report)
    return 0 if all(bar["held"] for bar in held) else 1


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


if __name__ == "__main__":
    sys.exit(main())
