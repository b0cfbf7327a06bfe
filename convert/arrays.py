"""The arrays of a checkpoint, piece by piece from published tensors: a large one is never in memory as a whole."""

from collections.abc import Iterable, Iterator
from math import prod
from typing import NamedTuple

import numpy as np
from einops import rearrange

from hlwq_jax import LazyTensor, StoredWeight
from ltx_jax.orbax_io import piece_rows, pieces_of

_ROW_BYTES = 2**15  # runs of a file in shorter rows are not worth a read each
_READ_BYTES = 2**22
WHOLE_BYTES = 2**28  # a tensor up to this size is read at once: its axes move faster
_SLICED, _SLICE_ROWS = 2**20, 256  # bytes; transposing by slices took a third of the time of the whole at once


class Pieces(NamedTuple):
    """An array to be written, as `write_array` takes it."""

    shape: tuple[int, ...]
    dtype: np.dtype
    pieces: Iterable[np.ndarray]

    @classmethod
    def of(cls, array: np.ndarray) -> "Pieces":
        return cls(array.shape, array.dtype, pieces_of(array))


def moved(tensor: LazyTensor, pattern: str) -> Pieces:
    """A tensor with its axes moved as an einops pattern says."""
    left, right = (side.split() for side in pattern.split("->"))
    sizes = dict(zip(left, tensor.shape, strict=True))
    shape = tuple(sizes[axis] for axis in right)
    return Pieces(shape, tensor.dtype, _pieces(tensor, pattern, shape))


def _pieces(tensor: LazyTensor, pattern: str, shape: tuple[int, ...]) -> Iterator[np.ndarray]:
    if tensor.nbytes <= WHOLE_BYTES:
        yield from pieces_of(read(tensor, pattern))
        return
    rows = piece_rows(shape, tensor.dtype)
    for start in range(0, shape[0], rows):
        yield _read_slab(tensor, pattern, start, min(start + rows, shape[0]))


def read(tensor: LazyTensor, pattern: str) -> np.ndarray:
    """A tensor with its axes moved, slice by slice: it is never there twice, and its pages stay in cache."""
    left, right = (side.split() for side in pattern.split("->"))
    if tensor.nbytes < _SLICED:
        return np.ascontiguousarray(rearrange(tensor.read(), pattern))
    sizes = dict(zip(left, tensor.shape, strict=True))
    result = np.empty([sizes[axis] for axis in right], tensor.dtype)
    rows = np.moveaxis(result, right.index(left[0]), 0)
    within = f"{pattern.split('->')[0]} -> {left[0]} {' '.join(axis for axis in right if axis != left[0])}"
    for start in range(0, tensor.shape[0], _SLICE_ROWS):
        stop = min(start + _SLICE_ROWS, tensor.shape[0])
        rows[start:stop] = rearrange(tensor.read_rows(start, stop), within)
    return result


def _read_slab(tensor: LazyTensor, pattern: str, start: int, stop: int) -> np.ndarray:
    """Entries `start` to `stop` of the first axis of the moved tensor, wherever that axis lay."""
    left, right = (side.split() for side in pattern.split("->"))
    axis = left.index(right[0])
    slab = np.empty((*tensor.shape[:axis], stop - start, *tensor.shape[axis + 1 :]), tensor.dtype)
    row, inner = prod(tensor.shape[axis:]), prod(tensor.shape[axis + 1 :])
    if axis == 0 or row * tensor.dtype.itemsize >= _ROW_BYTES:
        for outer, run in enumerate(slab.reshape(-1, (stop - start) * inner)):
            run[:] = tensor.read_flat(outer * row + start * inner, outer * row + stop * inner)
    else:  # kernels of convolutions: the whole file for each of a few slabs
        chosen = (slice(None),) * axis + (slice(start, stop),)
        step = max(_READ_BYTES // (tensor.nbytes // tensor.shape[0]), 1)
        for first in range(0, tensor.shape[0], step):
            slab[first : first + step] = tensor.read_rows(first, min(first + step, tensor.shape[0]))[chosen]
    return read(LazyTensor.from_array(tensor.name, slab), pattern)


def planes(weight: StoredWeight) -> dict[str, np.ndarray]:
    """The device layout of a packed weight, after all checks of its codes and norms."""
    lo, hi, norms = weight.checked_planes()
    arrays = {"lo": lo, "norms": norms, "scaled_centroids": weight.scaled_centroids}
    return arrays | ({} if hi is None else {"hi": hi})
