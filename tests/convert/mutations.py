"""What may happen to a package: each a change of its files by a random generator, which says what it did."""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from . import decoder, tiny
from .tiny import Release

Files = dict[str, bytes]


def bit_flip_in_header(rng: np.random.Generator, files: Files) -> str:
    name, raw = _pick(rng, files)
    return _flip(rng, files, name, 0, min(8 + int.from_bytes(raw[:8], "little"), len(raw)))


def bit_flip_in_payload(rng: np.random.Generator, files: Files) -> str:
    name, raw = _pick(rng, files)
    return _flip(rng, files, name, min(8 + int.from_bytes(raw[:8], "little"), len(raw) - 1), len(raw))


def bytes_deleted(rng: np.random.Generator, files: Files) -> str:
    name, raw = _pick(rng, files)
    start = _place(rng, raw)
    count = int(rng.choice([1, 2, 8, 64]))
    files[name] = raw[:start] + raw[start + count :]
    return f"{count} bytes deleted at {start} of {name}"


def bytes_inserted(rng: np.random.Generator, files: Files) -> str:
    name, raw = _pick(rng, files)
    start = _place(rng, raw)
    count = int(rng.choice([1, 2, 8, 64]))
    files[name] = raw[:start] + rng.bytes(count) + raw[start:]
    return f"{count} bytes inserted at {start} of {name}"


def truncated(rng: np.random.Generator, files: Files) -> str:
    name, raw = _pick(rng, files)
    files[name] = raw[: _place(rng, raw)]
    return f"{name} cut off at {len(files[name])}"


def number_edited(rng: np.random.Generator, files: Files) -> str:
    """A number in a header, where it stands."""
    name, raw = _pick(rng, files)
    header, data = split(raw)
    places = list(re.finditer(rb"(?<=[\[ ,:])\d+(?=[\],])", header))
    found = places[int(rng.integers(len(places)))]
    number = int(found[0])
    new = _number(rng, number)
    files[name] = join(header[: found.start()] + new + header[found.end() :], data)
    return f"{number} became {new.decode()} in the header of {name}"


def names_swapped(rng: np.random.Generator, files: Files) -> str:
    name, _ = _pick(rng, files)

    def change(header: dict) -> str:
        first, second = _two(rng, header)
        header[first], header[second] = header[second], header[first]
        return f"{first} and {second} swapped in {name}"

    return _edit(files, name, change)


def data_swapped(rng: np.random.Generator, files: Files) -> str:
    """Two tensors of one size: another valid file."""
    name, _ = _pick(rng, files)

    def change(header: dict) -> str:
        first, _ = _two(rng, header)
        sizes = {n: e["data_offsets"][1] - e["data_offsets"][0] for n, e in header.items() if n != "__metadata__"}
        second = str(rng.choice([n for n in sizes if sizes[n] == sizes[first]]))
        a, b = header[first], header[second]
        a["data_offsets"], b["data_offsets"] = b["data_offsets"], a["data_offsets"]
        return f"data of {first} and {second} swapped in {name}"

    return _edit(files, name, change)


def renamed(rng: np.random.Generator, files: Files) -> str:
    name, _ = _pick(rng, files)

    def change(header: dict) -> str:
        old, other = _two(rng, header)
        new = rng.choice(
            [
                "../x",
                "/etc/passwd",
                "a\\b",
                "",
                "x\0y",
                "\ud800",
                "x" * 5000,
                "\x1b[2J",
                "__metadata",
                other + "x",
                old.replace(".", "__"),
                old.replace("__", "."),
                old.removeprefix("model.diffusion_model."),
                "model." + old,
                old.replace(".0.", ".00."),
                old.replace(".0.", ".٠."),
                old.replace(".0.", ".1."),
                old.upper(),
                old + " ",
                old.removesuffix(".weight"),
                old.replace("packed", "codes").replace("ct_scaled", "ct"),
                old + ".lora_A.weight",
            ]
        )
        header[str(new)] = header.pop(old)
        return f"{old} became {str(new)[:200]!a} in {name}"

    return _edit(files, name, change)


def kind_changed(rng: np.random.Generator, files: Files) -> str:
    name, _ = _pick(rng, files)

    def change(header: dict) -> str:
        tensor, _ = _two(rng, header)
        entry = header[tensor]
        old, size = entry["dtype"], {"BF16": 2, "F16": 2, "F32": 4, "I64": 8, "U8": 1, "I8": 1}[entry["dtype"]]
        kinds = {1: ["U8", "I8", "BOOL", "F8_E4M3"], 2: ["BF16", "F16", "I16", "U16"], 4: ["F32", "I32", "U32"]}
        entry["dtype"] = str(rng.choice([*kinds.get(size, ["I64", "U64", "F64"]), "F64", "F4", ""]))
        return f"{tensor} became {entry['dtype']!r}, from {old}, in {name}"

    return _edit(files, name, change)


def shape_changed(rng: np.random.Generator, files: Files) -> str:
    """Another shape of the same size."""
    name, _ = _pick(rng, files)

    def change(header: dict) -> str:
        tensor, _ = _two(rng, header)
        shape = header[tensor]["shape"]
        options = [shape[::-1], [1, *shape], [*shape, 1], [int(np.prod(shape))], [0, *shape]]
        header[tensor]["shape"] = options[int(rng.integers(len(options)))]
        return f"{tensor} of {shape} became {header[tensor]['shape']} in {name}"

    return _edit(files, name, change)


def doubled_key(rng: np.random.Generator, files: Files) -> str:
    """A name twice in a header, or in another JSON file."""
    names = sorted(files)
    name = names[int(rng.integers(len(names)))]
    raw = files[name]
    header, data = split(raw) if name.endswith(".safetensors") else (raw, b"")
    keys = list(re.finditer(rb'[{,]\s*("[^"\\]+")\s*:', header))
    if not keys:
        return f"nothing doubled in {name}"
    found = keys[int(rng.integers(len(keys)))]
    header = header[: found.end()] + b" 0, " + found[1] + b":" + header[found.end() :]
    files[name] = join(header, data) if name.endswith(".safetensors") else header
    return f"{found[1].decode()} doubled in {name}"


def tensor_removed(rng: np.random.Generator, files: Files) -> str:
    """With its data: another valid file, of less."""
    name, raw = _pick(rng, files)
    header, data = split(raw)
    entries = json.loads(header)
    gone, _ = _two(rng, entries)
    start, stop = entries.pop(gone)["data_offsets"]
    for entry in (entry for key, entry in entries.items() if key != "__metadata__"):
        entry["data_offsets"] = [end - (stop - start) * (end > start) for end in entry["data_offsets"]]
    files[name] = join(json.dumps(entries).encode(), data[:start] + data[stop:])
    return f"{gone} removed from {name}"


def values_changed(rng: np.random.Generator, files: Files) -> str:
    """A tensor's bytes: all of them random, or a few extreme ones."""
    name, raw = _pick(rng, files)
    header, data = split(raw)
    entries = json.loads(header)
    parts = [n for n in entries if re.search("norms|packed|codes|meta$|ct", n)]
    tensor = str(rng.choice(parts)) if parts and rng.random() < 0.8 else _two(rng, entries)[0]
    start, stop = entries[tensor]["data_offsets"]
    new = bytearray(data)
    if rng.random() < 0.3:
        new[start:stop] = rng.bytes(stop - start)
        how = "random"
    else:
        kind = decoder.KINDS[entries[tensor]["dtype"]]
        size = np.dtype(kind).itemsize
        values = [0, 1, -1, 127, 32, 2**62] if np.dtype(kind).kind in "iu" else [np.nan, np.inf, -np.inf, -1, 0, 6e4]
        with np.errstate(all="ignore"):
            value = np.array(values[int(rng.integers(len(values)))]).astype(kind)
        place = start + size * int(rng.integers(max((stop - start) // size, 1)))
        new[place : place + size] = value.tobytes()
        how = f"{value} at byte {place}"
    files[name] = join(header, bytes(new))
    return f"{tensor} became {how} in {name}"


def file_replaced(rng: np.random.Generator, files: Files) -> str:
    names = sorted(files)
    name = names[int(rng.integers(len(names)))]
    contents = {
        "nothing": b"",
        "zeros": bytes(1000),
        "a page": b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
        "a pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n",
        "a pickle": b"\x80\x04\x95\x1a\x00\x00\x00\x00\x00\x00\x00.",
        "a zip": b"PK\x03\x04" + bytes(100),
        "noise": rng.bytes(500),
        "an empty header": b"\2\0\0\0\0\0\0\0{}",
        "nested lists": b"\x10\x27\0\0\0\0\0\0" + b"[" * 10_000,
        "UTF-16": json.dumps({"a": 1}).encode("utf-16"),
        "a list": b"[]",
        "null": b"null",
    }
    what = str(rng.choice(sorted(contents)))
    files[name] = contents[what]
    return f"{name} became {what}"


def files_moved(rng: np.random.Generator, files: Files) -> str:
    names = sorted(files)
    first, second = (names[int(i)] for i in rng.integers(len(names), size=2))
    how = int(rng.integers(4))
    if how == 0:
        files[first], files[second] = files[second], files[first]
        return f"{first} and {second} swapped"
    if how == 1:
        del files[first]
        return f"{first} removed"
    if how == 2:
        files["copy of " + first.replace("/", " ")] = files[first]
        return f"{first} there twice"
    files["more/" + Path(first).name] = files.pop(first)
    return f"{first} moved"


def sidecar_edited(rng: np.random.Generator, files: Files) -> str:
    name = str(rng.choice([n for n in files if n.endswith(".json") and "tokenizer.json" not in n] or ["more.json"]))
    try:
        content = json.loads(files.get(name, b"{}"))
    except ValueError:
        content = {}
    path = _edit_value(rng, content)
    if name == tiny.SIDECAR and rng.random() < 0.2:
        content["table"] = str(rng.choice(["A", "B", "Z"]))
    files[name] = json.dumps(content).encode()
    return f"{path} edited in {name}"


def config_edited(rng: np.random.Generator, files: Files) -> str:
    name = str(rng.choice([n for n in sorted(files) if b'"config"' in files[n][:200_000]]))

    def change(header: dict) -> str:
        content = json.loads(header["__metadata__"]["config"])
        path = _edit_value(rng, content)
        header["__metadata__"]["config"] = json.dumps(content)
        return f"{path} edited in the configuration of {name}"

    return _edit(files, name, change)


MUTATIONS: tuple[tuple[Callable[[np.random.Generator, Files], str], int], ...] = (
    (bit_flip_in_header, 10),
    (bit_flip_in_payload, 8),
    (bytes_deleted, 5),
    (bytes_inserted, 5),
    (truncated, 5),
    (number_edited, 10),
    (names_swapped, 5),
    (data_swapped, 4),
    (renamed, 8),
    (kind_changed, 6),
    (shape_changed, 5),
    (doubled_key, 4),
    (tensor_removed, 3),
    (values_changed, 8),
    (file_replaced, 5),
    (files_moved, 4),
    (sidecar_edited, 6),
    (config_edited, 4),
)


def _pick(rng: np.random.Generator, files: Files) -> tuple[str, bytes]:
    """A file of tensors; those with codes more often than their share."""
    names = [name for name in sorted(files) if name.endswith(".safetensors") and len(files[name]) > 16]
    name = names[int(rng.integers(len(names)))]
    return name, files[name]


def _place(rng: np.random.Generator, raw: bytes) -> int:
    """A byte of a file; half of the time in its header."""
    stop = 8 + int.from_bytes(raw[:8], "little") if rng.random() < 0.5 else len(raw)
    return int(rng.integers(max(min(stop, len(raw)), 1)))


def _flip(rng: np.random.Generator, files: Files, name: str, start: int, stop: int) -> str:
    raw = bytearray(files[name])
    place, bit = int(rng.integers(start, stop)), int(rng.integers(8))
    raw[place] ^= 1 << bit
    files[name] = bytes(raw)
    return f"bit {bit} of byte {place} of {name} flipped"


def split(raw: bytes) -> tuple[bytes, bytes]:
    length = int.from_bytes(raw[:8], "little")
    return raw[8 : 8 + length], raw[8 + length :]


def join(header: bytes, data: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + data


def _edit(files: Files, name: str, change: Callable[[dict], str]) -> str:
    header, data = split(files[name])
    content = json.loads(header)
    what = change(content)
    files[name] = join(json.dumps(content).encode(), data)
    return what


def _two(rng: np.random.Generator, header: Mapping[str, Any]) -> tuple[str, str]:
    names = [name for name in header if name != "__metadata__"]
    return names[int(rng.integers(len(names)))], names[int(rng.integers(len(names)))]


def _number(rng: np.random.Generator, old: int) -> bytes:
    others = (-1, 0, 1, old + 1, max(old - 1, 0), 2 * old, 2**31, 2**40, 2**63, 2**64 - 1, 10**30, 10**5000)
    texts = ("1.5", "true", "null", '"2"', "[]", "{}", "NaN", "Infinity", "-0", "1e3", "1e999", f"{old}.0")
    if rng.random() < 0.6:
        return str(others[int(rng.integers(len(others) - 1))]).encode()
    return [*texts, "9" * 5000][int(rng.integers(len(texts) + 1))].encode()


def _edit_value(rng: np.random.Generator, content: Any) -> str:
    """Changes one value somewhere in parsed JSON; returns where."""
    path, value = "", content
    while True:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        if not keys:
            return f"{path} (empty, so nothing)"
        key = keys[int(rng.integers(len(keys)))]
        path += f"/{key}"
        if not (isinstance(value[key], dict | list) and value[key]) or rng.random() < 0.1:
            break
        value = value[key]
    old = value[key]
    if rng.random() < 0.15:
        del value[key]
        return f"{path} (removed)"
    numbers = [0, 1, 2, 3, -1, 10**9, 2**40, 2**64, 10**30, 0.5, 1.0, 1e30, -0.0]
    others = [None, True, False, "", "2", "../x", "/etc/passwd", "codes/../../x", [], {}, [[]], {"a": {}}, [1, 2, 3]]
    nested: Any = []
    for _ in range(200):
        nested = [nested]
    options = [*numbers, *others, nested, [old], {"x": old}, f"{old}x"]
    if type(old) in (int, float):
        options += [old + 1, old - 1, old * 2, -old, float(old)] * 3
    value[key] = options[int(rng.integers(len(options)))]
    return f"{path} ({str(old)[:40]!a} to {str(value[key])[:40]!a})"


def mutant(seed: int) -> tuple[Release, Files, str]:
    """A package and what is left of it after one change, or (one in five) two."""
    rng = np.random.default_rng(seed)
    release = tiny.releases()[seed % len(tiny.releases())]
    files, told = dict(release.files), []
    weights = np.array([weight for _, weight in MUTATIONS], float)
    for _ in range(2 if rng.random() < 0.2 else 1):
        change = MUTATIONS[int(rng.choice(len(MUTATIONS), p=weights / weights.sum()))][0]
        try:
            told.append(change(rng, files))
        except (KeyError, ValueError, IndexError) as error:  # of what the first change left
            if not told:
                raise
            told.append(f"({change.__name__} of that: {type(error).__name__})")
    return release, files, "; ".join(told)
