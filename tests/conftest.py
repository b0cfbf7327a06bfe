"""Shared by all tests: where the reference data lies, and models filled from a published checkpoint."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from scripts.parity_cases import fill

DATA = Path(__file__).parent / "data"
# JAX 0.10 fuses a streamed block as it does one of all blocks in a program, 0.12 does not: what both compute is then a
# few roundings of float32 apart, for values up to 4, as README.md says.
STREAMED_ATOL = 0 if jax.__version_info__ < (0, 11) else 2e-6
FOLDER = "LTX_JAX_TESTS"  # environment variable: where a run of tests keeps what it caches


def pytest_configure() -> None:
    # One folder for all workers of a run, which inherit its name, removed in the end.
    folder = os.environ.setdefault(FOLDER, tempfile.mkdtemp(prefix="ltx-jax-tests-"))
    # Tests neither read nor leave anything in the user's cache; each worker has its own.
    os.environ["LTX_JAX_CACHE"] = tempfile.mkdtemp(dir=folder)
    # Programs that several files of tests need are compiled once.
    os.environ["JAX_COMPILATION_CACHE_DIR"] = f"{folder}/compiled"
    jax.config.update("jax_compilation_cache_dir", f"{folder}/compiled")
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    # A CUDA plug-in that is there to compile for named cards would otherwise look for one to run on.
    jax.config.update("jax_platforms", "cpu")


def pytest_unconfigure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        shutil.rmtree(os.environ.pop(FOLDER), ignore_errors=True)


jax.config.update("jax_default_matmul_precision", "highest")


@pytest.fixture(scope="session")
def ltx_dir() -> Path:
    """Tiny models and what the reference computes with them."""
    return DATA / "ltx"


@pytest.fixture(scope="session")
def mini_release() -> Path:
    """A whole release in the published file layout, with reference clips."""
    return DATA / "mini-release"


@pytest.fixture(scope="session")
def ltx_config(ltx_dir: Path) -> dict:
    return json.loads((ltx_dir / "config.json").read_text())


@pytest.fixture(scope="session")
def reference(ltx_dir: Path) -> Callable[[str], dict[str, np.ndarray]]:
    """`reference("video_vae")`: the arrays of one reference file."""
    return lambda name: load_file(ltx_dir / f"{name}.safetensors")


@pytest.fixture(scope="session")
def mini_checkpoint(mini_release: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The miniature release, converted; its text encoder unpacked, as the reference ran it."""
    from convert import convert

    dest = tmp_path_factory.mktemp("checkpoint") / "mini"
    convert(mini_release / "LTX-2.3-22B-PolarQuant-Q5", dest, gemma=mini_release / "gemma-3-mini", gemma_bits=16)
    return dest


def read_prefix(path: Path, prefix: str) -> dict[str, np.ndarray]:
    """The tensors of a safetensors file below `prefix`, which is cut off."""
    with safe_open(path, "np") as file:
        return {key.removeprefix(prefix): file.get_tensor(key) for key in file.keys() if key.startswith(prefix)}  # noqa: SIM118


__all__ = ["DATA", "STREAMED_ATOL", "fill", "read_prefix"]
