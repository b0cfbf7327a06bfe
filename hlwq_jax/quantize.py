"""One weight to codes and norms, and back, in float32.

By default as the original packer and reader compute it, bit for bit. A `Recipe` can do better at the same size: a
converged or a trellis codebook, signs before the rotation, norms that fit the levels (docs/quantization.md).
"""

from dataclasses import dataclass
from typing import Literal, get_args

import ml_dtypes
import numpy as np
from jaxtyping import BFloat16, Float, Float16, Float32, Int8, UInt8

from hlwq_jax.codebook import TableName, lloyd_max
from hlwq_jax.hadamard import check_block_size, hadamard_matrix
from hlwq_jax.trellis import trellis_encode, trellis_indices, trellis_table

Norm = Literal["l2", "least-squares", "fitted"]
NORMS: tuple[Norm, ...] = get_args(Norm)

_CHUNK = 2**22  # values worked on at a time, so that float32 copies of a large weight never exist at once
_IN_CACHE = 2**17  # values that levels are looked up for at a time: a third of the time of a chunk at once
_CELLS = 4096
_SCALES = 24  # that a block beyond the levels is tried at


@dataclass(frozen=True, kw_only=True)
class Quantized:
    """A quantized weight of `[out_features, in_features]`; rows are padded to whole blocks."""

    codes: UInt8[np.ndarray, "out padded"]
    norms: Float16[np.ndarray, "out blocks"]
    centroids: Float32[np.ndarray, " levels"]  # 2**(bits + history_bits)
    bits: int
    block_size: int
    in_features: int
    history_bits: int = 0  # of a trellis (see `trellis`); 0: `centroids[code]` are the levels
    signs: Int8[np.ndarray, " in"] | None = None  # ±1, multiplied with the columns before the rotation

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
            history_bits=self.history_bits,
            signs=self.signs,
        )


def scale_centroids(centroids: Float32[np.ndarray, " levels"], block_size: int) -> Float32[np.ndarray, " levels"]:
    """The levels divided by sqrt(block_size), as decoders look them up and some packages store them (`ct_scaled`)."""
    return centroids / np.float32(block_size**0.5)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How weights are quantized: `PUBLISHED_RECIPE` by default; `BEST_RECIPE` has the least error for its size.

    `quantize(weight)` may be given the rows of a weight in slices that begin at multiples of
    `rows_at_once(in_features, block_size)`: codes and norms are those of the whole, and signs are equal in all slices.
    """

    bits: int = 5  # 2 to 8; with a trellis, 2 to 6
    block_size: int = 128
    table: TableName = "A"  # of a scalar codebook; a trellis has its own
    history_bits: int = 0  # 3, 5 or 7: a trellis, which doubles the time and lowers the error with each bit
    sign_seed: int | None = None  # of `random_signs`; None: no signs
    norm: Norm = "l2"

    def quantize(self, weight: Float[np.ndarray, "out in"]) -> Quantized:
        """As `hlwq_jax.quantize` does it, with what that raises."""
        return quantize(
            weight,
            bits=self.bits,
            block_size=self.block_size,
            table=self.table,
            history_bits=self.history_bits,
            signs=self.signs(weight.shape[1]),
            norm=self.norm,
        )

    def signs(self, in_features: int) -> Int8[np.ndarray, " in"] | None:
        return None if self.sign_seed is None else random_signs(in_features, self.sign_seed)


PUBLISHED_RECIPE = Recipe()
BEST_RECIPE = Recipe(history_bits=7, sign_seed=0, norm="least-squares")


def random_signs(num: int, seed: int) -> Int8[np.ndarray, " num"]:
    """±1 by the top bit (0: +1) of SplitMix64's first outputs for a seed, in unsigned 64-bit arithmetic.

    Source: Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014, with the constants of
    Vigna's splitmix64.c.
    """
    with np.errstate(over="ignore"):
        state = np.uint64(seed) + np.arange(1, num + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ state >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ state >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return np.where((state ^ state >> np.uint64(31)) >> np.uint64(63), -1, 1).astype(np.int8)


def quantize(
    weight: Float[np.ndarray, "out in"],
    *,
    bits: int = 5,
    block_size: int = 128,
    table: TableName = "A",
    history_bits: int = 0,
    signs: Int8[np.ndarray, " in"] | None = None,
    norm: Norm = "l2",
) -> Quantized:
    """Quantizes a weight at 2 to 8 bits a value; blocks run along the input axis.

    `history_bits` above 0 encodes by a trellis in place of `table`, at 2 to 6 bits. `signs` (±1) are multiplied with
    the columns first: without them a block with a large mean rotates into one value that no level reaches.

    The norm "l2" is the block's own; "least-squares" the factor with which the levels chosen come closest to the block;
    "fitted" the same, but blocks with a value beyond the outermost level, which would be clipped, have their levels
    chosen by a larger norm where that comes closer (a trellis has the least-squares norm instead). Readers need not
    know: they use codes and norms alike. What tells tables apart (`energy`) stays, as most blocks have the codes of
    "l2", and the others an outermost one.

    Raises where a value is not finite or a block's norm does not fit float16 (65504): such a weight cannot be written.
    """
    if not 2 <= bits <= 8:
        raise ValueError(f"bits must be 2 to 8, got {bits}")
    check_block_size(block_size)
    if norm not in NORMS:
        raise ValueError(f"norm must be one of {', '.join(NORMS)}, got {norm!r}")
    out_features, in_features = weight.shape
    if not in_features:
        raise ValueError("a weight without inputs cannot be quantized")
    num_blocks = -(-in_features // block_size)
    codes = np.empty((out_features, num_blocks * block_size), np.uint8)
    norms = np.empty((out_features, num_blocks), np.float16)
    centroids = trellis_table(bits, history_bits) if history_bits else lloyd_max(bits, table)
    rows = rows_at_once(in_features, block_size)
    for start in range(0, out_features, rows):
        chunk = np.asarray(weight[start : start + rows], np.float32)
        if signs is not None:
            chunk = chunk * signs
        if codes.shape[1] > in_features:
            chunk = np.pad(chunk, ((0, 0), (0, codes.shape[1] - in_features)))
        blocks = chunk.reshape(-1, block_size)
        # In pieces that fit a core's cache; the product alone is of all at once, as its rounding may hang on the count.
        at_once = max(1, _IN_CACHE // block_size)
        pieces = [slice(first, first + at_once) for first in range(0, len(blocks), at_once)]
        values, exact_norms = np.empty_like(blocks), np.empty(len(blocks), np.float32)
        with np.errstate(over="ignore", invalid="ignore"):  # what overflows is refused
            for piece in pieces:
                exact_norms[piece] = np.maximum(np.linalg.norm(blocks[piece], axis=1), np.float32(1e-10))
                np.divide(blocks[piece], exact_norms[piece, None], out=values[piece])
            norms[start : start + rows] = exact_norms.reshape(len(chunk), -1)
            _check_norms(norms[start : start + rows], exact_norms, first_row=start)
            values = values @ hadamard_matrix(block_size)
            values *= np.float32(block_size**0.5)
        found = codes[start : start + rows].reshape(-1, block_size)
        if history_bits:
            found[...] = trellis_encode(values, centroids, bits=bits)
        for piece in pieces:
            if not history_bits:
                found[piece] = nearest(values[piece], centroids)
                if norm == "fitted":
                    _fit_clipped(values[piece], found[piece], centroids)
            if norm != "l2":
                levels = _levels(found[piece], centroids, bits=bits, history_bits=history_bits)
                exact_norms[piece] *= np.vecdot(values[piece], levels) / np.vecdot(levels, levels)
        if norm != "l2":
            with np.errstate(over="ignore"):
                norms[start : start + rows] = exact_norms.reshape(len(chunk), -1)
            _check_norms(norms[start : start + rows], exact_norms, first_row=start)
    return Quantized(
        codes=codes,
        norms=norms,
        centroids=centroids,
        bits=bits,
        block_size=block_size,
        in_features=in_features,
        history_bits=history_bits,
        signs=signs,
    )


def _fit_clipped(
    values: Float32[np.ndarray, "num block"],
    codes: UInt8[np.ndarray, "num block"],
    centroids: Float32[np.ndarray, " levels"],
) -> None:
    """Chooses the codes of blocks that reach beyond the levels anew, in place, for the norm that fits them best.

    Blocks with a large mean rotate into one such value. Norms grow at most until it is just rounded to an outermost
    level: a block without one would not look like the codes of its table (`energy.observe`).
    """
    reach = np.abs(values).max(axis=1)
    outermost = float(max(-centroids[0], centroids[-1]))
    chosen = np.flatnonzero(reach > outermost)
    if not chosen.size:
        return
    block, last = values[chosen], float(min(-(centroids[0] + centroids[1]), centroids[-2] + centroids[-1]) / 2)
    most = reach[chosen] / last * (1 - 1e-5)
    best = np.full(len(chosen), -1.0, np.float32)
    for share in np.linspace(0, 1, _SCALES, dtype=np.float32):
        found = nearest(block / (1 + share * (most - 1))[:, None], centroids)
        levels = centroids.take(found)
        # What the least-squares norm leaves is the block's square less this.
        explained = np.square(np.vecdot(block, levels)) / np.vecdot(levels, levels)
        better = explained > best
        best[better] = explained[better]
        codes[chosen[better]] = found[better]


def _check_norms(
    stored: Float16[np.ndarray, "rows blocks"], exact: Float32[np.ndarray, " num"], *, first_row: int
) -> None:
    fits = np.isfinite(stored)
    if not fits.all():
        first = int(np.argmin(fits))
        row, block = divmod(first, stored.shape[1])
        raise ValueError(
            f"row {first_row + row}, block {block} has a norm of {exact[first]}, "
            "which float16 cannot hold: keep this weight unquantized, or scale it down"
        )


def _levels(
    codes: UInt8[np.ndarray, "num block"], centroids: Float32[np.ndarray, " levels"], *, bits: int, history_bits: int
) -> Float32[np.ndarray, "num block"]:
    """What the codes of blocks look up."""
    return centroids.take(trellis_indices(codes, bits=bits, history_bits=history_bits) if history_bits else codes)


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
        """Counted from 1; what lies below or above all cells is taken to the first or the last by `take`."""
        place = (x - lowest) * scale
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
        codes[start : start + _IN_CACHE] = below.take(where, mode="clip") + (piece > edge.take(where, mode="clip"))
    return codes.reshape(values.shape)


def dequantize(
    codes: UInt8[np.ndarray, "out padded"],
    norms: Float16[np.ndarray, "out blocks"],
    centroids: Float32[np.ndarray, " levels"],
    *,
    block_size: int = 128,
    in_features: int | None = None,
    history_bits: int = 0,
    signs: Int8[np.ndarray, " in"] | None = None,
) -> BFloat16[np.ndarray, "out in"]:
    """The weight that codes stand for: lookup, scale, rotate, multiply by the norm (and signs), round to bfloat16.

    `in_features` cuts the padding off; None keeps all columns. Raises where a code has no level.
    """
    check_block_size(block_size)
    if codes.shape != (norms.shape[0], norms.shape[1] * block_size):
        raise ValueError(f"norms {norms.shape} and blocks of {block_size} do not fit codes {codes.shape}")
    num_codes = len(centroids) >> history_bits
    if codes.size and int(codes.max()) >= num_codes:
        raise ValueError(f"codes must be below {num_codes}, got {int(codes.max())}")
    bits = (num_codes - 1).bit_length()
    scaled = scale_centroids(centroids, block_size)
    matrix = hadamard_matrix(block_size)
    weight = np.empty((codes.shape[0], codes.shape[1] if in_features is None else in_features), ml_dtypes.bfloat16)
    rows = max(1, _CHUNK // max(codes.shape[1], 1))
    for start in range(0, len(codes), rows):
        stop = start + rows
        blocks = codes[start:stop].reshape(-1, block_size)
        blocks = _levels(blocks, scaled, bits=bits, history_bits=history_bits) @ matrix
        blocks *= norms[start:stop].astype(np.float32).reshape(-1, 1)
        columns = blocks.reshape(-1, codes.shape[1])[:, : weight.shape[1]]
        weight[start:stop] = columns if signs is None else columns * signs
    return weight
