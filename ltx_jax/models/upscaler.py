"""Latent upscalers: twice or one and a half times the height and width, or twice the frames, of video latents.

Source: `LatentUpsampler`, `SpatialRationalResampler`, `BlurDownsample` and `PixelShuffleND` in Lightricks/LTX-2,
ltx_core/model/upsampler; pixel shuffle from Shi et al., https://arxiv.org/abs/1609.05158.
"""

from math import comb

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from ltx_jax.config import UpscalerConfig
from ltx_jax.models.conv import Conv3d, Video
from ltx_jax.models.video_vae import Statistics, VideoLatents

NUM_GROUPS = 32
NORM_EPS = 1e-5

Upscaled = Float[Array, "batch frames_out height_out width_out channels"]


class GroupNorm(nnx.GroupNorm):
    """Mean and variance of each group of channels over a whole clip, in float32; the result in x's dtype."""

    def __init__(self, channels: int, *, rngs: nnx.Rngs):
        super().__init__(channels, NUM_GROUPS, epsilon=NORM_EPS, use_fast_variance=False, rngs=rngs)

    def __call__(self, x: Video) -> Video:
        return super().__call__(x.astype(jnp.float32)).astype(x.dtype)


class ResBlock(nnx.Module):
    """Two convolutions beside the input; each is normalised after it."""

    def __init__(self, channels: int, *, rngs: nnx.Rngs):
        self.conv1 = Conv3d(channels, channels, padding="zeros", rngs=rngs)
        self.norm1 = GroupNorm(channels, rngs=rngs)
        self.conv2 = Conv3d(channels, channels, padding="zeros", rngs=rngs)
        self.norm2 = GroupNorm(channels, rngs=rngs)

    def __call__(self, x: Video) -> Video:
        y = jax.nn.silu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        return jax.nn.silu(x + y)


class SpatialUpsample(nnx.Module):
    """Up by a whole number in height and width: a 2-D convolution of every frame and a pixel shuffle.

    The rational resampler then blurs with a fixed filter and keeps one in `down` rows and columns.
    """

    def __init__(self, channels: int, ratio: tuple[int, int], *, rational: bool, rngs: nnx.Rngs):
        self.up, self.down = ratio
        self.conv = nnx.Conv(channels, channels * self.up**2, (3, 3), padding=1, rngs=rngs)
        self.blur = nnx.Param(jnp.asarray(binomial_filter())) if rational else None

    def __call__(self, x: Video) -> Upscaled:
        y = self.conv(x).astype(x.dtype)
        y = rearrange(y, "b f h w (c row column) -> b f (h row) (w column) c", row=self.up, column=self.up)
        # Nothing is left out where `down` is 1, and the reference does not blur then either.
        return y if self.blur is None or self.down == 1 else blur_down(y, self.blur[...], self.down)


def binomial_filter() -> Float[np.ndarray, "5 5 1 1"]:
    """The filter that checkpoints hold: binomial coefficients (1, 4, 6, 4, 1) in both directions, with sum 1."""
    row = np.array([comb(4, k) for k in range(5)], np.float32) / 16
    return np.outer(row, row)[:, :, None, None]


def blur_down(x: Video, kernel: Float[Array, "size size 1 1"], stride: int) -> Upscaled:
    """Every channel filtered with `kernel`, zeros around it, at every `stride`-th row and column; summed in float32."""
    batch, channels, size = len(x), x.shape[-1], len(kernel)
    y = jax.lax.conv_general_dilated(
        rearrange(x, "b f h w c -> (b f) h w c").astype(jnp.float32),
        jnp.broadcast_to(kernel.astype(jnp.float32), (size, size, 1, channels)),
        (stride, stride),
        [(size // 2, size // 2)] * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=channels,
    )
    return rearrange(y, "(b f) h w c -> b f h w c", b=batch).astype(x.dtype)


class TemporalUpsample(nnx.Module):
    """Twice the frames, less the first: like the first pixel frame of a clip, the first latent stands alone."""

    def __init__(self, channels: int, *, rngs: nnx.Rngs):
        self.conv = Conv3d(channels, 2 * channels, padding="zeros", rngs=rngs)

    def __call__(self, x: Video) -> Upscaled:
        return rearrange(self.conv(x), "b f h w (c t) -> b (f t) h w c", t=2)[:, 1:]


class LatentUpscaler(nnx.Module):
    """Works on latents as the VAE's encoder makes them; `upscale` takes and gives normalised ones."""

    def __init__(self, config: UpscalerConfig, *, rngs: nnx.Rngs):
        channels = config.mid_channels
        self.config = config
        self.conv_in = Conv3d(config.in_channels, channels, padding="zeros", rngs=rngs)
        self.norm_in = GroupNorm(channels, rngs=rngs)
        self.blocks = nnx.List([ResBlock(channels, rngs=rngs) for _ in range(config.num_blocks_per_stage)])
        if config.temporal_scale == 1:
            self.upsample = SpatialUpsample(channels, config.ratio, rational=config.rational, rngs=rngs)
        else:
            self.upsample = TemporalUpsample(channels, rngs=rngs)
        self.blocks_out = nnx.List([ResBlock(channels, rngs=rngs) for _ in range(config.num_blocks_per_stage)])
        self.conv_out = Conv3d(channels, config.in_channels, padding="zeros", rngs=rngs)

    def __call__(self, latents: VideoLatents) -> Upscaled:
        x = jax.nn.silu(self.norm_in(self.conv_in(latents)))
        for block in self.blocks:
            x = block(x)
        x = self.upsample(x)
        for block in self.blocks_out:
            x = block(x)
        return self.conv_out(x)


def upscale(upscaler: LatentUpscaler, statistics: Statistics, latents: VideoLatents) -> Upscaled:
    """Normalised latents to larger or longer normalised latents. `statistics` are those of the video VAE."""
    return statistics.normalise(upscaler(statistics.unnormalise(latents)))
