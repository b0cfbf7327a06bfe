"""A checkpoint folder to ready models: layer by layer, packed weights staying packed."""

from collections import defaultdict
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from hlwq_jax import QuantizedLinear, replace_linears
from ltx_jax.checkpoint import LAYERED, CheckpointError, Configs, Manifest
from ltx_jax.orbax_io import restore
from ltx_jax.stack import locate, stack_layers


def load_configs(manifest: Manifest) -> Configs:
    """The configurations of all models of a checkpoint."""
    return Configs.from_metadata(
        manifest.metadata,
        manifest.gemma_metadata,
        manifest.upscaler_metadata,
        num_hidden_states=manifest.num_hidden_states,
    )


def load_component(folder: Path, manifest: Manifest, component: str, *, dtype: Any = None) -> nnx.Module:
    """One model of a checkpoint, its equal layers stacked for `jax.lax.scan`.

    `dtype` casts plain floating weights (packed ones stay as they are); None keeps what is stored. Peak memory is the
    model and one layer. Raises CheckpointError if the folder lacks the component or an array does not fit.
    """
    if component not in manifest.parts:
        raise CheckpointError(
            f"{folder} has no {component}; it holds {', '.join(sorted(manifest.parts))}. "
            "Convert again with the files that contain it (`python -m convert --help`)"
        )
    model = load_configs(manifest).abstract(component)
    quantized = manifest.quantized.get(component, {})

    def packed(path: tuple, linear: nnx.Linear) -> nnx.Module | None:
        shape = quantized.get(".".join(map(str, path)))
        if shape is None:
            return None
        return QuantizedLinear.abstract(
            shape.in_features,
            shape.out_features,
            bits=shape.bits,
            block_size=shape.block_size,
            use_bias=linear.bias is not None,
            # Queries, keys and values of self-attention read one input: they share its rotation.
            shared_outputs=(3 if path[-2] == "self_attn" and path[-1] != "to_out" else 1) * shape.out_features,
        )

    replaced = replace_linears(model, packed)
    unplaced = set(quantized) - {".".join(map(str, path)) for path in replaced}
    if unplaced:
        raise CheckpointError(
            f"{folder}: the manifest packs linears that {component} does not have: {sorted(unplaced)[:5]}"
        )
    if component in LAYERED:
        _stack_in_place(model)

    arrays = _Arrays(model, component)
    for part in manifest.parts[component]:
        path = folder / component / part
        if not path.is_dir():
            raise CheckpointError(f"{folder} lacks {component}/{part}, which its manifest lists; convert again")
        for name, array in restore(path).items():
            arrays.put(name, array, dtype)
    return arrays.merge()


def _stack_in_place(model: nnx.Module) -> None:
    """Stacks every list of layers of the model."""
    for owner in (model, getattr(model, "video", None), getattr(model, "audio", None)):
        for attribute in ("blocks", "layers"):
            layers = getattr(owner, attribute, None)
            if isinstance(layers, nnx.List):
                setattr(owner, attribute, stack_layers(layers))


class _Arrays:
    """The variables of an abstract model being filled."""

    def __init__(self, model: nnx.Module, component: str):
        self.component = component
        self.model = model
        self.graphdef, state = nnx.split(model)
        self.flat = dict(nnx.to_flat_state(state))
        self.paths = {".".join(map(str, path)): path for path in self.flat}
        self.filled: dict[str, set[int | None]] = defaultdict(set)
        self.arrays: dict[str, np.ndarray] = {}

    def put(self, name: str, array: np.ndarray, dtype: Any) -> None:
        """Takes a parameter by its path with numbered layers: a whole array, or one layer's slice of a stacked one."""
        try:
            place, index = locate(self.model, name)
        except (AttributeError, KeyError) as error:
            raise CheckpointError(
                f"{self.component}: the checkpoint has an array {name} that the model does not know"
            ) from error
        name = ".".join(map(str, place))
        variable = self.flat[self.paths[name]]
        expected = tuple(variable.get_value().shape)
        shape = tuple(array.shape) if index is None else (expected[0], *array.shape)
        if shape != expected:
            raise CheckpointError(f"{self.component}: {name} has shape {shape}, the model needs {expected}")
        if dtype is not None and isinstance(variable, nnx.Param) and jnp.issubdtype(array.dtype, jnp.floating):
            array = array.astype(dtype)
        if index is None:
            self.arrays[name] = array
        else:
            stack = self.arrays.setdefault(name, np.zeros(expected, array.dtype))
            if stack.dtype != array.dtype:
                # Layers may be stored in different precisions; a stack has one, the widest.
                stack = self.arrays[name] = stack.astype(jnp.promote_types(stack.dtype, array.dtype))
            stack[index] = array
        self.filled[name].add(index)

    def merge(self) -> nnx.Module:
        """The model on the device; each array leaves the host as it goes. Raises CheckpointError if any is missing."""
        missing = [
            name
            for name, path in self.paths.items()
            if name not in self.filled
            or (None not in self.filled[name] and len(self.filled[name]) != self.flat[path].get_value().shape[0])
        ]
        if missing:
            raise CheckpointError(
                f"{self.component}: {len(missing)} parameters are not in the checkpoint, among them {missing[:5]}"
            )
        for name, path in self.paths.items():
            self.flat[path] = self.flat[path].replace(jnp.asarray(self.arrays.pop(name)))
        return nnx.merge(self.graphdef, nnx.from_flat_state(self.flat))
