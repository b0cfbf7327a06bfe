"""What files mean, by the letter of their formats and with nothing of the converter: to hold its results against.

Files are parsed by the `safetensors` library, codes are unpacked bit by bit, and weights decoded in float64.
"""

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors import deserialize
from safetensors.numpy import load_file

from tests.conftest import DATA

from .tiny import Packed

KINDS = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "F64": np.float64}
KINDS |= {"U8": np.uint8, "I8": np.int8, "I64": np.int64, "I32": np.int32, "BOOL": np.bool_}
_CODES, _NORMS = ("__packed", "__codes", ".codes_packed", ".codes"), ("__norms", ".norms")
_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "model.", "transformer.")


class Stored(NamedTuple):
    """A quantized weight as it is in files."""

    codes: np.ndarray  # [out, padded]
    norms: np.ndarray  # [out, blocks]
    scaled: np.ndarray  # levels / sqrt(block size)


def tensors(path: Path) -> dict[str, np.ndarray]:
    """Every tensor of a file. Tensors of kinds that no weight has come as bytes."""
    found = {}
    for name, entry in deserialize(path.read_bytes()):
        kind = KINDS.get(entry["dtype"])
        data = np.frombuffer(bytes(entry["data"]), kind or np.uint8)
        found[name] = data.reshape(entry["shape"]) if kind else data
    return found


def metadata(path: Path) -> dict[str, str]:
    raw = path.read_bytes()
    return json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")]).get("__metadata__", {})


def plain(found: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    """A tensor by its published name, also where its prefix was left out."""
    spellings = dict.fromkeys((name, name.removeprefix("model.diffusion_model."), name.removeprefix("model.")))
    (spelling,) = [spelling for spelling in spellings if spelling in found]
    return found[spelling]


def stored(
    found: Mapping[str, np.ndarray], name: str, how: Packed, shape: tuple[int, ...], sidecar: Mapping[str, Any]
) -> Stored:
    """A packed weight by its published name, in any spelling of its stem; `how` it was packed is known."""
    bare = [name, *(name.removeprefix(p) for p in _PREFIXES), *(p + name for p in _PREFIXES)]
    stems = {s for n in bare for v in (n, n.removesuffix(".weight")) for s in (v, v.replace(".", "__"))}
    (stem, suffix), *more = [(s, suffix) for s in stems for suffix in _CODES if s + suffix in found]
    assert not more, f"{name} is there twice"
    family = suffix[: 1 if suffix[0] == "." else 2]
    codes, norms = found[stem + suffix], found[f"{stem}{family}norms"]
    rows, block = shape[0], how.block_size
    codes = unpack(codes.reshape(-1).view(np.uint8), how, norms.size * block)
    if f"{stem}{family}ct_scaled" in found:
        scaled = found[f"{stem}{family}ct_scaled"]
    elif f"{stem}{family}ct" in found:
        scaled = found[f"{stem}{family}ct"] / np.float32(block**0.5)
    else:  # what no file says: these packages were made with table B, and a sidecar may claim another one
        scaled = table(sidecar.get("table", "B"), how.bits) / np.float32(block**0.5)
    flat = how.layout == "V7" and shape[1] % block
    rows = 1 if flat else rows
    return Stored(codes.reshape(rows, -1), norms.reshape(rows, -1), scaled)


def unpack(stream: np.ndarray, how: Packed, count: int) -> np.ndarray:
    """The codes of a byte stream."""
    if how.layout in ("V1", "V4", "V7") or how.bits in (7, 8):
        return stream[:count]
    if how.layout in ("V2", "V3") and how.bits <= 4:  # nibbles: the halves of a block
        halves = stream.reshape(-1, how.block_size // 2)
        return np.concatenate([halves & 15, halves >> 4], axis=1).reshape(-1)
    if how.layout == "V3":
        return stream[:count]
    order = "little" if how.layout == "V2" else "big"
    bits = np.unpackbits(stream, bitorder=order)[: count * how.bits].reshape(count, how.bits)
    weights = 1 << np.arange(how.bits)
    return (bits * (weights if order == "little" else weights[::-1])).sum(axis=1).astype(np.uint8)


@cache
def table(name: str, bits: int) -> np.ndarray:
    """The levels of a published table, as the original code computed them."""
    return load_file(DATA / "hlwq/centroids.safetensors")[f"{name}{bits}"]


def decode(weight: Stored, block_size: int) -> np.ndarray:
    """The values of all blocks, one after the other."""
    matrix = np.ones((1, 1))
    while len(matrix) < block_size:
        matrix = np.kron(matrix, [[1, 1], [1, -1]])
    levels = weight.scaled.astype(np.float64)[weight.codes].reshape(-1, block_size)
    return (levels @ matrix / block_size**0.5) * weight.norms.astype(np.float64).reshape(-1, 1)


def planes(arrays: Mapping[str, np.ndarray], *, bits: int, block_size: int) -> Stored:
    """A packed linear of a checkpoint, as docs/format.md tells."""

    def fields(words: np.ndarray, width: int) -> np.ndarray:
        shifts = np.arange(0, 32, width, dtype=np.uint32)
        return (words[..., None] >> shifts & (2**width - 1)).reshape(len(words), -1)[:, : blocks * block_size]

    blocks = arrays["norms"].shape[1]
    codes = fields(arrays["lo"], 8 if bits > 6 else 4)
    if "hi" in arrays:
        codes = codes | fields(arrays["hi"], bits - 4) << 4
    return Stored(codes.astype(np.uint8), arrays["norms"], arrays["scaled_centroids"])


def checkpoint(folder: Path) -> dict[str, np.ndarray]:
    """Every array of a converted checkpoint, `component/path` -> array, from the chunks of its files."""
    found = {}
    for path in folder.rglob("zarr.json"):
        facts = json.loads(path.read_bytes())
        kind = ml_dtypes.bfloat16 if facts["data_type"] == "bfloat16" else facts["data_type"]
        chunks = sorted(path.parent.glob("c*"), key=lambda chunk: [int(n) for n in chunk.name.split(".")[1:]])
        data = np.frombuffer(b"".join(chunk.read_bytes() for chunk in chunks), kind)
        component = path.relative_to(folder).parts[0]
        name = f"{component}/{path.parent.name}"
        assert name not in found, f"{name} is there twice"
        found[name] = data.reshape(facts["shape"])
    return found
