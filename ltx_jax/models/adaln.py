"""Adaptive layer norm: the timestep embedding and the shifts, scales and gates made from it.

Source: `adaln.py` and `timestep_embedding.py` in Lightricks/LTX-2 (AdaLN-single of PixArt-alpha,
https://arxiv.org/abs/2310.00426).
"""

import math

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

SINUSOID_DIM = 256


def sinusoid(timesteps: Float[Array, "*shape"]) -> Float[Array, "*shape 256"]:
    """Cosines, then sines, of the timestep at 128 frequencies `10000^(-j / 128)`, float32."""
    half = SINUSOID_DIM // 2
    frequencies = jnp.exp(-math.log(10000.0) / half * jnp.arange(half, dtype=jnp.float32))
    angles = timesteps.astype(jnp.float32)[..., None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class AdaLN(nnx.Module):
    """Timesteps to `num_outputs` rows of modulation, and to the embedding before the last linear."""

    def __init__(self, dim: int, num_outputs: int, *, rngs: nnx.Rngs):
        self.num_outputs = num_outputs
        self.linear_1 = nnx.Linear(SINUSOID_DIM, dim, rngs=rngs)
        self.linear_2 = nnx.Linear(dim, dim, rngs=rngs)
        self.linear = nnx.Linear(dim, num_outputs * dim, rngs=rngs)

    def __call__(
        self, timesteps: Float[Array, "batch tokens"], dtype
    ) -> tuple[Float[Array, "batch tokens rows dim"], Float[Array, "batch tokens dim"]]:
        embedding = self.linear_2(jax.nn.silu(self.linear_1(sinusoid(timesteps).astype(dtype))))
        rows = self.linear(jax.nn.silu(embedding))
        return rearrange(rows, "b t (rows d) -> b t rows d", rows=self.num_outputs), embedding


def rms_norm(x: Float[Array, "*shape dim"], eps: float) -> Float[Array, "*shape dim"]:
    """`x / sqrt(mean(x^2) + eps)` over the last axis, statistics in float32, no weight."""
    wide = x.astype(jnp.float32)
    return (wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)).astype(x.dtype)


def layer_norm(x: Float[Array, "*shape dim"], eps: float) -> Float[Array, "*shape dim"]:
    """Mean removed, variance one over the last axis, statistics in float32, no weight."""
    wide = x.astype(jnp.float32)
    wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
    return (wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)).astype(x.dtype)


def modulate(x: Float[Array, "batch tokens dim"], shift, scale) -> Float[Array, "batch tokens dim"]:
    return x * (1 + scale) + shift
