"""The arrays of a checkpoint, read back as lazy tensors: in rows, from the pieces that they were written in."""

import json
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes  # noqa: F401  numpy knows the names of its dtypes from here on
import numpy as np

from convert.files import ConvertError
from hlwq_jax import LazyTensor, TensorInfo, plane_widths, unpack_planes
from ltx_jax.checkpoint import QuantizedShape

_CODES_AT_ONCE = 2**22


class ArrayTensor(LazyTensor):
    """An array of a checkpoint. Raises ConvertError where it is not there, or not as a conversion writes one."""

    def __init__(self, name: str, part: Path):
        folder = part / name
        try:
            described = json.loads((folder / "zarr.json").read_bytes())
            shape, dtype = tuple(described["shape"]), np.dtype(described["data_type"])
            rows = described["chunk_grid"]["configuration"]["chunk_shape"][0] if shape else 1
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise ConvertError(
                f"{folder} is not an array of a checkpoint ({error}); `verify` lists all damage"
            ) from error
        super().__init__(name, TensorInfo(dtype=dtype, shape=shape, start=0), folder)
        self._piece = max(rows * (self.size // shape[0]), 1) if shape and shape[0] else 1  # values in a file

    def read_flat(self, start: int, stop: int) -> np.ndarray:
        runs = [self._read_piece(place, start, stop) for place in range(start // self._piece, -(-stop // self._piece))]
        return runs[0] if len(runs) == 1 else np.concatenate(runs or [np.empty(0, self.dtype)])

    def _read_piece(self, place: int, start: int, stop: int) -> np.ndarray:
        assert self.path is not None
        path = self.path / ".".join(["c", *([str(place)] if self.shape else []), *"0" * (len(self.shape) - 1)])
        first, last = max(start - place * self._piece, 0), min(stop - place * self._piece, self._piece)
        try:
            data = np.fromfile(path, self.dtype, count=last - first, offset=first * self.dtype.itemsize)
        except OSError as error:
            raise ConvertError(f"{path}: {error.strerror}; `verify` lists all damage") from error
        if data.size != last - first:
            raise ConvertError(f"{path} is cut off; `verify` lists all damage")
        return data


class PackedLinear:
    """A quantised linear of a checkpoint: its arrays, read in rows."""

    def __init__(self, path: str, part: Path, shape: QuantizedShape):
        """`part` is the folder of the Orbax checkpoint that holds the linear at `path`."""
        self.path, self.shape = path, shape
        _, hi_words = plane_widths(self.row_codes, shape.bits)
        self.lo = ArrayTensor(f"{path}.lo", part)
        self.hi = ArrayTensor(f"{path}.hi", part) if hi_words else None
        self.norms = ArrayTensor(f"{path}.norms", part)
        self.scaled_centroids = ArrayTensor(f"{path}.scaled_centroids", part).read()
        self.signs = ArrayTensor(f"{path}.signs", part).read() if shape.signs else None

    @property
    def num_blocks(self) -> int:
        return -(-self.shape.in_features // self.shape.block_size)

    @property
    def row_codes(self) -> int:
        """Codes in a row, padding included."""
        return self.num_blocks * self.shape.block_size

    def slices(self) -> Iterator[slice]:
        """Runs of rows, equally many in each but the last, which together are all."""
        most = max(_CODES_AT_ONCE // self.row_codes // 8 * 8, 8)  # whole groups of eight codes in every packing
        for start in range(0, self.shape.out_features, most):
            yield slice(start, min(start + most, self.shape.out_features))

    def planes(self, rows: slice) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
        """`lo`, `hi` and `norms` of some rows."""
        lo, norms = (tensor.read_rows(rows.start, rows.stop) for tensor in (self.lo, self.norms))
        return lo, None if self.hi is None else self.hi.read_rows(rows.start, rows.stop), norms

    def codes(self, rows: slice) -> np.ndarray:
        """One code a byte, as `[rows, row_codes]`."""
        lo, hi, _ = self.planes(rows)
        return np.asarray(_codes(lo, hi, bits=self.shape.bits, num_codes=self.row_codes))


def _unpack(lo, hi, *, bits: int, num_codes: int):
    return unpack_planes(lo, hi, bits=bits, num_codes=num_codes).astype(jnp.uint8)


_codes = jax.jit(_unpack, static_argnames=("bits", "num_codes"))
