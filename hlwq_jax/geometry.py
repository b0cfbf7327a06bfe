"""The sizes, width and packing of one stored weight, from the shapes of its parts, its meta vector and the sidecar."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import numpy as np

from hlwq_jax.codebook import TableName, lloyd_max
from hlwq_jax.energy import measure, measure_tables, plausible
from hlwq_jax.format import Parts
from hlwq_jax.names import mangle
from hlwq_jax.packing import Packing, packed_length
from hlwq_jax.stored import StoredWeight
from hlwq_jax.tensors import FormatError, LazyTensor

BitOrder = Literal["msb", "lsb"]

_MAX_BLOCK = 2**12  # the rotation of such a block is a matrix of 64 MiB
_MAX_LEVEL = 64.0  # sqrt(_MAX_BLOCK): values of a block whose mean square is 1 are no larger


@dataclass(frozen=True, kw_only=True)
class Sidecar:
    """What `polar_config.json` says; all of it is optional, and shapes go before it."""

    bits: int | None = None
    block_size: int | None = None
    table: TableName | None = None
    layers: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # by mangled name without `.weight`

    @classmethod
    def parse(cls, content: Mapping[str, Any] | None, *, where: str = "sidecar") -> "Sidecar":
        """Raises `FormatError`, which begins with `where`, for settings that no weight can have."""
        content = content or {}
        layers = content.get("layers", {})
        if not isinstance(layers, dict) or not all(isinstance(layer, dict) for layer in layers.values()):
            raise FormatError(f"{where}: layers must map names to settings")
        table = content.get("table")
        if table is not None and table not in get_args(TableName):
            raise FormatError(f"{where}: table must be one of {', '.join(get_args(TableName))}, got {table!a}")
        for name, settings in [("", content), *layers.items()]:
            for key in _SETTINGS:
                _check_setting(settings.get(key), key, where=f"{where}: {name}: " if name else f"{where}: ")
        by_name = {_layer_key(name): layer for name, layer in layers.items()}
        if len(by_name) < len(layers):
            raise FormatError(f"{where}: layers has two spellings of one name; keep one")
        return cls(
            bits=content.get("bits"),
            block_size=content.get("block_size"),
            table=table,
            layers=by_name,
        )

    def layer(self, stem: str) -> Mapping[str, Any]:
        return self.layers.get(_layer_key(stem), {})


def _layer_key(name: str) -> str:
    return mangle(name).removesuffix("__weight")


_SETTINGS = ("bits", "block_size", "in_features", "out_features")


def _check_setting(value: Any, key: str, *, where: str) -> None:
    if value is not None and (type(value) is not int or value < 1):
        raise FormatError(f"{where}{key} must be a positive whole number, got {value!a}")
    if value is not None and key == "bits" and value > 8:
        raise FormatError(f"{where}bits must be 1 to 8, got {value}")
    if value is not None and key == "block_size" and not _is_block_size(value):
        raise FormatError(f"{where}the block size must be a power of two up to {_MAX_BLOCK}, got {value}")


def _is_block_size(value: int) -> bool:
    return 1 <= value <= _MAX_BLOCK and not value & (value - 1)


@dataclass(frozen=True, kw_only=True)
class _Meta:
    """The numbers of a `meta` vector; which ones are there depends on its length."""

    out: int | None = None
    num_blocks: int | None = None
    block_size: int | None = None
    total: int | None = None
    in_features: int | None = None
    bits: int | None = None
    padded: int | None = None
    entries: int = 0


def _read_meta(parts: Parts) -> _Meta:
    if parts.meta is None:
        return _Meta()
    if len(parts.meta.shape) != 1 or parts.meta.size not in (2, 4, 5):
        raise FormatError(
            f"{parts.meta.where}: expected 2, 4 or 5 entries (out, blocks, block size, total[, in]), got shape "
            f"{list(parts.meta.shape)}"
        )
    values = [int(v) for v in parts.meta.read()]
    if min(values) < 1:
        raise FormatError(f"{parts.meta.where}: expected positive sizes, got {values}")
    if len(values) == 2:
        return _Meta(bits=values[0], padded=values[1], entries=2)
    names = ("out", "num_blocks", "block_size", "total", "in_features")
    return _Meta(**dict(zip(names, values, strict=False)), entries=len(values))


def describe(
    parts: Parts,
    *,
    name: str,
    sidecar: Sidecar,
    model_shape: tuple[int, ...] | None,
    bit_order: BitOrder | None,
    warn: Callable[[str], None],
    alike: StoredWeight | None = None,
) -> StoredWeight:
    """Everything about a weight but its table, unless that is stored. Raises `FormatError` where parts contradict.

    `alike` is a weight stored in the same way: where shapes leave width or packing open, they are its ones, and no code
    of this one is looked at.
    """
    meta, layer = _read_meta(parts), sidecar.layer(parts.stem)
    if meta.entries == 2:
        warn(f"{name}: meta has 2 entries, read as [bits, padded inputs]; no package with that layout is known")
    if model_shape is not None and len(model_shape) != 2:
        raise FormatError(
            f"{name}: quantized weights have 2 axes, the model's parameter has shape {list(model_shape)} "
            f"({parts.codes.where})"
        )
    block_size, assumed = _block_size(parts, meta, layer, sidecar)
    num_levels = _table_size(parts)
    flat = parts.layout == "V7"
    out, num_blocks = (None, parts.norms.size) if flat else _rows(parts, name, meta, model_shape)
    if assumed:
        block_size = _infer_block_size(parts, block_size, num_levels)
        if block_size != 128:
            warn(f"{name}: blocks of {block_size}, from the shapes: no meta or sidecar says so")
    if not parts.norms.size:
        raise FormatError(f"{name}: there are no norms ({parts.norms.where})")
    total = parts.norms.size * block_size
    if meta.total is not None and meta.total != total:
        raise FormatError(
            f"{name}: meta promises {meta.total} codes, rows, blocks and block size make {total} ({parts.codes.where})"
        )
    if meta.padded is not None and meta.padded != num_blocks * block_size:
        raise FormatError(
            f"{name}: meta promises {meta.padded} padded inputs, its blocks make {num_blocks * block_size} "
            f"({parts.norms.where})"
        )
    out, in_features = _features(parts, name, meta, layer, model_shape, out, num_blocks * block_size, block_size, flat)
    if flat and out is not None and in_features is not None and in_features % block_size == 0:
        num_blocks, flat = in_features // block_size, False  # blocks end with the rows: the same as any other layout
    weight = StoredWeight(
        name=name,
        stem=parts.stem,
        layout=parts.layout,
        packing="N",
        bits=8,
        block_size=block_size,
        out_features=out,
        in_features=in_features,
        num_blocks=num_blocks,
        flattened=flat,
        table="A",
        table_reason="not decided",
        centroids=lloyd_max(8),
        code_tensor=parts.codes,
        norm_tensor=parts.norms,
        nbytes=sum(t.nbytes for t in (parts.codes, parts.norms, parts.meta, parts.shape, parts.table) if t is not None),
    )
    claimed = num_levels.bit_length() - 1 if num_levels else meta.bits
    hinted = layer.get("bits") or (sidecar.bits if parts.layout == "V4" else None)
    weight = _packing(weight, meta, claimed=claimed, hinted=hinted, order=bit_order, alike=alike)
    if hinted is not None and hinted != weight.bits:
        warn(f"{name}: the sidecar says {hinted} bits, the tensors hold {weight.bits}")
    if parts.table is not None:
        weight = _with_stored_table(weight, parts.table, scaled=parts.table_is_scaled)
        return weight if alike is not None else _in_fitting_order(weight)
    return weight


def _block_size(parts: Parts, meta: _Meta, layer: Mapping[str, Any], sidecar: Sidecar) -> tuple[int, bool]:
    """The block size and whether it is only the usual one, said nowhere."""
    said = meta.block_size or layer.get("block_size") or sidecar.block_size
    block_size = said or 128
    if not _is_block_size(block_size):
        raise FormatError(
            f"{parts.stem}: the block size must be a power of two up to {_MAX_BLOCK}, got {block_size} "
            f"({(parts.meta or parts.norms).where})"
        )
    return block_size, said is None


def _table_size(parts: Parts) -> int | None:
    if parts.table is None:
        return None
    if len(parts.table.shape) != 1 or parts.table.size not in {2**bits for bits in range(1, 9)}:
        raise FormatError(
            f"{parts.table.where}: expected 2 to 256 levels, a power of two, got {list(parts.table.shape)}"
        )
    return parts.table.size


def _rows(parts: Parts, name: str, meta: _Meta, model_shape: tuple[int, ...] | None) -> tuple[int, int]:
    """`out` and the blocks of a row, from the norms' shape, or for flat norms from meta or the model."""
    shape = parts.norms.shape
    if len(shape) == 2:
        out, num_blocks = shape
    elif len(shape) == 1 and meta.out is not None and meta.num_blocks is not None:
        out, num_blocks = meta.out, meta.num_blocks
    elif len(shape) == 1 and len(parts.codes.shape) == 2 and shape[0] % max(parts.codes.shape[0], 1) == 0:
        out, num_blocks = parts.codes.shape[0], shape[0] // max(parts.codes.shape[0], 1)
    elif len(shape) == 1 and model_shape is not None and shape[0] % max(model_shape[0], 1) == 0:
        out, num_blocks = model_shape[0], shape[0] // max(model_shape[0], 1)
    else:
        raise FormatError(
            f"{name}: expected norms [out, blocks], got {list(shape)} ({parts.norms.where}), and neither meta nor the "
            "model's shapes say how many rows they are"
        )
    for what, value, expected in (("rows", out, meta.out), ("blocks a row", num_blocks, meta.num_blocks)):
        if expected is not None and value != expected:
            raise FormatError(f"{name}: meta promises {expected} {what}, its norms have {value} ({parts.norms.where})")
    if len(parts.codes.shape) == 2 and parts.codes.shape[0] != out:
        raise FormatError(f"{name}: codes have {parts.codes.shape[0]} rows ({parts.codes.where}), norms have {out}")
    if out * num_blocks != parts.norms.size or not parts.norms.size:
        raise FormatError(
            f"{name}: {out} rows of {num_blocks} blocks need as many norms, got {parts.norms.size} "
            f"({parts.norms.where})"
        )
    return out, num_blocks


def _infer_block_size(parts: Parts, usual: int, num_levels: int | None) -> int:
    """The block size that makes the codes fit the norms, where nothing states it and the usual one does not."""
    size, norms = parts.codes.size, parts.norms.size
    bytes_per_block, rest = divmod(size, norms)
    bits = num_levels.bit_length() - 1 if num_levels else None
    fits = {bytes_per_block}  # one code per byte
    if parts.codes.dtype == np.uint8:
        if len(parts.codes.shape) == 2:
            if bits is None or bits <= 4:
                fits.add(2 * bytes_per_block)
            if bits in (None, 5) and bytes_per_block * 8 % 5 == 0:
                fits.add(bytes_per_block * 8 // 5)
        else:
            fits |= {bytes_per_block * 8 // b for b in range(2, 7) if bytes_per_block * 8 % b == 0}
    fits = {block for block in fits if block and not block & (block - 1) and block <= _MAX_BLOCK}
    if usual in fits or (len(parts.codes.shape) == 1 and parts.layout != "V7"):
        return usual
    if rest or len(fits) != 1:
        raise FormatError(
            f"{parts.stem}: {size} bytes of codes ({parts.codes.where}) do not fit {norms} norms at blocks of {usual}: "
            "name the block size in the sidecar (block_size)"
        )
    return fits.pop()


def _features(
    parts: Parts,
    name: str,
    meta: _Meta,
    layer: Mapping[str, Any],
    model_shape: tuple[int, ...] | None,
    out: int | None,
    padded: int,
    block_size: int,
    flat: bool,
) -> tuple[int | None, int | None]:
    """`out` and `in`: everyone who states them must agree; `in` is None where nobody does, never the padded length."""
    stated: list[tuple[str, int | None, int | None]] = [("its norms", out, None), ("meta", meta.out, meta.in_features)]
    if parts.shape is not None:
        if parts.shape.shape != (2,):
            raise FormatError(f"{parts.shape.where}: expected [out, in], got {list(parts.shape.shape)} entries")
        rows, columns = (int(v) for v in parts.shape.read())
        stated.append(("its shape tensor", rows, columns))
    stated.append(("sidecar", layer.get("out_features"), layer.get("in_features")))
    if model_shape is not None:
        stated.append(("the model", model_shape[0], model_shape[1]))
    where = parts.norms.where
    rows = _agreed(name, "rows", [(who, rows) for who, rows, _ in stated], where)
    columns = _agreed(name, "inputs", [(who, columns) for who, _, columns in stated], where)
    if flat:
        if rows is None or columns is None:
            return rows, columns
        if not padded - block_size < rows * columns <= padded:
            raise FormatError(
                f"{name}: {rows} x {columns} values need {-(-rows * columns // block_size)} blocks of {block_size}, "
                f"got {padded // block_size} ({where})"
            )
    elif columns is not None and not padded - block_size < columns <= padded:
        raise FormatError(
            f"{name}: {padded // block_size} blocks of {block_size} hold {padded - block_size + 1} to {padded} inputs, "
            f"got {columns} ({where})"
        )
    return rows, columns


def _agreed(name: str, what: str, stated: list[tuple[str, int | None]], where: str) -> int | None:
    known = [(who, value) for who, value in stated if value is not None]
    if len({value for _, value in known}) > 1:
        told = ", ".join(f"{who}: {value}" for who, value in known)
        raise FormatError(f"{name}: {what} disagree: {told} ({where})")
    return known[0][1] if known else None


def _packing(
    weight: StoredWeight,
    meta: _Meta,
    *,
    claimed: int | None,
    hinted: int | None,
    order: BitOrder | None,
    alike: StoredWeight | None,
) -> StoredWeight:
    """Width and packing: `claimed` bits (from a stored table or meta) must fit, `hinted` ones are preferred."""
    fits = list(_fitting(weight, meta, order))
    shape, blocks = list(weight.code_tensor.shape), weight.norm_tensor.size
    if claimed is not None:
        fits = [(packing, bits) for packing, bits in fits if bits == claimed]
    if not fits:
        raise FormatError(
            f"{weight.name}: codes of shape {shape} fit no packing of {blocks} blocks of {weight.block_size}"
            f"{f' at {claimed} bits' if claimed else ''} ({weight.code_tensor.where})"
        )
    if hinted is not None and any(bits == hinted for _, bits in fits):
        fits = [(packing, bits) for packing, bits in fits if bits == hinted]
    if alike is not None and (alike.packing, alike.bits) in fits:
        fits = [(alike.packing, alike.bits)]
    options = [replace(weight, packing=packing, bits=bits, centroids=lloyd_max(bits)) for packing, bits in fits]
    if len(options) == 1:
        return options[0]
    # With a stored table the order of a 5-bit stream is tried later, under that table.
    return options[0] if claimed is not None else _best(options)


def _fitting(weight: StoredWeight, meta: _Meta, order: BitOrder | None) -> Iterator[tuple[Packing, int]]:
    """Every packing and width of which the codes' tensor has the shape, the likeliest first."""
    tensor, blocks = weight.code_tensor, weight.norm_tensor.size
    total = blocks * weight.block_size
    dense = len(tensor.shape) == 1
    if dense and tensor.dtype == np.uint8 and weight.layout in ("V2", "V3"):
        return  # these writers keep rows; without them half a block and half a byte of a stream look alike
    if tensor.size == total:
        # One code per byte. In dense streams that is 7 or 8 bits (or 1), but nothing forbids fewer.
        packing: Packing = "M" if dense and tensor.dtype == np.uint8 else "N"
        for bits in (5, 8, 7, 6, 4, 3, 2, 1):
            yield ("N" if bits < 7 and packing == "M" else packing), bits
        return
    if tensor.dtype != np.uint8:
        return
    if dense:
        for bits in (2, 3, 4, 5, 6):
            if tensor.size == packed_length(total, bits=bits, packing="M"):
                lsb = order == "lsb" or (order is None and bits == 2 and meta.entries == 5)
                yield ("L" if lsb and bits in (2, 5) else "M"), bits
        if tensor.size == packed_length(total, bits=1, packing="L"):
            yield "L", 1
        return
    if 2 * tensor.size == total and weight.block_size % 2 == 0 and weight.layout not in ("V5", "V6"):
        for bits in (4, 3, 2):
            yield "H", bits
    elif 8 * tensor.size == 5 * total:
        first: Packing = "M" if order == "msb" else "L"
        yield first, 5
        if order is None and weight.layout != "V2":  # a known writer's order is not up for choice
            yield "M", 5


def _best(options: list[StoredWeight]) -> StoredWeight:
    """The option under which the sampled codes are likeliest to be codes; raises where none is possible."""
    scores: list[tuple[float, int]] = []
    seen = []
    for i, option in enumerate(options):
        raw = replace(option, centroids=np.zeros(256, np.float32)).sample()  # 256: no code is refused yet
        if not len(raw):
            return options[0]
        if int(raw.max()) >= 2**option.bits:
            seen.append(f"{option.bits} bits: largest code {int(raw.max())}")
            continue
        measured = measure_tables(raw, option.bits)
        for table, found in measured.items():
            if plausible(found, lloyd_max(option.bits, table), option.block_size):
                scores.append((found.distance, i))
        seen.append(
            f"{option.bits} bits in packing {option.packing}: {min(measured.values(), key=lambda m: m.distance)}"
        )
    if not scores:
        raise FormatError(
            f"{options[0].name}: its codes fit no width or bit order, so they are damaged or foreign: {'; '.join(seen)}"
            f" ({options[0].code_tensor.where})"
        )
    return options[min(scores)[1]]


def _with_stored_table(weight: StoredWeight, tensor: LazyTensor, *, scaled: bool) -> StoredWeight:
    levels = tensor.read()
    if not np.isfinite(levels).all() or (np.diff(levels) <= 0).any():
        raise FormatError(f"{tensor.where}: expected finite levels in ascending order")
    if np.abs(levels).max() > _MAX_LEVEL:
        raise FormatError(f"{tensor.where}: expected levels up to ±{_MAX_LEVEL:g}, got {np.abs(levels).max():g}")
    stored_scaled = levels.astype(np.float32) if scaled else None
    if scaled:
        levels = (levels.astype(np.float64) * weight.block_size**0.5).astype(np.float32)
    return replace(weight, centroids=levels, stored_scaled=stored_scaled, table="stored", table_reason="stored")


def _in_fitting_order(weight: StoredWeight) -> StoredWeight:
    """A weight with a stored table in the other bit order, where only that one gives possible codes."""
    levels = weight.centroids
    if len(weight.code_tensor.shape) == 2 and weight.bits == 5 and weight.packing != "N" and weight.layout != "V2":
        other = weight.reordered()
        fits, fits_other = (plausible(measure(w.sample(), levels), levels, weight.block_size) for w in (weight, other))
        return other if fits_other and not fits else weight
    return weight
