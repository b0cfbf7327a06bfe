"""Models as the files that they are published in: what was trained here, for everyone's converters and for ours.

    write_official(Path("ltx.safetensors"), {"transformer": transformer, ...}, metadata)
    write_gemma(Path("gemma"), gemma, config)

`python -m convert ltx.safetensors DEST --gemma gemma --recipe published` packs it, `export --layout V5` publishes it.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from einops import rearrange
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import save_file

from convert.mapping import Rule, flatten, rule_of
from convert.tables import MAIN, table_of
from ltx_jax.cache import written_whole
from ltx_jax.config import UpscalerConfig

VERSION = "2.3.0"


# The text encoder's names begin thus in its own file; that of the table has no prefix.
_TEXT = "model."


def _places(
    component: str, model: nnx.Module, upscalers: Mapping[str, UpscalerConfig] | None = None
) -> Iterator[tuple[str, Rule, nnx.Variable]]:
    """Every parameter of a model with its whole published name and its rule. Raises ValueError as `rule_of` does."""
    prefix, table = table_of(component, upscalers or {})
    rules = list(flatten(table))
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        name, rule = rule_of(rules, ".".join(map(str, path)))
        yield (_TEXT if component == "gemma" else prefix) + name, rule, variable


def official_tensors(
    component: str, model: nnx.Module, *, upscalers: Mapping[str, UpscalerConfig] | None = None
) -> dict[str, np.ndarray]:
    """A model's parameters by their published names, axes as published, in bfloat16.

    Raises ValueError for a parameter that has no published name, such as that of stacked layers.
    """
    tensors = {}
    for name, rule, variable in _places(component, model, upscalers):
        left, right = rule.pattern.split("->")
        moved = rearrange(np.asarray(variable.get_value()), f"{right} -> {left}")
        tensors[name] = np.ascontiguousarray(moved).astype(ml_dtypes.bfloat16)
    return tensors


def write_official(path: Path, models: Mapping[str, nnx.Module], metadata: Mapping[str, Any]) -> None:
    """All models of the main file, with their configuration, whole or not at all.

    Raises ValueError where one is missing, as `official_tensors` does, and for values that are not finite.
    """
    if missing := set(MAIN) - set(models):
        raise ValueError(f"an official checkpoint holds {', '.join(MAIN)}; missing: {', '.join(sorted(missing))}")
    tensors = {name: x for part in MAIN for name, x in official_tensors(part, models[part]).items()}
    _write(path, tensors, {"config": json.dumps(metadata), "model_version": VERSION})


def write_parts(path: Path, models: Mapping[str, nnx.Module]) -> None:
    """Some models by themselves, as `read_official` reads them. Raises ValueError as `write_official` does."""
    tensors = {name: x for part, model in models.items() for name, x in official_tensors(part, model).items()}
    _write(path, tensors, {"format": "pt"})


def write_upscaler(path: Path, model: nnx.Module, metadata: Mapping[str, Any]) -> None:
    """A latent upscaler's own file. Raises ValueError as `write_official` does."""
    config = UpscalerConfig.from_metadata(metadata)
    _write(path, official_tensors("upscaler", model, upscalers={"upscaler": config}), {"config": json.dumps(metadata)})


def write_gemma(folder: Path, model: nnx.Module, config: Mapping[str, Any]) -> None:
    """`config.json` and `model.safetensors` of a text encoder, in the Hugging Face layout.

    Raises ValueError as `write_official` does.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_parts(folder / "model.safetensors", {"gemma": model})
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _write(path: Path, tensors: Mapping[str, np.ndarray], metadata: dict[str, str]) -> None:
    for name, tensor in tensors.items():
        if not np.isfinite(tensor.astype(np.float32)).all():
            raise ValueError(f"{name} has values that are not finite; {path} was not written")
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as temporary:
        save_file(dict(tensors), str(temporary), metadata)


def read_official(
    path: Path, component: str, model: nnx.Module, *, upscalers: Mapping[str, UpscalerConfig] | None = None
) -> None:
    """Fills a model of the main file, a text encoder or an upscaler from a file of official tensors, in place.

    For training that goes on from there: values become float32, nothing is packed. Raises ValueError, listing them, for
    tensors that are missing or of another shape.
    """
    odd, found = [], []
    with safe_open(path, "numpy") as file:
        names = set(file.keys())
        for name, rule, variable in _places(component, model, upscalers):
            value = rearrange(file.get_tensor(name).astype(np.float32), rule.pattern) if name in names else None
            shape = variable.get_value().shape
            if value is None or value.shape != shape:
                odd.append(f"{name} ({'missing' if value is None else f'{list(value.shape)} for {list(shape)}'})")
            found.append((variable, value))
    if odd:
        raise ValueError(f"{path} does not hold this {component}: {len(odd)} tensors differ, {', '.join(odd[:6])}")
    for variable, value in found:
        variable.set_value(jnp.asarray(value))
