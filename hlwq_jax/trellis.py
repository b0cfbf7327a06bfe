"""Trellis codebooks: 2**history_bits sets of levels, of which the codes before a code choose the one it picks from.

The path of a code is its top bit. Where the level of a scalar code is `table[code]`, that of a trellis code is

    table[window << (bits - 1) | rest]

where `rest` are the code's other bits and `window` holds the paths of this code (top) and of the `history_bits` codes
before it in its block (the one just before next to the top, the oldest at bit 0); before a block's first code all paths
are 0. So a value is chosen among 2**bits levels out of 2**(bits + history_bits), with no bit more, and decoding stays a
lookup: at 5 bits the paths are the upper plane of the device layout, of which a window is one shift (see `planes`).

The encoder finds the paths of least squared error by the Viterbi algorithm. Source: trellis-coded quantization,
Marcellin and Fischer, IEEE Transactions on Communications 38 (1990), with tables that Lloyd's iteration trained for
blocks of 128 (scripts/train_trellis.py) from Ungerboeck's codes. Each window has levels of its own there, so that they
differ in reach and not only in place. docs/quantization.md has the errors, and what else was tried.
"""

from functools import cache
from importlib import resources

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int32, UInt8, UInt16

HISTORY_BITS = 3, 5, 7  # for which there are tables, at
TRELLIS_BITS = 2, 3, 4, 5, 6

_CELLS, _REACH = 512, 5.0  # values are looked up in so many cells of [-reach, reach]
# Costs of windows looked at together: on a CPU few enough for its caches, elsewhere enough to fill the device. Half as
# many are kept for the way back, 8 MiB and 256 MiB.
_COSTS_ON_CPU, _COSTS_ELSEWHERE = 2**22, 2**27


def check_trellis(bits: int, history_bits: int) -> None:
    """Raises ValueError where there is no table."""
    if bits not in TRELLIS_BITS or history_bits not in HISTORY_BITS:
        raise ValueError(
            f"there are trellises of {_listed(TRELLIS_BITS)} bits with {_listed(HISTORY_BITS)} history bits (0: none), "
            f"got bits {bits}, history_bits {history_bits}"
        )


def _listed(numbers: tuple[int, ...]) -> str:
    return f"{', '.join(map(str, numbers[:-1]))} or {numbers[-1]}"


def trellis_table(bits: int, history_bits: int) -> Float32[np.ndarray, " levels"]:
    """The `2**(bits + history_bits)` levels for values of unit mean square, ascending in each window; read-only."""
    check_trellis(bits, history_bits)
    return _tables()[f"bits{bits}_history{history_bits}"]


@cache
def _tables() -> dict[str, np.ndarray]:
    with resources.files("hlwq_jax").joinpath("trellis.npz").open("rb") as file, np.load(file) as stored:
        tables = {name: stored[name].astype(np.float32) for name in stored.files}
    for table in tables.values():
        table.flags.writeable = False
    return tables


def trellis_indices(
    codes: UInt8[np.ndarray, "*batch block"], *, bits: int, history_bits: int
) -> UInt16[np.ndarray, "*batch block"]:
    """Where in the table the level of each code of a block stands; codes themselves where `history_bits` is 0."""
    indices = codes.astype(np.uint16)
    path = indices >> (bits - 1)
    window = path << history_bits
    for age in range(1, min(history_bits, codes.shape[-1] - 1) + 1):
        window[..., age:] |= path[..., :-age] << (history_bits - age)
    return indices & (2 ** (bits - 1) - 1) | window << (bits - 1)


def trellis_encode(
    values: Float32[np.ndarray, "blocks block"], table: Float32[np.ndarray, " levels"], *, bits: int
) -> UInt8[np.ndarray, "blocks block"]:
    """The codes of least squared error for blocks of unit mean square, on jax's default device.

    A block's codes depend on its values alone, not on its neighbours. In a table each window's levels must ascend.
    """
    windows = table.reshape(-1, 2 ** (bits - 1))
    levels, nearby = jnp.asarray(windows), jnp.asarray(_nearby(windows))
    num_blocks, block_size = values.shape
    costs = _COSTS_ON_CPU if jax.default_backend() == "cpu" else _COSTS_ELSEWHERE
    at_once = max(16, costs // (block_size * len(windows)))
    codes = np.empty(values.shape, np.uint8)
    for start in range(0, num_blocks, at_once):
        some = values[start : start + at_once]
        # Counts are padded to powers of two, so that few programs are compiled.
        padded = np.zeros((min(at_once, 1 << (len(some) - 1).bit_length()), block_size), np.float32)
        padded[: len(some)] = some
        codes[start : start + at_once] = np.asarray(_encode(jnp.asarray(padded), levels, nearby))[: len(some)]
    return codes


def _nearby(windows: Float32[np.ndarray, "windows levels"]) -> Float32[np.ndarray, "cells windows"]:
    """For each cell of values, the level of every window that is nearest to the middle of the cell.

    So that a step of the search reads one row in place of comparing with every level. A cell is far narrower than
    levels of one window lie apart, so the level is the nearest to all values but those about half way, which are far
    from both.
    """
    middles = ((np.arange(_CELLS) + 0.5) / _CELLS * 2 - 1) * _REACH
    edges = (windows[:, 1:] + windows[:, :-1]) / 2
    return np.stack([w[np.searchsorted(e, middles)] for w, e in zip(windows, edges, strict=True)], axis=1)


@jax.jit
def _encode(
    values: Float32[Array, "blocks block"],
    levels: Float32[Array, "windows levels"],
    nearby: Float32[Array, "cells windows"],
) -> UInt8[Array, "blocks block"]:
    windows = _best_windows(values, nearby)
    rest = jnp.argmin(jnp.abs(levels[windows] - values[..., None]), axis=-1)
    path = windows >= len(levels) // 2
    return (path * levels.shape[1] + rest).astype(jnp.uint8)


def _best_windows(
    values: Float32[Array, "blocks block"], nearby: Float32[Array, "cells windows"]
) -> Int32[Array, "blocks block"]:
    """The windows along the path of least squared error.

    A state is the paths before a code, a window less its top bit: from state `s` path `p` makes the window
    `p·states + s` and leads to the state `window >> 1`. Two windows, which differ in the oldest path, lead to a state.
    """
    num_blocks, num_windows = len(values), nearby.shape[1]
    num_states = num_windows // 2
    cells = ((values + _REACH) * (_CELLS / (2 * _REACH))).astype(jnp.int32)
    cells = jnp.clip(cells, 0, _CELLS - 1)

    def forward(costs, step):
        value, cell = step
        errors = (value[:, None] - nearby[cell]) ** 2
        through = costs.reshape(num_blocks, 1, -1, 2) + errors.reshape(num_blocks, 2, -1, 2)
        return jnp.minimum(through[..., 0], through[..., 1]).reshape(num_blocks, num_states), costs

    def backward(state, step):
        value, cell, costs = step
        windows = 2 * state[:, None] + jnp.arange(2)
        errors = (value[:, None] - nearby[cell[:, None], windows]) ** 2
        # Both windows come from neighbouring states: one pair is taken. (Two single ones were a program that crashes:
        # jaxlib 0.10.2 on a CPU with AVX-512.)
        pair = (state % (num_states // 2))[:, None, None]
        before = jnp.take_along_axis(costs.reshape(num_blocks, -1, 2), pair, axis=1)[:, 0] + errors
        window = 2 * state + (before[:, 1] < before[:, 0])
        return window % num_states, window

    start = jnp.full((num_blocks, num_states), jnp.inf).at[:, 0].set(0)
    last, costs = jax.lax.scan(forward, start, (values.T, cells.T))
    state = jnp.argmin(last, axis=1).astype(jnp.int32)
    _, windows = jax.lax.scan(backward, state, (values.T, cells.T, costs), reverse=True)
    return windows.T
