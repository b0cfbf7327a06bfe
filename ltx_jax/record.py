"""What a clip was made with, beside it as .json: enough to make it again, bit for bit on the same machine."""

import hashlib
import json
import warnings
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from ltx_jax.checkpoint import MANIFEST
from ltx_jax.engine import Engine
from ltx_jax.modes import parse_image
from ltx_jax.settings import Settings
from ltx_jax.settings_json import KINDS, PATHS, settings_from

FORMAT = "ltx-jax clip"


class RecordError(ValueError):
    """A record that cannot be used; the text says why."""


def facts_of(settings: Settings, engine: Engine, dtype: str | None, *, kept_latents: Path | None) -> dict[str, Any]:
    """All that decides a clip, its files by their digests, as JSON. `dtype` is what was asked for."""
    values = asdict(settings)
    loras = engine.residency.loras
    files = [lora.path.resolve() for lora in loras]
    images = [parse_image(text) for text in settings.image]
    files += [path.resolve() for path, _, _ in images]
    values["image"] = [
        f"{path.resolve()}@{frame}" + ("" if strength is None else f":{strength}") for path, frame, strength in images
    ]
    for name in PATHS:
        path = getattr(settings, name)
        if path is not None:
            files.append(path.resolve())
            values[name] = str(path.resolve())
    facts = {
        "format": FORMAT,
        "settings": values,
        "checkpoint": str(engine.folder.resolve()),
        "checkpoint_sha256": sha256(engine.folder / MANIFEST),
        "lora": [":".join(map(str, [lora.path.resolve(), lora.strength, lora.in_stage(2)])) for lora in loras],
        "dtype": dtype,
        "files": {str(path): sha256(path) for path in files},
        "kept_latents": None if kept_latents is None else str(kept_latents.resolve()),
        "device": jax.devices()[0].device_kind,
        "versions": {name: version(name) for name in ("jax", "jaxlib", "flax")},
    }
    return json.loads(json.dumps(facts))  # as it will be read again


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_record(path: Path) -> dict[str, Any]:
    """What a clip's .json says. Raises RecordError if it is not one."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise RecordError(f"{path} cannot be read as the .json of a clip: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise RecordError(f"{path} was not written beside a clip by generate.py")
    return content


def recorded_settings(record: Mapping[str, Any]) -> Settings:
    """The settings of a clip. Raises RecordError where a file that it was made with is gone; warns where it changed."""
    for path, digest in record["files"].items():
        if not Path(path).is_file():
            raise RecordError(f"the clip was made with {path}, which is not there any more")
        if sha256(Path(path)) != digest:
            warnings.warn(f"{path} has changed since the clip was made: the new clip will differ", stacklevel=2)
    return settings_from({name: value for name, value in record["settings"].items() if name in KINDS}, Settings())


def changes(record: Mapping[str, Any], facts: Mapping[str, Any]) -> list[str]:
    """What of the surroundings is not as it was when a clip was made."""
    return [name for name in ("checkpoint_sha256", "device", "versions") if record.get(name) != facts[name]]


def is_made(output: Path, facts: Mapping[str, Any]) -> bool:
    """Whether a clip is there, made with exactly this."""
    try:
        return output.is_file() and read_record(output.with_suffix(".json")) == facts
    except RecordError:
        return False
