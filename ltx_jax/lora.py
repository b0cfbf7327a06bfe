"""Low-rank adapters: read the published files, put them beside a model's linears (packed or plain).

Source: Hu et al., LoRA, https://arxiv.org/abs/2106.09685; key names and BF16 fusion as in Lightricks/LTX-2,
ltx_core/loader (`W + strength * B A`, no alpha).
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float
from safetensors import SafetensorError, safe_open

from ltx_jax.stack import locate, walk


class LoraError(ValueError):
    """A LoRA file that cannot be read, or does not belong to this model."""


class Lora(NamedTuple):
    """A LoRA file, and how strongly it acts: in the first of two stages, and in the second if there differently."""

    path: Path
    strength: float = 1.0
    second_strength: float | None = None

    def in_stage(self, number: int) -> float:
        return self.strength if number == 1 or self.second_strength is None else self.second_strength


class Factors(nnx.Variable):
    """A LoRA's matrices and strength: loaded, not trained with the model's own parameters."""


class LoraLinear(nnx.Module):
    """A linear layer with adapters beside it; the layer itself, packed or not, stays as it is.

    In float32 it computes what the reference's fusion gives, rounding included: each `strength * B A` is rounded to
    bfloat16 and added to the bfloat16 weight. Otherwise the adapters act on the input, which costs no weight.
    """

    def __init__(self, base: nnx.Module, adapters: Sequence[tuple[Array, Array, Array]], files: tuple[int, ...]):
        """`adapters` are `(A [rank, in], B [out, rank], strength [])`, with one more leading axis in a stack.

        `files` says which LoRA of the model each of them is of.
        """
        self.base: Any = base
        self.files = files
        self.a = nnx.List([Factors(a) for a, _, _ in adapters])
        self.b = nnx.List([Factors(b) for _, b, _ in adapters])
        self.strength = nnx.List([Factors(s) for _, _, s in adapters])

    def __call__(self, x: Float[Array, "*batch in_features"]) -> Float[Array, "*batch out_features"]:
        adapters = [
            (a.get_value(), b.get_value(), s.get_value()) for a, b, s in zip(self.a, self.b, self.strength, strict=True)
        ]
        if x.dtype == jnp.float32:
            weight = self.base.kernel.get_value().T if isinstance(self.base, nnx.Linear) else self.base.dequantize()
            rounded = _to_bfloat16 if weight.dtype == jnp.bfloat16 else lambda y: y
            weight = rounded(weight.astype(jnp.float32))
            for a, b, strength in adapters:
                scaled = rounded(b.astype(jnp.float32) * rounded(strength))
                weight = rounded(weight + rounded(jnp.matmul(scaled, a.astype(jnp.float32))))
            y = jnp.matmul(x, weight.T)
            return y if self.base.bias is None else y + self.base.bias.get_value().astype(jnp.float32)
        y = self.base(x)
        for a, b, strength in adapters:
            down = jnp.matmul(x, a.astype(x.dtype).T)
            y = y + jnp.matmul(down, b.astype(x.dtype).T) * strength.astype(x.dtype)
        return y


def _to_bfloat16(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Rounds float32 values to bfloat16 ones. A cast there and back would be compiled away."""
    return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)


@dataclass(frozen=True)
class Pairs:
    """What the keys and shapes of a LoRA file say."""

    keys: dict[str, tuple[str, str]]  # adapted linear, by its name below `diffusion_model.` -> keys of A and B
    foreign: tuple[str, ...]  # keys of another kind
    broken: tuple[str, ...]  # linears whose A or B is missing, or of another rank than the other
    twice: tuple[str, ...]  # halves that are there with and without a prefix


def find_pairs(shapes: Mapping[str, tuple[int, ...]]) -> Pairs:
    """Sorts the tensors of a LoRA file, given by key and shape, into pairs."""
    halves: dict[str, dict[str, str]] = defaultdict(dict)
    foreign, twice = [], []
    for key, shape in shapes.items():
        name, _, half = key.removesuffix(".weight").rpartition(".")
        if not key.endswith(".weight") or half not in ("lora_A", "lora_B") or len(shape) != 2:
            foreign.append(key)
            continue
        name = name.removeprefix("model.").removeprefix("diffusion_model.")
        if half in halves[name]:
            twice.append(f"{half} of {name}")
        halves[name][half] = key
    whole = {name: (found["lora_A"], found["lora_B"]) for name, found in halves.items() if len(found) == 2}
    keys = {name: (a, b) for name, (a, b) in whole.items() if shapes[a][0] == shapes[b][1]}
    return Pairs(keys, tuple(foreign), tuple(sorted(set(halves) - set(keys))), tuple(twice))


def read_lora(path: Path) -> dict[str, tuple[Array, Array]]:
    """The `(A, B)` of every adapted linear by its published name below `diffusion_model.`.

    Raises LoraError for what is not a LoRA file, for ranks or halves that do not fit, and for values that are not
    finite. Only safetensors files are opened: a pickle can run any program.
    """
    if not path.is_file():
        raise LoraError(f"{path} cannot be read: it is no file; give a LoRA as a safetensors file")
    try:
        with safe_open(path, "flax") as file:
            keys = file.keys()
            pairs = find_pairs({key: tuple(file.get_slice(key).get_shape()) for key in keys})
            odd = [key for key in keys if file.get_slice(key).get_dtype() not in ("BF16", "F16", "F32")]
            foreign = [*pairs.foreign, *odd]
            tensors = {} if foreign else {key: file.get_tensor(key) for key in keys}
    except (OSError, SafetensorError) as error:
        raise LoraError(f"{path} cannot be read as a safetensors file: {error}") from error
    if not tensors:
        raise LoraError(
            f"{path} is not an LTX-2 LoRA: expected matrices of floats, `diffusion_model.….lora_A.weight` and "
            f"`lora_B.weight`, found {', '.join(foreign[:5]) or 'no tensors'}{' and more' if len(foreign) > 5 else ''}"
        )
    if pairs.twice:
        raise LoraError(f"{path} has {pairs.twice[0]} twice, with and without a prefix; remove one")
    if pairs.broken:
        raise LoraError(f"{path}: A and B are missing or of different rank for {', '.join(pairs.broken[:8])}")
    for key, tensor in tensors.items():
        if not jnp.isfinite(tensor).all():
            raise LoraError(f"{path}: {key} has values that are not finite: damaged data, download it again")
    return {name: (tensors[a], tensors[b]) for name, (a, b) in pairs.keys.items()}


def add_loras(model: nnx.Module, loras: Sequence[tuple[Path, float]], linear_names: Mapping[str, str]) -> None:
    """Puts LoRA files with their strengths beside the linears of `model`, in place.

    `linear_names` maps published linears to paths in the model with its layers numbered (`blocks.3.video.ff.proj_in`);
    layers may be stacked. Raises LoraError, listing them, for adapters that match nothing or do not fit.
    """
    adapters: dict[tuple, list[tuple[int, tuple[Array, Array, Array]]]] = {}
    for number, (path, strength) in enumerate(loras):
        factors = read_lora(path)
        unknown = [name for name in factors if name not in linear_names]
        if unknown:
            raise LoraError(
                f"{path} adapts {len(unknown)} of {len(factors)} linears that this model does not have: "
                f"{', '.join(sorted(unknown)[:8])}"
            )
        placed: dict[tuple, dict[int | None, tuple[Array, Array]]] = defaultdict(dict)
        for name, pair in factors.items():
            place, layer = locate(model, linear_names[name])
            placed[place][layer] = pair
            linear = walk(model, place)
            linear: Any = linear.base if isinstance(linear, LoraLinear) else linear
            expected = (linear.in_features, linear.out_features)
            if (pair[0].shape[1], pair[1].shape[0]) != expected:
                raise LoraError(
                    f"{path}: {name} maps {pair[0].shape[1]} to {pair[1].shape[0]} channels, the model's linear "
                    f"{expected[0]} to {expected[1]}; this LoRA is for another model"
                )
        for place, by_layer in placed.items():
            adapters.setdefault(place, []).append((number, _gather(model, place, by_layer, strength)))
    for place, found in adapters.items():
        parent, name = walk(model, place[:-1]), place[-1]
        files, pairs = zip(*found, strict=True)
        setattr(parent, name, LoraLinear(getattr(parent, name), pairs, files))


def set_strengths(model: nnx.Module, strengths: Sequence[float]) -> None:
    """Changes how strongly the LoRAs of a model act, in place; nothing is compiled anew for it."""
    for _, module in nnx.iter_modules(model):
        if isinstance(module, LoraLinear):
            for number, strength in zip(module.files, module.strength, strict=True):
                strength.set_value(jnp.full_like(strength.get_value(), strengths[number]))


def reference_scales(paths: Sequence[Path]) -> tuple[int, int]:
    """How much smaller, and how much shorter, the LoRAs of these files read a reference clip; (1, 1) if none says.

    Raises LoraError where they disagree, or say what is no whole number.
    """
    found: dict[tuple[int, int], Path] = {}
    for path in paths:
        try:
            with safe_open(path, "numpy") as file:
                metadata = file.metadata() or {}
        except (OSError, SafetensorError) as error:
            raise LoraError(f"{path} cannot be read as a safetensors file: {error}") from error
        said = [metadata.get(name) for name in ("reference_downscale_factor", "reference_temporal_scale_factor")]
        if any(value is not None for value in said):
            try:
                scales = tuple(1 if value is None else int(value) for value in said)
            except ValueError:
                scales = 0, 0
            if min(scales) < 1:
                raise LoraError(f"{path}: its reference scale factors must be whole numbers from 1, got {said}")
            found[scales[0], scales[1]] = path
    if len(found) > 1:
        what = " and ".join(
            f"{path} 1/{down} of the size, 1/{time} of the frames" for (down, time), path in found.items()
        )
        raise LoraError(f"the LoRAs read their reference differently: {what}; give one of them")
    return next(iter(found), (1, 1))


def _gather(
    model: nnx.Module, place: tuple, by_layer: Mapping[int | None, tuple[Array, Array]], strength: float
) -> tuple[Array, Array, Array]:
    """One layer's factors, or those of a whole stack: layers without any get zeros, lower ranks are padded."""
    if None in by_layer:
        a, b = by_layer[None]
        return a, b, jnp.asarray(strength, jnp.float32)
    stack = walk(model, place[: place.index("layer")])
    rank = max(a.shape[0] for a, _ in by_layer.values())
    a0, b0 = next(iter(by_layer.values()))
    a_all = np.zeros((stack.num_layers, rank, a0.shape[1]), a0.dtype)
    b_all = np.zeros((stack.num_layers, b0.shape[0], rank), b0.dtype)
    for layer, (a, b) in by_layer.items():
        a_all[layer, : a.shape[0]] = np.asarray(a)
        b_all[layer, :, : b.shape[1]] = np.asarray(b)
    return jnp.asarray(a_all), jnp.asarray(b_all), jnp.full((stack.num_layers,), strength, jnp.float32)
