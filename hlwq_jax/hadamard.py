"""The Walsh-Hadamard rotation of a block: Sylvester (natural) order, no sign flips, no permutation, no seed."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32


def check_block_size(block_size: int) -> None:
    if block_size < 1 or block_size & (block_size - 1):
        raise ValueError(f"block_size must be a power of two, got {block_size}")


def signs(block_size: int) -> Float32[np.ndarray, "block block"]:
    """The matrix of ±1, `(-1)**popcount(i & j)`, symmetric; its square is `block_size` times the identity."""
    check_block_size(block_size)
    return _signs(block_size)


@cache
def _signs(block_size: int) -> np.ndarray:
    matrix = np.ones((1, 1), np.float32)
    while len(matrix) < block_size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    matrix.flags.writeable = False
    return matrix


def hadamard_matrix(block_size: int) -> Float32[np.ndarray, "block block"]:
    """The normalised matrix `signs / sqrt(block_size)`: symmetric, orthonormal and its own inverse."""
    return signs(block_size) * np.float32(block_size**-0.5)


def hadamard_transform(x: Float[Array, "*batch block"]) -> Float[Array, "*batch block"]:
    """`x @ hadamard_matrix(block)` by butterflies: `log2(block)` rounds of sums and differences.

    For comparison and for blocks too large for a matrix. On matrix hardware, and for 128, the product is faster.
    """
    block_size = x.shape[-1]
    check_block_size(block_size)
    y = x
    half = 1
    while half < block_size:
        pairs = y.reshape(*x.shape[:-1], block_size // (2 * half), 2, half)
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        y = jnp.stack([a + b, a - b], axis=-2).reshape(x.shape)
        half *= 2
    return y * jnp.asarray(block_size**-0.5, x.dtype)


def rotate(x: Float[Array, "*batch block"], *, exponent: int) -> Float[Array, "*batch block"]:
    """`x @ signs * 2**-exponent`, by one matrix product in x's dtype: the power of two costs no rounding."""
    matrix = jnp.asarray(signs(x.shape[-1]) * np.float32(2.0**-exponent), x.dtype)
    return jax.lax.dot_general(
        x, matrix, (((x.ndim - 1,), (0,)), ((), ())), precision=precision_for(x.dtype), preferred_element_type=x.dtype
    )


def precision_for(dtype: jax.typing.DTypeLike) -> jax.lax.Precision | None:
    """float32 products are never done in TF32 here: they are the ones that are compared with a reference."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
