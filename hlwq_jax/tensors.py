"""Lazy safetensors: a header checked in full before anything is believed, and tensors read one at a time.

The format is 8 bytes of header length, a JSON header, and the tensors' bytes, little-endian, without gaps:
https://github.com/huggingface/safetensors. A foreign or damaged file raises `FormatError`, which names file and tensor.
"""

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

_DTYPES = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "U16": np.dtype("<u2"),
    "I16": np.dtype("<i2"),
    "U32": np.dtype("<u4"),
    "I32": np.dtype("<i4"),
    "U64": np.dtype("<u8"),
    "I64": np.dtype("<i8"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "C64": np.dtype("<c8"),
}
PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle")
_MAX_HEADER = 100_000_000  # as in the safetensors library; a JSON file may not be larger either
_MAX_NAME = 1000
_MAX_DEPTH = 32  # of nested JSON: a header has 3, a configuration 8


class FormatError(ValueError):
    """A file or tensor that is damaged, foreign, or not what its name says."""


class ByteSource(ABC):
    """Where the bytes of a file come from: this disk, or a server (see `remote`)."""

    @property
    @abstractmethod
    def size(self) -> int:
        """Of the whole file."""

    @abstractmethod
    def read(self, start: int, stop: int) -> bytes:
        """Bytes `start` to `stop`."""


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """One entry of a header; `start` counts bytes from the beginning of the file."""

    dtype: np.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class LazyTensor:
    """A named tensor that is read when asked for: from a file, or from an array that is already there."""

    def __init__(
        self,
        name: str,
        info: TensorInfo,
        path: Path | None,
        array: np.ndarray | None = None,
        source: ByteSource | None = None,
    ):
        self.name = name
        self.path = path
        self._info = info
        self._array = array
        self._source = source

    @classmethod
    def from_array(cls, name: str, array: np.ndarray) -> "LazyTensor":
        array = np.ascontiguousarray(array)
        return cls(name, TensorInfo(dtype=array.dtype, shape=array.shape, start=0), None, array)

    @property
    def dtype(self) -> np.dtype:
        return self._info.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self._info.shape

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self._info.nbytes

    @property
    def where(self) -> str:
        """Name and file, for messages."""
        return self.name if self.path is None else f"{self.name} ({self.path})"

    def read(self) -> np.ndarray:
        return self.read_flat(0, self.size).reshape(self.shape)

    def read_rows(self, start: int, stop: int) -> np.ndarray:
        """The slice `[start:stop]` along the first axis."""
        if not 0 <= start <= stop <= self.shape[0]:
            raise IndexError(f"{self.where}: rows {start} to {stop} of {self.shape[0]}")
        row = math.prod(self.shape[1:])
        return self.read_flat(start * row, stop * row).reshape(stop - start, *self.shape[1:])

    def read_flat(self, start: int, stop: int) -> np.ndarray:
        """Elements `start` to `stop` in row-major order."""
        if self._array is not None:
            return self._array.reshape(-1)[start:stop]
        assert self.path is not None
        offset = self._info.start + start * self.dtype.itemsize
        if self._source is not None:
            return np.frombuffer(self._source.read(offset, offset + (stop - start) * self.dtype.itemsize), self.dtype)
        # Plain reads and no memory map: a file cut off while in use then raises, where a map would kill the process.
        data = np.fromfile(self.path, self.dtype, count=stop - start, offset=offset)
        if data.size != stop - start:
            raise FormatError(
                f"{self.where}: expected {stop - start} values at byte {offset}, the file ends after {data.size}"
            )
        return data

    def __repr__(self) -> str:
        return f"LazyTensor({self.name!r}, {self.dtype}, {list(self.shape)}, {str(self.path)!r})"


class TensorFile(Mapping[str, LazyTensor]):
    """A safetensors file: its names mapped to lazy tensors. Opening reads the header and checks all of it.

    With a `source` its bytes come from there, and the path is only its name.
    """

    def __init__(self, path: Path | str, source: ByteSource | None = None):
        self.path = Path(path)
        if self.path.suffix in PICKLES:
            raise FormatError(
                f"{self.path}: a pickle, by its name: it could run any program, so it is never opened; expected "
                "safetensors"
            )
        self._source = source
        header, data_start, self.file_size = _read_header(self.path, source or _LocalBytes(self.path))
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise FormatError(f"{self.path}: __metadata__ must map strings to strings, got {_short(metadata)}")
        self.metadata: dict[str, str] = metadata
        self.tensors = {name: _parse_entry(self.path, name, entry, data_start) for name, entry in header.items()}
        _check_layout(self.path, self.tensors, data_start, self.file_size)

    def read(self, name: str) -> np.ndarray:
        return self[name].read()

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        return self[name].read_rows(start, stop)

    def __getitem__(self, name: str) -> LazyTensor:
        return LazyTensor(name, self.tensors[name], self.path, source=self._source)

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


class _LocalBytes(ByteSource):
    def __init__(self, path: Path):
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file" if not path.exists() else f"{path} is not a file")
        self.path = path

    @property
    def size(self) -> int:
        return self.path.stat().st_size

    def read(self, start: int, stop: int) -> bytes:
        with self.path.open("rb") as file:
            file.seek(start)
            return file.read(stop - start)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises `FormatError`, with its name, for anything else, and as `parse_json` does."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file" if not path.exists() else f"{path} is not a file")
    size = path.stat().st_size
    if size > _MAX_HEADER:
        raise FormatError(f"{path}: expected a JSON file of up to {_MAX_HEADER} bytes, got {size}")
    raw = path.read_bytes()
    refuse_pages(path, raw[:256])
    content = parse_json(raw, where=str(path))
    if not isinstance(content, dict):
        raise FormatError(f"{path}: expected a JSON object, got {_short(content)}")
    return content


def parse_json(text: bytes | str, *, where: str) -> Any:
    """JSON by the letter: names that are there twice, NaN and Infinity are refused, which `json` would let pass.

    So is nesting out of all proportion. Raises `FormatError`, which begins with `where`.
    """
    try:
        text = text.decode("utf-8") if isinstance(text, bytes) else text
        content = json.loads(
            text,
            object_pairs_hook=lambda pairs: whole if len(whole := dict(pairs)) == len(pairs) else _twice(where, pairs),
            parse_constant=lambda name: _no_number(where, name),
        )
    except FormatError:
        raise
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{where}: not valid JSON: {error}") from error
    level, depth = [content], 0
    while level:
        depth += 1
        if depth > _MAX_DEPTH:
            raise FormatError(f"{where}: expected JSON of up to {_MAX_DEPTH} levels, got more")
        inner = (value.values() if isinstance(value, dict) else value for value in level if type(value) in (dict, list))
        level = [value for values in inner for value in values]
    return content


def _twice(where: str, pairs: list[tuple[str, Any]]) -> None:
    seen: set[str] = set()
    for name, _ in pairs:
        if name in seen:
            raise FormatError(f"{where}: names {_short(name)} twice")
        seen.add(name)


def _no_number(where: str, name: str) -> None:
    raise FormatError(f"{where}: not valid JSON: {name} is no number")


def _read_header(path: Path, source: ByteSource) -> tuple[dict[str, Any], int, int]:
    """The parsed header, where the data starts, and the file's size."""
    file_size = source.size
    start = source.read(0, min(file_size, 256))
    if start[8:9] != b"{":  # as every header begins; the 8 bytes before it may be any
        refuse_foreign(path, start)
        if file_size < 10:
            raise FormatError(f"{path}: expected a safetensors file, got {file_size} bytes: download it again")
    length = int.from_bytes(start[:8], "little")
    if length > min(_MAX_HEADER, file_size - 8):
        raise FormatError(
            f"{path}: not a safetensors file, or cut off: its first 8 bytes promise a header of {length} bytes, "
            f"but the file has {file_size} bytes: download it again"
        )
    header = parse_json(source.read(8, 8 + length), where=f"{path}: the header")
    if not isinstance(header, dict):
        raise FormatError(f"{path}: the header must be a JSON object, got {_short(header)}")
    return header, 8 + length, file_size


def refuse_foreign(path: Path | str, start: bytes) -> None:
    """Says what a file is, where it is one of the things that are often found under a model file's name."""
    refuse_pages(path, start)
    if start.startswith(b"GGUF"):
        raise FormatError(f"{path}: this is a GGUF file; expected safetensors")
    if start.startswith((b"PK\x03\x04", *(bytes([0x80, protocol]) for protocol in range(2, 6)))):
        raise FormatError(
            f"{path}: this is a zip or pickle file (torch .pt?), which is never read; expected safetensors"
        )


def refuse_pages(path: Path | str, start: bytes) -> None:
    """Refuses what servers and git leave in place of a file."""
    if start.startswith(b"version https://git-lfs"):
        raise FormatError(f"{path}: this is a Git LFS pointer, not the file: run `git lfs pull`, or download it again")
    if start.lstrip()[:1] == b"<":
        raise FormatError(
            f"{path}: this is an HTML or XML page, not a model file: download it again (signed in, if needed)"
        )


def _parse_entry(path: Path, name: str, entry: Any, data_start: int) -> TensorInfo:
    if not 0 < len(name) <= _MAX_NAME or not name.isprintable():
        raise FormatError(f"{path}: {_short(name)}: expected a name of 1 to {_MAX_NAME} printable characters")
    if not isinstance(entry, dict) or not entry.keys() >= {"dtype", "shape", "data_offsets"}:
        raise FormatError(f"{path}: {name}: expected dtype, shape and data_offsets, got {_short(entry)}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise FormatError(f"{path}: {name}: dtype {_short(dtype)} is not supported; known are {', '.join(_DTYPES)}")
    if not _are_sizes(shape):
        raise FormatError(f"{path}: {name}: shape must be a list of sizes, got {_short(shape)}")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise FormatError(f"{path}: {name}: data_offsets must be [start, end] with start <= end, got {_short(offsets)}")
    info = TensorInfo(dtype=_DTYPES[dtype], shape=tuple(shape), start=data_start + offsets[0])
    if info.nbytes != offsets[1] - offsets[0]:
        raise FormatError(
            f"{path}: {name}: {dtype} of shape {shape} takes {info.nbytes} bytes, its data_offsets {offsets} hold "
            f"{offsets[1] - offsets[0]}"
        )
    return info


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and len(values) <= 32 and all(type(v) is int and 0 <= v < 2**63 for v in values)


def _check_layout(path: Path, tensors: dict[str, TensorInfo], data_start: int, file_size: int) -> None:
    """Tensors must fill the file exactly: no overlap, no gap, nothing missing, nothing after the last one."""
    ordered = sorted(tensors.items(), key=lambda item: (item[1].start, item[1].nbytes))
    promised = max([data_start, *(info.start + info.nbytes for info in tensors.values())])
    if file_size != promised:
        what = "the download was cut off" if file_size < promised else "there are bytes that belong to no tensor"
        last = max(tensors, key=lambda name: tensors[name].start + tensors[name].nbytes, default="none")
        raise FormatError(
            f"{path}: the file has {file_size} bytes, its header promises {promised} (last tensor: {last}): {what}, "
            "download it again"
        )
    end, previous = data_start, "the header"
    for name, info in ordered:
        if info.start != end:
            relation = "overlaps" if info.start < end else "leaves a gap after"
            raise FormatError(
                f"{path}: {name} starts at byte {info.start} and {relation} {previous}, which ends at {end}"
            )
        end, previous = info.start + info.nbytes, name


def _short(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 80 else text[:77] + "..."
