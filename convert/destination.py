"""The folder that a conversion makes: work that survives until it is whole, and then takes its place.

A conversion works in DEST.converting, or in DEST/.converting where DEST is there already: it may be the root of a disk.

    .converting.jsonl   says that the folder is ours, and what is finished; locked while a conversion runs
    checkpoint/         what will be DEST
    replaced/           the old checkpoint, while the new one takes its place
"""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from convert.files import ConvertError
from convert.journal import INVENTORY, Journal
from ltx_jax import durable
from ltx_jax.checkpoint import KEPT_FOLDER, MANIFEST, MODELS, TOKENIZER, Manifest

MARKER = ".converting.jsonl"
WORKING = ".converting"  # the working folder inside a DEST that was there before
TREE, REPLACED = "checkpoint", "replaced"


def check_dest(dest: Path, *, overwrite: bool) -> None:
    """Raises ConvertError or CheckpointError for a destination that must not be written; changes nothing."""
    if not dest.exists():
        return
    if not dest.is_dir():
        raise ConvertError(f"{dest} is a file; give the name of a folder to make")
    if (dest / MANIFEST).is_file():
        Manifest.read(dest)  # raises if it is not ours
        if not overwrite:
            raise ConvertError(f"{dest} is a finished checkpoint; choose another folder, or --overwrite")
    elif any(dest.iterdir()) and not (dest / WORKING / MARKER).is_file():
        raise ConvertError(f"{dest} is not empty and was not made by convert; choose another folder")


def check_space(dest: Path, needed: int) -> None:
    """Raises ConvertError where the disk has no room for so many bytes; those of unfinished work count as free."""
    existing = next(folder for folder in (dest, *dest.parents) if folder.exists())
    work = _working_folder(dest).rglob("*")
    room = shutil.disk_usage(existing).free + sum(path.stat().st_size for path in work if path.is_file())
    if room < needed:
        raise ConvertError(f"{existing} has {room / 1e9:.3g} GB free, the checkpoint needs {needed / 1e9:.3g} GB")


def _working_folder(dest: Path) -> Path:
    return dest / WORKING if dest.is_dir() else _beside(dest)


def _beside(dest: Path) -> Path:
    return dest.with_name(f"{dest.name}.converting")


@contextmanager
def claim(dest: Path, *, overwrite: bool) -> Iterator["Work"]:
    """The work on a destination, for this process alone; it stays until it is finished or removed.

    Raises ConvertError where another process works on it, and as `check_dest` does.
    """
    if not any((folder / MARKER).is_file() for folder in (dest / WORKING, _beside(dest))):
        check_dest(dest, overwrite=overwrite)
    with ExitStack() as stack:
        if dest.is_dir() and (_beside(dest) / MARKER).is_file():  # begun before there was a DEST
            stack.enter_context(_locked(_beside(dest), dest))
            if not (_beside(dest) / TREE).exists():
                _empty(_beside(dest))
        folder = _working_folder(dest)
        stack.enter_context(_locked(folder, dest))
        work = Work(dest, folder)
        check_dest(dest, overwrite=overwrite)  # again: ending what an earlier run left may have changed it
        yield work


@contextmanager
def _locked(folder: Path, dest: Path) -> Iterator[None]:
    """Makes a working folder and locks it; one that holds no work in the end goes."""
    if folder.is_dir() and any(folder.iterdir()) and not (folder / MARKER).is_file():
        raise ConvertError(f"{folder} is in the way and was not made by convert; move it")
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / MARKER, "ab") as marker:
            try:
                fcntl.flock(marker, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system takes it back however a process ends
            except BlockingIOError as error:
                raise ConvertError(
                    f"another conversion into {dest} is running; wait until it ends, or choose another folder"
                ) from error
            if not _is(marker.fileno(), folder / MARKER):
                continue  # a conversion that ended just now has removed it
            try:
                yield
            finally:
                if all(path.is_dir() or path.name == MARKER for path in folder.rglob("*")):
                    _empty(folder)
                    (folder / MARKER).unlink()
                    with suppress(OSError):  # another conversion may have begun in it just now
                        folder.rmdir()
            return


def _is(descriptor: int, path: Path) -> bool:
    """Whether an open file is the one that has this name now."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != MARKER:
            path.unlink()


class Work:
    """An unfinished conversion."""

    def __init__(self, dest: Path, folder: Path):
        self.dest, self.folder, self.tree = dest, folder, folder / TREE
        self.journal = Journal(folder / MARKER)
        if "swap" in self.journal.step:
            self._end_swap(**self.journal.step["swap"])

    def begin(self, key: dict[str, Any]) -> tuple[str, ...]:
        """Goes on with work of the same key, and starts over from any other; returns what of that was different."""
        key, old = json.loads(json.dumps(key)), self.journal.key
        different = () if old is None else tuple(name for name in key if key[name] != old.get(name))
        if old != key:
            self.remove()
            self.journal.start(key)
        self.tree.mkdir(exist_ok=True)
        return different

    def remove(self) -> None:
        """Removes what was written."""
        _empty(self.folder)
        self.journal.clear()

    def finish(self) -> None:
        """Puts the new checkpoint in its place. One that is there already stays whole until this moment.

        Raises ConvertError where something else lies there.
        """
        if self.folder == _beside(self.dest):
            self._swap([], [])
            try:
                durable.rename(self.tree, self.dest)
            except OSError as error:
                raise ConvertError(
                    f"{self.dest} cannot be made: {error.strerror}; run again when that is mended"
                ) from error
        else:
            old = _of_checkpoint(self.dest) if (self.dest / MANIFEST).is_file() else []
            new = _of_checkpoint(self.tree)
            for name in new:
                if name not in old and (self.dest / name).exists():
                    raise ConvertError(f"{self.dest / name} is in the way; move it and run again")
            self._swap(old, new)
            (self.folder / REPLACED).mkdir(exist_ok=True)
            for name in reversed(old):  # the manifest first: without it the rest is no checkpoint
                durable.rename(self.dest / name, self.folder / REPLACED / name)
            for name in new:
                durable.rename(self.tree / name, self.dest / name)
        self.remove()

    def _swap(self, old: list[str], new: list[str]) -> None:
        self.journal.set_step(swap={"old": old, "new": new})

    def _end_swap(self, old: list[str], new: list[str]) -> None:
        """Ends a swap that was cut off after its last step, and takes back any other."""
        if (self.dest / MANIFEST).is_file() and not (self.tree / MANIFEST).is_file():
            self.remove()
            return
        replaced = self.folder / REPLACED
        for name in reversed(new):
            if not (self.tree / name).exists():
                durable.rename(self.dest / name, self.tree / name)
        for name in old:
            if (replaced / name).exists():
                durable.rename(replaced / name, self.dest / name)
        self.journal.set_step(swap_taken_back=True)


def _of_checkpoint(folder: Path) -> list[str]:
    """The names in a folder that a conversion writes, the manifest last; not what someone may have put beside them."""
    names = {path.name for path in folder.iterdir()}
    models = {name for name in names if name in MODELS or name.startswith("upscaler_")}
    ours = models | {TOKENIZER, KEPT_FOLDER, INVENTORY, MANIFEST}
    return sorted(names & ours, key=lambda name: (name == MANIFEST, name))
