"""The vocoder: log-mel spectrograms to a waveform, then three times its sample rate by bandwidth extension.

Source: `vocoder.py` in Lightricks/LTX-2, ltx_core/model/audio_vae. Both generators are BigVGAN-v2
(https://arxiv.org/abs/2206.04658; https://github.com/NVIDIA/BigVGAN) with SnakeBeta activations.

Everything runs in float32, whatever the weights are stored in: through some two hundred layers the rounding of bfloat16
becomes audible noise.
"""

from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from ltx_jax.config import GeneratorConfig, VocoderConfig
from ltx_jax.mel import LOG_FLOOR, resample

FILTER_TAPS = 12  # of the low-pass filters around an activation
BLOCK = 16  # samples that are filtered together


def antialiased_snake(
    x: Float[Array, "batch length channels"],
    *,
    alpha: Float[Array, " channels"],
    beta: Float[Array, " channels"],
    up_filter: Float[Array, " 12"],
    down_filter: Float[Array, " 12"],
) -> Float[Array, "batch length channels"]:
    """SnakeBeta at twice the sample rate, `x + sin^2(e^alpha x) / (e^beta + 1e-9)`, between two low-pass filters.

    The signal continues with its edge values on both sides, before and after the activation. Source:
    `alias_free_activation/torch` in NVIDIA/BigVGAN.

    On a CPU each filter is a banded matrix applied to blocks of samples. That is (0.4 to 0.8 M values) 12 to 14 times
    faster than depthwise convolutions and 6 to 9 times faster than convolutions with the channels folded into the
    batch. Sums of shifted slices run a little faster there, but compile 2.5 times slower, and there are 200
    activations. Elsewhere it is the slices, which fuse into one kernel: XLA's compiler for GPUs refuses so narrow a
    matrix product.
    """
    return jax.lax.platform_dependent(x, alpha, beta, up_filter, down_filter, cpu=_snake_banded, default=_snake_sliced)


def _snake(x, alpha, beta):
    return x + jnp.square(jnp.sin(jnp.exp(alpha) * x)) / (jnp.exp(beta) + 1e-9)


def _snake_sliced(x, alpha, beta, up_filter, down_filter):
    """Every tap times the signal moved by it."""
    length = x.shape[1]
    # The zeros between the inputs, which are left out here, halve the signal.
    padded = pad_edges(x, 3, 3)
    even: Any = sum(2 * up_filter[11 - 2 * j] * padded[:, j : j + length] for j in range(6))
    odd: Any = sum(2 * up_filter[12 - 2 * j] * padded[:, j : j + length] for j in range(1, 7))
    x = _snake(rearrange(jnp.stack([even, odd]), "two b n c -> b (n two) c"), alpha, beta)
    pairs = rearrange(pad_edges(x, 5, 7), "b (n two) c -> two b n c", two=2)
    filtered: Any = sum(down_filter[k] * pairs[k % 2, :, k // 2 : k // 2 + length] for k in range(FILTER_TAPS))
    return filtered


def _snake_banded(x, alpha, beta, up_filter, down_filter):
    """Both filters as matrix products with blocks of samples."""
    length = x.shape[1]
    num_blocks = -(-length // BLOCK)
    padded_length = (num_blocks + 1) * BLOCK
    precision = jax.lax.Precision.HIGHEST  # tensor cores would cut the signal itself to ten bits

    # Samples 2i and 2i + 1 of the doubled signal from inputs i - 3 .. i + 3, again twice as large.
    x = pad_edges(x, 3, padded_length - length - 3)
    filters = 2 * banded(up_filter, BLOCK + 6)[:, 11 : 11 + 2 * BLOCK]
    x = jnp.einsum("ko,bnkc->bnoc", filters, blocks_with_halo(x, BLOCK, 6), precision=precision)
    x = rearrange(x, "b n o c -> b (n o) c")[:, : 2 * length]

    x = _snake(x, alpha, beta)

    # Output i from samples 2i - 5 .. 2i + 6.
    x = pad_edges(x, 5, 2 * (padded_length - length) - 5)
    filters = banded(down_filter, BLOCK)
    x = jnp.einsum("ok,bnkc->bnoc", filters, blocks_with_halo(x, 2 * BLOCK, 10), precision=precision)
    return rearrange(x, "b n o c -> b (n o) c")[:, :length]


def pad_edges(x: Float[Array, "batch length channels"], before: int, after: int) -> Float[Array, "batch new channels"]:
    """The first sample repeated in front and the last one behind. (`jnp.pad` makes ten times the operations of it.)"""
    first = jnp.broadcast_to(x[:, :1], (x.shape[0], before, x.shape[2]))
    last = jnp.broadcast_to(x[:, -1:], (x.shape[0], after, x.shape[2]))
    return jnp.concatenate([first, x, last], axis=1)


def banded(taps: Float[Array, " 12"], rows: int) -> Float[Array, "{rows} {2*rows+10}"]:
    """Zeros, and in row r the taps from column 2r on."""
    columns = 2 * rows + FILTER_TAPS - 2
    # Each row of a flat array that repeats every `columns + 2` values begins two values earlier in the repetition.
    repeated = jnp.tile(jnp.pad(taps, (0, columns + 2 - FILTER_TAPS)), rows)
    return repeated[: rows * columns].reshape(rows, columns)


def blocks_with_halo(
    x: Float[Array, "batch length channels"], size: int, halo: int
) -> Float[Array, "batch blocks block channels"]:
    """All blocks of `size` samples but the last, each followed by the first `halo` samples of the next."""
    x = rearrange(x, "b (n s) c -> b n s c", s=size)
    return jnp.concatenate([x[:, :-1], x[:, 1:, :halo]], axis=2)


class Snake(nnx.Module):
    """Anti-aliased SnakeBeta with its parameters, in log scale, and its filters."""

    def __init__(self, channels: int):
        self.alpha = nnx.Param(jnp.zeros(channels))
        self.beta = nnx.Param(jnp.zeros(channels))
        self.up_filter = nnx.Param(jnp.zeros((FILTER_TAPS, 1, 1)))
        self.down_filter = nnx.Param(jnp.zeros((FILTER_TAPS, 1, 1)))

    def __call__(self, x: Float[Array, "batch length channels"]) -> Float[Array, "batch length channels"]:
        return antialiased_snake(
            x,
            alpha=self.alpha[...].astype(x.dtype),
            beta=self.beta[...].astype(x.dtype),
            up_filter=self.up_filter[:, 0, 0].astype(x.dtype),
            down_filter=self.down_filter[:, 0, 0].astype(x.dtype),
        )


def same_conv(in_channels: int, out_channels: int, kernel: int, dilation: int = 1, *, rngs: nnx.Rngs) -> nnx.Conv:
    padding = (kernel - 1) * dilation // 2
    return nnx.Conv(
        in_channels, out_channels, (kernel,), padding=[(padding, padding)], kernel_dilation=dilation, rngs=rngs
    )


class AMPBlock(nnx.Module):
    """Residual pairs of convolutions, the first of each dilated, each behind an activation."""

    def __init__(self, channels: int, kernel: int, dilations: tuple[int, ...], *, rngs: nnx.Rngs):
        self.convs1 = nnx.List([same_conv(channels, channels, kernel, d, rngs=rngs) for d in dilations])
        self.convs2 = nnx.List([same_conv(channels, channels, kernel, rngs=rngs) for _ in dilations])
        self.acts1 = nnx.List([Snake(channels) for _ in dilations])
        self.acts2 = nnx.List([Snake(channels) for _ in dilations])

    def __call__(self, x: Float[Array, "batch length channels"]) -> Float[Array, "batch length channels"]:
        for conv1, conv2, act1, act2 in zip(self.convs1, self.convs2, self.acts1, self.acts2, strict=True):
            x = x + conv2(act2(conv1(act1(x))))
        return x


class Generator(nnx.Module):
    """Mel to a waveform of `hop_length` samples a frame, not clamped."""

    def __init__(self, config: GeneratorConfig, *, in_channels: int, out_channels: int, rngs: nnx.Rngs):
        channels = config.initial_channels
        self.conv_pre = same_conv(in_channels, channels, 7, rngs=rngs)
        self.upsamples = nnx.List([])
        self.blocks = nnx.List([])  # of all stages, one after the other
        for rate, kernel in zip(config.upsample_rates, config.upsample_kernels, strict=True):
            trimmed = kernel - 1 - (kernel - rate) // 2
            self.upsamples.append(
                nnx.ConvTranspose(
                    channels,
                    channels // 2,
                    (kernel,),
                    strides=rate,
                    padding=[(trimmed, trimmed)],
                    transpose_kernel=True,
                    rngs=rngs,
                )
            )
            channels //= 2
            for size, dilations in zip(config.resblock_kernels, config.resblock_dilations, strict=True):
                self.blocks.append(AMPBlock(channels, size, dilations, rngs=rngs))
        self.act_post = Snake(channels)
        self.conv_post = nnx.Conv(channels, out_channels, (7,), padding=[(3, 3)], use_bias=False, rngs=rngs)

    def __call__(self, mel: Float[Array, "batch frames bins channels"]) -> Float[Array, "batch samples channels"]:
        x = self.conv_pre(rearrange(mel, "b f m c -> b f (c m)"))
        num_parallel = len(self.blocks) // len(self.upsamples)
        for i, upsample in enumerate(self.upsamples):
            x = upsample(x)
            stage = self.blocks[i * num_parallel : (i + 1) * num_parallel]
            x = jnp.mean(jnp.stack([block(x) for block in stage]), axis=0)
        return self.conv_post(self.act_post(x))


class CausalMel(nnx.Module):
    """Log-mel spectrogram by a strided convolution with stored bases; no window sees later samples than its hop."""

    def __init__(self, config: VocoderConfig):
        frequencies = config.bwe_n_fft // 2 + 1
        self.hop_length = config.bwe_hop_length
        # Windowed cosines, then sines.
        self.forward_basis = nnx.Param(jnp.zeros((config.bwe_n_fft, 1, 2 * frequencies)))
        self.mel_basis = nnx.Param(jnp.zeros((frequencies, config.bwe_mel_bins)))

    def __call__(self, waveform: Float[Array, "batch samples channels"]) -> Float[Array, "batch frames bins channels"]:
        num_channels = waveform.shape[-1]
        basis, mel_basis = (x[...].astype(waveform.dtype) for x in (self.forward_basis, self.mel_basis))
        x = rearrange(waveform, "b n c -> (b c) n 1")
        x = jax.lax.conv_general_dilated(
            x,
            basis,
            (self.hop_length,),
            [(basis.shape[0] - self.hop_length, 0)],
            dimension_numbers=("NWC", "WIO", "NWC"),
        )
        real, imaginary = jnp.split(x, 2, axis=-1)
        mel = jnp.sqrt(jnp.square(real) + jnp.square(imaginary)) @ mel_basis
        return rearrange(jnp.log(jnp.maximum(mel, LOG_FLOOR)), "(b c) f m -> b f m c", c=num_channels)


class Vocoder(nnx.Module):
    """The audio autoencoder's mel to a waveform in [-1, 1] at `config.sample_rate_hz`.

    `base` makes the waveform at `input_sample_rate_hz`; `bwe` reads that waveform's own mel and makes what a plain
    resampling of it lacks.
    """

    def __init__(self, config: VocoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        channels = config.audio_channels
        self.base = Generator(config.base, in_channels=channels * config.mel_bins, out_channels=channels, rngs=rngs)
        self.bwe = Generator(config.bwe, in_channels=channels * config.bwe_mel_bins, out_channels=channels, rngs=rngs)
        self.bwe_mel = CausalMel(config)

    def __call__(self, mel: Float[Array, "batch frames bins channels"]) -> Float[Array, "batch samples channels"]:
        """Float32 whatever `mel` and the weights are; `base.hop_length * frames` samples, times the ratio of rates."""
        return self.extend_bandwidth(self.base_waveform(mel))

    def base_waveform(self, mel: Float[Array, "batch frames bins channels"]) -> Float[Array, "batch samples channels"]:
        """The waveform before bandwidth extension."""
        return jnp.clip(self.base(mel.astype(jnp.float32)), -1, 1)

    def extend_bandwidth(
        self, waveform: Float[Array, "batch samples channels"]
    ) -> Float[Array, "batch new_samples channels"]:
        """The waveform at the output's sample rate, with the high frequencies that it lacks made up."""
        config = self.config
        num_samples = waveform.shape[1] * config.sample_rate_hz // config.input_sample_rate_hz
        waveform = jnp.pad(waveform, ((0, 0), (0, -waveform.shape[1] % config.bwe_hop_length), (0, 0)))
        residual = self.bwe(self.bwe_mel(waveform))
        skip = resample(waveform, config.input_sample_rate_hz, config.sample_rate_hz, pad_mode="edge")
        return jnp.clip(residual + skip, -1, 1)[:, :num_samples]
