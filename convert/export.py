"""A checkpoint back to published files: those that it was converted from, to the byte, or a new package."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from convert.arrays import moved
from convert.files import ConvertError
from convert.journal import INVENTORY, file_digest, read_inventory
from convert.layout import KEPT_TENSORS, Payload, write_safetensors
from convert.package import Layout, Published, PublishedWeight, file_in, metadata_of, new_folder, stream, write_package
from convert.parts import ArrayTensor, PackedLinear
from convert.progress import progress_bar
from convert.tasks import SKIPPED
from hlwq_jax import LazyTensor, TensorFile
from ltx_jax import durable
from ltx_jax.checkpoint import Manifest


@dataclass(frozen=True, kw_only=True)
class Export:
    """Writes a checkpoint back as published files: by default those that it was converted from, to the byte."""

    checkpoint: tyro.conf.Positional[Path]
    """The folder that convert made."""
    out: tyro.conf.Positional[Path]
    """The folder to make."""
    layout: Layout | None = None
    """Write a new package instead: V5 (dense streams; tables A, B or C) or V1 (a byte a code; any table)."""


def run_export(options: Export) -> int:
    """Exports and says what was written; returns 0."""
    num_files = export(options.checkpoint, options.out, layout=options.layout, progress=True)
    proof = "" if options.layout else ", each with the SHA-256 of the one that was converted"
    print(f"wrote {options.out}: {num_files} files{proof}")
    if Manifest.read(options.checkpoint).gemma_metadata is not None:
        print("note: the text encoder is a package of its own, and is not exported")
    return 0


def export(checkpoint: str | Path, out: str | Path, *, layout: Layout | None = None, progress: bool = False) -> int:
    """Writes published files from a checkpoint folder; returns how many. `out` is there only when it is complete.

    Without `layout` they are the files that were converted; the SHA-256 of each is compared with the manifest's. With
    one they are a new package of everything in the checkpoint but the text encoder (see `package`).

    Raises ConvertError for a checkpoint that has not what is asked of it or is damaged, for an `out` that is there,
    and for a disk without room.
    """
    opened = _Checkpoint(Path(checkpoint))
    if layout is not None:
        return write_package(Path(out), opened.published(), layout=layout, progress=progress)
    files = opened.files()
    texts: dict[str, str] = opened.layout["texts"]
    needed = sum(payload.nbytes for file in files for payload in file.tensors.values())
    with new_folder(Path(out), needed) as folder, progress_bar("export", needed, shown=progress) as advance:
        for file in files:
            digest = sha256()

            def seen(data: bytes | memoryview, digest=digest, name=file.name) -> None:
                digest.update(data)
                advance(name, len(data))

            write_safetensors(file_in(folder, file.name), file.tensors, header=file.header, advance=seen)
            if digest.hexdigest() != file.sha256:
                raise ConvertError(
                    f"{file.name} would not be as it came: its SHA-256 is {digest.hexdigest()}, that of the source was "
                    f"{file.sha256}; `python -m convert verify {checkpoint}` tells what is damaged"
                )
        for name, text in texts.items():
            durable.write(file_in(folder, name), [text.encode()])
    return len(files) + len(texts)


@dataclass(frozen=True, kw_only=True)
class _File:
    """A published file as it is written back."""

    name: str
    header: str
    sha256: str
    tensors: Mapping[str, Payload]  # in the order of their bytes


class _Checkpoint:
    """A checkpoint folder as the tensors that it was made from. Raises ConvertError for what it lacks."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.manifest = Manifest.read(folder)
        inventory = read_inventory(folder)
        if file_digest(folder / INVENTORY) != self.manifest.provenance.get("inventory_sha256"):
            raise ConvertError(f"{folder / INVENTORY} is not the one that the manifest names; convert again")
        if "layout" not in inventory:
            raise ConvertError(f"{folder} does not tell how its source lay, as an older version made it; convert again")
        self.layout: dict[str, Any] = inventory["layout"]
        self.tensors: dict[str, dict[str, Any]] = inventory["tensors"]
        self.kept: Mapping[str, LazyTensor] = {}
        if KEPT_TENSORS in inventory["files"]:
            self.kept = TensorFile(folder / KEPT_TENSORS)

    def files(self) -> list[_File]:
        """The files that were converted."""
        places = [(name, place) for file in self.layout["files"] for name, place in file["tensors"].items()]
        gone = [name for name, place in places if "quantised" in place]
        if gone:
            raise ConvertError(
                f"{len(gone)} linears, such as {gone[0]}, were quantised here, so {self.folder} does not hold what "
                "they were; `--layout V5` or `--layout V1` writes a new package"
            )
        sources = self.manifest.provenance["sources"]
        return [
            _File(
                name=file["name"],
                header=file["header"],
                sha256=sources[file["path"]]["sha256"],
                tensors=dict(self._in_order(file)),
            )
            for file in self.layout["files"]
        ]

    def _in_order(self, file: Mapping[str, Any]) -> Iterator[tuple[str, Payload]]:
        header = {name: entry for name, entry in json.loads(file["header"]).items() if name != "__metadata__"}
        for name in sorted(header, key=lambda name: header[name]["data_offsets"]):
            start, end = header[name]["data_offsets"]
            payload = self._payload(name, file["tensors"][name])
            if payload.nbytes != end - start:
                raise ConvertError(
                    f"{name} takes {payload.nbytes} bytes in {self.folder}, in {file['name']} it took {end - start}; "
                    f"`python -m convert verify {self.folder}` tells what is damaged"
                )
            yield name, payload

    def _payload(self, name: str, place: Mapping[str, Any]) -> Payload:
        if place.get("kept"):
            return self._kept(name)
        if "array" in place:
            return self._moved_back(place)
        if "norms" in place:
            return Payload.of(self._linear(place["norms"]).norms)
        linear = self._linear(place["codes"])
        return stream(
            lambda: map(linear.codes, linear.slices()),
            linear.shape.out_features * linear.row_codes,
            packing=place["packing"],
            dtype=np.uint8,
            shape=linear.shape,
        )

    def published(self) -> Published:
        """Everything but the text encoder, by its full published name."""
        main: dict[str, Payload | PublishedWeight] = {}
        upscalers: dict[str, dict[str, Payload]] = {name: {} for name in self.manifest.upscaler_metadata}
        places = [item for file in self.layout["files"] for item in file["tensors"].items()]
        for name, place in [*places, *self.layout["elsewhere"].items()]:
            full_name, linear = place.get("name", name), place.get("codes") or place.get("quantised")
            if linear:
                main[full_name] = PublishedWeight.of_linear(self._linear(linear))
            elif "array" in place:
                component = place["array"].partition("/")[0]
                if component in upscalers:
                    upscalers[component][name] = self._moved_back(place)
                else:
                    main[full_name] = self._moved_back(place)
            elif self.tensors.get(name, {}).get("rule") == SKIPPED:
                main[name] = self._kept(name)
        return Published(
            tensors=main,
            metadata=metadata_of(self.manifest.metadata, self.manifest.model_version),
            upscalers={
                component: (tensors, metadata_of(self.manifest.upscaler_metadata[component]))
                for component, tensors in upscalers.items()
            },
        )

    def _kept(self, name: str) -> Payload:
        if name not in self.kept:
            raise ConvertError(f"{self.folder / KEPT_TENSORS} lacks {name}; convert again")
        return Payload.of(self.kept[name])

    def _moved_back(self, place: Mapping[str, Any]) -> Payload:
        component, part, name = place["array"].split("/")
        array = ArrayTensor(name, self.folder / component / part)
        left, right = place["pattern"].split("->")
        back = f"{right.strip()} -> {left.strip()}"
        return Payload(dtype=array.dtype, shape=moved(array, back).shape, pieces=lambda: moved(array, back).pieces)

    def _linear(self, place: str) -> PackedLinear:
        component, part, path = place.split("/")
        shape = self.manifest.quantized.get(component, {}).get(path)
        if shape is None:
            raise ConvertError(
                f"the manifest of {self.folder} lacks the packed linear {component}/{path}; convert again"
            )
        return PackedLinear(path, self.folder / component / part, shape)
