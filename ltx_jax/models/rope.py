"""Rotary position embedding of LTX-2.3 ("split" form): time for audio; time, height and width for video.

Source: `rope.py` in Lightricks/LTX-2 (split rotary embedding with a float64 frequency grid); Su et al., RoFormer,
https://arxiv.org/abs/2104.09864.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float


class Rotary(NamedTuple):
    """Cosine and sine of every token's angles; each head has frequencies of its own."""

    cos: Float[Array, "batch tokens heads half"]
    sin: Float[Array, "batch tokens heads half"]


def frequency_grid(dim: int, num_axes: int, theta: float) -> np.ndarray:
    """The `dim // (2 num_axes)` frequencies `theta^(j / (K - 1)) * pi / 2`, from a float64 grid, as float32.

    Float64 matters: the last frequencies differ by several radians of angle when the grid is made in float32.
    """
    num_frequencies = dim // (2 * num_axes)
    exponents = np.linspace(0.0, 1.0, num_frequencies, dtype=np.float64)
    return (np.power(np.float64(theta), exponents) * (np.pi / 2)).astype(np.float32)


def position_fractions(
    positions: Float[Array, "batch tokens axes"], max_pos: tuple[float, ...]
) -> Float[Array, "batch tokens axes"]:
    """Positions as fractions of the range of each axis, float32.

    The ranges are hidden from the compiler, which would turn the division into a product with a rounded reciprocal: one
    unit in the last place of a fraction is 1e-3 of the fastest angle from some seconds of clip on.
    """
    ranges = jax.lax.optimization_barrier(jnp.broadcast_to(jnp.asarray(max_pos, jnp.float32), positions.shape))
    return positions.astype(jnp.float32) / ranges


def rotary_tables(
    fractions: Float[Array, "batch tokens axes"], *, dim: int, num_heads: int, theta: float, dtype
) -> Rotary:
    """The rotary tables of an attention of inner width `dim` for positions given as fractions of their range.

    The angle of axis a and frequency g is `g * (2 * fraction_a - 1)`, the axis running fastest; what is missing to
    `dim / 2` angles is padded in front with angle zero; the row is then dealt to the heads in order. Angles are
    float32 whatever `dtype`, because bfloat16 positions would merge neighbouring frames.
    """
    grid = frequency_grid(dim, fractions.shape[-1], theta)
    angles = (2.0 * fractions.astype(jnp.float32) - 1.0)[:, :, None, :] * grid[:, None]
    angles = rearrange(angles, "b t frequencies axes -> b t (frequencies axes)")
    angles = jnp.pad(angles, ((0, 0), (0, 0), (dim // 2 - angles.shape[-1], 0)))
    angles = rearrange(angles, "b t (h half) -> b t h half", h=num_heads)
    return Rotary(jnp.cos(angles).astype(dtype), jnp.sin(angles).astype(dtype))


def apply_rotary(x: Float[Array, "batch tokens heads head_dim"], rotary: Rotary) -> Float[Array, "..."]:
    """Rotates the first half of each head's channels against the second half."""
    x1, x2 = jnp.split(x, 2, axis=-1)
    cos, sin = rotary
    return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1)
