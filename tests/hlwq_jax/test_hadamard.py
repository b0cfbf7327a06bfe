import jax.numpy as jnp
import numpy as np
import pytest

from hlwq_jax import hadamard_matrix, hadamard_transform
from hlwq_jax.hadamard import rotate, signs


def test_matrix_is_sylvester_and_its_own_inverse():
    matrix = hadamard_matrix(128)
    i, j = np.indices((128, 128))
    np.testing.assert_array_equal(matrix > 0, np.bitwise_count(i & j) % 2 == 0)
    assert matrix[0, 0] == np.float32(0.0883883461356163)
    np.testing.assert_allclose(matrix @ matrix, np.eye(128), atol=1e-6)  # float32 sums of 128 terms


@pytest.mark.parametrize("block_size", [1, 2, 8, 256])
def test_fast_transform_equals_the_matrix(block_size):
    x = np.random.default_rng(0).standard_normal((3, block_size), dtype=np.float32)
    # float32 sums in another order
    np.testing.assert_allclose(hadamard_transform(jnp.asarray(x)), x @ hadamard_matrix(block_size), atol=1e-5)


def test_rotation_scales_by_a_power_of_two():
    x = np.eye(8, dtype=np.float32)
    np.testing.assert_array_equal(rotate(jnp.asarray(x), exponent=2), signs(8) / 4)


def test_block_sizes_are_powers_of_two():
    with pytest.raises(ValueError, match="power of two, got 96"):
        hadamard_matrix(96)
