"""LoRA training: new low-rank adapters beside a model's linears, which stay as they are, packed at 5 bits or not.

    add_adapters(transformer, names, rank=16)
    trainer = Trainer(DenoisingModel(transformer, remat=True), flow_loss(settings), schedule, trainable=adapters)
    write_adapters(Path("shape.safetensors"), trainer.model().transformer, names)

Source: Hu et al., LoRA, https://arxiv.org/abs/2106.09685; Dettmers et al., QLoRA, https://arxiv.org/abs/2305.14314
(adapters over quantised weights); file layout as in Lightricks/LTX-2 (`W + strength * B A`, no alpha).
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.flax import save_file

from ltx_jax.cache import written_whole
from ltx_jax.lora import Factors, LoraLinear
from ltx_jax.stack import locate, walk

# Attention and feed-forward of the blocks, by their published names.
TARGETS = r"transformer_blocks\..*\.(to_q|to_k|to_v|to_out\.0|net\.0\.proj|net\.2)"


def targeted(linear_names: Mapping[str, str], targets: str = TARGETS) -> list[str]:
    """The paths of linears whose published names match a regular expression as a whole.

    Raises ValueError for one that matches nothing, or is none.
    """
    try:
        chosen = [path for name, path in linear_names.items() if re.fullmatch(targets, name)]
    except re.error as error:
        raise ValueError(f"targets must be a regular expression; {targets!r} is none: {error}") from error
    if not chosen:
        some = ", ".join(sorted(linear_names)[:4])
        raise ValueError(f"no linear matches {targets!r}; there are {len(linear_names)}, such as {some}")
    return chosen


def add_adapters(
    model: nnx.Module, linear_names: Mapping[str, str], *, rank: int, targets: str = TARGETS, seed: int = 0
) -> int:
    """Puts new adapters beside linears of `model`, in place; they change nothing yet. Returns how many.

    `linear_names` maps published names to paths in the model (`Manifest.linears_below`); `targets` is a regular
    expression that the names of adapted ones match. Layers may be stacked: all of a stack are adapted together.
    Raises ValueError for a rank below one, for linears that have adapters, and as `targeted` does.
    """
    if rank < 1:
        raise ValueError(f"the rank of adapters must be at least 1, got {rank}")
    chosen = targeted(linear_names, targets)
    places = list(dict.fromkeys(locate(model, path)[0] for path in chosen))
    key = jax.random.key(seed)
    for number, place in enumerate(places):
        parent, linear = walk(model, place[:-1]), walk(model, place)
        if isinstance(linear, LoraLinear):
            raise ValueError(f"{'.'.join(map(str, place))} has adapters already; train on a model without LoRAs")
        layers = (walk(model, place[: place.index("layer")]).num_layers,) if "layer" in place else ()
        bound = linear.in_features**-0.5
        a = jax.random.uniform(
            jax.random.fold_in(key, number), (*layers, rank, linear.in_features), minval=-bound, maxval=bound
        )
        b = jnp.zeros((*layers, linear.out_features, rank))
        setattr(parent, str(place[-1]), LoraLinear(linear, [(a, b, jnp.ones(layers))], (0,)))
    return len(chosen)


def adapters(path: Any, value: Any) -> bool:
    """The filter of what is trained: the matrices of adapters, not their strength, nor anything of the model."""
    return isinstance(value, Factors) and not _is_strength(path, value)


def without_adapters(model: Any) -> Any:
    """The same model as it is without its adapters: with all of them at a strength of zero."""
    graphdef, strengths, rest = nnx.split(model, _is_strength, ...)
    return nnx.merge(graphdef, jax.tree.map(jnp.zeros_like, strengths), rest, copy=True)


def _is_strength(path: Any, value: Any) -> bool:
    return isinstance(value, Factors) and "strength" in path


def write_adapters(
    path: Path, model: nnx.Module, linear_names: Mapping[str, str], *, metadata: Mapping[str, str] | None = None
) -> None:
    """The adapters of `model` as a LoRA file in bfloat16, as `generate.py --lora` reads it, whole or not at all.

    Raises ValueError where there are none, and where a value is not finite.
    """
    tensors = {}
    for name, place in linear_names.items():
        where, index = locate(model, place)
        linear = walk(model, where)
        if isinstance(linear, LoraLinear):
            for half, factors in (("lora_A", linear.a[0]), ("lora_B", linear.b[0])):
                value = factors.get_value() if index is None else factors.get_value()[index]
                if not np.isfinite(np.asarray(value)).all():
                    raise ValueError(f"{half} of {name} has values that are not finite; {path} was not written")
                tensors[f"diffusion_model.{name}.{half}.weight"] = value.astype(jnp.bfloat16)
    if not tensors:
        raise ValueError("the model has no adapters to write; see add_adapters")
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as temporary:
        save_file(tensors, str(temporary), {"format": "pt", **(metadata or {})})
