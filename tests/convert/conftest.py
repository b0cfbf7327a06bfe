"""Small packages made from the miniature release, to be damaged."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from hlwq_jax import TensorFile

PACKAGE = "LTX-2.3-22B-PolarQuant-Q5"


@pytest.fixture
def package(mini_release, tmp_path) -> Path:
    """A copy of the package that a test may change."""
    return Path(shutil.copytree(mini_release / PACKAGE, tmp_path / "package"))


@pytest.fixture
def rewrite() -> Callable[..., None]:
    """`rewrite(path, change)` writes a safetensors file anew with `change(tensors, metadata)` applied."""

    def apply(path: Path, change: Callable[[dict[str, np.ndarray], dict[str, str]], None]) -> None:
        file = TensorFile(path)
        tensors = {name: file.read(name) for name in file}
        metadata = dict(file.metadata)
        change(tensors, metadata)
        save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, path, metadata=metadata or None)

    return apply


@pytest.fixture
def codes(package) -> list[Path]:
    return sorted((package / "polarquant/codes").glob("*.safetensors"))


@pytest.fixture
def kept(package) -> Path:
    return package / "polarquant/bf16/ltx23_bf16.safetensors"
