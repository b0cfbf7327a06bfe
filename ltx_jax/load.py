"""A checkpoint folder to ready models: layer by layer straight to the device, packed weights staying packed."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial, reduce
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from hlwq_jax import QuantizedLinear, replace_linears
from ltx_jax.checkpoint import LAYERED, CheckpointError, Configs, Manifest, QuantizedShape, part_of
from ltx_jax.offload import HostLayers, Streamed
from ltx_jax.orbax_io import describe, release_freed_memory, restore
from ltx_jax.stack import Stack, layer_lists, locate

_PIECE_BYTES = 2**28  # that are read at a time: one layer of the transformer


def load_configs(manifest: Manifest) -> Configs:
    """The configurations of all models of a checkpoint."""
    return Configs.from_metadata(
        manifest.metadata,
        manifest.gemma_metadata,
        manifest.upscaler_metadata,
        num_hidden_states=manifest.num_hidden_states,
    )


def abstract_component(
    manifest: Manifest, component: str, *, dtype: Any = None, stored: Mapping[str, DTypeLike] | None = None
) -> nnx.Module:
    """One model as `load_component` will give it, with shapes in place of arrays: no folder is needed.

    `dtype` casts plain floating weights; None keeps what is stored. A manifest does not say how they are stored, so
    they count as bfloat16, as published, but for those that `stored` names (path with numbered layers -> dtype).
    Raises CheckpointError for a component that is not there, and for names in the manifest or `stored` that are not in
    the model.
    """
    quantized = manifest.quantized.get(component, {})
    configs = load_configs(manifest)
    model, depths = configs.one_layer(component) if component in LAYERED else (configs.abstract(component), {})
    rest = dict(quantized)
    for path, (owner, attribute) in layer_lists(model).items() if depths else ():
        graphdef, state = nnx.split(getattr(owner, attribute)[0])
        by_layer = [_take(rest, f"{path}.{number}.") for number in range(depths[path])]
        stacks: list[Stack] = []
        for shapes, run in groupby(by_layer):
            layer = nnx.merge(graphdef, state, copy=True)
            _pack(layer, shapes, where=f"{component}/{path}")
            stacks.append(Stack.of_equal(layer, len(list(run))))
        setattr(owner, attribute, nnx.List(stacks))
    _pack(model, rest, where=component)

    variables = _variables(model)
    kinds: dict[str, list[Any]] = defaultdict(list)
    for name, kind in (stored or {}).items():
        kinds[_find(model, component, variables, name).variable].append(jnp.dtype(kind))
    for name, variable in variables.items():
        shape = variable.get_value()
        plain = isinstance(variable, nnx.Param) and jnp.issubdtype(shape.dtype, jnp.floating)
        # Layers may be stored in different precisions; a stack has one, the widest.
        kind = reduce(jnp.promote_types, kinds[name]) if name in kinds else jnp.bfloat16 if plain else shape.dtype
        if dtype is not None and plain and jnp.issubdtype(kind, jnp.floating):
            kind = dtype
        variable.set_value(jax.ShapeDtypeStruct(shape.shape, kind))
    return model


def _take(quantized: dict[str, QuantizedShape], prefix: str) -> dict[str, QuantizedShape]:
    """Takes out what lies below a prefix, which is cut off."""
    return {name.removeprefix(prefix): quantized.pop(name) for name in list(quantized) if name.startswith(prefix)}


def _pack(model: nnx.Module, shapes: Mapping[str, QuantizedShape], *, where: str) -> None:
    """Replaces the linears that `shapes` names by packed ones. Raises CheckpointError for one that is not there."""

    def packed(path: tuple, linear: nnx.Linear) -> nnx.Module | None:
        shape = shapes.get(".".join(map(str, path)))
        if shape is None:
            return None
        # Queries, keys and values of self-attention read one input: they share its rotation.
        sharing = 3 if path[-2] == "self_attn" and path[-1] != "to_out" else 1
        return nnx.merge(*_packed(shape, linear.bias is not None, sharing), copy=True)

    replaced = replace_linears(model, packed)
    unplaced = set(shapes) - {".".join(map(str, path)) for path in replaced}
    if unplaced:
        raise CheckpointError(f"the manifest packs linears that {where} does not have: {sorted(unplaced)[:5]}")


@cache
def _packed(shape: QuantizedShape, use_bias: bool, sharing: int) -> Any:
    """A packed linear without arrays, split: made once for the many layers that have it."""
    linear = QuantizedLinear.abstract(
        shape.in_features,
        shape.out_features,
        bits=shape.bits,
        block_size=shape.block_size,
        history_bits=shape.history_bits,
        signs=shape.signs,
        use_bias=use_bias,
        shared_outputs=sharing * shape.out_features,
    )
    return nnx.split(linear)


def load_component(
    folder: Path,
    manifest: Manifest,
    component: str,
    *,
    dtype: Any = None,
    offload: bool = False,
    adapt: Callable[[nnx.Module], None] | None = None,
    device: jax.Device | None = None,
) -> Any:
    """One model of a checkpoint, its equal layers stacked for `jax.lax.scan`; a `Streamed` one with `offload`.

    `dtype` casts plain floating weights (packed ones stay as they are); None keeps what is stored. `adapt` changes the
    abstract model in place before it is filled: settings, and modules put around its own with arrays of their own.

    Host memory peaks at one layer (beside those to be streamed), device memory at the model and one layer; an array
    larger than a layer, such as an embedding, takes its place. Without `device` the arrays lie on the default device,
    uncommitted. Raises CheckpointError, before any weight is read, if the folder lacks the component or a part, or an
    array does not fit; ValueError for `offload` of a model without layers.
    """
    if component not in manifest.parts:
        raise CheckpointError(
            f"{folder} has no {component}; it holds {', '.join(sorted(manifest.parts))}. "
            "Convert again with the files that contain it (`python -m convert --help`)"
        )
    parts: dict[str, dict[str, jax.ShapeDtypeStruct]] = {}
    for part in manifest.parts[component]:
        path = folder / component / part
        if not path.is_dir():
            raise CheckpointError(f"{folder} lacks {component}/{part}, which its manifest lists; convert again")
        parts[part] = describe(path)
    kinds = {name: array.dtype for arrays in parts.values() for name, array in arrays.items()}
    model = abstract_component(manifest, component, dtype=dtype, stored=kinds)
    variables = _variables(model)
    places = _check(model, component, variables, parts)
    lists = layer_lists(model) if offload else {}
    if offload and component not in LAYERED:
        raise ValueError(f"{component} has no layers to stream; {', '.join(LAYERED)} have")
    if adapt is not None:
        adapt(model)

    def read(part: str, shapes: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, np.ndarray]:
        """Arrays of a part in the dtypes that the model has for them."""
        release_freed_memory()
        arrays = restore(folder / component / part, shapes)
        for name in arrays:
            kind = variables[places[name].variable].get_value().dtype
            arrays[name] = np.asarray(arrays[name]).astype(kind, copy=False)
        return arrays

    streamed: dict[str, HostLayers] = {}
    for path, (owner, attribute) in lists.items():
        layers = _layers(path, getattr(owner, attribute), variables, lambda part: read(part, parts[part]))
        streamed[path] = HostLayers(layers, device=device)
        setattr(owner, attribute, nnx.List([]))

    resident = {part: shapes for part, shapes in parts.items() if part.rpartition(".")[0] not in lists}
    found = {places[name] for shapes in resident.values() for name in shapes}
    stacks = {place.variable for place in found if place.layer is not None}
    with jax.default_device(device):
        values = _zeros(tuple((name, variables[name].get_value()) for name in sorted(stacks)))
    for part, piece in ((part, piece) for part, shapes in resident.items() for piece in _pieces(shapes)):
        arrays = read(part, piece)
        slices, layer = {}, 0
        for name in piece:
            place = places[name]
            array = jax.device_put(arrays.pop(name), device)
            if place.layer is None:
                values[place.variable] = array
            else:
                slices[place.variable], layer = array, place.layer
        values |= _fill({name: values.pop(name) for name in slices}, slices, layer)
        jax.block_until_ready(values)
    for name, value in values.items():
        variables[name].set_value(value)
    release_freed_memory()
    return Streamed(model, streamed) if offload else model


def _pieces(shapes: Mapping[str, jax.ShapeDtypeStruct]) -> Iterator[dict[str, jax.ShapeDtypeStruct]]:
    """The arrays of a part in groups to be read at a time."""
    piece: dict[str, jax.ShapeDtypeStruct] = {}
    size = 0
    for name, shape in shapes.items():
        nbytes = shape.size * shape.dtype.itemsize
        if piece and size + nbytes > _PIECE_BYTES:
            yield piece
            piece, size = {}, 0
        piece[name] = shape
        size += nbytes
    if piece:
        yield piece


class _Place(NamedTuple):
    """Where an array of the checkpoint goes: a variable, and the index in it if that is of a stack."""

    variable: str
    layer: int | None


def _variables(model: nnx.Module) -> dict[str, nnx.Variable]:
    """The variables of a model, not copies of them, by dotted path."""
    return {".".join(map(str, path)): node for path, node in nnx.iter_graph(model) if isinstance(node, nnx.Variable)}


def _find(model: nnx.Module, component: str, variables: Mapping[str, nnx.Variable], name: str) -> _Place:
    try:
        place, layer = locate(model, name)
    except (AttributeError, KeyError):
        place, layer = (), None
    found = ".".join(map(str, place))
    if found not in variables:
        raise CheckpointError(f"{component}: the checkpoint has an array {name} that the model does not know")
    return _Place(found, layer)


def _check(
    model: nnx.Module,
    component: str,
    variables: Mapping[str, nnx.Variable],
    parts: Mapping[str, Mapping[str, jax.ShapeDtypeStruct]],
) -> dict[str, _Place]:
    """The place of every array. Raises CheckpointError for what is unknown, missing, misplaced or of another shape."""
    places: dict[str, _Place] = {}
    filled: dict[str, set[int | None]] = defaultdict(set)
    for part, arrays in parts.items():
        for name, array in arrays.items():
            if part_of(component, name) != part:
                raise CheckpointError(
                    f"{component}: {name} belongs into {part_of(component, name)}, but lies in {part}"
                )
            place = places[name] = _find(model, component, variables, name)
            expected = variables[place.variable].get_value().shape[0 if place.layer is None else 1 :]
            if tuple(array.shape) != tuple(expected):
                raise CheckpointError(f"{component}: {name} has shape {array.shape}, the model needs {expected}")
            filled[place.variable].add(place.layer)
    missing = [
        name
        for name, variable in variables.items()
        if name not in filled or (None not in filled[name] and len(filled[name]) != variable.get_value().shape[0])
    ]
    if missing:
        raise CheckpointError(
            f"{component}: {len(missing)} parameters are not in the checkpoint, among them {missing[:5]}"
        )
    return places


def _layers(
    path: str, stacks: nnx.List, stored: Mapping[str, nnx.Variable], read: Callable[[str], dict[str, np.ndarray]]
) -> Iterator[nnx.Module]:
    """The layers of a list one by one; `read` gives the arrays of a part."""
    names = {id(variable): name for name, variable in stored.items()}
    number = 0
    for position, stack in enumerate(stacks):
        graphdef, state = nnx.split(stack.layer)
        variables = _variables(stack.layer)
        for index in range(stack.num_layers):
            arrays = read(f"{path}.{number:03d}")
            flat = dict(nnx.to_flat_state(state))
            for place in flat:
                variable = variables[".".join(map(str, place))]
                name = names.get(id(variable))
                if name is None:  # not of the checkpoint
                    value = np.asarray(variable.get_value()[index])
                else:
                    value = arrays[f"{path}.{number}.{name.removeprefix(f'{path}.{position}.layer.')}"]
                flat[place] = flat[place].replace(value)
            yield nnx.merge(graphdef, nnx.from_flat_state(flat))
            number += 1


@partial(jax.jit, static_argnames="shapes")
def _zeros(shapes: tuple[tuple[str, jax.ShapeDtypeStruct], ...]) -> dict[str, jax.Array]:
    """Arrays to be filled, made on the device."""
    return {name: jnp.zeros(x.shape, x.dtype) for name, x in shapes}


@partial(jax.jit, donate_argnames="stacks")
def _fill(stacks: dict[str, jax.Array], slices: dict[str, jax.Array], layer: Any) -> dict[str, jax.Array]:
    """Stacks with one layer set, in their own memory."""
    return {name: jax.lax.dynamic_update_index_in_dim(stacks[name], slices[name], layer, 0) for name in slices}
