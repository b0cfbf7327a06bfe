import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hlwq_jax import Recipe, dequantize_in_slices, dequantize_planes, pack_planes

from .conftest import gaussian


@pytest.mark.parametrize("recipe", [Recipe(), Recipe(bits=4), Recipe(history_bits=3, sign_seed=1)])
@pytest.mark.parametrize(("out", "values"), [(70, 16 * 384), (5, 1)])
def test_slices_have_the_bits_of_the_whole_eager_or_compiled(recipe, out, values, monkeypatch):
    monkeypatch.setattr("hlwq_jax.slices._VALUES", values)
    weight = recipe.quantize(gaussian(out, 300))
    arrays = (*pack_planes(weight.codes, weight.bits), weight.norms, weight.scaled_centroids)
    layout = {"bits": recipe.bits, "block_size": 128, "history_bits": recipe.history_bits}
    decoded = dequantize_in_slices(*arrays, **layout, in_features=300, signs=weight.signs)
    operands = [None if array is None else jnp.asarray(array) for array in arrays]
    signs = None if weight.signs is None else jnp.asarray(weight.signs)
    for decode in (dequantize_planes, jax.jit(dequantize_planes, static_argnames=tuple(layout))):
        np.testing.assert_array_equal(decode(*operands, **layout, signs=signs)[:, :300], decoded)
    # Sums in another order than the original decoder's: equal, or the next bfloat16. atol is a rounding of the sums.
    exact = weight.dequantize().astype(np.float32)
    np.testing.assert_allclose(decoded.astype(np.float32), exact, rtol=2**-7, atol=1e-8)


def test_a_weight_without_rows_decodes_to_none():
    weight = Recipe().quantize(np.zeros((0, 300), np.float32))
    lo, hi = pack_planes(weight.codes, 5)
    decoded = dequantize_in_slices(
        lo, hi, weight.norms, weight.scaled_centroids, bits=5, block_size=128, in_features=300
    )
    assert decoded.shape == (0, 300)
