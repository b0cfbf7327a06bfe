"""Packages damaged at random, each from a seed: refused with a clear error, or converted to what the files now mean.

`python -m tests.convert.fuzz SEED` tells what becomes of one; `... FIRST LAST` of many.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
from einops import rearrange

from convert import ConvertError, convert
from convert.inventory import Expected
from convert.mapping import flatten, source_name
from convert.tables import table_of
from hlwq_jax import FormatError
from ltx_jax import durable
from ltx_jax.checkpoint import CheckpointError
from ltx_jax.config import ConfigError
from ltx_jax.text import TextError

from . import decoder, tiny
from .mutations import mutant
from .tiny import Release

REFUSALS = (ConvertError, FormatError, ConfigError, CheckpointError, TextError, OSError)  # as the command catches them
MEMORY_BOUND = 2**28  # a package has 1 MB; tracing a changed configuration, and compiling, takes more than reading it
ROOT = Path(__file__).parents[2]


class Failure(AssertionError):
    """A mutant that crashed the converter, was refused without a reason, or became something else than it says."""


class Verdict(NamedTuple):
    what: str  # was done to a package
    refused: str | None  # with which words; None: converted, and right


@contextmanager
def cheaply() -> Iterator[None]:
    """Without waiting for disks, and with the model of a configuration looked at once: neither depends on files.

    Where files lose their configuration, that of the tiny model is the one that is built in.
    Warnings of numpy are errors here: a user would see them, with no idea what they mean.
    """
    made = lru_cache(maxsize=64)(lambda text, configs: Expected(configs[0]))

    class Once(tuple):  # equal to any other, so that the text alone is the key
        __slots__ = ()
        __eq__ = lambda self, other: True  # noqa: E731
        __hash__ = lambda self: 0  # noqa: E731

    with (
        mock.patch.object(durable, "sync"),
        mock.patch.object(os, "fsync"),
        mock.patch("convert.inventory.Expected", lambda configs: made(repr(configs), Once([configs]))),
        mock.patch("convert.inventory.LTX_2_3", tiny.config()),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("error", RuntimeWarning)
        yield


def run(seed: int, scratch: Path) -> Verdict:
    """Converts a mutant and judges what comes of it. Raises Failure, with the seed."""
    release, files, what = mutant(seed)
    source, dest = scratch / "source", scratch / "dest"
    for folder in (source, dest):
        shutil.rmtree(folder, ignore_errors=True)
    Release(release.name, files, {}).write(source)
    try:
        return Verdict(what, _judge(release, source, dest))
    except Exception as error:
        raise Failure(f"seed {seed} ({release.name}: {what}): {type(error).__name__}: {error}") from error


def _judge(release: Release, source: Path, dest: Path) -> str | None:
    reset_peak()
    before = memory("VmRSS")
    gemma = source / tiny.GEMMA if release.gemma and (source / tiny.GEMMA).is_dir() else None
    try:
        manifest = convert(source, dest, gemma=gemma, gemma_bits=16)
    except REFUSALS as error:
        text = str(error)
        assert str(source) in text, f"an error that names no file: {text}"
        assert len(text) < 20_000, f"an error of {len(text)} characters"
        assert not dest.exists(), "something refused is there under its final name"
        assert not dest.with_name("dest.converting").exists(), "something is left of what was refused"
        return text
    finally:
        grown = memory("VmHWM") - before
        assert grown < MEMORY_BOUND, f"{grown >> 20} MiB more memory for {_size(source) >> 10} kiB of files"
    compare(release, source, dest, manifest)
    return None


def compare(release: Release, source: Path, dest: Path, manifest: Any) -> None:
    """Raises where a checkpoint is not what an independent decoder makes of the source files."""
    arrays = decoder.checkpoint(dest)
    ignored = set(manifest.provenance["ignored"])
    paths = [path for path in sorted(source.rglob("*.safetensors")) if str(path) not in ignored]
    upscalers = [path for path in paths if _is_upscaler(path)]
    gemma = [path for path in paths if (path.parent / "tokenizer.json").is_file()]
    main = [path for path in paths if path not in upscalers and path not in gemma]
    found: dict[str, np.ndarray] = {}
    for path in main:
        found |= decoder.tensors(path)
    sidecars = sorted(source.rglob(tiny.SIDECAR))
    sidecar = json.loads(sidecars[0].read_bytes()) if sidecars else {}
    for name, target in tiny.targets().items():
        key = f"{target.component}/{target.path}"
        if name not in release.packed:
            _same(arrays.pop(key), rearrange(decoder.plain(found, name), target.pattern), name)
            continue
        how = release.packed[name]
        weight = decoder.stored(found, name, how, target.shape, sidecar)
        assert np.isfinite(weight.norms).all(), f"norms of {name} that are not finite were taken"
        assert (weight.norms >= 0).all(), f"negative norms of {name} were taken"
        assert weight.codes.max() < len(weight.scaled), f"codes of {name} without a level were taken"
        size = int(np.prod(target.shape))
        if key in arrays:  # unpacked
            values = decoder.decode(weight, how.block_size).reshape(-1)[:size].reshape(target.shape)
            given = rearrange(arrays.pop(key), "i o -> o i").astype(np.float64)
            # Rounded to bfloat16, of values that were computed in float32.
            assert np.abs(given - values).max() <= 2**-8 * np.abs(values).max(), f"{name} has other values"
            continue
        path = key.removesuffix(".kernel")
        given = {
            k: arrays.pop(f"{path}.{k}") for k in ("lo", "hi", "norms", "scaled_centroids") if f"{path}.{k}" in arrays
        }
        facts = manifest.quantized[target.component][target.path.removesuffix(".kernel")]
        assert (facts.out_features, facts.in_features) == target.shape, name
        assert (facts.bits, facts.block_size, facts.history_bits, facts.signs) == (how.bits, how.block_size, 0, False)
        unpacked = decoder.planes(given, bits=how.bits, block_size=how.block_size)
        _same(unpacked.codes, weight.codes, f"codes of {name}")
        _same(unpacked.norms, weight.norms, f"norms of {name}")
        # The table is computed in doubles here and there, and divided by a square root in float32.
        np.testing.assert_allclose(unpacked.scaled, weight.scaled, rtol=1e-6, err_msg=f"table of {name}")
    for path in upscalers:
        _companion(arrays, "upscaler_spatial_x2", decoder.tensors(path), "")
        config = json.loads(decoder.metadata(path).get("config", json.dumps(tiny.UPSCALER_CONFIG)))
        assert manifest.upscaler_metadata["upscaler_spatial_x2"] == config
    if manifest.gemma_metadata is not None:
        tensors = {name: x for path in gemma for name, x in decoder.tensors(path).items()}
        _companion(arrays, "gemma", tensors, "language_model.model.")
        assert manifest.gemma_metadata == json.loads((gemma[0].parent / "config.json").read_bytes())
        for name in ("tokenizer.json", "tokenizer_config.json"):
            original = gemma[0].parent / name
            assert not original.is_file() or (dest / "tokenizer" / name).read_bytes() == original.read_bytes()
    assert not arrays, f"arrays of nothing: {sorted(arrays)[:5]}"
    configs = {text for path in main if (text := decoder.metadata(path).get("config")) is not None}
    (config,) = configs or {json.dumps(tiny.config())}
    registers = {"connector_num_learnable_registers": tiny.config()["transformer"]["connector_num_learnable_registers"]}
    expected = json.loads(config)
    expected["transformer"] |= registers
    assert manifest.metadata == expected


def _companion(arrays: dict[str, np.ndarray], component: str, found: Mapping[str, np.ndarray], prefix: str) -> None:
    rules = list(flatten(table_of(component, tiny.expected().configs.upscalers)[1]))
    for path in tiny.expected().shapes[component]:
        name = source_name(rules, path)
        pattern = next(rule.pattern for rule in rules if rule.match(name) == path)
        _same(arrays.pop(f"{component}/{path}"), rearrange(found[prefix + name], pattern), name)


def _same(given: np.ndarray, expected: np.ndarray, name: str) -> None:
    """To the bit, and of the same kind."""
    assert given.dtype == expected.dtype, f"{name} is {given.dtype}, the file has {expected.dtype}"
    assert given.shape == expected.shape, f"{name} is {given.shape}, the file has {expected.shape}"
    assert given.tobytes() == expected.tobytes(), f"{name} has other values than the file"


def _is_upscaler(path: Path) -> bool:
    config = decoder.metadata(path).get("config")
    if config is None:
        return "initial_conv.weight" in decoder.tensors(path)
    return json.loads(config).get("_class_name") == "LatentUpsampler"


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def reset_peak() -> None:
    """Makes the system measure the peak of memory anew, where it can (Linux)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def memory(name: str) -> int:
    """Bytes by a name of /proc/self/status; 0 where there is none."""
    try:
        text = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    found = re.search(rf"^{name}:\s+(\d+) kB", text, re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def run_many(seeds: range) -> Counter[str]:
    """Judges many, and returns how many were refused and how many converted.

    Raises Failure, with all that failed, at the end.
    """
    counts: Counter[str] = Counter()
    failures = []
    with scratch_folder() as scratch, cheaply():
        for seed in seeds:
            print(f"seed {seed}", file=sys.stderr, flush=True)  # the last one tells which it was, should this die
            try:
                counts["converted" if run(seed, scratch).refused is None else "refused"] += 1
            except Failure as failure:
                failures.append(str(failure))
    if failures:
        raise Failure(f"{len(failures)} of {len(seeds)}:\n" + "\n".join(failures))
    return counts


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """In memory where the system has such a place: a mutant is some hundreds of small files."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        yield Path(folder)


def in_another_process(seeds: range) -> dict[str, int]:
    """As `run_many`, where a crash is seen, and without the type checks of a test run, which take thrice the time."""
    command = [sys.executable, "-m", __spec__.name, str(seeds.start), str(seeds.stop)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout[-2000:]}{done.stderr[-20_000:]}"
    return json.loads(done.stdout)


if __name__ == "__main__":
    first, *last = map(int, sys.argv[1:])
    if last:
        print(json.dumps(run_many(range(first, *last))))
    else:
        with scratch_folder() as folder, cheaply():
            print(run(first, folder))
