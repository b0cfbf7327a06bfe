"""Models and trees with shapes in place of arrays, for planning and for filling from a checkpoint."""

from collections.abc import Callable
from dataclasses import fields
from typing import Any, TypeVar

import jax
from flax import nnx

Model = TypeVar("Model", bound=nnx.Module)
Class = TypeVar("Class", bound=type)


def tree_dataclass(cls: Class) -> Class:
    """Makes a dataclass a tree for JAX; fields with `metadata={"static": True}` are part of its structure.

    As `jax.tree_util.register_dataclass`, but trees are rebuilt without `__init__`: JAX puts shapes and marks of its
    own in place of arrays, which are not what annotations promise to people.
    """
    names = [field.name for field in fields(cls) if not field.metadata.get("static")]
    static = [field.name for field in fields(cls) if field.metadata.get("static")]

    def flatten(tree: Any) -> tuple[list[tuple[Any, Any]], tuple]:
        children = [(jax.tree_util.GetAttrKey(name), getattr(tree, name)) for name in names]
        return children, tuple(getattr(tree, name) for name in static)

    def unflatten(values: tuple, children: Any) -> Any:
        tree = object.__new__(cls)
        for name, value in (*zip(names, children, strict=True), *zip(static, values, strict=True)):
            object.__setattr__(tree, name, value)
        return tree

    jax.tree_util.register_pytree_with_keys(cls, flatten, unflatten)
    return cls


class _OneKey(nnx.Rngs):
    """The same key for every weight: they are never drawn, and counting keys is quadratic in the number of layers."""

    def __init__(self):
        self.key = jax.random.key(0)

    def params(self) -> jax.Array:
        return self.key


def abstract(make: Callable[[nnx.Rngs], Model]) -> Model:
    """`make(rngs)` traced for its shapes: nothing is initialised, whatever the size."""
    return nnx.eval_shape(lambda: make(_OneKey()))
