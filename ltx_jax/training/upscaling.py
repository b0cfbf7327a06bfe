"""The loss of a latent upscaler: latents of small clips to those of the same clips at their full size."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ltx_jax.models.upscaler import LatentUpscaler, upscale
from ltx_jax.models.video_vae import Statistics
from ltx_jax.training.loop import Loss, Metrics


class LatentPairs(NamedTuple):
    """Normalised latents of the same clips, at two sizes."""

    small: Float[Array, "batch frames height width channels"]
    large: Float[Array, "batch frames_out height_out width_out channels"]


def upscaler_loss(statistics: Statistics) -> Loss:
    """Mean absolute and squared error of normalised latents; `statistics` are those of the video autoencoder."""

    def loss(model: LatentUpscaler, batch: LatentPairs, key: jax.Array) -> tuple[Array, Metrics]:
        difference = upscale(model, statistics, batch.small) - batch.large
        error, squared = jnp.mean(jnp.abs(difference)), jnp.mean(jnp.square(difference))
        return error + squared, {"error": error, "squared": squared}

    return loss
