"""One quantized weight as it lies in a package: its sizes and table, read, checked and decoded on demand."""

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from jaxtyping import BFloat16, Float16, Float32, UInt8, UInt32

from hlwq_jax.codebook import TableName, lloyd_max
from hlwq_jax.energy import Measurement, conclude, measure, measure_tables, observe, plausible
from hlwq_jax.packing import Packing, packed_length, unpack
from hlwq_jax.planes import pack_planes, plane_widths, planes_from_stream
from hlwq_jax.quantize import Quantized, dequantize, scale_centroids
from hlwq_jax.slices import dequantize_in_slices
from hlwq_jax.tensors import FormatError, LazyTensor

_RUN_CODES = 2**19  # that are unpacked at a time: they stay in cache
_SAMPLE_RUNS, _SAMPLE_RUN = 4, 16  # blocks looked at when a package is opened: four runs of sixteen


@dataclass(frozen=True, kw_only=True)
class StoredWeight:
    """A weight `[out_features, in_features]`; its rows are `num_blocks` blocks, the last one padded.

    Where the package and the model leave `in_features` open it is None, and the weight can be read but not decoded. In
    layout V7 the blocks may run across rows (`flattened`); then `num_blocks` counts those of the whole weight.
    """

    name: str  # the model's parameter name where it is known, else the stem
    stem: str
    layout: str
    packing: Packing
    bits: int
    block_size: int
    out_features: int | None
    in_features: int | None
    num_blocks: int
    flattened: bool = False
    table: TableName | Literal["stored"]
    table_reason: str  # how the table was decided
    centroids: Float32[np.ndarray, " levels"]
    stored_scaled: Float32[np.ndarray, " levels"] | None = None  # the file's own levels / sqrt(block), to the bit
    energy: Measurement | None = None  # of the sampled blocks; None where none were looked at
    code_tensor: LazyTensor
    norm_tensor: LazyTensor
    nbytes: int  # stored, all parts together

    @property
    def bits_per_weight(self) -> float:
        if self.out_features is None:
            return 8 * self.nbytes / (self.norm_tensor.size * self.block_size)
        return 8 * self.nbytes / (self.out_features * (self.in_features or self.num_blocks * self.block_size))

    def codes(self) -> UInt8[np.ndarray, "out padded"]:
        """All codes, one per byte, padding included. Raises where one has no level."""
        self._need_rows()
        return self._read_blocks(0, self.norm_tensor.size).reshape(self.norm_tensor.size // self.num_blocks, -1)

    def norms(self) -> Float16[np.ndarray, "out blocks"]:
        """All block norms. Raises where one is negative or not finite."""
        self._need_rows()
        return self._read_norms().reshape(-1, self.num_blocks)

    def planes(self) -> tuple[UInt32[np.ndarray, "out lo"], UInt32[np.ndarray, "out hi"] | None]:
        """The codes in the device layout (see `planes`); the usual 5-bit stream takes a fast path."""
        self._need_rows()
        rows, row_codes = self.norm_tensor.size // self.num_blocks, self.num_blocks * self.block_size
        if self.packing == "M" and self.bits == 5 and row_codes % 32 == 0:
            return planes_from_stream(self._bytes(0, self.code_tensor.size), out_features=rows, row_codes=row_codes)
        return pack_planes(self.codes(), self.bits)

    def checked_planes(
        self,
    ) -> tuple[UInt32[np.ndarray, "out lo"], UInt32[np.ndarray, "out hi"] | None, Float16[np.ndarray, "out blocks"]]:
        """`planes` and `norms` after the checks of `check`; the file is read once, the codes are never all there."""
        self._need_rows()
        num_rows, row_codes = self.norm_tensor.size // self.num_blocks, self.num_blocks * self.block_size
        lo_words, hi_words = plane_widths(row_codes, self.bits)
        lo, hi = np.empty((num_rows, lo_words), np.uint32), np.empty((num_rows, hi_words), np.uint32)
        norms = self._read_norms().reshape(num_rows, self.num_blocks)
        step = max(_RUN_CODES // row_codes // 8 * 8, 8)  # whole groups of eight codes
        observations = []
        for start in range(0, num_rows, step):
            rows = slice(start, min(start + step, num_rows))
            stream, codes = self._read_stream(rows.start * self.num_blocks, rows.stop * self.num_blocks)
            observations.append(observe(codes[norms[rows].reshape(-1) != 0], self.centroids))
            if self.packing == "M" and self.bits == 5 and row_codes % 32 == 0:
                lo[rows], hi[rows] = planes_from_stream(stream, out_features=len(lo[rows]), row_codes=row_codes)
                continue
            lo[rows], high = pack_planes(codes.reshape(-1, row_codes), self.bits)
            if high is not None:
                hi[rows] = high
        measured = conclude(observations, self.centroids, self.block_size)
        if not plausible(measured, self.centroids, self.block_size):
            raise FormatError(self.evidence(measured))
        return lo, hi if hi_words else None, norms

    def quantized(self) -> Quantized:
        """The weight in memory, checked, as `QuantizedLinear.from_quantized` takes it."""
        in_features = self._need_in_features()
        self.check()
        return Quantized(
            codes=self.codes(),
            norms=self.norms(),
            centroids=self.centroids,
            bits=self.bits,
            block_size=self.block_size,
            in_features=in_features,
        )

    @property
    def scaled_centroids(self) -> Float32[np.ndarray, " levels"]:
        if self.stored_scaled is not None:
            return self.stored_scaled
        return scale_centroids(self.centroids, self.block_size)

    def dequantize(self) -> BFloat16[np.ndarray, "out in"]:
        """The decoded weight, after the checks of `check`, to the rounding of `dequantize_planes`."""
        in_features = self._need_in_features()
        assert self.out_features is not None
        if not self.flattened:
            levels = {"scaled_centroids": self.scaled_centroids, "bits": self.bits, "block_size": self.block_size}
            return dequantize_in_slices(*self.checked_planes(), **levels, in_features=in_features)
        codes, norms, _ = self._checked()
        blocks = dequantize(codes, norms[:, None], self.centroids, block_size=self.block_size)
        return blocks.reshape(-1)[: self.out_features * in_features].reshape(self.out_features, in_features)

    def check(self) -> Measurement:
        """Reads the whole weight and raises `FormatError` for codes without a level, norms that are none, and
        blocks with an energy that no packer can have written; returns the measured energy."""
        return self._checked()[2]

    def _checked(self) -> tuple[np.ndarray, np.ndarray, Measurement]:
        codes, norms = self._read_blocks(0, self.norm_tensor.size), self._read_norms()
        measured = measure(codes[norms != 0], self.centroids)
        if not plausible(measured, self.centroids, self.block_size):
            raise FormatError(self.evidence(measured))
        return codes, norms, measured

    def sample(self) -> UInt8[np.ndarray, "blocks block"]:
        """Codes of up to 64 blocks from all over the weight, without those of zero norm."""
        total = self.norm_tensor.size
        if total <= _SAMPLE_RUNS * _SAMPLE_RUN:
            starts, length = [0], total
        else:  # whole groups of eight blocks, so that a dense stream can be cut there at any block size
            starts = [i * (total - _SAMPLE_RUN) // (_SAMPLE_RUNS - 1) // 8 * 8 for i in range(_SAMPLE_RUNS)]
            length = _SAMPLE_RUN
        runs = []
        for start in starts:
            norms = self.norm_tensor.read_flat(start, start + length)
            runs.append(self._read_blocks(start, start + length)[norms != 0])
        return np.concatenate(runs)

    def evidence(self, measured: Measurement) -> str:
        """Why the weight cannot be decoded, with what the other bit order would give."""
        text = (
            f"{self.name}: {measured} with table {self.table} at {self.bits} bits in packing {self.packing}: wrong bit "
            "order, width or offset, or damaged data"
        )
        other = {"M": "L", "L": "M"}.get(self.packing)
        if other is not None and self.bits == 5:
            swapped = self.reordered()
            measured = measure(swapped.sample(), self.centroids)
            verdict = "fits" if plausible(measured, self.centroids, self.block_size) else "does not fit either"
            text += f"; in packing {other} it {verdict}: {measured}"
        codes = self.sample()
        fitting = {
            table: found
            for table, found in measure_tables(codes, self.bits).items()
            if plausible(found, lloyd_max(self.bits, table), self.block_size)
        }
        if fitting:
            table = min(fitting, key=lambda name: fitting[name].distance)
            text += f"; with table {table} it fits: {fitting[table]}"
        largest = int(codes.max(initial=0))
        if largest < 2 ** (self.bits - 1):
            text += f"; no code is above {largest}, as if written at {max(largest.bit_length(), 1)} bits"
        return f"{text} ({self.code_tensor.where})"

    def reordered(self) -> "StoredWeight":
        """The same stream read in the other bit order."""
        return replace(self, packing="L" if self.packing == "M" else "M")

    def _read_blocks(self, start: int, stop: int) -> np.ndarray:
        return self._read_stream(start, stop)[1]

    def _read_stream(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """A run of blocks, as bytes and as codes."""
        count = (stop - start) * self.block_size
        first = packed_length(start * self.block_size, bits=self.bits, packing=self.packing)
        length = packed_length(count, bits=self.bits, packing=self.packing)
        stream = self._bytes(first, first + length)
        codes = unpack(
            stream,
            num_codes=count,
            bits=self.bits,
            packing=self.packing,
            block_size=self.block_size,
        )
        largest = int(codes.max(initial=0))
        if largest >= len(self.centroids):
            raise FormatError(
                f"{self.name}: the largest code is {largest}, expected below {len(self.centroids)} at {self.bits} bits:"
                f" wrong width, or damaged data ({self.code_tensor.where})"
            )
        return stream, codes.reshape(-1, self.block_size)

    def _bytes(self, start: int, stop: int) -> np.ndarray:
        return self.code_tensor.read_flat(start, stop).view(np.uint8)

    def _read_norms(self) -> np.ndarray:
        norms = self.norm_tensor.read_flat(0, self.norm_tensor.size)
        lengths = np.isfinite(norms) & (norms >= 0)
        if not lengths.all():
            first = int(np.argmin(lengths))
            raise FormatError(
                f"{self.name}: norm {first} of {norms.size} is {norms[first]}, expected a finite number of 0 or more: "
                f"damaged data ({self.norm_tensor.where})"
            )
        return norms

    def _need_rows(self) -> None:
        if self.flattened:
            raise FormatError(
                f"{self.name}: its blocks run over the flattened weight, not along rows: use dequantize(), with its "
                "shape from model_shapes"
            )

    def _need_in_features(self) -> int:
        if self.in_features is None or self.out_features is None:
            raise FormatError(
                f"{self.name}: its number of inputs is not in the package: give it by model_shapes or a sidecar "
                f"(in_features; {self.norm_tensor.size} blocks of {self.block_size} values are there)"
            )
        return self.in_features
