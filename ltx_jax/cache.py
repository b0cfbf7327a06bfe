"""Files that appear whole or not at all, and the folder of what can be made again: programs, plans, contexts."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any


def cache_folder(name: str) -> Path:
    """A folder of the user's cache, or of $LTX_JAX_CACHE; not made yet."""
    given = os.environ.get("LTX_JAX_CACHE")
    root = Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ltx-jax"
    return root / name


def digest(*parts: Any) -> str:
    """SHA-256 of values that JSON can hold, the same whatever the order of their keys."""
    return sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


@cache
def source_digest() -> str:
    """Of this library's own code: another version may compute other numbers, or need other memory."""
    folders = [Path(__file__).parent, Path(__file__).parent.parent / "hlwq_jax"]
    files = sorted(path for folder in folders for path in folder.rglob("*.py"))
    return sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` that becomes `path` only when the block ends well."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def keep_newest(folder: Path, pattern: str, count: int) -> None:
    """Removes all but the `count` files that were used last."""

    def age(path: Path) -> float:
        with suppress(FileNotFoundError):  # another process may tidy up as well
            return -path.stat().st_mtime
        return 0.0

    for path in sorted(folder.glob(pattern), key=age)[count:]:
        path.unlink(missing_ok=True)
