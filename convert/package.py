"""Writes a new package in a published layout, from tensors by published name: what other readers of HLWQ read.

Layout V5 has the codes as dense streams and no table: every reader takes one of the published tables. Layout V1 has a
byte a code and the table of each weight. Neither has a place for signs or a trellis (docs/format.md).
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal, get_args

import numpy as np

from convert.destination import Work, check_space, claim
from convert.files import ConvertError
from convert.layout import Payload, header_of, write_safetensors
from convert.parts import PackedLinear
from convert.progress import progress_bar
from hlwq_jax import TABLES, LazyTensor, Packing, Quantized, lloyd_max, mangle, pack, packed_length
from hlwq_jax.quantize import scale_centroids
from hlwq_jax.reader import SIDECARS
from ltx_jax import durable
from ltx_jax.checkpoint import QuantizedShape

Layout = Literal["V5", "V1"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)
_FILE_BYTES = 2**32  # of a file of codes, about
_PUBLISHED_TABLES = ("A", "B", "C")  # that readers of V5 may try
_AGAIN = "`python -m convert --recipe published` (or `fitted`) packs with table A and nothing else"


@dataclass(frozen=True, kw_only=True)
class PublishedWeight:
    """A quantised weight to publish, its codes in runs of rows."""

    shape: QuantizedShape
    scaled_centroids: np.ndarray
    codes: Callable[[], Iterable[np.ndarray]]  # [rows, padded inputs]; whole groups of eight codes, but for the last
    norms: Payload  # [out, blocks]

    @classmethod
    def of(cls, weight: Quantized) -> "PublishedWeight":
        """A weight in memory, such as `hlwq_jax.quantize` returns."""
        return cls(
            shape=QuantizedShape(
                in_features=weight.in_features,
                out_features=weight.out_features,
                bits=weight.bits,
                block_size=weight.block_size,
                history_bits=weight.history_bits,
                signs=weight.signs is not None,
            ),
            scaled_centroids=weight.scaled_centroids,
            codes=lambda: [weight.codes],
            norms=Payload.of(weight.norms),
        )

    @classmethod
    def of_linear(cls, linear: PackedLinear) -> "PublishedWeight":
        """A linear of a checkpoint, read when it is written."""
        return cls(
            shape=linear.shape,
            scaled_centroids=linear.scaled_centroids,
            codes=lambda: map(linear.codes, linear.slices()),
            norms=Payload.of(linear.norms),
        )

    @property
    def table(self) -> str:
        """The table whose levels these are, or "stored" for any other."""
        bits, block_size = self.shape.bits, self.shape.block_size
        levels = ((table, scale_centroids(lloyd_max(bits, table), block_size)) for table in TABLES)
        return next((table for table, scaled in levels if np.array_equal(scaled, self.scaled_centroids)), "stored")

    @property
    def num_blocks(self) -> int:
        """Of a row."""
        return self.norms.shape[1]

    @property
    def num_codes(self) -> int:
        return self.shape.out_features * self.num_blocks * self.shape.block_size

    def stream(self, packing: Packing, dtype: Any) -> Payload:
        """The codes as published bytes."""
        return stream(self.codes, self.num_codes, packing=packing, dtype=dtype, shape=self.shape)


def stream(
    codes: Callable[[], Iterable[np.ndarray]], num_codes: int, *, packing: Packing, dtype: Any, shape: QuantizedShape
) -> Payload:
    """Runs of codes as published bytes; each run is of whole groups of eight codes, but for the last."""
    return Payload(
        dtype=np.dtype(dtype),
        shape=(packed_length(num_codes, bits=shape.bits, packing=packing),),
        pieces=lambda: (pack(run, bits=shape.bits, packing=packing, block_size=shape.block_size) for run in codes()),
    )


@dataclass(frozen=True, kw_only=True)
class Published:
    """Models to publish: tensors by published name, and the metadata of their files."""

    tensors: Mapping[str, Payload | PublishedWeight]
    metadata: Mapping[str, str]
    upscalers: Mapping[str, tuple[Mapping[str, Payload], Mapping[str, str]]]  # component -> its tensors, its metadata


def metadata_of(config: Mapping[str, Any], model_version: str | None = None) -> dict[str, str]:
    """What published files say of their models."""
    return {"config": json.dumps(config)} | ({} if model_version is None else {"model_version": model_version})


def export_package(
    out: str | Path,
    tensors: Mapping[str, LazyTensor | np.ndarray | Quantized],
    *,
    config: Mapping[str, Any],
    model_version: str | None = None,
    layout: Layout = "V5",
) -> int:
    """Writes a new package from a model's tensors by published name; returns how many files it has.

    Quantised weights come as `Quantized` under the name of their parameter (`….weight`). Layout V5 needs all of them to
    be of one of the tables A, B and C, which the sidecar names; V1 takes any table. `config` is the published
    configuration: it becomes metadata of the file of plain tensors.

    Raises ConvertError for what the layout has no place for (trellis codes, signs, other tables in V5), where nothing
    is quantised, for an `out` that is there, and for a disk without room.
    """
    published = Published(
        tensors={
            name: PublishedWeight.of(value) if isinstance(value, Quantized) else Payload.of(value)
            for name, value in tensors.items()
        },
        metadata=metadata_of(config, model_version),
        upscalers={},
    )
    return write_package(Path(out), published, layout=layout)


def write_package(out: Path, model: Published, *, layout: Layout, progress: bool = False) -> int:
    """As `export_package`."""
    weights = {name: value for name, value in model.tensors.items() if isinstance(value, PublishedWeight)}
    if not weights:
        raise ConvertError("nothing is quantised here, so it makes no package of a published layout")
    table = _check_expressible(weights, layout)
    parts = [(_v5 if layout == "V5" else _v1)(name, weight) for name, weight in weights.items()]
    _check_names(name for part in parts for name in part)
    plain = {name: value for name, value in model.tensors.items() if isinstance(value, Payload)}
    files: dict[str, tuple[Mapping[str, Payload], Mapping[str, str]]] = {
        f"codes/chunk_{number:02}_codes.safetensors": (chunk, {}) for number, chunk in enumerate(_chunks(parts))
    }
    files["bf16/model_bf16.safetensors"] = plain, model.metadata
    files |= {f"upscalers/{component}.safetensors": file for component, file in model.upscalers.items()}
    needed = sum(payload.nbytes for tensors, _ in files.values() for payload in tensors.values())
    with new_folder(out, needed) as folder, progress_bar("export", needed, shown=progress) as advance:
        for name, (tensors, metadata) in files.items():
            write_safetensors(
                file_in(folder, name),
                tensors,
                header=header_of(tensors, metadata),
                advance=lambda data, name=name: advance(name, len(data)),
            )
        sidecar = json.dumps(_sidecar(weights, layout, table), indent=1)
        durable.write(folder / SIDECARS[0], [sidecar.encode(), b"\n"])
    return len(files) + 1


@contextmanager
def new_folder(out: Path, needed: int) -> Iterator[Path]:
    """A folder to fill, which gets its name when it is full; what a run that was cut off left of it is removed.

    Raises ConvertError for a name that is taken, a disk without room for so many bytes, and if another process fills
    the same folder.
    """
    out = out.resolve()
    if out.exists():
        raise ConvertError(f"{out} is there already, and nothing is overwritten; choose another folder")
    with claim(out, overwrite=False) as work:
        _start_over(work)
        try:
            check_space(out, int(1.01 * needed) + 2**20)
            yield work.tree
            durable.sync(work.tree)
            work.finish()
        except BaseException:
            work.remove()
            raise


def _start_over(work: Work) -> None:
    key = {"export": True}
    if work.journal.key not in (None, key):
        raise ConvertError(
            f"{work.folder} holds an unfinished conversion; choose another folder, or remove that one first"
        )
    work.remove()
    work.begin(key)


def file_in(folder: Path, name: str) -> Path:
    """The place of a file below a folder, which is made. Raises ConvertError for a name that leads elsewhere."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.name:
        raise ConvertError(f"{name!r} is no name of a file in a package; convert again")
    place = folder / path
    place.parent.mkdir(parents=True, exist_ok=True)
    return place


def _check_expressible(weights: Mapping[str, PublishedWeight], layout: Layout) -> str | None:
    """The table of all weights in layout V5, None in V1. Raises ConvertError for what a layout has no place for."""
    for name, weight in weights.items():
        if weight.shape.history_bits or weight.shape.signs:
            what = "a trellis" if weight.shape.history_bits else "signs"
            raise ConvertError(f"{name} has {what}, for which no published layout has a place; {_AGAIN}")
    if layout == "V1":
        return None
    first: dict[str, str] = {}  # table -> the first weight of it
    for name, weight in weights.items():
        first.setdefault(weight.table, name)
    other = next((table for table in first if table not in _PUBLISHED_TABLES), None)
    if other is not None:
        raise ConvertError(
            f"{first[other]} has the levels of table {other!r}, and layout V5 stores none: its readers take A, B or C. "
            f"Layout V1 stores them; or {_AGAIN}"
        )
    if len(first) > 1:
        examples = " and ".join(f"{table} ({name})" for table, name in first.items())
        raise ConvertError(
            f"weights are of tables {examples}, and readers of layout V5 take one for all; layout V1 stores them"
        )
    return next(iter(first))


def _v5(name: str, weight: PublishedWeight) -> dict[str, Payload]:
    shape, stem = weight.shape, mangle(name)
    meta = [shape.out_features, weight.num_blocks, shape.block_size, weight.num_codes, shape.in_features]
    if shape.bits == 2:  # with five entries, streams of two bits are taken to be of another order
        del meta[-1]
    return {
        f"{stem}__packed": weight.stream("M", np.uint8),
        f"{stem}__norms": weight.norms,
        f"{stem}__meta": Payload.of(np.array(meta, np.int64)),
    }


def _v1(name: str, weight: PublishedWeight) -> dict[str, Payload]:
    stem, codes = name.removesuffix(".weight"), weight.stream("N", np.int8)
    rows = weight.shape.out_features, weight.num_blocks * weight.shape.block_size
    return {
        f"{stem}.codes": Payload(dtype=codes.dtype, shape=rows, pieces=codes.pieces),
        f"{stem}.norms": weight.norms,
        f"{stem}.ct_scaled": Payload.of(weight.scaled_centroids),
    }


def _check_names(names: Iterable[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise ConvertError(f"two weights would be called {name} in this layout; choose the other one")
        seen.add(name)


def _chunks(parts: Iterable[Mapping[str, Payload]]) -> Iterator[dict[str, Payload]]:
    """The parts of weights in files of a few gigabytes; those of one weight stay together."""
    chunk: dict[str, Payload] = {}
    size = 0
    for part in parts:
        nbytes = sum(payload.nbytes for payload in part.values())
        if chunk and size + nbytes > _FILE_BYTES:
            yield chunk
            chunk, size = {}, 0
        chunk |= part
        size += nbytes
    yield chunk


def _sidecar(weights: Mapping[str, PublishedWeight], layout: Layout, table: str | None) -> dict[str, Any]:
    layers = {
        name.removesuffix(".weight"): {
            "in_features": weight.shape.in_features,
            "out_features": weight.shape.out_features,
            "in_features_padded": weight.num_blocks * weight.shape.block_size,
            "n_blocks": weight.num_blocks,
            "bits": weight.shape.bits,
            "block_size": weight.shape.block_size,
            "packed": layout == "V5",
        }
        for name, weight in weights.items()
    }
    sizes = {weight.shape.block_size for weight in weights.values()}
    return {
        "format": "hlwq" if layout == "V5" else "polar_engine_v4",
        **({"block_size": sizes.pop()} if len(sizes) == 1 else {}),
        **({} if table is None else {"table": table}),
        "layers": layers,
    }
