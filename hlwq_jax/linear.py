"""`QuantizedLinear`, a drop-in for `nnx.Linear` that keeps its weight packed, and swapping it into any NNX model."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hlwq_jax.hadamard import check_block_size
from hlwq_jax.matmul import FORMS, Form, dequantize_planes, quantized_matmul
from hlwq_jax.planes import pack_planes, plane_widths
from hlwq_jax.quantize import PUBLISHED_RECIPE, Quantized, Recipe
from hlwq_jax.trellis import check_trellis

Path = tuple[str | int, ...]


class Packed(nnx.Variable):
    """A part of a quantized weight; not an `nnx.Param`, so that optimizers and gradients leave it alone."""


class QuantizedLinear(nnx.Module):
    """A linear layer whose weight stays packed on the device; see `planes` for the layout and `matmul` for the forms.

    Made zero; fill it (`from_quantized`, `from_linear`, or a checkpoint) before use. It computes in the dtype of its
    input. Its variables may carry leading axes of stacked layers, as `jax.lax.scan` and `nnx.scan` slice them.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bits: int = 5,
        block_size: int = 128,
        history_bits: int = 0,
        signs: bool = False,
        use_bias: bool = True,
        bias_dtype: jax.typing.DTypeLike = jnp.float32,
        form: Form | Literal["auto"] = "auto",
        shared_outputs: int | None = None,
        num_layers: tuple[int, ...] = (),
    ):
        """`history_bits` above 0 are those of a trellis; `signs` says that the weight's columns have signs.

        `shared_outputs` counts the outputs of all layers fed the same x; `num_layers` are axes of stacked layers.
        """
        check_block_size(block_size)
        if history_bits:
            check_trellis(bits, history_bits)
        _check_form(form)
        self.in_features = in_features
        self.out_features = out_features
        self.bits = bits
        self.block_size = block_size
        self.history_bits = history_bits
        self.form: Form | Literal["auto"] = form
        # With signs each layer has an x of its own, and shares no rotation with others.
        self.shared_outputs = out_features if shared_outputs is None or signs else shared_outputs
        num_blocks = -(-in_features // block_size)
        lo_words, hi_words = plane_widths(num_blocks * block_size, bits)
        rows = (*num_layers, out_features)
        self.lo = Packed(jnp.zeros((*rows, lo_words), jnp.uint32))
        self.hi = Packed(jnp.zeros((*rows, hi_words), jnp.uint32)) if hi_words else None
        self.norms = Packed(jnp.zeros((*rows, num_blocks), jnp.float16))
        self.scaled_centroids = Packed(jnp.zeros((*num_layers, 2 ** (bits + history_bits)), jnp.float32))
        self.signs = Packed(jnp.ones((*num_layers, in_features), jnp.int8)) if signs else None
        self.bias = nnx.Param(jnp.zeros(rows, bias_dtype)) if use_bias else None

    @classmethod
    def abstract(cls, in_features: int, out_features: int, **settings: Any) -> "QuantizedLinear":
        """The layer with shapes in place of arrays, to be filled from a checkpoint; settings as for the constructor."""
        return nnx.eval_shape(lambda: cls(in_features, out_features, **settings))

    @classmethod
    def from_quantized(
        cls,
        weight: Quantized,
        *,
        bias: jax.Array | np.ndarray | None = None,
        form: Form | Literal["auto"] = "auto",
        shared_outputs: int | None = None,
    ) -> "QuantizedLinear":
        lo, hi = pack_planes(weight.codes, weight.bits)
        parts = {
            "lo": lo,
            "hi": hi,
            "norms": weight.norms,
            "scaled_centroids": weight.scaled_centroids,
            "signs": weight.signs,
            "bias": bias,
        }
        layer = cls.abstract(
            weight.in_features,
            weight.out_features,
            bits=weight.bits,
            block_size=weight.block_size,
            history_bits=weight.history_bits,
            signs=weight.signs is not None,
            use_bias=bias is not None,
            form=form,
            shared_outputs=shared_outputs,
        )
        return layer._fill({name: jnp.asarray(part) for name, part in parts.items() if part is not None})

    @classmethod
    def from_linear(
        cls,
        linear: nnx.Linear,
        *,
        recipe: Recipe = PUBLISHED_RECIPE,
        form: Form | Literal["auto"] = "auto",
        shared_outputs: int | None = None,
    ) -> "QuantizedLinear":
        """Quantizes a layer's kernel (or the kernels of stacked layers, one by one) and takes over its bias."""
        kernel = np.asarray(linear.kernel[...], np.float32)
        layers, (in_features, out_features) = kernel.shape[:-2], kernel.shape[-2:]
        weights = [recipe.quantize(np.ascontiguousarray(k.T)) for k in kernel.reshape(-1, in_features, out_features)]
        planes = [pack_planes(weight.codes, recipe.bits) for weight in weights]
        parts = {
            "lo": [lo for lo, _ in planes],
            "hi": [hi for _, hi in planes],
            "norms": [weight.norms for weight in weights],
            "scaled_centroids": [weight.scaled_centroids for weight in weights],
            "signs": [weight.signs for weight in weights],
        }
        stacked = {n: np.stack(p).reshape(*layers, *p[0].shape) for n, p in parts.items() if p[0] is not None}
        bias = None if linear.bias is None else linear.bias[...]
        layer = cls.abstract(
            in_features,
            out_features,
            bits=recipe.bits,
            block_size=recipe.block_size,
            history_bits=recipe.history_bits,
            signs=recipe.sign_seed is not None,
            use_bias=bias is not None,
            form=form,
            shared_outputs=shared_outputs,
            num_layers=layers,
        )
        filled = {name: jnp.asarray(part) for name, part in stacked.items()}
        return layer._fill(filled if bias is None else filled | {"bias": bias})

    def _fill(self, parts: dict[str, jax.Array]) -> "QuantizedLinear":
        for name, array in parts.items():
            expected = getattr(self, name).get_value()
            if array.shape != expected.shape:
                raise ValueError(f"{name} must have shape {expected.shape}, got {array.shape}")
            getattr(self, name).set_value(array)
        return self

    def __call__(self, x: jax.Array) -> jax.Array:
        if x.shape[-1] != self.in_features:
            raise ValueError(f"x must have {self.in_features} features, got shape {x.shape}")
        y = quantized_matmul(
            x,
            self.lo[...],
            None if self.hi is None else self.hi[...],
            self.norms[...],
            self.scaled_centroids[...],
            bits=self.bits,
            block_size=self.block_size,
            history_bits=self.history_bits,
            signs=None if self.signs is None else self.signs[...],
            form=self.form,
            shared_outputs=self.shared_outputs,
        )
        return y if self.bias is None else y + self.bias[...].astype(y.dtype)

    def dequantize(self) -> jax.Array:
        """The bfloat16 weight `[out, in]` (below the axes of stacked layers), as the original decoder computes it."""
        weight = dequantize_planes(
            self.lo[...],
            None if self.hi is None else self.hi[...],
            self.norms[...],
            self.scaled_centroids[...],
            bits=self.bits,
            block_size=self.block_size,
            history_bits=self.history_bits,
            signs=None if self.signs is None else self.signs[...],
        )
        return weight[..., : self.in_features]


def set_form(model: nnx.Module, form: Form | Literal["auto"]) -> list[Path]:
    """Switches every QuantizedLinear of a model, stacked ones too, to a form in place; returns their paths.

    What was compiled before still runs the old form. Raises ValueError for a form that does not exist.
    """
    _check_form(form)
    layers: dict[Any, QuantizedLinear] = {
        path: layer for path, layer in nnx.iter_modules(model) if isinstance(layer, QuantizedLinear)
    }
    for layer in layers.values():
        layer.form = form
    return list(layers)


def _check_form(form: str) -> None:
    if form != "auto" and form not in FORMS:
        raise ValueError(f"form must be auto or one of {', '.join(FORMS)}, got {form!r}")


def quantize_linears(
    model: nnx.Module,
    *,
    select: Callable[[Path, nnx.Linear], bool | int] = lambda path, linear: True,
    recipe: Recipe = PUBLISHED_RECIPE,
    form: Form | Literal["auto"] = "auto",
) -> list[Path]:
    """Quantizes the `nnx.Linear` layers of a model in place and returns the paths of those it quantized.

    `select(path, linear)` says whether, or at how many bits if not at the recipe's. Keep small or sensitive layers
    (embeddings, modulation, gates) out: without signs, a block with a large mean decodes badly.
    """

    def make(path: Path, linear: nnx.Linear) -> nnx.Module | None:
        chosen = select(path, linear)
        if chosen is False:
            return None
        chosen_recipe = recipe if chosen is True else replace(recipe, bits=int(chosen))
        return QuantizedLinear.from_linear(linear, recipe=chosen_recipe, form=form)

    return replace_linears(model, make)


def replace_linears(model: nnx.Module, make: Callable[[Path, nnx.Linear], nnx.Module | None]) -> list[Path]:
    """Replaces `nnx.Linear` layers of a model (or of its `nnx.eval_shape`) in place; returns the replaced paths.

    `make(path, linear)` returns the new layer, or None to leave the old one. A layer reachable by several paths is
    made once, under the first, and stays shared. Subclasses of `nnx.Linear` are left alone.
    """
    made: dict[int, nnx.Module | None] = {}
    replaced: list[Path] = []
    for path, container, key, linear in list(_linears(model, (), set())):
        if id(linear) not in made:
            made[id(linear)] = make(path, linear)
        layer = made[id(linear)]
        if layer is None:
            continue
        if isinstance(container, tuple):
            raise TypeError(f"{'.'.join(map(str, path))} lies in a tuple, which cannot be changed: use nnx.List")
        if isinstance(container, list | dict | nnx.List):
            container[key] = layer
        else:
            setattr(container, str(key), layer)
        replaced.append(path)
    return replaced


def _linears(node: Any, path: Path, seen: set[int]) -> Iterator[tuple[Path, Any, Any, nnx.Linear]]:
    """Every place that holds a Linear: its path, the container, the key there, the layer."""
    if id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, list | tuple | nnx.List):
        children = list(enumerate(node))
    elif isinstance(node, dict):
        children = list(node.items())
    elif isinstance(node, nnx.Module):
        children = [(name, child) for name, child in vars(node).items() if not name.startswith("_pytree__")]
    else:
        return
    for key, child in children:
        if type(child) is nnx.Linear:
            yield (*path, key), node, key, child
        else:
            yield from _linears(child, (*path, key), seen)
