"""The video autoencoder: pixels to latents with a causal encoder, and back with a decoder that sees both sides.

Clips have 8k + 1 frames: the first stands alone in time, each later latent holds eight (with LTX-2.3's block lists;
all sizes here come from the configuration). Values of pixels are in [-1, 1].
Source: LTX-Video (https://arxiv.org/abs/2501.00103), section 2; `video_vae.py`, `resnet.py` and `sampling.py` in
Lightricks/LTX-2, ltx_core/model/video_vae.
"""

from math import prod

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from ltx_jax.config import VideoVAEConfig
from ltx_jax.models.adaln import rms_norm
from ltx_jax.models.conv import Conv3d, TimePadding, Video

Pixels = Float[Array, "batch frames height width 3"]
VideoLatents = Float[Array, "batch frames height width channels"]

# What a change of resolution makes of a `Video`.
Resized = Float[Array, "batch frames_out height_out width_out channels_out"]

NORM_EPS = 1e-8


def pixel_norm(x: Video) -> Video:
    """Each position divided by the root mean square of its channels; no weight."""
    return rms_norm(x, NORM_EPS)


def patchify_pixels(x: Video, size: int) -> Resized:
    """Patches of `size` x `size` pixels as channels, in the order channel, column in the patch, row in the patch."""
    return rearrange(x, "b f (h row) (w column) c -> b f h w (c column row)", row=size, column=size)


def unpatchify_pixels(x: Video, size: int) -> Resized:
    """Inverts `patchify_pixels`."""
    return rearrange(x, "b f h w (c column row) -> b f (h row) (w column) c", row=size, column=size)


def space_to_depth(x: Video, stride: tuple[int, int, int]) -> Resized:
    """Cells of `stride` (time, height, width) as channels, in the order channel, time, row, column."""
    t, r, c = stride
    return rearrange(x, "b (f t) (h row) (w column) c -> b f h w (c t row column)", t=t, row=r, column=c)


def depth_to_space(x: Video, stride: tuple[int, int, int]) -> Resized:
    """Inverts `space_to_depth`."""
    t, r, c = stride
    return rearrange(x, "b f h w (c t row column) -> b (f t) (h row) (w column) c", t=t, row=r, column=c)


class ResBlock(nnx.Module):
    """Two convolutions, each after PixelNorm and SiLU, beside the input."""

    def __init__(self, channels: int, *, padding: TimePadding, rngs: nnx.Rngs):
        self.conv1 = Conv3d(channels, channels, padding=padding, rngs=rngs)
        self.conv2 = Conv3d(channels, channels, padding=padding, rngs=rngs)

    def __call__(self, x: Video) -> Video:
        y = self.conv1(jax.nn.silu(pixel_norm(x)))
        y = self.conv2(jax.nn.silu(pixel_norm(y)))
        return x + y


class ResBlocks(nnx.Module):
    """Residual blocks at one resolution."""

    def __init__(self, channels: int, num_layers: int, *, padding: TimePadding, rngs: nnx.Rngs):
        self.layers = nnx.List([ResBlock(channels, padding=padding, rngs=rngs) for _ in range(num_layers)])

    def __call__(self, x: Video) -> Video:
        for layer in self.layers:
            x = layer(x)
        return x


class Downsample(nnx.Module):
    """Space to depth after a causal convolution, beside the averaged space to depth of the input."""

    def __init__(self, channels: int, out_channels: int, stride: tuple[int, int, int], *, rngs: nnx.Rngs):
        cell = prod(stride)
        if out_channels % cell or channels * cell % out_channels:
            raise ValueError(
                f"a block that folds {cell} positions must make a multiple of {cell} channels that divides "
                f"{cell} times its {channels} channels; {out_channels} does not: check the widths in the configuration"
            )
        self.stride = stride
        self.group = channels * cell // out_channels
        self.conv = Conv3d(channels, out_channels // cell, padding="causal", rngs=rngs)

    def __call__(self, x: Video) -> Resized:
        if self.stride[0] == 2:
            # The first frame stands alone: doubled, it fills the first cell.
            x = jnp.concatenate([x[:, :1], x], axis=1)
        skip = rearrange(space_to_depth(x, self.stride), "b f h w (c group) -> b f h w c group", group=self.group)
        return space_to_depth(self.conv(x), self.stride) + jnp.mean(skip, axis=-1)


class Upsample(nnx.Module):
    """Depth to space after a convolution. Where time is doubled, the first frame is dropped: it stands alone."""

    def __init__(self, channels: int, out_channels: int, stride: tuple[int, int, int], *, rngs: nnx.Rngs):
        self.stride = stride
        self.conv = Conv3d(channels, out_channels * prod(stride), padding="copies", rngs=rngs)

    def __call__(self, x: Video) -> Resized:
        x = depth_to_space(self.conv(x), self.stride)
        return x[:, 1:] if self.stride[0] == 2 else x


class VideoEncoder(nnx.Module):
    """Pixels to latents as the network makes them: `Statistics.normalise` comes after."""

    def __init__(self, config: VideoVAEConfig, *, rngs: nnx.Rngs):
        self.config = config
        channels = config.encoder_base_channels
        self.conv_in = Conv3d(config.pixel_channels * config.patch_size**2, channels, padding="causal", rngs=rngs)
        blocks = []
        for block in config.encoder_blocks:
            if block.kind == "res_x":
                blocks.append(ResBlocks(channels, block.num_layers, padding="causal", rngs=rngs))
            else:
                blocks.append(Downsample(channels, channels * block.multiplier, block.stride, rngs=rngs))
                channels *= block.multiplier
        self.blocks = nnx.List(blocks)
        # The means, and one logarithm of the variance for all channels.
        self.conv_out = Conv3d(channels, config.latent_channels + 1, padding="causal", rngs=rngs)

    def __call__(
        self, pixels: Pixels
    ) -> Float[Array, "batch latent_frames latent_height latent_width latent_channels"]:
        """Encodes clips. Frames behind the last whole latent are dropped.

        Raises ValueError where height or width does not hold whole latents.
        """
        return self.moments(pixels)[..., : self.config.latent_channels]

    def moments(self, pixels: Pixels) -> Float[Array, "batch latent_frames latent_height latent_width moments"]:
        """The means of the latents, and behind them the logarithm of their variance, which only training reads."""
        time, row, column = self.config.scale
        _, num_frames, height, width, _ = pixels.shape
        if height % row or width % column or not (num_frames and height and width):
            raise ValueError(
                f"the encoder takes at least one frame of a multiple of {row} x {column} (height x width) pixels, got "
                f"{num_frames} of {height} x {width}; crop or resize"
            )
        x = pixels[:, : (num_frames - 1) // time * time + 1]
        x = self.conv_in(patchify_pixels(x, self.config.patch_size))
        for block in self.blocks:
            x = block(x)
        return self.conv_out(jax.nn.silu(pixel_norm(x)))


class VideoDecoder(nnx.Module):
    """Latents to pixels; takes what `Statistics.unnormalise` gives. The result may go a little beyond [-1, 1]."""

    def __init__(self, config: VideoVAEConfig, *, rngs: nnx.Rngs):
        self.config = config
        channels = config.decoder_channels
        self.conv_in = Conv3d(config.latent_channels, channels, padding="copies", rngs=rngs)
        blocks = []
        for block in reversed(config.decoder_blocks):
            if block.kind == "res_x":
                blocks.append(ResBlocks(channels, block.num_layers, padding="copies", rngs=rngs))
            else:
                blocks.append(Upsample(channels, channels // block.multiplier, block.stride, rngs=rngs))
                channels //= block.multiplier
        self.blocks = nnx.List(blocks)
        self.conv_out = Conv3d(channels, config.pixel_channels * config.patch_size**2, padding="copies", rngs=rngs)

    def __call__(self, latents: VideoLatents) -> Float[Array, "batch pixel_frames pixel_height pixel_width 3"]:
        x = self.conv_in(latents)
        for block in self.blocks:
            x = block(x)
        return unpatchify_pixels(self.conv_out(jax.nn.silu(pixel_norm(x))), self.config.patch_size)


class Statistics(nnx.Module):
    """Mean and standard deviation of every latent channel over the training data; computed in float32."""

    def __init__(self, channels: int):
        self.mean = nnx.Param(jnp.zeros(channels))
        self.std = nnx.Param(jnp.ones(channels))

    def normalise(self, latents: VideoLatents) -> VideoLatents:
        """What the encoder makes to what the diffusion model sees."""
        wide = latents.astype(jnp.float32)
        return ((wide - self.mean[...]) / self.std[...]).astype(latents.dtype)

    def unnormalise(self, latents: VideoLatents) -> VideoLatents:
        """What the diffusion model makes to what the decoder and the upscalers take."""
        wide = latents.astype(jnp.float32)
        return (wide * self.std[...] + self.mean[...]).astype(latents.dtype)


class VideoVAE(nnx.Module):
    """Encoder, decoder and the statistics of the latents between them."""

    def __init__(self, config: VideoVAEConfig, *, rngs: nnx.Rngs):
        self.encoder = VideoEncoder(config, rngs=rngs)
        self.decoder = VideoDecoder(config, rngs=rngs)
        self.statistics = Statistics(config.latent_channels)

    def encode(self, pixels: Pixels) -> Float[Array, "batch latent_frames latent_height latent_width latent_channels"]:
        """Pixels in [-1, 1] to normalised latents. Raises ValueError where a size does not hold whole latents."""
        return self.normalise(self.encoder(pixels))

    def decode(self, latents: VideoLatents) -> Float[Array, "batch pixel_frames pixel_height pixel_width 3"]:
        """Normalised latents to pixels in about [-1, 1], not clamped."""
        return self.decoder(self.unnormalise(latents))

    def normalise(self, latents: VideoLatents) -> VideoLatents:
        return self.statistics.normalise(latents)

    def unnormalise(self, latents: VideoLatents) -> VideoLatents:
        return self.statistics.unnormalise(latents)
