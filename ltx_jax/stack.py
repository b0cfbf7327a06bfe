"""Layers of one structure with their weights stacked on a leading axis, run under `jax.lax.scan`.

Why: scanned, only one layer's unpacked weights are alive at a time and the body is compiled once; the same layers
unrolled in one jit need several times the memory. Models are written as a plain list of layers; `stack_layers`
replaces runs of equal layers by a `Stack`, and `run_layers` runs either.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx


class Entered(NamedTuple):
    """A layered model between its way in and its way out: what `enter` gives, and layers and `leave` take."""

    carry: Any  # what the layers change
    shared: Any  # what every layer reads
    per_layer: Any  # a pytree of arrays with a leading axis over the layers, or None
    rest: Any  # what `leave` needs besides


class Stack(nnx.Module):
    """Consecutive layers of one structure: `layer` holds every variable with a leading axis of `num_layers`."""

    def __init__(self, layers: Sequence[nnx.Module]):
        """Stacks the variables of `layers` (arrays, or shapes from `nnx.eval_shape`)."""
        graphdefs, states = zip(*(nnx.split(layer) for layer in layers), strict=True)
        if any(graphdef != graphdefs[0] for graphdef in graphdefs):
            raise ValueError("layers of different structure cannot be stacked")
        self.num_layers = len(layers)
        self.layer = nnx.merge(graphdefs[0], jax.tree.map(_stack_leaves, *states))

    @classmethod
    def of_equal(cls, layer: nnx.Module, num_layers: int) -> "Stack":
        """As a stack of that many layers like `layer`, which has shapes in place of arrays."""
        stack = cls([layer])
        graphdef, state = nnx.split(stack.layer)
        deep = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((num_layers, *leaf.shape[1:]), leaf.dtype), state)
        stack.num_layers, stack.layer = num_layers, nnx.merge(graphdef, deep)
        return stack


def _stack_leaves(*leaves: Any) -> Any:
    if isinstance(leaves[0], jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct((len(leaves), *leaves[0].shape), leaves[0].dtype)
    return jnp.stack(leaves)


def stack_layers(layers: Sequence[nnx.Module]) -> nnx.List:
    """The same layers with each run of equal structure (and shapes) replaced by one `Stack`; Stacks are left alone."""
    runs: list[list[nnx.Module]] = []
    last = None
    for layer in layers:
        graphdef, state = nnx.split(layer)
        kind = (graphdef, jax.tree.structure(state), [(x.shape, x.dtype) for x in jax.tree.leaves(state)])
        if runs and kind == last and not isinstance(layer, Stack):
            runs[-1].append(layer)
        else:
            runs.append([layer])
        last = kind
    return nnx.List([run[0] if isinstance(run[0], Stack) else Stack(run) for run in runs])


def layer_lists(model: nnx.Module) -> dict[str, tuple[nnx.Module, str]]:
    """The lists of layers of a layered model: dotted name (`video.blocks`) -> its owner, and its attribute there."""
    lists = {}
    for prefix in ("", "video.", "audio."):
        owner = getattr(model, prefix[:-1], None) if prefix else model
        for attribute in ("blocks", "layers"):
            if isinstance(getattr(owner, attribute, None), nnx.List):
                lists[f"{prefix}{attribute}"] = (owner, attribute)
    return lists


def locate(model: nnx.Module, path: str) -> tuple[tuple[str | int, ...], int | None]:
    """Where the module of a path with numbered layers (`blocks.3.ff.proj_in`) lies, stacked or not.

    Returns the place to `walk` to, and the index within the stack that holds it (None outside of one). Raises KeyError
    if the model has no such layer.
    """
    place: list[str | int] = []
    node: Any = model
    index = None
    for step in path.split("."):
        if not step.isdigit():
            place.append(step)
            node = getattr(node, step)
            continue
        number = int(step)
        sizes = [entry.num_layers if isinstance(entry, Stack) else 1 for entry in node]
        position = 0
        while position < len(sizes) and number >= sizes[position]:
            number -= sizes[position]
            position += 1
        if position == len(sizes):
            raise KeyError(f"the model has no layer {step} in {path}")
        place.append(position)
        node = node[position]
        if isinstance(node, Stack):
            index = number
            place.append("layer")
            node = node.layer
    return tuple(place), index


def walk(model: nnx.Module, place: Sequence[str | int]) -> Any:
    """The module at a place that `locate` gave."""
    node: Any = model
    for step in place:
        node = node[step] if isinstance(step, int) else getattr(node, step)
    return node


def module_at(model: nnx.Module, path: str) -> Any:
    """The module of a path with numbered layers, cut out of its stack if it lies in one."""
    place, index = locate(model, path)
    module = walk(model, place)
    if index is None:
        return module
    graphdef, state = nnx.split(module)
    return nnx.merge(graphdef, jax.tree.map(lambda a: a[index], state))


def count_layers(layers: Sequence[nnx.Module]) -> int:
    return sum(layer.num_layers if isinstance(layer, Stack) else 1 for layer in layers)


def run_layers(
    layers: Sequence[nnx.Module], step: Callable[[Any, Any, Any], tuple[Any, Any]], carry: Any, per_layer: Any = None
) -> tuple[Any, Any]:
    """Runs `carry, out = step(layer, carry, x)` over all layers, `x` being the layer's slice of `per_layer`.

    `per_layer` is a pytree of arrays with a leading axis over all layers (or None). Returns the last carry and the
    outputs stacked over all layers.
    """
    outs = []
    start = 0
    for layer in layers:
        if isinstance(layer, Stack):
            stop = start + layer.num_layers
            graphdef, state = nnx.split(layer.layer)

            def body(carry, sliced, graphdef=graphdef):
                layer_state, x = sliced
                return step(nnx.merge(graphdef, layer_state), carry, x)

            xs = jax.tree.map(lambda a: a[start:stop], per_layer)  # noqa: B023
            carry, out = jax.lax.scan(body, carry, (state, xs))
        else:
            stop = start + 1
            carry, out = step(layer, carry, jax.tree.map(lambda a: a[start], per_layer))  # noqa: B023
            out = jax.tree.map(lambda a: a[None], out)
        outs.append(out)
        start = stop
    if len(outs) == 1:
        return carry, outs[0]
    return carry, jax.tree.map(lambda *parts: jnp.concatenate(parts), *outs)
