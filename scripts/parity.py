"""Compares this library with what the reference computed, case by case.

    python scripts/parity.py tests/data/ltx
    python scripts/parity.py tests/data/mini-release --json parity.json

A directory is either models by themselves (checkpoint.safetensors and config.json beside reference files) or a whole
release (reference/index.json beside the published folders). Its index, configurations and tensors decide what runs.
Exits with 1 where a case fails or is not known, with 2 where the directory is neither.
"""

import json
import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).parents[1]))  # runs without installation

import jax
import tyro
from rich.console import Console
from rich.table import Table

from scripts import parity_autoencoders, parity_models, parity_runs
from scripts.parity_cases import Report, Row, Runner, run_files

RUNNERS = {
    "rope": parity_runs.run_rope,
    "sampling": parity_runs.run_sampling,
    "transformer": parity_models.run_transformer,
    "transformer_cross_timestep": parity_models.run_cross_timestep,
    "gemma_text": parity_models.run_gemma,
    "text_connectors": parity_models.run_connectors,
    "video_vae": parity_autoencoders.run_video_vae,
    "audio": parity_autoencoders.run_audio,
    "e2e": parity_runs.run_e2e,
}


def run_models(directory: Path) -> list[Row]:
    """All cases of a directory of models by themselves."""
    models, report = parity_models.Models(directory), Report()

    def runner_of(name: str) -> Runner | None:
        upscaler = name.startswith("upscaler_") and name.endswith("_io")
        run = parity_autoencoders.run_upscaler if upscaler else RUNNERS.get(name)
        return None if run is None else lambda report, reference: run(models, report, reference)

    with quick_compilation():
        with report.case("checkpoint"):
            models.check_checkpoint(report)
        run_files(report, directory, runner_of, models.inputs)
    return report.rows


@contextmanager
def quick_compilation() -> Iterator[None]:
    """On a CPU, tiny models take far longer to compile than to run; half of that is optimisation.

    Without it the errors are of the same size: it changes the order of sums, not the precision.
    """
    flag = "jax_disable_most_optimizations"
    before = bool(jax.config.read(flag))
    jax.config.update(flag, before or jax.default_backend() == "cpu")
    try:
        yield
    finally:
        jax.config.update(flag, before)


def run_directory(directory: Path) -> list[Row] | None:
    """The rows of a directory, or None if it is laid out in neither of the known ways."""
    jax.config.update("jax_default_matmul_precision", "highest")
    if (directory / "checkpoint.safetensors").is_file() and (directory / "config.json").is_file():
        return run_models(directory)
    if (directory / "reference" / "index.json").is_file():
        from scripts.parity_release import run_release

        return run_release(directory)
    return None


def number(value: float) -> str:
    return f"{value:.2e}" if math.isfinite(value) else "-"


def show(rows: list[Row], console: Console) -> None:
    table = Table("case", "largest error", "tolerance", "ok", "note")
    for row in rows:
        ok = "[green]yes[/]" if row.ok else "[red]NO[/]"
        table.add_row(row.case, number(row.error), number(row.tolerance), ok, row.note.replace("[", r"\["))
    console.print(table)


def main(
    directory: Annotated[Path, tyro.conf.Positional],
    json_file: Annotated[Path | None, tyro.conf.arg(name="json")] = None,
) -> int:
    """Compares this library with what the reference computed, case by case; prints a table.

    Args:
        directory: Laid out as tests/data/ltx or tests/data/mini-release.
        json_file: Also write the rows here.
    """
    console = Console(width=None if sys.stdout.isatty() else 160)
    start = time.perf_counter()
    rows = run_directory(directory)
    if rows is None:
        print(
            f"{directory} is laid out in neither known way: it needs checkpoint.safetensors and config.json, or "
            "reference/index.json",
            file=sys.stderr,
        )
        return 2
    seconds = time.perf_counter() - start
    show(rows, console)
    failed = [row.case for row in rows if not row.ok]
    console.print(f"{len(rows) - len(failed)} of {len(rows)} cases agree; {seconds:.0f} s, jax {jax.__version__}")
    if json_file is not None:
        finite = [{k: None if v != v else v for k, v in asdict(row).items()} for row in rows]
        content = {"directory": str(directory), "ok": not failed, "seconds": round(seconds, 1), "rows": finite}
        json_file.write_text(json.dumps(content, indent=1) + "\n")
    return 1 if failed or not rows else 0


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
