"""Conversion of a synthetic 5-bit release, against `cp` and `sha256sum` of the same bytes: throughput, and peak memory.

    python scripts/bench_convert.py --json convert.json
    python scripts/bench_convert.py --blocks 48 --gemma-blocks 48     the size of the whole release: 90 GB of disk

The release has random weights, and the shapes and layout of the published one, with fewer blocks. It is converted with
the command's defaults: every code is checked, every source file and every array written is hashed, and what was written
is forced to the disk. In turn with that its files are copied by `cp`, forced to the disk too, and the copies hashed by
`sha256sum`. A third time is that of Python's hashlib over the same files: it may use instructions of the processor that
`sha256sum` does not. Exits with 1 where a bar is missed.
"""

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # runs without installation

import tyro

from convert import convert
from convert.journal import file_digest
from ltx_jax.environment import prepare
from ltx_jax.memory import peak_rss_bytes
from scripts._bench import machine, write_json
from scripts._real_release import PACKAGE, TEXT_ENCODER, Release, release_files, write_files

HALF, PEAK_BAR = 0.5, 2 * 2**30


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Converts a synthetic release, copies and hashes it; prints throughputs, their ratio, and peak memory."""

    blocks: int = 4
    """Blocks of the transformer: 0.3 GB each, beside 9 GB of everything else."""
    gemma_blocks: int = 2
    """Blocks of the text encoder: 0.5 GB each, beside an embedding of 2 GB; 0 is none."""
    rounds: int = 2
    """How often each is done, in turn."""
    folder: Path | None = None
    """Where to write: a new folder in this one; by default in the system's folder for temporary files."""
    json: Path | None = None
    """Write all figures here."""


def convert_release(folder: Path) -> int:
    """Converts what lies in a folder; returns the peak resident memory of this process."""
    prepare()
    gemma = folder / TEXT_ENCODER
    convert(folder / PACKAGE, folder / "checkpoint", gemma=gemma if gemma.is_dir() else None)
    return peak_rss_bytes()


def convert_alone(folder: Path) -> int:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(convert_release, folder).result()


def copy_and_hash(folder: Path) -> None:
    sources = [folder / name for name in (PACKAGE, TEXT_ENCODER) if (folder / name).is_dir()]
    copy = folder / "copy"
    copy.mkdir()
    subprocess.run(["cp", "-r", *map(str, sources), str(copy)], check=True)
    subprocess.run(["sync", "-f", str(copy)], check=True)
    files = [str(path) for path in copy.rglob("*.safetensors")]
    subprocess.run(["sha256sum", *files], check=True, stdout=subprocess.DEVNULL)


def main(argv: list[str] | None = None) -> int:
    """Runs; returns 0, or 1 where a bar is missed."""
    args = tyro.cli(Arguments, args=argv, description=__doc__)
    release = Release.ltx_2_3(blocks=args.blocks, gemma_blocks=args.gemma_blocks)
    files = release_files(release)
    total = sum(file.nbytes for file in files.values())
    times: dict[str, list[float]] = {"convert": [], "cp and sha256sum": [], "hashlib": []}
    peaks: list[int] = []

    def timed(name: str, run: Callable[[], object]) -> None:
        os.sync()  # what another left to be written is not this one's work
        start = time.perf_counter()
        run()
        times[name].append(time.perf_counter() - start)
        print(f"{name}: {times[name][-1]:.1f} s", file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory(prefix="bench-convert-", dir=args.folder) as name:
        folder = Path(name)
        print(f"writes a release of {total / 1e9:.1f} GB", file=sys.stderr)
        write_files(folder, release, files, lambda count: None)
        for _ in range(args.rounds):
            timed("cp and sha256sum", lambda: copy_and_hash(folder))
            shutil.rmtree(folder / "copy")
            timed("convert", lambda: peaks.append(convert_alone(folder)))
            written = sum(path.stat().st_size for path in (folder / "checkpoint").rglob("*") if path.is_file())
            shutil.rmtree(folder / "checkpoint")
            timed("hashlib", lambda: [file_digest(folder / path) for path in files])

    median = {name: statistics.median(values) for name, values in times.items()}
    ratio, peak = median["cp and sha256sum"] / median["convert"], max(peaks)
    print(f"{args.blocks} blocks, {args.gemma_blocks} of the text encoder: {total / 1e9:.1f} GB read, ", end="")
    print(f"{written / 1e9:.1f} GB written; medians of {args.rounds}")
    for name, seconds in median.items():
        print(f"  {name:20}{seconds:8.1f} s{total / 1e9 / seconds:8.3f} GB/s")
    held = ratio >= HALF and peak <= PEAK_BAR
    print(f"convert has {ratio:.2f} of the throughput of cp and sha256sum (bar: {HALF} or more)")
    print(f"peak resident memory {peak / 2**30:.2f} GiB (bar: {PEAK_BAR / 2**30:.0f} or less)")
    report = {"machine": machine(("orbax-checkpoint", "numpy")), "blocks": args.blocks, "read_bytes": total}
    report |= {"gemma_blocks": args.gemma_blocks, "written_bytes": written, "seconds": times, "peak_rss_bytes": peaks}
    write_json(args.json, report | {"ratio": ratio, "bars": {"ratio": HALF, "peak_rss_bytes": PEAK_BAR}, "held": held})
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
