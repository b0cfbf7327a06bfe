"""The audio autoencoder: log-mel spectrograms to latents and back, with 2-D convolutions that are causal in time.

Source: `audio_vae.py` and its blocks in Lightricks/LTX-2, ltx_core/model/audio_vae; the residual network is that of
latent diffusion (https://arxiv.org/abs/2112.10752) with PixelNorm and without attention.
"""

from itertools import pairwise

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from ltx_jax.config import AudioVAEConfig

Features = Float[Array, "batch frames bins channels"]

NORM_EPS = 1e-6

# Zeros for (time, bins): all in front in time, so that no frame sees a later one.
_CAUSAL = ((2, 0), (1, 1))
_CAUSAL_STRIDED = ((2, 0), (0, 1))


def pixel_norm(x: Features) -> Features:
    """Each position divided by the root mean square of its channels; statistics in float32, no weight."""
    wide = x.astype(jnp.float32)
    return (wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + NORM_EPS)).astype(x.dtype)


def causal_conv(in_channels: int, out_channels: int, *, rngs: nnx.Rngs) -> nnx.Conv:
    return nnx.Conv(in_channels, out_channels, (3, 3), padding=_CAUSAL, rngs=rngs)


class ResBlock(nnx.Module):
    """Two causal convolutions beside the input, which passes a 1x1 convolution where the channels change."""

    def __init__(self, in_channels: int, out_channels: int, *, rngs: nnx.Rngs):
        self.conv1 = causal_conv(in_channels, out_channels, rngs=rngs)
        self.conv2 = causal_conv(out_channels, out_channels, rngs=rngs)
        self.shortcut = nnx.Conv(in_channels, out_channels, (1, 1), rngs=rngs) if in_channels != out_channels else None

    def __call__(self, x: Float[Array, "batch frames bins in"]) -> Float[Array, "batch frames bins out"]:
        y = self.conv1(jax.nn.silu(pixel_norm(x)))
        y = self.conv2(jax.nn.silu(pixel_norm(y)))
        return y + (x if self.shortcut is None else self.shortcut(x))


class Level(nnx.Module):
    """Residual blocks at one resolution, and the convolution that changes it on the way to the next level, if any."""

    def __init__(
        self, in_channels: int, out_channels: int, num_blocks: int, resample: nnx.Conv | None = None, *, rngs: nnx.Rngs
    ):
        widths = [in_channels] + [out_channels] * num_blocks
        self.blocks = nnx.List([ResBlock(*pair, rngs=rngs) for pair in pairwise(widths)])
        self.resample = resample

    def __call__(self, x: Float[Array, "batch frames bins in"]) -> Float[Array, "batch frames bins out"]:
        for block in self.blocks:
            x = block(x)
        return x


class Encoder(nnx.Module):
    """Mel to the means of the latents, before normalisation: half the frames (rounded up) and bins at each level."""

    def __init__(self, config: AudioVAEConfig, *, rngs: nnx.Rngs):
        self.latent_channels = config.latent_channels
        widths = [config.base_channels * multiplier for multiplier in config.channel_multipliers]
        self.conv_in = causal_conv(config.audio_channels, config.base_channels, rngs=rngs)
        self.levels = nnx.List([])
        for i, width in enumerate(widths):
            before = widths[i - 1] if i > 0 else config.base_channels
            halve = None
            if i < len(widths) - 1:
                halve = nnx.Conv(width, width, (3, 3), strides=2, padding=_CAUSAL_STRIDED, rngs=rngs)
            self.levels.append(Level(before, width, config.num_res_blocks, halve, rngs=rngs))
        self.mid = Level(widths[-1], widths[-1], 2, rngs=rngs)
        self.conv_out = causal_conv(widths[-1], 2 * config.latent_channels, rngs=rngs)

    def __call__(self, mel: Features) -> Float[Array, "batch time latent_bins latent_channels"]:
        return self.moments(mel)[..., : self.latent_channels]

    def moments(self, mel: Features) -> Float[Array, "batch time latent_bins moments"]:
        """The means of the latents, and behind them the logarithms of their variances, which only training reads."""
        x = self.conv_in(mel)
        for level in self.levels:
            x = level(x)
            if level.resample is not None:
                x = level.resample(x)
        return self.conv_out(jax.nn.silu(pixel_norm(self.mid(x))))


class Decoder(nnx.Module):
    """Latents, no longer normalised, to mel: `scale * time - (scale - 1)` frames."""

    def __init__(self, config: AudioVAEConfig, *, rngs: nnx.Rngs):
        widths = [config.base_channels * multiplier for multiplier in config.channel_multipliers]
        self.conv_in = causal_conv(config.latent_channels, widths[-1], rngs=rngs)
        self.mid = Level(widths[-1], widths[-1], 2, rngs=rngs)
        # Numbered as in the encoder, from the mel up, and run from the last to the first.
        self.levels = nnx.List([])
        for i, width in enumerate(widths):
            before = widths[min(i + 1, len(widths) - 1)]
            after_doubling = causal_conv(width, width, rngs=rngs) if i > 0 else None
            self.levels.append(Level(before, width, config.num_res_blocks + 1, after_doubling, rngs=rngs))
        self.conv_out = causal_conv(widths[0], config.audio_channels, rngs=rngs)

    def __call__(self, latents: Float[Array, "batch time latent_bins latent_channels"]) -> Features:
        x = self.mid(self.conv_in(latents))
        for level in reversed(self.levels):
            x = level(x)
            if level.resample is not None:
                x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
                x = level.resample(x)[:, 1:]  # the first latent frame stands for one mel frame
        return self.conv_out(jax.nn.silu(pixel_norm(x)))


class Statistics(nnx.Module):
    """Mean and standard deviation of every channel of an audio token: index `channel * bins + bin`."""

    def __init__(self, config: AudioVAEConfig):
        self.bins = config.latent_bins
        self.mean = nnx.Param(jnp.zeros(config.token_dim))
        self.std = nnx.Param(jnp.ones(config.token_dim))

    def normalise(self, latents: Features) -> Features:
        mean, std = self._per_bin()
        return ((latents.astype(jnp.float32) - mean) / std).astype(latents.dtype)

    def unnormalise(self, latents: Features) -> Features:
        mean, std = self._per_bin()
        return (latents.astype(jnp.float32) * std + mean).astype(latents.dtype)

    def _per_bin(self) -> tuple[Float[Array, "bins channels"], Float[Array, "bins channels"]]:
        mean, std = (
            rearrange(x[...].astype(jnp.float32), "(c bins) -> bins c", bins=self.bins) for x in (self.mean, self.std)
        )
        return mean, std


class AudioVAE(nnx.Module):
    """Encoder, decoder, and the statistics that normalise the latents between them.

    `encode` takes log-mel spectrograms as `ltx_jax.mel.mel_spectrogram` makes them; `decode` returns such, for the
    vocoder. A clip of T latent frames decodes to `scale * T - (scale - 1)` mel frames.
    """

    def __init__(self, config: AudioVAEConfig, *, rngs: nnx.Rngs):
        self.encoder = Encoder(config, rngs=rngs)
        self.decoder = Decoder(config, rngs=rngs)
        self.statistics = Statistics(config)

    def encode(self, mel: Features) -> Float[Array, "batch time latent_bins latent_channels"]:
        return self.statistics.normalise(self.encoder(mel))

    def decode(self, latents: Float[Array, "batch time latent_bins latent_channels"]) -> Features:
        return self.decoder(self.statistics.unnormalise(latents))
