import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hlwq_jax import BEST_RECIPE, FORMS, Packed, Quantized, QuantizedLinear, Recipe, quantize_linears, replace_linears

from .conftest import assert_decodes, gaussian, random_quantized


def random_input(*shape: int, dtype="float32") -> jax.Array:
    return jnp.asarray(np.random.default_rng(5).standard_normal(shape), dtype)


@pytest.mark.parametrize("bits", [4, 5, 6, 8])
def test_a_quantized_layer_is_a_linear_layer_of_the_decoded_weight(bits):
    weight = random_quantized(24, 300, bits=bits)
    layer = QuantizedLinear.from_quantized(weight, bias=np.arange(24, dtype=np.float32))
    assert_decodes(np.asarray(layer.dequantize()), weight.dequantize())
    x = random_input(2, 3, 300)
    expected = x @ weight.dequantize().astype(np.float32).T + np.arange(24)
    np.testing.assert_allclose(layer(x), expected, atol=1e-4)  # a value may round to the next bfloat16
    low = layer(x.astype(jnp.bfloat16))
    assert low.dtype == jnp.bfloat16
    np.testing.assert_allclose(low.astype(jnp.float32), expected, atol=0.02, rtol=0.01)  # bfloat16 has 8 bits


def test_weights_are_not_parameters_but_the_bias_is():
    layer = QuantizedLinear.from_quantized(random_quantized(24, 300), bias=np.zeros(24, np.float32))
    assert set(nnx.state(layer, nnx.Param)) == {"bias"}
    assert set(nnx.state(layer, Packed)) == {"lo", "hi", "norms", "scaled_centroids"}
    grads = nnx.grad(lambda layer, x: jnp.sum(layer(x)))(layer, random_input(3, 300))
    assert set(grads) == {"bias"}
    np.testing.assert_array_equal(grads["bias"].get_value(), np.full(24, 3))


def test_a_lora_beside_it_trains():
    class WithLora(nnx.Module):
        def __init__(self, base: nnx.Module):
            self.base = base
            self.lora = nnx.LoRA(300, 4, 24, rngs=nnx.Rngs(0))

        def __call__(self, x):
            return self.base(x) + self.lora(x)

    model = WithLora(QuantizedLinear.from_quantized(random_quantized(24, 300)))
    grads = nnx.grad(lambda m, x: jnp.sum(m(x) ** 2), argnums=nnx.DiffState(0, nnx.LoRAParam))(
        model, random_input(3, 300)
    )
    assert float(jnp.abs(grads["lora"]["lora_b"].get_value()).max()) > 0


def test_split_merge_jit_and_eval_shape():
    layer = QuantizedLinear.from_quantized(random_quantized(24, 300))
    graphdef, state = nnx.split(layer)
    x = random_input(3, 300)
    run = jax.jit(lambda state, x: nnx.merge(graphdef, state)(x))
    np.testing.assert_allclose(run(state, x), layer(x), atol=1e-6)  # the same sums, compiled together
    abstract = QuantizedLinear.abstract(300, 24, use_bias=False)
    graphdef2, state2 = nnx.split(abstract)
    assert graphdef2 == graphdef
    assert jax.tree.map(lambda a: (a.shape, a.dtype), state2) == jax.tree.map(lambda a: (a.shape, a.dtype), state)
    assert jax.eval_shape(run, state2, x).shape == (3, 24)


def test_stacked_layers_scan():
    weights = [random_quantized(256, 256, seed=i) for i in range(3)]
    layers = [QuantizedLinear.from_quantized(weight, bias=np.ones(256, np.float32)) for weight in weights]
    graphdef, _ = nnx.split(layers[0])
    state = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(nnx.split(layer)[1] for layer in layers))
    x = random_input(4, 256)

    def run(state, x):
        return jax.lax.scan(lambda x, layer: (nnx.merge(graphdef, layer)(x), None), x, state)[0]

    expected = x
    for layer in layers:
        expected = layer(expected)
    np.testing.assert_allclose(jax.jit(run)(state, x), expected, rtol=1e-5, atol=1e-5)  # three layers of float32 sums
    gradient = jax.grad(lambda x: jnp.sum(run(state, x)))(x)
    product = np.linalg.multi_dot([w.dequantize().astype(np.float32).T for w in weights]).sum(axis=1)
    # As above, a value may round to the next bfloat16.
    np.testing.assert_allclose(gradient, np.broadcast_to(product, (4, 256)), atol=1e-3)
    stacked = nnx.merge(graphdef, state)
    assert stacked.dequantize().shape == (3, 256, 256)
    np.testing.assert_array_equal(stacked.dequantize()[1], layers[1].dequantize())


class Model(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.first = nnx.Linear(64, 32, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(32, 32, rngs=rngs) for _ in range(2)])
        self.heads = nnx.Dict({"a": nnx.Linear(32, 8, use_bias=False, rngs=rngs)})
        self.mlp = nnx.Sequential(nnx.Linear(8, 8, rngs=rngs), jax.nn.gelu)
        self.tied = self.first

    def __call__(self, x):
        x = self.first(x)
        for layer in self.layers:
            x = layer(x)
        return self.mlp(self.heads["a"](x))


def test_linear_layers_of_any_model_are_swapped():
    model = Model(nnx.Rngs(0))
    x = random_input(4, 64)
    before = model(x)
    paths = quantize_linears(model, recipe=Recipe(bits=8), select=lambda path, linear: path != ("layers", 1) or 6)
    assert set(paths) == {
        ("first",), ("tied",), ("layers", 0), ("layers", 1), ("heads", "a"), ("mlp", "layers", 0),
    }  # fmt: skip
    assert model.tied is model.first
    assert [layer.bits for layer in model.layers if isinstance(layer, QuantizedLinear)] == [8, 6]
    after = model(x)
    assert np.linalg.norm(after - before) / np.linalg.norm(before) < 0.06  # five layers, one at 6 bits (0.03)


def test_layers_not_selected_stay():
    model = Model(nnx.Rngs(0))
    assert quantize_linears(model, select=lambda path, linear: linear.in_features == 64) == [("first",), ("tied",)]
    assert type(model.layers[0]) is nnx.Linear


def test_an_abstract_model_takes_abstract_layers():
    model = nnx.eval_shape(lambda: Model(nnx.Rngs(0)))

    def make(path, linear):
        use_bias = linear.bias is not None
        return QuantizedLinear.abstract(linear.in_features, linear.out_features, use_bias=use_bias)

    assert len(replace_linears(model, make)) == 6
    graphdef, state = nnx.split(model)
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(state))
    assert jax.eval_shape(lambda s, x: nnx.merge(graphdef, s)(x), state, random_input(4, 64)).shape == (4, 8)


def test_stacked_kernels_are_quantized_layer_by_layer():
    linear = nnx.Linear(40, 24, rngs=nnx.Rngs(0))
    kernels = np.stack([gaussian(40, 24, seed) for seed in range(2)])
    linear.kernel.set_value(jnp.asarray(kernels))
    linear.bias = nnx.Param(jnp.zeros((2, 24)))
    layer = QuantizedLinear.from_linear(linear, recipe=Recipe(bits=8, block_size=32))
    assert layer.lo.shape == (2, 24, 16)
    decoded = np.asarray(layer.dequantize(), np.float32)
    np.testing.assert_allclose(decoded, kernels.transpose(0, 2, 1), atol=0.03 * np.abs(kernels).max())  # 8 bits


def test_unfit_inputs_are_refused():
    layer = QuantizedLinear.from_quantized(random_quantized(24, 300))
    with pytest.raises(ValueError, match="x must have 300 features"):
        layer(jnp.zeros((2, 384)))
    weight = random_quantized(24, 300)
    short = Quantized(**{**vars(weight), "norms": weight.norms[:, :2]})
    with pytest.raises(ValueError, match="norms must have shape"):
        QuantizedLinear.from_quantized(short)


@pytest.mark.parametrize("num_layers", [(), (3,)])
@pytest.mark.parametrize("form", ["auto", *FORMS])
def test_layers_of_a_trellis_with_signs_scan_as_others_do(num_layers, form):
    linear: Any = nnx.Linear(300, 300, rngs=nnx.Rngs(0))
    kernels = np.stack([gaussian(300, 300, seed) for seed in range(math.prod(num_layers))])
    linear.kernel.set_value(jnp.asarray(kernels.reshape(*num_layers, 300, 300)))
    linear.bias.set_value(jnp.zeros((*num_layers, 300)))
    layer: Any = QuantizedLinear.from_linear(linear, recipe=BEST_RECIPE, form=form)
    assert layer.scaled_centroids.shape == (*num_layers, 4096)
    assert (layer.signs.shape, layer.signs.dtype, type(layer.signs)) == ((*num_layers, 300), jnp.int8, Packed)
    abstract = QuantizedLinear.abstract(300, 300, bits=5, history_bits=7, signs=True, num_layers=num_layers)
    assert jax.tree.map(jnp.shape, nnx.state(abstract)) == jax.tree.map(jnp.shape, nnx.state(layer))

    expected = x = random_input(4, 300)
    for weight in (BEST_RECIPE.quantize(kernel.T.copy()) for kernel in kernels):
        expected = expected @ weight.dequantize().astype(np.float32).T
    graphdef, state = nnx.split(layer)
    scanned = jax.lax.scan(lambda x, state: (nnx.merge(graphdef, state)(x), None), x, state)[0] if num_layers else None
    y = layer(x) if scanned is None else scanned
    # Three products by weights of which some forms skip a rounding to bfloat16 (0.0016 each).
    assert np.linalg.norm(y - expected) / np.linalg.norm(expected) < 0.006
    decoded = np.asarray(layer.dequantize(), np.float32).reshape(-1, 300, 300)
    assert np.sum((decoded - kernels.transpose(0, 2, 1)) ** 2) / np.sum(kernels**2) < 0.00125


def test_layers_with_signs_share_no_rotation():
    assert QuantizedLinear.abstract(128, 64, shared_outputs=192).shared_outputs == 192
    assert QuantizedLinear.abstract(128, 64, shared_outputs=192, signs=True).shared_outputs == 64


def test_a_trellis_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="got bits 5, history_bits 4"):
        QuantizedLinear(128, 64, history_bits=4)
