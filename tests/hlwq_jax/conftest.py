"""Small packages in every layout, built in memory from random weights."""

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from hlwq_jax import LazyTensor, Quantized, TableName, mangle, pack, quantize

HLWQ = Path(__file__).parents[1] / "data" / "hlwq"


@pytest.fixture(scope="session")
def hlwq_dir() -> Path:
    """Packages written by the original packer, and the original's decoded weights."""
    return HLWQ


def gaussian(out: int, in_features: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((out, in_features), dtype=np.float32) * np.float32(0.02)


def lazy(arrays: dict[str, np.ndarray]) -> dict[str, LazyTensor]:
    return {name: LazyTensor.from_array(name, array) for name, array in arrays.items()}


def stored_as(layout: str, name: str, weight: Quantized) -> dict[str, np.ndarray]:
    """The tensors of one weight (`name` without `.weight`) in a layout."""
    bits, block = weight.bits, weight.block_size
    out, blocks = weight.norms.shape
    signed = weight.codes.view(np.int8)
    scaled = {f"{name}.ct_scaled": weight.centroids / np.float32(block**0.5)}
    total = out * blocks * block
    if layout == "V1":
        return {f"{name}.codes": signed, f"{name}.norms": weight.norms, **scaled}
    if layout in ("V2", "V3"):
        packing = "H" if bits <= 4 else "L" if bits == 5 and layout == "V2" else "N"
        codes = pack(weight.codes, bits=bits, packing=packing, block_size=block).reshape(out, -1)
        suffix = "codes_packed" if layout == "V3" and bits <= 4 else "codes"
        return {f"{name}.{suffix}": codes, f"{name}.norms": weight.norms, **scaled}
    if layout == "V4":
        return {f"{mangle(name)}__codes": signed, f"{mangle(name)}__norms": weight.norms}
    stem = mangle(f"{name}.weight") if layout == "V5" else f"{name}.weight"
    meta = [out, blocks, block, total] + ([weight.in_features] if layout == "V6" else [])
    return {
        # 2-bit streams are taken for the later notebook's, least significant bit first, where meta has 5 entries.
        f"{stem}__packed": pack(weight.codes, bits=bits, packing="L" if bits == 2 and layout == "V6" else "M"),
        f"{stem}__norms": weight.norms,
        f"{stem}__meta": np.array(meta, np.int64),
    }


def random_quantized(
    out: int, in_features: int, *, bits: int = 5, table: TableName = "A", block_size: int = 128, seed: int = 0
) -> Quantized:
    return quantize(gaussian(out, in_features, seed), bits=bits, table=table, block_size=block_size)


def assert_decodes(decoded: np.ndarray, expected: np.ndarray) -> None:
    """Equal to within one bfloat16 step of the largest value: what the order of float32 sums may change."""
    assert decoded.dtype == ml_dtypes.bfloat16
    assert decoded.shape == expected.shape
    decoded, expected = decoded.astype(np.float32), expected.astype(np.float32)
    assert np.abs(decoded - expected).max() <= 2**-8 * np.abs(expected).max()
