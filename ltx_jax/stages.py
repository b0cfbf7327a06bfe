"""The compiled programs of a clip beside text and denoising: one jitted function each, arrays in, arrays out.

The pipeline runs them, a plan compiles the same ones; so what a plan says is what will run.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ltx_jax.geometry import AudioLatents, VideoLatents
from ltx_jax.models.audio_vae import AudioVAE
from ltx_jax.models.upscaler import LatentUpscaler
from ltx_jax.models.upscaler import upscale as upscale_latents
from ltx_jax.models.video_vae import Statistics, VideoVAE
from ltx_jax.models.vocoder import Vocoder

Pixels = Float[Array, "batch pixel_frames pixel_height pixel_width 3"]
Mel = Float[Array, "batch mel_frames mel_bins mel_channels"]


@jax.jit
def encode_pixels(vae: VideoVAE, pixels: Pixels) -> VideoLatents:
    return vae.encode(pixels)


@jax.jit
def decode_pixels(vae: VideoVAE, latents: VideoLatents) -> Pixels:
    return vae.decode(latents)


@jax.jit
def encode_mel(vae: AudioVAE, mel: Mel) -> AudioLatents:
    return vae.encode(mel)


@jax.jit
def decode_mel(vae: AudioVAE, latents: AudioLatents) -> Mel:
    return vae.decode(latents)


@jax.jit
def vocode(vocoder: Vocoder, mel: Mel) -> Float[Array, "batch samples audio_channels"]:
    return vocoder(mel.astype(jnp.float32))


@jax.jit
def upscale(
    upscaler: LatentUpscaler, statistics: Statistics, latents: VideoLatents
) -> Float[Array, "batch new_frames new_height new_width channels"]:
    return upscale_latents(upscaler, statistics, latents)
