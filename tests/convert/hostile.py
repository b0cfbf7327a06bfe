"""What is done to small packages to make them lie, and how the command must take it."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from convert.__main__ import main

from . import decoder, tiny
from .fuzz import MEMORY_BOUND, memory, reset_peak
from .mutations import join, split
from .published import write_file
from .tiny import BLOCK, CODES, KEPT

CODES_0 = CODES % 0
INDEX = "model.safetensors.index.json"
T = f"{BLOCK}attn1.q_norm.weight"  # of 32 values
Change = Callable[[Path], object]


class Case(NamedTuple):
    name: str
    release: Callable[[], tiny.Release]
    change: Change
    message: str  # in the error, beside the file
    file: str  # that is named


def v5() -> tiny.Release:
    return tiny.packed("V5", 5)


def v1() -> tiny.Release:
    return tiny.packed("V1", 5)


def header(file: str, edit: Callable[[dict[str, Any]], object]) -> Change:
    """Edits a header as parsed; the data stays as it is."""

    def change(folder: Path) -> None:
        raw, data = split((folder / file).read_bytes())
        content = json.loads(raw)
        edit(content)
        (folder / file).write_bytes(join(json.dumps(content).encode(), data))

    return change


def entry(name: str = T, file: str = KEPT, **facts: Any) -> Change:
    return header(file, lambda content: content[name].update(facts))


def rename(new: str) -> Change:
    return header(KEPT, lambda content: content.update({new: content.pop(T)}))


def text(file: str, edit: Callable[[bytes], bytes]) -> Change:
    """Edits the bytes of a header."""

    def change(folder: Path) -> None:
        raw, data = split((folder / file).read_bytes())
        (folder / file).write_bytes(join(edit(raw), data))

    return change


def content(file: str, data: bytes | str) -> Change:
    return lambda folder: (folder / file).write_bytes(data if isinstance(data, bytes) else data.encode())


def document(file: str, edit: Callable[[dict[str, Any]], object]) -> Change:
    """Edits a JSON file."""

    def change(folder: Path) -> None:
        found = json.loads((folder / file).read_bytes())
        edit(found)
        (folder / file).write_text(json.dumps(found))

    return change


def setting(path: str, value: Any, file: str = KEPT) -> Change:
    """Sets one value of the configuration in a file's metadata."""

    def edit(found: dict[str, Any]) -> None:
        config = json.loads(found["__metadata__"]["config"])
        *parents, last = path.split("/")
        place = config
        for key in parents:
            place = place[int(key) if isinstance(place, list) else key]
        place[last] = value
        found["__metadata__"]["config"] = json.dumps(config)

    return header(file, edit)


def values(suffix: str, edit: Callable[[np.ndarray], Any], file: str = CODES_0) -> Change:
    """Replaces the first tensor of such a name by what `edit(array)` gives; None removes it."""

    def change(folder: Path) -> None:
        tensors = decoder.tensors(folder / file)
        name = next(name for name in sorted(tensors) if name.endswith(suffix))
        new = edit(tensors[name].copy())
        write_file(
            folder / file, {k: v for k, v in tensors.items() if k != name} | ({} if new is None else {name: new})
        )

    return change


def put(value: float, place: int = 3) -> Callable[[np.ndarray], np.ndarray]:
    def edit(array: np.ndarray) -> np.ndarray:
        array.reshape(-1)[place] = value
        return array

    return edit


def replaced(file: str, make: Callable[[Path], object]) -> Change:
    """Something else under a file's name."""

    def change(folder: Path) -> None:
        (folder / file).unlink()
        make(folder / file)

    return change


def check_refused(arguments: list[Path | str], dest: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The one error that the command tells, after a look at what it left and at the memory it took."""
    reset_peak()
    before = memory("VmRSS")
    assert main([*map(str, arguments)]) == 2
    assert memory("VmHWM") - before < MEMORY_BOUND
    told = capsys.readouterr()
    errors = [line for line in told.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "Traceback" not in told.err + told.out
    assert len(told.err) < 20_000
    assert not dest.exists()
    assert not dest.with_name("out.converting").exists()
    return told.err[told.err.index("error: ") :]


def check_case(case: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Refused, with the file and what is wrong in it."""
    source = case.release().write(tmp_path / "source")
    case.change(source)
    error = check_refused([source, tmp_path / "out"], tmp_path / "out", capsys)
    assert str(source / case.file) in error
    assert re.search(case.message, error, re.DOTALL), error
