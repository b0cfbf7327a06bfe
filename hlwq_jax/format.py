"""Published tensor names: which tensors make up one quantized weight, and which format only looks like HLWQ.

The layouts, by the names of a weight's parts (`p` with dots, `m` with every dot as `__`):

    V1  p.codes int8, p.norms, p.ct or p.ct_scaled             one code per byte
    V2  the same, some codes uint8 and packed                  half-block nibbles to 4 bits, packing L at 5
    V3  p.codes_packed uint8 to 4 bits, else p.codes           half-block nibbles, bytes
    V4  m__codes int8, m__norms                                one code per byte
    V5  m__packed uint8, m__norms, m__meta                     packing M
    V6  p.weight__packed, p.weight__norms, p.weight__meta      packing M
    V7  codes int8 and norms, one axis each                    blocks run over the flattened weight
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from hlwq_jax.tensors import FormatError, LazyTensor

_CODES = ("__packed", "__codes", ".codes_packed", ".codes")
_PARTS = (*_CODES, "__norms", "__meta", "__shape", "__ct_scaled", "__ct", ".norms", ".ct_scaled", ".ct")
# Parts that may also be names of ordinary tensors where the package has no codes of that family.
_COMMON_WORDS = (".norms", ".ct_scaled", ".ct", "__shape", "__ct_scaled", "__ct")


@dataclass(frozen=True, kw_only=True)
class Parts:
    """The tensors of one quantized weight, before anything of them is read."""

    stem: str
    layout: str  # "V1" to "V7"; "other" where found by structure alone
    codes: LazyTensor
    norms: LazyTensor
    meta: LazyTensor | None = None
    shape: LazyTensor | None = None
    table: LazyTensor | None = None
    table_is_scaled: bool = False  # holds level / sqrt(block), not the level


def refuse_look_alikes(names: Iterable[str]) -> None:
    """Raises for formats that share words with HLWQ, and names them."""
    names = set(names)
    rules = (
        ("compressed-tensors INT4", ".weight_packed", (".weight_scale",)),
        ("EOQ (absmax)", ".codes", (".scales",)),
        ("MLX", ".scales", (".biases",)),
        ("bitsandbytes", ".weight", (".weight.absmax",)),
        ("GPTQ or AWQ", ".qweight", ()),
    )
    for name in sorted(names):
        for what, suffix, partners in rules:
            stem = name.removesuffix(suffix)
            if name.endswith(suffix) and all(stem + partner in names for partner in partners):
                others = ", ".join(stem + partner for partner in partners)
                raise FormatError(f"{name}{' with ' + others if others else ''}: this package is {what}, not HLWQ")


def gather(tensors: Mapping[str, LazyTensor]) -> tuple[list[Parts], dict[str, LazyTensor]]:
    """Splits tensors into the parts of quantized weights and plain tensors, from names, types and numbers of axes.

    Works on the union over a package's files. Raises `FormatError` for look-alikes, for weights with a part missing,
    and where nothing is quantized.
    """
    refuse_look_alikes(tensors)
    groups: dict[tuple[str, str], dict[str, LazyTensor]] = {}
    plain: dict[str, LazyTensor] = {}
    for name, tensor in tensors.items():
        suffix = next((suffix for suffix in _PARTS if name.endswith(suffix) and name != suffix), None)
        if suffix is None:
            plain[name] = tensor
        else:
            groups.setdefault((suffix[0], name[: -len(suffix)]), {})[suffix] = tensor
    has_codes = {family for (family, _), group in groups.items() if any(suffix in group for suffix in _CODES)}
    for key, group in list(groups.items()):
        if key[0] not in has_codes and all(suffix in _COMMON_WORDS for suffix in group):
            plain.update({tensor.name: tensor for tensor in groups.pop(key).values()})
    dot_layout = _dot_layout(groups)
    weights = [_parts(stem, group, dot_layout) for (_, stem), group in groups.items()]
    if not weights:
        weights = _by_structure(plain)
    if not weights:
        examples = ", ".join(f"{t.name} {t.dtype}{list(t.shape)}" for t in list(tensors.values())[:3])
        raise FormatError(f"none of {len(tensors)} tensors is an HLWQ weight; the first are: {examples or 'none'}")
    return weights, plain


def _dot_layout(groups: Mapping[tuple[str, str], Mapping[str, LazyTensor]]) -> str:
    """Which of the dotted layouts a package has: they differ by single weights, so look at all of them."""
    dotted = [group for (family, _), group in groups.items() if family == "."]
    if any(".codes_packed" in group for group in dotted):
        return "V3"
    return "V2" if any(".codes" in group and group[".codes"].dtype == np.uint8 for group in dotted) else "V1"


def _parts(stem: str, group: Mapping[str, LazyTensor], dot_layout: str) -> Parts:
    found = [suffix for suffix in _CODES if suffix in group]
    have = ", ".join(sorted(tensor.where for tensor in group.values()))
    if not found:
        raise FormatError(f"{stem}: its codes are missing, there is only {have}")
    if len(found) > 1:
        raise FormatError(f"{stem}: codes are there twice: {have}")
    suffix, family = found[0], found[0][: 1 if found[0][0] == "." else 2]
    codes, norms, meta = group[suffix], group.get(family + "norms"), group.get(family + "meta")
    if norms is None:
        raise FormatError(f"{stem}: {stem}{family}norms is missing, there is only {have}")
    if suffix == "__packed" and meta is None:
        raise FormatError(f"{stem}: {stem}__meta is missing, there is only {have}")
    scaled, unscaled = group.get(family + "ct_scaled"), group.get(family + "ct")
    if _is_flat(codes, norms) and meta is None:
        layout = "V7"
    elif suffix == "__packed" or (suffix == "__codes" and codes.dtype == np.uint8 and len(codes.shape) == 1):
        layout = "V6" if "." in stem else "V5"
    else:
        layout = "V4" if suffix == "__codes" else dot_layout
    for tensor, kinds, what in (
        (codes, (np.uint8, np.int8), "uint8 or int8"),
        (norms, (np.float16,), "float16"),
        (meta, (np.int64, np.int32), "int64"),
        (group.get(family + "shape"), (np.int64, np.int32), "int64"),
        (scaled or unscaled, (np.float32,), "float32"),
    ):
        if tensor is not None and tensor.dtype not in kinds:
            raise FormatError(f"{tensor.where}: expected {what}, got {tensor.dtype}")
    return Parts(
        stem=stem,
        layout=layout,
        codes=codes,
        norms=norms,
        meta=meta,
        shape=group.get(family + "shape"),
        table=scaled or unscaled,
        table_is_scaled=scaled is not None,
    )


def _is_flat(codes: LazyTensor, norms: LazyTensor) -> bool:
    """Whether blocks run over the flattened weight: all codes on one axis, or one block in each row."""
    one_block_rows = len(codes.shape) == 2 and len(norms.shape) == 1 and codes.shape[0] == norms.size
    return len(norms.shape) == 1 and codes.dtype == np.int8 and (len(codes.shape) == 1 or one_block_rows)


def _by_structure(plain: dict[str, LazyTensor]) -> list[Parts]:
    """Weights under unknown names: one byte tensor and one 2-D float16 tensor that share the beginning of their names.

    What is found is taken out of `plain`. A float32 vector of a power of two of values beside them is the table.
    """
    groups: dict[str, list[LazyTensor]] = {}
    for name, tensor in plain.items():
        cut = max(name.rfind(separator) for separator in (".", "__", "_"))
        groups.setdefault(name[: max(cut, 0)].rstrip("_"), []).append(tensor)
    weights = []
    for stem, group in groups.items():
        codes = [t for t in group if t.dtype in (np.uint8, np.int8) and len(t.shape) in (1, 2)]
        norms = [t for t in group if t.dtype == np.float16 and len(t.shape) == 2]
        tables = [
            t for t in group if t.dtype == np.float32 and len(t.shape) == 1 and t.size in {2**b for b in range(1, 9)}
        ]
        if not stem or len(codes) != 1 or len(norms) != 1:
            continue
        meta = [t for t in group if t.dtype == np.int64 and t.shape in ((2,), (4,), (5,))]
        used = [*codes, *norms, *meta[:1], *tables[:1]]
        weights.append(
            Parts(
                stem=stem,
                layout="other",
                codes=codes[0],
                norms=norms[0],
                meta=meta[0] if meta else None,
                table=tables[0] if tables else None,
                # No name tells the two scalings apart; the outermost level does: 1.5 to 4.6, or that by sqrt(block).
                table_is_scaled=bool(tables) and float(np.abs(tables[0].read()).max()) < 0.75,
            )
        )
        for tensor in used:
            del plain[tensor.name]
    return weights
