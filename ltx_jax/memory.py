"""What a program needs in memory, from the compiler, for a device at hand or for a card that is not there."""

import json
import re
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import psutil

from ltx_jax.cache import cache_folder, digest, keep_newest, written_whole
from ltx_jax.cards import Card

KEPT = 2000  # measured programs in the cache, some 200 bytes each


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one compiled program on its device."""

    argument_bytes: int
    output_bytes: int
    temp_bytes: int
    alias_bytes: int  # of outputs that take the place of arguments
    compile_seconds: float  # when it was compiled; 0 from the cache of compiled programs

    @property
    def added_bytes(self) -> int:
        """What running it needs beside its arguments."""
        return self.output_bytes + self.temp_bytes - self.alias_bytes

    @property
    def peak_bytes(self) -> int:
        return self.argument_bytes + self.added_bytes


def nbytes(tree: Any) -> int:
    """Bytes of all arrays, or shapes of arrays, of a tree."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree) if hasattr(leaf, "dtype"))


def measure(target: Card | jax.Device, function: Any, *args: Any, **static: Any) -> Memory:
    """Compiles a jitted function for a target and returns what it needs. Nothing runs.

    `args` hold arrays or shapes. For a device at hand the compiled program stays in JAX's own caches, so that running
    it afterwards compiles nothing.
    """
    if isinstance(target, Card):
        sharding = jax.sharding.SingleDeviceSharding(target.device())

        def shape(leaf: Any) -> Any:
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding) if hasattr(leaf, "dtype") else leaf
    else:

        def shape(leaf: Any) -> Any:
            if isinstance(leaf, jax.ShapeDtypeStruct):  # bound to a device, or free
                return leaf
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if hasattr(leaf, "dtype") else leaf

    lowered = function.lower(*jax.tree.map(shape, args), **static)
    name = target.name if isinstance(target, Card) else target.device_kind
    path = cache_folder("plans") / f"{digest(name, jax.__version__, lowered.as_text())}.memory.json"
    with suppress(OSError, ValueError, TypeError):
        return Memory(**json.loads(path.read_text()))
    started = time.monotonic()
    with _not_cached() if isinstance(target, Card) else nullcontext():
        analysis: Any = lowered.compile().memory_analysis()
    found = Memory(
        argument_bytes=analysis.argument_size_in_bytes,
        output_bytes=analysis.output_size_in_bytes,
        temp_bytes=analysis.temp_size_in_bytes,
        alias_bytes=analysis.alias_size_in_bytes,
        compile_seconds=round(time.monotonic() - started, 2),
    )
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(path) as temporary:
            temporary.write_text(json.dumps(asdict(found)))
        keep_newest(path.parent, "*.memory.json", KEPT)
    return found


@contextmanager
def _not_cached() -> Iterator[None]:
    """Without JAX's persistent cache, which cannot hold programs for a device that is not there."""
    enabled = jax.config.values["jax_enable_compilation_cache"]
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", enabled)


def free_bytes(device: jax.Device) -> int:
    """What programs may still take of a device at hand; of a CPU, what the system could give them now."""
    if device.platform == "cpu":
        return psutil.virtual_memory().available
    stats = device.memory_stats() or {}
    return int(stats.get("bytes_limit", 0) - stats.get("bytes_in_use", 0))


def peak_rss_bytes() -> int:
    """The most host memory that this process has had. What its parent had before it started does not count."""
    with suppress(OSError):
        found = re.search(r"^VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
        if found:
            return int(found[1]) * 1024
    # Other systems; ru_maxrss counts bytes on macOS and kilobytes elsewhere.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
