import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from hlwq_jax import FORMS, Quantized, Recipe, choose_form, pack_planes, quantized_matmul

from .conftest import gaussian, random_quantized

# Relative error of the product. float32: "exact" multiplies the decoder's own weight, but for a value in ten thousand
# that float32 sums in another order round to the next bfloat16; the other forms skip that rounding (2^-9 at most,
# 0.0016 root mean square). bfloat16: rounding the output alone gives 0.0016, and weight and rotated input are rounded
# once each. "fused" has the bits of "rotate_weight".
TOLERANCE = {
    ("float32", "exact"): 5e-5,
    ("float32", "rotate_input"): 0.003,
    ("float32", "rotate_weight"): 0.003,
    ("bfloat16", "exact"): 0.003,
    ("bfloat16", "rotate_input"): 0.006,
    ("bfloat16", "rotate_weight"): 0.006,
}
for dtype in "float32", "bfloat16":
    TOLERANCE[dtype, "fused"] = TOLERANCE[dtype, "rotate_weight"]


def operands(weight: Quantized) -> tuple[Array, Array | None, Array, Array]:
    lo, hi = pack_planes(weight.codes, weight.bits)
    hi = None if hi is None else jnp.asarray(hi)
    return jnp.asarray(lo), hi, jnp.asarray(weight.norms), jnp.asarray(weight.scaled_centroids)


@pytest.mark.parametrize("bits", [2, 4, 5, 6, 8])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_form_multiplies_by_the_decoded_weight(bits, form, dtype):
    weight = random_quantized(24, 300, bits=bits)
    x = jnp.asarray(np.random.default_rng(1).standard_normal((2, 3, 300)), dtype)
    y = quantized_matmul(x, *operands(weight), bits=bits, block_size=128, form=form)
    assert (y.shape, y.dtype) == ((2, 3, 24), x.dtype)
    expected = np.asarray(x, np.float64) @ weight.dequantize().astype(np.float64).T
    error = np.linalg.norm(np.asarray(y, np.float64) - expected) / np.linalg.norm(expected)
    assert error < TOLERANCE[dtype, form]


@pytest.mark.parametrize(("bits", "history_bits"), [(2, 7), (4, 5), (5, 3), (5, 7), (6, 7)])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_form_multiplies_by_the_weight_of_a_trellis_with_signs(bits, history_bits, form, dtype):
    recipe = Recipe(bits=bits, history_bits=history_bits, sign_seed=1, norm="least-squares")
    weight = recipe.quantize(gaussian(24, 300))
    x = jnp.asarray(np.random.default_rng(1).standard_normal((2, 3, 300)), dtype)
    signs = jnp.asarray(weight.signs)
    layout = {"bits": bits, "block_size": 128, "history_bits": history_bits}
    y = quantized_matmul(x, *operands(weight), **layout, signs=signs, form=form)
    expected = np.asarray(x, np.float64) @ weight.dequantize().astype(np.float64).T
    error = np.linalg.norm(np.asarray(y, np.float64) - expected) / np.linalg.norm(expected)
    assert error < TOLERANCE[dtype, form]


@pytest.mark.parametrize("block_size", [8, 32, 256])
def test_other_block_sizes(block_size):
    weight = random_quantized(8, 100, block_size=block_size)
    x = jnp.asarray(np.random.default_rng(1).standard_normal((4, 100)), jnp.float32)
    expected = np.asarray(x) @ weight.dequantize().astype(np.float32).T
    for form in FORMS:
        y = quantized_matmul(x, *operands(weight), bits=5, block_size=block_size, form=form)
        assert np.linalg.norm(y - expected) / np.linalg.norm(expected) < TOLERANCE["float32", form]


def test_the_form_follows_from_shapes_and_dtype():
    assert choose_form(num_tokens=8, shared_outputs=64, dtype=jnp.bfloat16) == "rotate_input"
    assert choose_form(num_tokens=64, shared_outputs=64, dtype=jnp.bfloat16) == "rotate_weight"
    assert choose_form(num_tokens=8, shared_outputs=64, dtype=jnp.float32) == "exact"


def test_layers_that_share_x_share_one_rotation():
    weights = [random_quantized(16, 256, seed=i) for i in range(3)]
    parts = [operands(weight) for weight in weights]

    def attention_inputs(x, parts):
        return [quantized_matmul(x, *p, bits=5, block_size=128, form="rotate_input") for p in parts]

    text = jax.jit(attention_inputs).lower(jnp.zeros((4, 256), jnp.bfloat16), parts).compile().as_text()
    assert text is not None
    # Three products and one rotation.
    assert text.count(" dot(") + text.count('custom_call_target="__onednn$matmul"') == 4


@pytest.mark.parametrize(("out", "slice_outputs"), [(1024, 512), (1200, 400), (521, 521)])
def test_float32_products_unpack_slices_of_the_outputs(out, slice_outputs):
    weight = random_quantized(out, 256)
    x = jnp.asarray(np.random.default_rng(1).standard_normal((2, 3, 256)), jnp.float32)
    product = jax.jit(lambda x, *parts: quantized_matmul(x, *parts, bits=5, block_size=128))
    compiled = product.lower(x, *operands(weight)).compile()
    text = compiled.as_text()
    assert text is not None
    assert f"f32[{slice_outputs},256]" in text
    assert slice_outputs == out or f"f32[{out},256]" not in text
    expected = np.asarray(x) @ weight.dequantize().astype(np.float32).T
    y = compiled(x, *operands(weight))
    assert np.linalg.norm(y - expected) / np.linalg.norm(expected) < TOLERANCE["float32", "exact"]


@pytest.mark.parametrize("out", [24, 1024])  # whole, and in slices
def test_gradients_reach_x_and_nothing_else(out):
    weight = random_quantized(out, 300)
    lo, hi, norms, levels = operands(weight)
    x = jnp.asarray(np.random.default_rng(1).standard_normal((3, 300)), jnp.float32)

    def loss(x, norms, levels, form):
        return jnp.sum(quantized_matmul(x, lo, hi, norms, levels, bits=5, block_size=128, form=form) ** 2)

    decoded = jnp.asarray(weight.dequantize(), jnp.float32)
    expected = jax.grad(lambda x: jnp.sum((x @ decoded.T) ** 2))(x)
    for form in FORMS:
        dx, dnorms, dlevels = jax.grad(loss, argnums=(0, 1, 2))(x, norms, levels, form)
        assert not dnorms.any()
        assert not dlevels.any()
        # Output and backward product each carry the form's weight error.
        assert np.linalg.norm(dx - expected) / np.linalg.norm(expected) < 2 * TOLERANCE["float32", form]


def test_wrong_widths_are_refused():
    weight = random_quantized(8, 256)
    with pytest.raises(ValueError, match="x has 128 features, but 2 blocks of 128"):
        quantized_matmul(jnp.zeros((1, 128)), *operands(weight), bits=5, block_size=128)
