"""Linears that are packed while converting: which ones, at how many bits, and how close they come to what was there.

They are quantised as the published packages are: blocks of 128 inputs, table A. A linear that arrives packed is never
quantised again.
"""

import os
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from convert.files import ConvertError
from hlwq_jax import FormatError, LazyTensor, TableName, dequantize, pack_planes, plane_widths, quantize
from hlwq_jax.quantize import rows_at_once
from ltx_jax.checkpoint import QuantizedShape

BITS, BLOCK_SIZE = 5, 128
TABLE: TableName = "A"
UNPACKED_BITS = 16  # of the text encoder: as published
GEMMA = "gemma"
# Group -> the component it lies in, and the paths of its linears there. Gates, embeddings and norms are in none.
GROUPS: Mapping[str, tuple[str, re.Pattern[str]]] = {
    GEMMA: ("gemma", re.compile(r"layers\.\d+\.(attn|ff)\.\w+")),
    "connectors": ("connectors", re.compile(r"(video|audio)\.blocks\.\d+\.(attn|ff)\.(?!to_gate_logits)\w+")),
    "projection": ("connectors", re.compile(r"projection\.(video|audio)")),
    "adaln": ("transformer", re.compile(r"(video|audio)\.\w*adaln\.\w+")),
}
OPTIONAL = tuple(group for group in GROUPS if group != GEMMA)
_ERROR_ROWS = 16  # one row in so many is decoded again, to measure the error: a twentieth of the time of quantising
_THREADS = min(4, os.cpu_count() or 1)  # each needs 0.1 GB for its slice


@dataclass(frozen=True)
class Quantizing:
    """What a conversion packs: bits by group."""

    bits: Mapping[str, int]

    @classmethod
    def of(cls, *, gemma_bits: int, groups: Iterable[str]) -> "Quantizing":
        """Raises ConvertError for bits and groups that do not exist."""
        groups = tuple(groups)
        unknown = sorted(set(groups) - set(OPTIONAL))
        if unknown:
            raise ConvertError(f"nothing called {', '.join(unknown)} to quantize; there are {', '.join(OPTIONAL)}")
        if gemma_bits != UNPACKED_BITS and not 2 <= gemma_bits <= 8:
            raise ConvertError(f"gemma bits must be 2 to 8, or {UNPACKED_BITS} to leave it as it is; got {gemma_bits}")
        packed = {} if gemma_bits == UNPACKED_BITS else {GEMMA: gemma_bits}
        return cls(packed | {group: BITS for group in OPTIONAL if group in groups})

    def group(self, component: str, parameter: str) -> str | None:
        """The group to be packed that a parameter of a component is in, or None."""
        path = parameter.removesuffix(".kernel")
        if path == parameter:
            return None
        for group in self.bits:
            owner, paths = GROUPS[group]
            if owner == component and paths.fullmatch(path):
                return group
        return None

    def pack(self, tensor: LazyTensor, group: str) -> "QuantizedTensor":
        """Packs a weight of a group. Raises ConvertError, with the option that leaves it out, where it cannot be."""
        try:
            return quantize_tensor(tensor, bits=self.bits[group])
        except FormatError:  # a damaged file
            raise
        except ValueError as error:
            otherwise = f"--gemma-bits {UNPACKED_BITS}" if group == GEMMA else f"{group} left out of --quantize"
            raise ConvertError(f"{tensor.where} cannot be quantised: {error}; convert with {otherwise}") from error


@dataclass(frozen=True, kw_only=True)
class QuantizedTensor:
    """A linear's weight as it is stored in a checkpoint."""

    arrays: Mapping[str, np.ndarray]  # lo, hi (unless the bits leave it empty), norms, scaled_centroids
    shape: QuantizedShape
    relative_error: float  # of the decoded weight, root mean square, from every 16th row of a slice


def quantize_tensor(tensor: LazyTensor, *, bits: int) -> QuantizedTensor:
    """Packs a published weight `[out, in]` slice by slice: it is never in memory as a whole.

    The bits are those of `hlwq_jax.quantize` of the whole. Raises ValueError for values that it refuses, FormatError
    for a file that ends early.
    """
    out_features, in_features = tensor.shape
    num_blocks = -(-in_features // BLOCK_SIZE)
    lo_words, hi_words = plane_widths(num_blocks * BLOCK_SIZE, bits)
    lo, hi = np.empty((out_features, lo_words), np.uint32), np.empty((out_features, hi_words), np.uint32)
    norms = np.empty((out_features, num_blocks), np.float16)
    rows = rows_at_once(in_features, BLOCK_SIZE)

    def pack(start: int) -> tuple[np.ndarray, float, float]:
        place = slice(start, min(start + rows, out_features))
        weight = tensor.read_rows(place.start, place.stop)
        try:
            quantized = quantize(weight, bits=bits, block_size=BLOCK_SIZE, table=TABLE)
        except ValueError as error:
            raise ValueError(f"in rows {place.start} to {place.stop}, {error}") from error
        lo[place], high = pack_planes(quantized.codes, bits)
        if high is not None:
            hi[place] = high
        norms[place] = quantized.norms
        sample = slice(None, None, _ERROR_ROWS)
        decoded = dequantize(
            quantized.codes[sample],
            quantized.norms[sample],
            quantized.centroids,
            block_size=BLOCK_SIZE,
            in_features=in_features,
        )
        original = weight[sample].astype(np.float32)
        error = decoded.astype(np.float32) - original
        return quantized.scaled_centroids, float(np.vdot(error, error)), float(np.vdot(original, original))

    with ThreadPoolExecutor(_THREADS) as pool:
        scaled_centroids, errors, squares = zip(*pool.map(pack, range(0, out_features, rows)), strict=True)
    arrays = {"lo": lo, "norms": norms, "scaled_centroids": scaled_centroids[0]} | ({"hi": hi} if hi_words else {})
    return QuantizedTensor(
        arrays=arrays,
        shape=QuantizedShape(in_features=in_features, out_features=out_features, bits=bits, block_size=BLOCK_SIZE),
        relative_error=(sum(errors) / max(sum(squares), 1e-30)) ** 0.5,
    )


def packed_bytes(out_features: int, in_features: int, *, bits: int, block_size: int = BLOCK_SIZE) -> int:
    """Bytes of a weight in the device layout, with its norms and levels; rows are padded to whole blocks."""
    num_blocks = -(-in_features // block_size)
    words = sum(plane_widths(num_blocks * block_size, bits))
    return out_features * (4 * words + 2 * num_blocks) + 4 * 2**bits
