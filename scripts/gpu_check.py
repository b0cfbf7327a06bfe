"""Measures this library on the NVIDIA card at hand, at real size with random weights, in at most 8 minutes.

    python scripts/gpu_check.py --json gpu.json

Needs the packages and their extra `cuda`, downloads nothing and writes nothing large. Packed weights of LTX-2.3 are
made on the card: all 48 blocks where they fit, else fewer (it says so and scales seconds). One table: a step's seconds
for each form of unpacking and of attention, the share of unpacking, speed beside what a large product and a large copy
reach, streamed beside resident blocks, and measured beside planned memory. What does not fit the time or the card is
skipped with its reason; what fails has its reason in its row.

Without a card the same code checks itself on the CPU with a tiny model, whose seconds say nothing. Exits with 1 where
a row failed.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # runs without installation

import jax
import psutil
import tyro
from rich.console import Console
from rich.table import Table

from ltx_jax.cache import written_whole
from ltx_jax.environment import prepare
from scripts._bench import machine
from scripts._gpu_bench import REAL, TINY, Bench, Clock, Row, Sizes, Skip
from scripts.gpu_check_parts import Part, parts

STARTED = time.monotonic() - (time.time() - psutil.Process().create_time())  # with the imports
LIMIT = 470  # seconds, of the 8 minutes
GRACE = 6.0  # past the limit, for a row to end by itself


@dataclass
class Report:
    """The rows so far. They are printed as they come and written at once, so that a crash loses none."""

    sizes: str
    json_file: Path | None
    rows: list[Row] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    def add(self, row: Row) -> None:
        self.rows.append(row)
        line = " ".join(filter(None, (row.part, row.what, row.clip)))
        print(f"[{time.monotonic() - STARTED:4.0f} s] {row.status:7} {line}: {row.result}", file=sys.stderr, flush=True)
        self.write()

    @property
    def failed(self) -> bool:
        return any(row.status == "failed" for row in self.rows)

    def write(self) -> None:
        if self.json_file is None:
            return
        content = {
            "sizes": self.sizes,
            "seconds": round(time.monotonic() - STARTED, 1),
            "failed": self.failed,
            **self.facts,
            "rows": [asdict(row) for row in self.rows],
        }
        with written_whole(self.json_file) as temporary:
            temporary.write_text(json.dumps(content, indent=1) + "\n")

    def show(self) -> None:
        table = Table(title=f"{self.facts.get('device', 'no device')}, {self.sizes}")
        for name in ("part", "what", "clip", "result"):
            table.add_column(name, overflow="fold")
        colours = {"ok": "", "skipped": "yellow", "failed": "red"}
        for row in self.rows:
            mark = "" if row.status == "ok" else f"{row.status}: "
            table.add_row(row.part, row.what, row.clip, mark + row.result, style=colours[row.status])
        counts = (f"{sum(row.status == status for row in self.rows)} {status}" for status in colours)
        table.caption = f"{', '.join(counts)}; {time.monotonic() - STARTED:.0f} s"
        # Where nothing says how wide a terminal is, lines are cut that a log could hold.
        Console(width=None if sys.stdout.isatty() else 160).print(table, markup=False)


def rows_of(bench: Bench, name: str, clip: str, part: Part) -> Iterator[Row]:
    """The rows of one part; what it raises becomes one."""
    try:
        bench.clock.need(1)
        yield from part(bench)
    except Skip as reason:
        yield Row(part=name, clip=clip, status="skipped", result=str(reason))
    except Exception as error:  # of a compiler, a driver, the memory: whatever it is, the other parts still run
        text = (str(error).strip().splitlines() or [""])[0][:300]
        yield Row(part=name, clip=clip, status="failed", result=f"{type(error).__name__}: {text}")


def find_device() -> Any:
    """The NVIDIA card to measure, else a CPU."""
    try:
        device = jax.devices()[0]
        if device.platform == "gpu" and "amd" not in device.device_kind.lower():
            return device
        return jax.devices("cpu")[0]
    except Exception as error:  # each platform that cannot start, as $JAX_PLATFORMS may want, fails in its own way
        print(f"JAX finds no device: {type(error).__name__}: {error}", file=sys.stderr)
        jax.config.update("jax_platforms", "cpu")
        return jax.devices("cpu")[0]


def measure_all(report: Report, sizes: Sizes, device: Any, limit: float) -> None:
    clock = Clock(limit, STARTED)
    try:
        bench = Bench(sizes, device, clock)
    except Exception as error:
        report.add(Row(part="model", status="failed", result=f"{type(error).__name__}: {error}"))
        return
    for name, clip, part in parts(bench):
        for row in rows_of(bench, name, clip, part):
            report.add(row)


def main(
    *,
    json_file: Annotated[Path | None, tyro.conf.arg(name="json")] = None,
    tiny: bool = False,
    limit: float = LIMIT,
) -> int:
    """Measures this library on the NVIDIA card at hand, or checks itself on the CPU.

    Args:
        json_file: write all figures here
        tiny: check itself with a tiny model, on a card too
        limit: seconds since the start; what does not fit is skipped
    """
    prepare()
    device = find_device()
    card = device.platform == "gpu"
    if not card:
        print("No NVIDIA GPU that JAX can use: checking this script with a tiny model on the CPU instead.", flush=True)
        if any(Path(path).exists() for path in ("/dev/nvidiactl", "/dev/dxg")):
            print("An NVIDIA driver is here: `pip install -e '.[cuda]'` lets JAX use its card.")
    sizes, name = (REAL, "LTX-2.3 at real size") if card and not tiny else (TINY, "a tiny model")
    if not card:
        jax.config.update("jax_disable_most_optimizations", True)  # compiling is all that takes long
    report = Report(name, json_file)
    with suppress(Exception):  # a fact that a machine does not tell is no reason to measure nothing
        report.facts.update(machine())

    def give_up() -> None:
        """For what cannot be interrupted, such as a compiler that hangs."""
        report.add(Row(part="limit", status="failed", result=f"stopped after {limit:.0f} s in the midst of a part"))
        report.show()
        sys.stdout.flush()
        os._exit(1)

    watchdog = threading.Timer(limit + GRACE - (time.monotonic() - STARTED), give_up)
    watchdog.daemon = True
    watchdog.start()
    try:
        measure_all(report, sizes, device, limit)
    finally:
        watchdog.cancel()
        report.show()
    return int(report.failed)


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
