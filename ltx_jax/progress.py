"""What a pipeline tells while it works: nothing, or on the terminal one line a stage, with time spent and left."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol, runtime_checkable

from rich import progress as bars
from rich.console import Console


@runtime_checkable
class Progress(Protocol):
    """Told what goes on: each stage opens once, with its number of steps, and advances."""

    def stage(self, name: str, total: int) -> AbstractContextManager[Callable[[], None]]: ...

    def say(self, text: str) -> None: ...


class Silent:
    """No progress shown."""

    def stage(self, name: str, total: int) -> AbstractContextManager[Callable[[], None]]:
        return nullcontext(lambda: None)

    def say(self, text: str) -> None:
        pass


class TerminalProgress:
    """Shows the stages of a pipeline as they run, on standard error."""

    def __init__(self):
        self.console = Console(stderr=True)

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, soft_wrap=True)

    @contextmanager
    def stage(self, name: str, total: int) -> Iterator[Callable[[], None]]:
        columns = (
            bars.TextColumn("{task.description:<24}"),
            bars.BarColumn(),
            bars.MofNCompleteColumn(),
            bars.TimeElapsedColumn(),
            bars.TextColumn("left"),
            bars.TimeRemainingColumn(),
        )
        with bars.Progress(*columns, console=self.console) as progress:
            task = progress.add_task(name, total=total)
            yield lambda: progress.advance(task)
