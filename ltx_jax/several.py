"""Many clips of one call: prompts from a file, seeds in ranges, and a sheet to compare what came of them."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ltx_jax.settings import Settings
from ltx_jax.settings_json import settings_from

_MOST = 1000  # clips of one call: a mistyped range should not fill a disk


@dataclass(frozen=True, kw_only=True)
class Task:
    """One clip of several."""

    settings: Settings
    output: Path
    label: str  # of its row on the sheet


def parse_seeds(text: str) -> tuple[int, ...]:
    """Seeds of `1-8`, `3` or `1-4,10`. Raises ValueError for what is no such list, and for a seed given twice."""
    seeds: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (0, -1)
        if last < first or last - first >= _MOST:
            raise ValueError(f"seeds must be numbers and rising ranges, as 1-8 or 1,3,10-12; got {text!r}")
        seeds += range(first, last + 1)
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"a seed is there twice in {text!r}: it would make the same clip")
    return tuple(seeds)


def read_prompts(path: Path, base: Settings) -> list[Settings]:
    """The settings of each clip of a file: `base` with what is the clip's own.

    The file has a prompt a line (empty lines and those that begin with # are left out), or is JSON: a list of prompts,
    or of objects whose keys are settings. Raises ValueError, naming the entry, for what is neither.
    """
    try:
        text = path.read_text(encoding="utf-8")
        entries: Any = json.loads(text) if path.suffix.lower() == ".json" else _lines(text)
    except (OSError, ValueError) as error:
        raise ValueError(f"the prompts in {path} cannot be read: {error}") from error
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{path} has no prompts: give one a line, or a JSON list")
    found = []
    for number, entry in enumerate(entries, 1):
        if not isinstance(entry, str | dict) or not entry:
            raise ValueError(f"entry {number} of {path} must be a prompt, or an object of settings; got {entry!r}")
        try:
            found.append(settings_from({"prompt": entry} if isinstance(entry, str) else entry, base))
        except ValueError as error:
            raise ValueError(f"entry {number} of {path}: {error}") from error
    return found


def _lines(text: str) -> list[str]:
    lines = [line.strip() for line in text.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def tasks_of(settings: Sequence[Settings], seeds: Sequence[int] | None, output: Path) -> list[Task]:
    """Each prompt with each seed; with its own seed where there are none. Clips are named after the output.

    `clip.mp4` becomes `clip-2-seed7.mp4` for the second prompt and seed 7; the number of the prompt is left out where
    there is one. Raises ValueError for more clips than a mistake could mean.
    """
    count = len(settings) * len(seeds or [0])
    if count > _MOST:
        raise ValueError(f"{len(settings)} prompts with {len(seeds or [0])} seeds make {count} clips; {_MOST} at most")
    width = len(str(len(settings)))
    tasks = []
    for number, one in enumerate(settings, 1):
        for seed in seeds or [one.seed]:
            place = f"-{number:0{width}d}" if len(settings) > 1 else ""
            tasks.append(
                Task(
                    settings=replace(one, seed=seed),
                    output=output.with_name(f"{output.stem}{place}-seed{seed}{output.suffix}"),
                    label=f"{number}  seed {seed}  {one.prompt}" if len(settings) > 1 else f"seed {seed}  {one.prompt}",
                )
            )
    return tasks
