"""The codebooks of HLWQ: the levels that codes stand for, as the published packers computed them.

A name such as "Lloyd-Max" is no specification: the published recipes stop after exactly 100 Lloyd iterations, which
for four and more bits is far from converged, and decoding with the true Lloyd-Max table gives 15 times the error. So
each table here is its recipe, in IEEE doubles with nothing but `exp` and `erfc`; tests hold the SHA-256 of the results.

Sources: table A is `polarquant` 0.6.0 `utils`, B its `hf_integration`, C the notebooks that write `polar_state-…`.
"""

import math
from functools import cache
from itertools import pairwise
from typing import Literal, get_args

import numpy as np
from jaxtyping import Float32

TableName = Literal["A", "B", "C", "converged"]
TABLES: tuple[TableName, ...] = get_args(TableName)

_ITERATIONS = 100
_NEGLIGIBLE = {"A": 1e-10, "B": 1e-12, "C": 1e-10}  # below this probability a cell's midpoint stands for its mean


def lloyd_max(bits: int, table: TableName = "A") -> Float32[np.ndarray, " levels"]:
    """The `2**bits` levels of one table, ascending, for values of unit mean square; `bits` is 1 to 8.

    "A", "B" and "C" are bit for bit those of published files; "converged" is the true Lloyd-Max quantizer of the
    standard normal distribution, which no published file uses without storing it. The array is read-only.
    """
    if not 1 <= bits <= 8:
        raise ValueError(f"bits must be 1 to 8, got {bits}")
    if table not in TABLES:
        raise ValueError(f"table must be one of {', '.join(TABLES)}, got {table!r}")
    return _lloyd_max(bits, table)


@cache
def _lloyd_max(bits: int, table: TableName) -> np.ndarray:
    levels = (_converged(bits) if table == "converged" else _stopped(2**bits, table)).astype(np.float32)
    levels.flags.writeable = False
    return levels


def _stopped(n: int, table: TableName) -> np.ndarray:
    """100 iterations from uniform cells. B and C round boundaries and levels to float32 every time; A never does."""
    dtype = np.float64 if table == "A" else np.float32
    reach = 3.5 if table == "C" else 4.0
    edges = np.linspace(-reach, reach, n + 1).astype(dtype)
    if table == "A":
        edges[0], edges[-1] = -np.inf, np.inf
    levels = np.empty(n, dtype)
    for _ in range(_ITERATIONS):
        means = [_cell_mean(float(a), float(b), _NEGLIGIBLE[table]) for a, b in pairwise(edges)]
        levels = np.array(means).astype(dtype)
        edges[1:-1] = (levels[:-1] + levels[1:]) / dtype(2)
    return levels


def _cell_mean(a: float, b: float, negligible: float) -> float:
    """The mean of a standard normal variable given that it lies in [a, b]."""
    probability = _cdf(b) - _cdf(a)
    return (a + b) / 2 if probability <= negligible else (_density(a) - _density(b)) / probability


def _density(x: float) -> float:
    return math.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def _cdf(x: float) -> float:
    return math.erfc(-x / math.sqrt(2)) / 2


def _converged(bits: int) -> np.ndarray:
    """Newton's method on `level = mean of its cell`, over the positive half: plain iteration needs ~n² steps."""
    positive = _stopped(2**bits, "A")[2 ** (bits - 1) :]
    residual, jacobian = _cell_residuals(positive)
    for _ in range(100):
        step = np.linalg.solve(jacobian, residual)
        scale = 1.0
        while True:  # halve the step until the levels stay ascending and the residual falls
            trial = positive - scale * step
            if trial[0] > 0 and (np.diff(trial) > 0).all():
                trial_residual, trial_jacobian = _cell_residuals(trial)
                if scale < 1e-6 or np.abs(trial_residual).max() < np.abs(residual).max():
                    break
            scale /= 2
            if scale < 1e-9:
                return np.concatenate([-positive[::-1], positive])
        positive, residual, jacobian = trial, trial_residual, trial_jacobian
        if np.abs(scale * step).max() < 1e-13:
            break
    return np.concatenate([-positive[::-1], positive])


def _cell_residuals(levels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How far each positive level lies from its cell's mean, and the derivative of that by every level."""
    edges = np.concatenate([[0.0], (levels[:-1] + levels[1:]) / 2, [np.inf]])
    # erfc of the upper tail keeps its relative precision where 1 - erf would cancel.
    tail = np.array([math.erfc(t / math.sqrt(2)) / 2 for t in edges])
    density = np.array([_density(t) for t in edges])
    probability = tail[:-1] - tail[1:]
    mean = (density[:-1] - density[1:]) / probability
    by_lower = density[:-1] * (mean - edges[:-1]) / probability
    by_upper = np.zeros_like(mean)
    by_upper[:-1] = density[1:-1] * (edges[1:-1] - mean[:-1]) / probability[:-1]
    by_lower[0] = 0.0  # zero is a fixed edge
    jacobian = np.eye(len(levels)) - np.diag((by_lower + by_upper) / 2)
    jacobian -= np.diag(by_upper[:-1] / 2, 1) + np.diag(by_lower[1:] / 2, -1)
    return levels - mean, jacobian
