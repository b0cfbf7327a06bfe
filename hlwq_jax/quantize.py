"""One weight to codes and norms, and back, as the original packer and reader compute it (in float32)."""

from dataclasses import dataclass

import ml_dtypes
import numpy as np
from jaxtyping import BFloat16, Float, Float16, Float32, UInt8

from hlwq_jax.codebook import TableName, lloyd_max
from hlwq_jax.hadamard import check_block_size, hadamard_matrix

_CHUNK = 2**22  # values worked on at a time, so that float32 copies of a large weight never exist at once
_IN_CACHE = 2**17  # values that levels are looked up for at a time: a third of the time of a chunk at once
_CELLS = 4096


@dataclass(frozen=True, kw_only=True)
class Quantized:
    """A quantized weight of `[out_features, in_features]`; rows are padded to whole blocks."""

    codes: UInt8[np.ndarray, "out padded"]
    norms: Float16[np.ndarray, "out blocks"]
    centroids: Float32[np.ndarray, " levels"]
    bits: int
    block_size: int
    in_features: int

    @property
    def out_features(self) -> int:
        return self.codes.shape[0]

    @property
    def scaled_centroids(self) -> Float32[np.ndarray, " levels"]:
        return scale_centroids(self.centroids, self.block_size)

    def dequantize(self) -> BFloat16[np.ndarray, "out in"]:
        return dequantize(
            self.codes,
            self.norms,
            self.centroids,
            block_size=self.block_size,
            in_features=self.in_features,
        )


def scale_centroids(centroids: Float32[np.ndarray, " levels"], block_size: int) -> Float32[np.ndarray, " levels"]:
    """The levels divided by sqrt(block_size), as decoders look them up and some packages store them (`ct_scaled`)."""
    return centroids / np.float32(block_size**0.5)


def quantize(
    weight: Float[np.ndarray, "out in"], *, bits: int = 5, block_size: int = 128, table: TableName = "A"
) -> Quantized:
    """Quantizes a weight at 2 to 8 bits a value; blocks run along the input axis.

    Raises where a value is not finite or a block's norm does not fit float16 (65504): such a weight cannot be written.
    """
    if not 2 <= bits <= 8:
        raise ValueError(f"bits must be 2 to 8, got {bits}")
    check_block_size(block_size)
    out_features, in_features = weight.shape
    if not in_features:
        raise ValueError("a weight without inputs cannot be quantized")
    num_blocks = -(-in_features // block_size)
    codes = np.empty((out_features, num_blocks * block_size), np.uint8)
    norms = np.empty((out_features, num_blocks), np.float16)
    centroids = lloyd_max(bits, table)
    rows = rows_at_once(in_features, block_size)
    for start in range(0, out_features, rows):
        chunk = np.asarray(weight[start : start + rows], np.float32)
        if codes.shape[1] > in_features:
            chunk = np.pad(chunk, ((0, 0), (0, codes.shape[1] - in_features)))
        blocks = chunk.reshape(-1, block_size)
        with np.errstate(over="ignore"):  # what overflows is refused just below
            block_norms = np.maximum(np.linalg.norm(blocks, axis=1), np.float32(1e-10))
            stored = block_norms.astype(np.float16)
        if not np.isfinite(stored).all():
            row, block = divmod(int(np.argmin(np.isfinite(stored))), num_blocks)
            raise ValueError(
                f"row {start + row}, block {block} has a norm of {block_norms[row * num_blocks + block]}, "
                "which float16 cannot hold: keep this weight unquantized, or scale it down"
            )
        rotated = (blocks / block_norms[:, None]) @ hadamard_matrix(block_size)
        rotated *= np.float32(block_size**0.5)
        codes[start : start + rows] = nearest(rotated, centroids).reshape(len(chunk), -1)
        norms[start : start + rows] = stored.reshape(len(chunk), -1)
    return Quantized(
        codes=codes, norms=norms, centroids=centroids, bits=bits, block_size=block_size, in_features=in_features
    )


def rows_at_once(in_features: int, block_size: int = 128) -> int:
    """How many rows `quantize` works on at a time.

    A weight may come in slices that begin at multiples of it, and has the same codes as the whole then: at other places
    the matrix product may sum in another order, and a value within a rounding of two levels go to the other one.
    """
    return max(1, _CHUNK // (-(-in_features // block_size) * block_size))


def nearest(
    values: Float32[np.ndarray, "*shape"], centroids: Float32[np.ndarray, " levels"]
) -> UInt8[np.ndarray, "*shape"]:
    """The index of the level nearest to each value, the lower one at a tie: `searchsorted(midpoints, values)`.

    Values are first dropped into cells so fine that each holds at most one midpoint, then compared with that one:
    exact, and twenty times as fast as a binary search per value.
    """
    midpoints = (centroids[:-1] + centroids[1:]) / np.float32(2)
    lowest = midpoints[0]
    scale = np.float32((_CELLS - 2) / max(midpoints[-1] - lowest, 1e-3))

    def cell(x: np.ndarray) -> np.ndarray:
        place = (x - lowest) * scale
        np.clip(place, -1, _CELLS - 2, out=place)
        place += np.float32(1)
        return place.astype(np.intp)

    own = cell(midpoints)
    if (np.diff(own) == 0).any():
        return np.searchsorted(midpoints, values, side="left").astype(np.uint8)
    below = np.searchsorted(own, np.arange(_CELLS), side="left").astype(np.uint8)  # midpoints in cells before this one
    edge = np.full(_CELLS, np.inf, np.float32)
    edge[own] = midpoints
    flat = values.reshape(-1)
    codes = np.empty(flat.shape, np.uint8)
    for start in range(0, flat.size, _IN_CACHE):
        piece = flat[start : start + _IN_CACHE]
        where = cell(piece)
        codes[start : start + _IN_CACHE] = below.take(where) + (piece > edge.take(where))
    return codes.reshape(values.shape)


def dequantize(
    codes: UInt8[np.ndarray, "out padded"],
    norms: Float16[np.ndarray, "out blocks"],
    centroids: Float32[np.ndarray, " levels"],
    *,
    block_size: int = 128,
    in_features: int | None = None,
) -> BFloat16[np.ndarray, "out in"]:
    """The weight that codes stand for: lookup, scale, rotate, multiply by the norm, round to bfloat16, in that order.

    `in_features` cuts the padding off; None keeps all columns. Raises where a code has no level.
    """
    check_block_size(block_size)
    if codes.shape != (norms.shape[0], norms.shape[1] * block_size):
        raise ValueError(f"norms {norms.shape} and blocks of {block_size} do not fit codes {codes.shape}")
    if codes.size and int(codes.max()) >= len(centroids):
        raise ValueError(f"codes must be below {len(centroids)}, got {int(codes.max())}")
    scaled = scale_centroids(centroids, block_size)
    matrix = hadamard_matrix(block_size)
    weight = np.empty((codes.shape[0], codes.shape[1] if in_features is None else in_features), ml_dtypes.bfloat16)
    rows = max(1, _CHUNK // max(codes.shape[1], 1))
    for start in range(0, len(codes), rows):
        stop = start + rows
        blocks = scaled[codes[start:stop]].reshape(-1, block_size) @ matrix
        blocks *= norms[start:stop].astype(np.float32).reshape(-1, 1)
        weight[start:stop] = blocks.reshape(-1, codes.shape[1])[:, : weight.shape[1]]
    return weight
