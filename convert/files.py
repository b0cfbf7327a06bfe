"""What a source holds: which file has which model, told by names and metadata inside the files, never by file names."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from convert.tables.gemma import SKIP
from hlwq_jax import LazyTensor, TensorFile, find_sidecar
from hlwq_jax.reader import check_indexes, find_pickles
from hlwq_jax.remote import RemoteFile
from hlwq_jax.tensors import parse_json, read_json
from ltx_jax.checkpoint import MANIFEST, upscaler_component
from ltx_jax.config import ConfigError, GemmaConfig, UpscalerConfig

_LORA = re.compile(r"[._]lora_(A|B|up|down)\b|\.lora\.(up|down)\.")
_SECTIONS = ("transformer", "vae", "audio_vae", "vocoder")
TEXT_PREFIXES = ("language_model.model.", "model.language_model.", "model.")


class ConvertError(ValueError):
    """A source that cannot be converted, or a destination that cannot be written; the text says what to do."""


class SourceConfigError(ConvertError, ConfigError):
    """A source whose configuration is not one of LTX-2.3; the text begins with its file."""


class OnlyLoras(ConvertError):
    """A source that holds LoRAs and nothing else: they need no conversion."""

    def __init__(self, loras: Mapping[Path, TensorFile]):
        files = " and ".join(label(path) for path in loras)
        super().__init__(f"nothing to convert in a LoRA: give {files} to generate.py, with --lora FILE:STRENGTH")
        self.loras = loras


@dataclass(frozen=True, kw_only=True)
class Fetched:
    """What was read of files that are not on this disk."""

    num_bytes: int
    num_requests: int
    of_bytes: int  # that those files have


class Shelf:
    """Where files are looked for: on this disk and, by the paths they go by, among those `elsewhere`."""

    def __init__(self, elsewhere: Mapping[Path, RemoteFile] | None = None):
        self.elsewhere = elsewhere or {}

    def has(self, path: Path) -> bool:
        return path in self.elsewhere or path.is_file()

    def below(self, folder: Path, pattern: str) -> list[Path]:
        """The files in and below a folder whose names match a pattern."""
        far = {path for path in self.elsewhere if folder in path.parents and path.match(pattern)}
        return sorted(far.union(folder.rglob(pattern)))

    def open(self, path: Path) -> TensorFile:
        return TensorFile(path, self.elsewhere.get(path))

    @property
    def fetched(self) -> Fetched | None:
        """What was read so far of files elsewhere; None where there are none."""
        read = [file for file in self.elsewhere.values() if file.num_requests]
        return (
            Fetched(
                num_bytes=sum(file.bytes_read for file in read),
                num_requests=sum(file.num_requests for file in read),
                of_bytes=sum(file.size for file in read),
            )
            if read
            else None
        )


def repository_of(path: Path) -> tuple[str, str, str] | None:
    """Name, commit and place within the repository of a path in the cache of the Hugging Face Hub.

    Source: huggingface_hub, "Understand caching": models--OWNER--NAME/snapshots/COMMIT/PLACE.
    """
    parts = path.parts
    for i, part in enumerate(parts[1:-1], start=1):
        if part == "snapshots" and parts[i - 1].startswith("models--"):
            name = parts[i - 1].removeprefix("models--").replace("--", "/", 1)
            return name, parts[i + 1], "/".join(parts[i + 2 :])
    return None


def label(path: Path) -> str:
    """A path as messages show it: of the Hub's cache, repository and commit."""
    found = repository_of(path)
    return str(path) if found is None else f"hf://{found[0]}@{found[1]}" + (f"/{found[2]}" if found[2] else "")


@dataclass(frozen=True, kw_only=True)
class UpscalerFile:
    """A latent upscaler: a file of its own."""

    path: Path
    component: str
    metadata: dict[str, Any]  # its `config`
    tensors: TensorFile


@dataclass(frozen=True, kw_only=True)
class GemmaFolder:
    """A Gemma 3 text encoder in the Hugging Face layout."""

    path: Path
    metadata: dict[str, Any]  # config.json
    tensors: Mapping[str, LazyTensor]  # of the text model, below its prefix
    prefix: str
    skipped: tuple[str, ...]  # vision tower, projector, head
    files: tuple[Path, ...]


@dataclass(frozen=True, kw_only=True)
class Source:
    """Everything found below a path."""

    path: Path
    files: tuple[Path, ...]  # that hold the main tensors
    tensors: dict[str, LazyTensor]  # transformer, connectors, autoencoders, vocoder
    metadata: dict[str, Any] | None  # the published `config`; None if no file has it
    model_version: str | None
    sidecar: dict[str, Any] | None
    upscalers: dict[str, UpscalerFile]
    gemma: GemmaFolder | None
    file_sizes: dict[Path, int]  # of main files and upscalers, in bytes
    loras: dict[Path, TensorFile]  # that lie beside the model
    remote: bool  # whether some of it is read by HTTP: then little is looked at
    doubled: tuple[str, ...] = ()  # main tensors that are in two files
    ignored: dict[str, str] = field(default_factory=dict)  # file -> why
    config_file: Path | None = None  # that has the metadata

    @property
    def nbytes(self) -> int:
        groups = [self.tensors, *(upscaler.tensors for upscaler in self.upscalers.values())]
        if self.gemma is not None:
            groups.append(self.gemma.tensors)
        return sum(tensor.nbytes for group in groups for tensor in group.values())


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Names the file in what is wrong with its configuration, which it raises as SourceConfigError."""
    try:
        yield
    except ConfigError as error:
        raise SourceConfigError(f"{path}: {error}") from error


def open_source(
    path: Path, *, gemma: Path | None = None, upscalers: tuple[Path, ...] = (), shelf: Shelf | None = None
) -> Source:
    """Reads the headers of all files of a package folder, or of an official checkpoint file.

    Raises ConvertError or FormatError for what is missing, damaged, foreign, or there twice.
    """
    shelf = shelf or Shelf()
    found = [path] if shelf.has(path) else shelf.below(path, "*.safetensors")
    if not found and not path.exists():
        raise ConvertError(f"there is nothing at {path}; give a package folder or a checkpoint file")
    # A tokenizer alone is no text encoder: converted checkpoints have one too.
    text_folders = [
        file.parent for file in shelf.below(path, "tokenizer.json") if shelf.has(file.parent / "config.json")
    ]
    found = [file for file in found if not any(folder in file.parents for folder in text_folders)]
    if path.is_dir():
        check_indexes(path, shelf.elsewhere)
    if not found and (path / MANIFEST).is_file():
        raise ConvertError(f"{path} is a converted checkpoint already; SOURCE is what was published")
    pickles = find_pickles(path)
    if not found:
        hint = f" (pickles are never opened: {pickles[0].name})" if pickles else ""
        raise ConvertError(f"{path} holds no safetensors file{hint}; give the folder of the published package")
    odd = next((file for file in found if not str(file.relative_to(path)).isprintable()), None)
    if odd is not None:
        raise ConvertError(f"{str(odd)!a} is no name that can be printed; rename that file")

    ignored = {str(file): "a pickle, by its name: it could run any program, so it is never opened" for file in pickles}
    main: list[TensorFile] = []
    named_upscalers: dict[str, UpscalerFile] = {}
    given: dict[str, UpscalerFile] = {}
    loras: dict[Path, TensorFile] = {}
    for file in upscalers:
        upscaler = _upscaler(file, shelf.open(file))
        if upscaler is None:
            raise ConvertError(f"{file} is not a latent upscaler: it has no upscaler configuration or tensors")
        _add_upscaler(given, upscaler)
    for file in found:
        opened = shelf.open(file)
        if 3 * sum(_LORA.search(name) is not None for name in opened) > len(opened):
            loras[file] = opened
            ignored[str(file)] = "a LoRA: give it to generate.py with --lora"
            continue
        upscaler = _upscaler(file, opened)
        if upscaler is not None and upscaler.component in given:
            ignored[str(file)] = f"--upscaler gives another {upscaler.component}"
        elif upscaler is not None:
            _add_upscaler(named_upscalers, upscaler)
        else:
            main.append(opened)
    if loras and not main and not named_upscalers:
        raise OnlyLoras(loras)

    if gemma is None and len(text_folders) == 1:
        gemma = text_folders[0]
    elif gemma is None and text_folders:
        ignored |= {str(folder): "one of several text encoders: choose with --gemma" for folder in text_folders}
    metadata, config_file, version = _metadata(main)
    tensors, doubled = _merge(main)
    all_upscalers = named_upscalers | given
    return Source(
        path=path,
        files=tuple(file.path for file in main),
        tensors=tensors,
        doubled=tuple(doubled),
        metadata=metadata,
        model_version=version,
        sidecar=find_sidecar(path) if path.is_dir() else None,
        upscalers=all_upscalers,
        gemma=None if gemma is None else open_gemma(gemma, shelf),
        file_sizes={
            file.path: file.file_size for file in (*main, *(upscaler.tensors for upscaler in all_upscalers.values()))
        },
        loras=loras,
        remote=any(file.path in shelf.elsewhere for file in main),
        ignored=ignored,
        config_file=config_file,
    )


def _add_upscaler(upscalers: dict[str, UpscalerFile], upscaler: UpscalerFile) -> None:
    if upscaler.component in upscalers:
        other = upscalers[upscaler.component].path
        raise ConvertError(
            f"{other} and {upscaler.path} are both a {upscaler.component}; keep one, or choose with --upscaler"
        )
    upscalers[upscaler.component] = upscaler


def _merge(files: list[TensorFile]) -> tuple[dict[str, LazyTensor], list[str]]:
    """The union of all files, and what is in two of them. Raises ConvertError for a file that only repeats another."""
    tensors: dict[str, LazyTensor] = {}
    twice = []
    for file in files:
        repeated = [name for name in file if name in tensors]
        twice += [f"{name} in {tensors[name].path} and {file.path}" for name in repeated]
        if repeated and len(repeated) == len(file):
            raise ConvertError(
                f"{len(repeated)} tensors are in more than one file, all of {file.path}, such as {twice[-1]}; give one "
                "release at a time, as a file or a folder of its own"
            )
        tensors |= file
    return tensors, twice


def _metadata(files: list[TensorFile]) -> tuple[dict[str, Any] | None, Path | None, str | None]:
    """The published configuration, the file that has it, and the version, from whichever file has one."""
    configs = {file.metadata["config"]: file for file in files if "config" in file.metadata}
    if len(configs) > 1:
        paths = ", ".join(str(file.path) for file in configs.values())
        raise ConvertError(f"the files disagree on their configuration: {paths}")
    version = None
    for file in files:
        version = version or file.metadata.get("model_version")
        if version and not version.isprintable():
            raise ConvertError(f"{file.path}: the model_version in its metadata is {version[:40]!a}; expected a number")
    for file in configs.values():
        config = _config(file)
        if not all(isinstance(config.get(name, {}), dict) for name in _SECTIONS):
            raise ConvertError(f"the config in the metadata of {file.path} is not a JSON object of sections")
        return config, file.path, version
    return None, None, version


def _config(file: TensorFile) -> dict[str, Any]:
    """The `config` in a file's metadata."""
    config = parse_json(file.metadata["config"], where=f"{file.path}: the config in its metadata")
    if not isinstance(config, dict):
        raise ConvertError(f"the config in the metadata of {file.path} is not a JSON object of sections")
    return config


def _upscaler(path: Path, file: TensorFile) -> UpscalerFile | None:
    """The file as an upscaler, by its metadata or, where that is lost, by its tensors."""
    if "config" in file.metadata:
        config = _config(file)
        if config.get("_class_name") != "LatentUpsampler":
            return None
    elif {"initial_conv.weight", "final_conv.weight"} <= set(file):
        config = _upscaler_config(path, file)
    else:
        return None
    with naming(path):
        component = upscaler_component(UpscalerConfig.from_metadata(config))
    return UpscalerFile(path=path, component=component, metadata=config, tensors=file)


def _upscaler_config(path: Path, file: TensorFile) -> dict[str, Any]:
    """An upscaler's configuration from the shapes of its tensors."""
    first, rational = file["initial_conv.weight"], "upsampler.conv.weight" in file
    conv = file.get("upsampler.conv.weight" if rational else "upsampler.0.weight")
    numbers = [int(found[1]) for name in file if (found := re.match(r"res_blocks\.(\d{1,3})\.", name))]
    if len(first.shape) < 2 or conv is None or not numbers:
        raise ConvertError(
            f"{path} has lost its metadata, and its tensors are not those of a latent upscaler; download it again"
        )
    (mid, channels), blocks = first.shape[:2], 1 + max(numbers)
    temporal = len(conv.shape) == 5
    config = {
        "_class_name": "LatentUpsampler",
        "in_channels": channels,
        "mid_channels": mid,
        "num_blocks_per_stage": blocks,
        "dims": 3,
        "spatial_upsample": not temporal,
        "temporal_upsample": temporal,
    }
    if rational:
        if conv.shape[:1] != (9 * mid,):
            raise ConvertError(
                f"{path} has lost its metadata, and its resampler is not the x1.5 one; download it again"
            )
        config |= {"spatial_scale": 1.5, "rational_resampler": True}
    return config


def open_gemma(folder: Path, shelf: Shelf | None = None) -> GemmaFolder:
    """Reads the headers of a Gemma 3 folder. Raises ConvertError for what it lacks."""
    shelf = shelf or Shelf()
    if not folder.is_dir():
        raise ConvertError(f"there is no folder at {folder}; --gemma wants Gemma 3 in the Hugging Face layout")
    lacking = [name for name in ("config.json", "tokenizer.json") if not shelf.has(folder / name)]
    if lacking:
        raise ConvertError(f"{folder} has no {' and no '.join(lacking)}; --gemma wants Gemma 3 as published, with both")
    check_indexes(folder, shelf.elsewhere)
    metadata = read_json(folder / "config.json")
    with naming(folder / "config.json"):
        GemmaConfig.from_metadata(metadata)
    files = [file for file in shelf.below(folder, "*.safetensors") if file.parent == folder]
    if not files:
        pickles = [path.name for path in find_pickles(folder)]
        hint = f" (pickles are never opened: {pickles[0]})" if pickles else ""
        raise ConvertError(f"{folder} holds no safetensors file{hint}; download the weights of Gemma 3 too")
    tensors, twice = _merge([shelf.open(path) for path in files])
    if twice:
        raise ConvertError(f"{len(twice)} tensors of {folder} are there twice, such as {twice[0]}; download it again")
    skipped = tuple(name for name in tensors if any(fnmatch(name, pattern) for pattern in SKIP))
    text = {name: tensor for name, tensor in tensors.items() if name not in skipped}
    for prefix in TEXT_PREFIXES:
        if f"{prefix}embed_tokens.weight" in text:
            break
    else:
        raise ConvertError(
            f"{folder} is not Gemma 3: it has no embed_tokens.weight below {', '.join(TEXT_PREFIXES)}; it has "
            f"{', '.join(list(tensors)[:3])}"
        )
    return GemmaFolder(
        path=folder,
        metadata=metadata,
        # A name outside the prefix stays whole, so that the plan reports it.
        tensors={name.removeprefix(prefix): tensor for name, tensor in text.items()},
        prefix=prefix,
        skipped=skipped,
        files=tuple(files),
    )
