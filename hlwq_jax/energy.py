"""Finding out from codes alone which table wrote them, and whether they are codes at all.

Every rotated block had a mean square of exactly 1 before it was rounded to levels. So the mean of `level²` over blocks
(their energy) lands on a known number under the right table and off it under another table, bit order or width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Float64, UInt8

from hlwq_jax.codebook import TABLES, TableName, lloyd_max

SATURATED = 0.5  # blocks below this were nearly constant in the original: they are counted, not averaged
ENOUGH_BLOCKS = 200


def block_energies(
    codes: UInt8[np.ndarray, "blocks block"], centroids: Float32[np.ndarray, " levels"]
) -> Float64[np.ndarray, " blocks"]:
    """The mean of `level²` of every block. Codes must be below the number of levels."""
    squares = np.square(centroids)
    if codes.shape[1] % 2:
        return squares[codes].mean(axis=1, dtype=np.float64)
    # Two neighbours as one number of 16 bits, looked up together: in 0.4 of the time.
    pairs = np.zeros((len(squares), 256), np.float32)
    pairs[:, : len(squares)] = (squares[:, None] + squares) / 2
    return pairs.reshape(-1).take(np.ascontiguousarray(codes).view(np.uint16)).mean(axis=1, dtype=np.float64)


def expected_energy(
    centroids: Float32[np.ndarray, " levels"], block_size: int, *, written: Float32[np.ndarray, " levels"] | None = None
) -> float:
    """The mean energy of blocks uniform on the sphere, coded with the table `written` (None: the same one)."""
    written = centroids if written is None else written
    return _expected_energy(centroids.tobytes(), written.tobytes(), block_size)


@cache
def _expected_energy(decoded: bytes, written: bytes, block_size: int) -> float:
    levels = np.frombuffer(decoded, np.float32).astype(np.float64)
    table = np.frombuffer(written, np.float32).astype(np.float64)
    if block_size == 1:
        return float(np.mean(levels[np.searchsorted((table[:-1] + table[1:]) / 2, [-1.0, 1.0])] ** 2))
    # A coordinate of a point on the sphere of radius sqrt(block) is sqrt(block)·sin(t), with density cos(t)^(block-2).
    t = np.linspace(-np.pi / 2, np.pi / 2, 200_001)
    density = np.cos(t[1:-1]) ** (block_size - 2)
    cumulative = np.concatenate([[0.0, 0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    z = np.sqrt(block_size) * np.sin(t[:-1])
    below = np.interp((table[:-1] + table[1:]) / 2, z, cumulative / cumulative[-1])
    probability = np.diff(np.concatenate([[0.0], below, [1.0]]))
    return float(np.sum(probability * levels**2))


def highest_energy(centroids: Float32[np.ndarray, " levels"]) -> float:
    """The highest energy that any block of any weight can have; more means that these are not its codes.

    A block's z² average to 1 and each code gives at most its cell's level² at its cell's least z², so the bound is the
    upper concave hull of those points, taken at 1.
    """
    return _highest_energy(centroids.tobytes())


@cache
def _highest_energy(centroids: bytes) -> float:
    levels = np.frombuffer(centroids, np.float32).astype(np.float64)
    midpoints = (levels[:-1] + levels[1:]) / 2
    low, high = np.concatenate([[-np.inf], midpoints]), np.concatenate([midpoints, [np.inf]])
    least = np.where((low <= 0) & (high >= 0), 0.0, np.minimum(np.abs(low), np.abs(high))) ** 2
    inside, outside = least <= 1, least > 1
    best = float(np.max(levels[inside] ** 2))  # all of the block in one cell
    for i in np.flatnonzero(inside):  # or two cells mixed so that z² averages to 1
        for j in np.flatnonzero(outside):
            share = (1 - least[i]) / (least[j] - least[i])
            best = max(best, float((1 - share) * levels[i] ** 2 + share * levels[j] ** 2))
    return best


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """The energy of sampled blocks under one table."""

    mean: float
    expected: float
    num_blocks: int  # averaged
    num_saturated: int  # left out of the average
    num_impossible: int  # with an energy that no block can have; left out too where they are the lesser part
    spread: float  # standard deviation of a block

    @property
    def error(self) -> float:
        """How far the mean may be off by chance."""
        # A few equal blocks say nothing of the spread: never believe less than what Gaussian blocks show at 5 bits.
        # And however many blocks: weights that are not Gaussian shift the mean by up to 0.0005.
        return max(self.spread, 0.012) / max(self.num_blocks, 1) ** 0.5 + 0.0005

    @property
    def distance(self) -> float:
        return abs(self.mean - self.expected) if self.num_blocks else float("inf")

    def __str__(self) -> str:
        few = f" over only {self.num_blocks} blocks" if self.num_blocks < ENOUGH_BLOCKS else ""
        wrong = f", {self.num_impossible} of the blocks impossible" if self.num_impossible else ""
        return f"energy {self.mean:.4f}, expected {self.expected:.4f}{few}{wrong}"


class Observation(NamedTuple):
    """What a run of blocks shows; observations of all runs of a weight together are its measurement."""

    energies: np.ndarray
    num_unclipped: int  # of blocks too low in energy, those that clipping does not explain


def observe(codes: UInt8[np.ndarray, "blocks block"], centroids: Float32[np.ndarray, " levels"]) -> Observation:
    """Looks at blocks (of non-zero norm) under a table."""
    energies = block_energies(codes, centroids)
    # A block whose z² average to 1 falls that low only by clipping, which takes an outermost code.
    low = codes[energies < SATURATED]
    return Observation(energies, int((~((low == 0) | (low == len(centroids) - 1)).any(axis=1)).sum()))


def measure(codes: UInt8[np.ndarray, "blocks block"], centroids: Float32[np.ndarray, " levels"]) -> Measurement:
    """Measures blocks (of non-zero norm) under a table."""
    return conclude([observe(codes, centroids)], centroids, codes.shape[1])


def conclude(
    observations: Sequence[Observation], centroids: Float32[np.ndarray, " levels"], block_size: int
) -> Measurement:
    """The measurement of all observed blocks together."""
    energies = np.concatenate([observation.energies for observation in observations])
    kept = energies[energies >= SATURATED]
    # 10 %: rounding, and the choice between tables A and B where it is open, can move a block by less than that.
    possible = kept[kept <= 1.1 * highest_energy(centroids)]
    num_saturated, too_high = int(energies.size - kept.size), int(kept.size - possible.size)
    if too_high < possible.size:  # else the average of all is the better evidence
        kept = possible
    return Measurement(
        mean=float((kept if kept.size else energies).mean()) if energies.size else 0.0,
        expected=expected_energy(centroids, block_size),
        num_blocks=int(kept.size),
        num_saturated=num_saturated,
        num_impossible=sum(observation.num_unclipped for observation in observations) + too_high,
        spread=float(kept.std()) if kept.size else 0.0,
    )


def plausible(measured: Measurement, centroids: Float32[np.ndarray, " levels"], block_size: int) -> bool:
    """Whether blocks can be what a packer wrote with this table.

    Above the expected energy there is little room: a wrong bit order or width gives 2 to 4, and no single block may
    exceed `highest_energy`. Below there is more: blocks with a large mean saturate.
    """
    if measured.num_impossible or not measured.num_blocks:
        return not measured.num_impossible
    # The bound of a block's standard deviation, were its values independent; few blocks may stray by that much.
    chance = 4 * float(np.std(np.square(centroids))) / (block_size * measured.num_blocks) ** 0.5
    return -0.25 - chance <= measured.mean - measured.expected <= 0.1 + chance


def measure_tables(codes: UInt8[np.ndarray, "blocks block"], bits: int) -> dict[TableName, Measurement]:
    """Measures blocks under every table that is one: up to 3 bits A has converged."""
    tables = TABLES if bits > 3 else TABLES[:3]
    return {table: measure(codes, lloyd_max(bits, table)) for table in tables}


def clear_winner(measured: Mapping[TableName, Measurement]) -> TableName | None:
    """The table whose energy is nearest to what it should be, where chance cannot have swapped it with the second."""
    first, second = sorted(measured, key=lambda table: measured[table].distance)[:2]
    if not measured[first].num_blocks:
        return None
    margin = measured[second].distance - measured[first].distance
    return first if margin > 3 * measured[first].error else None
