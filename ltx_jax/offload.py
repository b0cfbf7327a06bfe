"""Layers kept in host memory and streamed to the device, one in use and one on its way.

Each layer is one flat buffer of 32-bit words in pinned host memory, as one large copy is the only one that runs at the
speed of the bus; inside the jitted layer it is cut into weights again, bit for bit. The layers run in a Python loop
over one compiled program, which overlaps copies and computation without any compiler flag.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property, partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, UInt32

Words = UInt32[Array, " words"]
WORD_BYTES = 4


@dataclass(frozen=True)
class Layout:
    """How a layer lies in its buffer: variable after variable, each from a whole word on."""

    graphdef: Any
    treedef: Any
    leaves: tuple[jax.ShapeDtypeStruct, ...]

    @classmethod
    def of(cls, layer: nnx.Module) -> "Layout":
        """The layout of a layer of arrays or of shapes."""
        graphdef, state = nnx.split(layer)
        leaves, treedef = jax.tree.flatten(state)
        return cls(graphdef, treedef, tuple(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves))

    @cached_property
    def _hash(self) -> int:
        return hash((self.graphdef, self.treedef, self.leaves))

    def __hash__(self) -> int:
        return self._hash  # kept, as every call of a jitted function asks for it

    @cached_property
    def _spans(self) -> tuple[tuple[int, int], ...]:
        """Where each leaf starts and stops, in words."""
        counts = [-(-prod(leaf.shape) * leaf.dtype.itemsize // WORD_BYTES) for leaf in self.leaves]
        stops = np.cumsum(counts, dtype=np.int64).tolist()
        return tuple(zip([0, *stops[:-1]], stops, strict=True))

    @property
    def num_words(self) -> int:
        return self._spans[-1][1] if self._spans else 0

    def pack(self, layer: nnx.Module) -> UInt32[np.ndarray, " words"]:
        """A layer's variables as words; what fills a variable's last word is zero."""
        words = np.zeros(self.num_words, np.uint32)
        for leaf, (start, stop) in zip(jax.tree.leaves(nnx.state(layer)), self._spans, strict=True):
            data = np.ascontiguousarray(leaf).reshape(-1).view(np.uint8)
            words[start:stop].view(np.uint8)[: data.size] = data
        return words

    def unpack(self, words: Words) -> nnx.Module:
        """The layer again, inside of jit."""
        leaves = []
        for leaf, (start, stop) in zip(self.leaves, self._spans, strict=True):
            values = jax.lax.bitcast_convert_type(words[start:stop], leaf.dtype).reshape(-1)
            leaves.append(values[: prod(leaf.shape)].reshape(leaf.shape))
        return nnx.merge(self.graphdef, jax.tree.unflatten(self.treedef, leaves))


@partial(jax.jit, static_argnames=("layout", "step"), donate_argnames="carry")
def run_layer(
    words: Words, carry: Any, shared: Any, per_layer: Any, index: Any, *, layout: Layout, step: Callable
) -> tuple[Any, Any]:
    """Layer `index` from its buffer: one program for all layers of a layout, with the carry's memory used again."""
    x = jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, index, keepdims=False), per_layer)
    return step(layout.unpack(words), carry, shared, x)


class HostLayers:
    """Layers of one or several structures in host memory: pinned where the device has such, else as numpy arrays."""

    def __init__(self, layers: Iterable[nnx.Module], *, device: jax.Device | None = None):
        """Takes the layers one by one (a generator needs memory for one alone); `device` is where they will run."""
        place: Any = jax.local_devices()[0] if device is None else device
        self.sharding = jax.sharding.SingleDeviceSharding(place)
        pinned = any(memory.kind == "pinned_host" for memory in place.addressable_memories())
        host = jax.sharding.SingleDeviceSharding(place, memory_kind="pinned_host") if pinned else None
        layouts: dict[Layout, Layout] = {}
        self.layouts: list[Layout] = []
        self.buffers: list[Any] = []
        for layer in layers:
            layout = Layout.of(layer)
            words = layout.pack(layer)
            del layer
            self.layouts.append(layouts.setdefault(layout, layout))
            self.buffers.append(jax.block_until_ready(jax.device_put(words, host)) if host else words)

    def __len__(self) -> int:
        return len(self.buffers)

    @property
    def nbytes(self) -> int:
        """Bytes of host memory."""
        return sum(buffer.nbytes for buffer in self.buffers)

    def run(self, step: Callable, carry: Any, shared: Any, per_layer: Any = None) -> tuple[Any, Any]:
        """Runs `carry, out = step(layer, carry, shared, x)` over all layers, `x` being the slice of `per_layer`.

        `step` is compiled once for each layout, so it must be a function that lives as long as the program, such as a
        model's static method. The arrays of `carry` are used up. Returns the last carry, and the outputs stacked,
        committed to the device (`sharding`), as what comes from another memory always is.
        """
        # As the later layers' carry is, so that the first has no program of its own.
        carry, shared, per_layer = jax.device_put((carry, shared, per_layer), self.sharding)
        outs = []
        following = self._put(0) if self.buffers else None
        for index, layout in enumerate(self.layouts):
            words = following
            # The layer before is done, and so its buffer is free: never more than two are on the device.
            jax.block_until_ready(carry)
            # Asked for before this layer runs, as a copy may wait for all that the device was given earlier.
            following = self._put(index + 1) if index + 1 < len(self) else None
            carry, out = run_layer(words, carry, shared, per_layer, index, layout=layout, step=step)
            outs.append(out)
        return carry, _stack(outs)

    def _put(self, index: int) -> Words:
        return jax.device_put(self.buffers[index], self.sharding)


@jax.jit
def _stack(outs: list[Any]) -> Any:
    return jax.tree.map(lambda *parts: jnp.stack(parts), *outs) if outs else None


@dataclass(frozen=True)
class Streamed:
    """A layered model whose layers are streamed."""

    rest: Any  # the model on the device, its lists of layers empty
    # `HostLayers` by the dotted name of their list (`blocks`, `video.blocks`); descriptions of layers in a plan.
    layers: dict[str, Any]
