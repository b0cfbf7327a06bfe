"""Contexts of prompts on disk, so that a known prompt needs no text encoder."""

from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

import jax
from safetensors import SafetensorError, safe_open
from safetensors.flax import save_file

from ltx_jax.cache import cache_folder, digest, keep_newest, source_digest, written_whole
from ltx_jax.checkpoint import TOKENIZER, Manifest
from ltx_jax.denoise import Prompt

KEPT = 64  # prompts; 12 MB each in bfloat16


def prompt_key(folder: Path, manifest: Manifest, text: str, dtype: Any) -> str | None:
    """What a prompt's contexts depend on; None where the checkpoint does not say what it was made from."""
    sources = manifest.provenance.get("sources")
    tokenizer = folder / TOKENIZER / "tokenizer.json"
    if not sources or not tokenizer.is_file():
        return None
    quantized = {name: manifest.quantized.get(name, {}) for name in ("gemma", "connectors")}
    return digest(
        text.strip(),
        sorted(source["sha256"] for source in sources.values()),
        {
            component: sorted((path, str(shape)) for path, shape in layers.items())
            for component, layers in quantized.items()
        },
        sha256(tokenizer.read_bytes()).hexdigest(),
        manifest.text_length,
        jax.numpy.dtype(dtype).name,
        jax.devices()[0].device_kind,
        jax.__version__,
        source_digest(),
    )


def read_prompt(key: str) -> Prompt | None:
    """The contexts kept under a key, if they are there and whole."""
    path = cache_folder("prompts") / f"{key}.safetensors"
    with suppress(OSError, SafetensorError, KeyError), safe_open(path, "flax") as file:
        found = Prompt(video=file.get_tensor("video"), audio=file.get_tensor("audio"))
        path.touch()  # used last
        return found
    return None


def keep_prompt(key: str, prompt: Prompt) -> None:
    """Keeps contexts; a folder that cannot be written only costs time later."""
    path = cache_folder("prompts") / f"{key}.safetensors"
    with suppress(OSError, SafetensorError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(path) as temporary:
            save_file({"video": prompt.video, "audio": prompt.audio}, str(temporary))
        keep_newest(path.parent, "*.safetensors", KEPT)
