"""A bar with bytes, speed and time left, on standard error."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

Advance = Callable[[str, int], None]  # what is done, and how many bytes of it


@contextmanager
def progress_bar(what: str, total: int, *, shown: bool) -> Iterator[Advance]:
    """Yields what advances the bar; it may be called from any thread."""
    columns = (
        TextColumn("{task.description:<32}"),
        BarColumn(bar_width=20),
        DownloadColumn(),
        TransferSpeedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True, quiet=not shown)) as progress:
        task = progress.add_task(what, total=total)

        def advance(what: str, count: int) -> None:
            progress.update(task, description=what, advance=count)

        yield advance
