"""Models with shapes in place of arrays, for planning and for filling from a checkpoint."""

from collections.abc import Callable
from typing import TypeVar

import jax
from flax import nnx

Model = TypeVar("Model", bound=nnx.Module)


class _OneKey(nnx.Rngs):
    """The same key for every weight: they are never drawn, and counting keys is quadratic in the number of layers."""

    def __init__(self):
        self.key = jax.random.key(0)

    def params(self) -> jax.Array:
        return self.key


def abstract(make: Callable[[nnx.Rngs], Model]) -> Model:
    """`make(rngs)` traced for its shapes: nothing is initialised, whatever the size."""
    return nnx.eval_shape(lambda: make(_OneKey()))
