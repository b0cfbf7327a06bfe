"""Packages in every published layout, written by what is no part of the converter."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from hlwq_jax import mangle, pack, quantize

NAMES = {"uint8": "U8", "int8": "I8", "int64": "I64", "float16": "F16", "bfloat16": "BF16", "float32": "F32"}


def write_file(path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> None:
    """A safetensors file as other programs write them: data not in the header's order, and a header with blanks."""
    backwards = sorted(tensors, reverse=True)
    ends = np.cumsum([0, *(tensors[name].nbytes for name in backwards)]).tolist()
    places = {name: ends[i : i + 2] for i, name in enumerate(backwards)}
    header = {
        name: {"shape": list(x.shape), "dtype": NAMES[x.dtype.name], "data_offsets": places[name]}
        for name, x in tensors.items()
    }
    text = json.dumps(header | ({"__metadata__": dict(metadata)} if metadata else {}), indent=1).encode() + b"   \n"
    data = b"".join(np.ascontiguousarray(tensors[name]).tobytes() for name in backwards)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def parts(
    layout: str, name: str, weight: np.ndarray, bits: int, sidecar: dict, *, block_size: int = 128
) -> dict[str, np.ndarray]:
    """A weight in a layout, by table B; what its readers need besides goes into `sidecar` (its `layers`)."""
    block_size *= 2 if layout == "V7" else 1  # wider than rows: blocks run across them
    flat = weight.reshape(1, -1) if layout == "V7" else weight
    packed = quantize(flat.astype(np.float32), bits=bits, block_size=block_size, table="B")
    codes, norms, stem = packed.codes, packed.norms, name.removesuffix(".weight")
    sidecar[stem] = {
        "in_features": weight.shape[1],
        "out_features": weight.shape[0],
        "bits": bits,
        "block_size": block_size,
    }
    rows, num_blocks = norms.shape
    meta = np.array([rows, num_blocks, block_size, codes.size, weight.shape[1]], np.int64)
    table = packed.scaled_centroids
    if layout == "V1":
        return {f"{stem}.codes": codes.view(np.int8), f"{stem}.norms": norms, f"{stem}.ct_scaled": table}
    if layout == "V2":
        packing = "H" if bits <= 4 else "L" if bits == 5 else "N"
        stream = pack(codes, bits=bits, packing=packing, block_size=block_size).view(np.uint8).reshape(rows, -1)
        return {f"{stem}.codes": stream, f"{stem}.norms": norms, f"{stem}.ct": packed.centroids}
    if layout == "V3":
        stream = pack(codes, bits=bits, packing="H", block_size=block_size).reshape(rows, -1)
        return {f"{stem}.codes_packed": stream, f"{stem}.norms": norms, f"{stem}.ct_scaled": table}
    if layout == "V4":
        return {f"{mangle(stem)}__codes": codes.view(np.int8), f"{mangle(stem)}__norms": norms}
    if layout == "V7":
        return {f"{mangle(name)}__codes": codes.view(np.int8).reshape(-1), f"{mangle(name)}__norms": norms.reshape(-1)}
    stem = f"{name}" if layout == "V6" else mangle(name)
    stream = pack(codes, bits=bits, packing="M").view(np.uint8)
    return {f"{stem}__packed": stream, f"{stem}__norms": norms, f"{stem}__meta": meta[: 5 if layout == "V6" else 4]}
