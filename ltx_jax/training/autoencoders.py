"""Losses that train the video autoencoder, the audio autoencoder and the vocoder.

Each has the form that `loop.Trainer` takes. There is no adversary: differences are taken at several scales, so that
edges and onsets count. Sources: Kingma & Welling, https://arxiv.org/abs/1312.6114 (the bound); Mathieu et al.,
https://arxiv.org/abs/1511.05440 (differences of gradients); Yamamoto et al., https://arxiv.org/abs/1910.11480
(short-time Fourier transforms at several resolutions).
"""

from collections.abc import Callable, Iterable
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from ltx_jax.config import AudioVAEConfig, VocoderConfig
from ltx_jax.mel import mel_filterbank
from ltx_jax.models.audio_vae import AudioVAE
from ltx_jax.models.conv import Conv3d
from ltx_jax.models.video_vae import ResBlock, Upsample, VideoVAE
from ltx_jax.models.vocoder import FILTER_TAPS, Generator, Snake, Vocoder
from ltx_jax.training.loop import Metrics

KL_WEIGHT = 3e-4
_STFT_SIZES = (2048, 1024, 512, 256, 128)

# What of a vocoder is computed, not learnt.
_FIXED = ("up_filter", "down_filter", "forward_basis", "mel_basis")


def sampled(
    mean: Float[Array, "*shape"], log_variance: Float[Array, "*shape"], key: jax.Array
) -> tuple[Float[Array, "*shape"], Float[Array, ""]]:
    """A draw from the encoder's distribution, and the mean divergence of that from the standard normal, in nats."""
    log_variance = jnp.clip(log_variance, -12, 4)
    noise = jax.random.normal(key, mean.shape, mean.dtype)
    divergence = 0.5 * jnp.mean(jnp.square(mean) + jnp.exp(log_variance) - 1 - log_variance)
    return mean + jnp.exp(0.5 * log_variance) * noise, divergence


def gradient_difference(made: Float[Array, "*shape"], true: Float[Array, "*shape"], axes: Iterable[int]) -> jax.Array:
    """The mean absolute difference of the differences between neighbours along some axes, summed over the axes."""
    total = jnp.zeros(())
    for axis in axes:
        total += jnp.mean(jnp.abs(jnp.diff(made, axis=axis) - jnp.diff(true, axis=axis)))
    return total


def video_vae_loss(
    model: VideoVAE,
    pixels: Float[Array, "batch frames height width 3"],
    key,
    *,
    edge_weight: float = 0.0,
    outline_weight: float = 0.0,
) -> tuple[Array, Metrics]:
    """Absolute and squared error of the pixels in [-1, 1], the absolute one of their gradients, and the divergence.

    The squared error finds shapes early, the absolute ones sharpen them: gradients count once shapes are where they
    should be; before, no shape at all has the least error of gradients. Around outlines the pixels' errors count
    `1 + outline_weight` times.
    """
    moments = model.encoder.moments(pixels)
    mean, log_variance = moments[..., :-1], moments[..., -1:]
    latents, divergence = sampled(mean, jnp.broadcast_to(log_variance, mean.shape), key)
    made = model.decoder(latents)
    weights = 1 + outline_weight * outlines(pixels) if outline_weight else jnp.ones(())
    error = jnp.mean(weights * jnp.abs(made - pixels))
    squared = jnp.mean(weights * jnp.square(made - pixels))
    psnr = 10 * jnp.log10(4 / jnp.mean(jnp.square(jnp.clip(made, -1, 1) - pixels)))
    edges = gradient_difference(made, pixels, (1, 2, 3))
    loss = error + squared + edge_weight * edges + KL_WEIGHT * divergence
    return loss, {"error": error, "squared": squared, "edges": edges, "psnr_db": psnr, "divergence": divergence}


def outlines(
    pixels: Float[Array, "batch frames height width channels"],
) -> Float[Array, "batch frames height width 1"]:
    """How near a pixel in [-1, 1] is to where neighbours in a row or column differ: 1 within two pixels of an edge."""
    steps = jnp.zeros_like(pixels[..., :1])
    for axis in (2, 3):
        change = jnp.max(jnp.abs(jnp.diff(pixels, axis=axis)), -1, keepdims=True)
        steps += jnp.pad(change, [(0, int(i == axis)) for i in range(pixels.ndim)])
    window = (1, 1, 5, 5, 1)
    return jnp.minimum(jax.lax.reduce_window(steps, 0.0, jax.lax.max, window, (1,) * 5, "SAME"), 1)


def start_smoothly(model: VideoVAE) -> None:
    """Gives a new video autoencoder weights to learn from quickly, in place.

    Independent weights for the positions that a position unfolds to begin as noise that has to be unlearnt: they
    begin equal (https://arxiv.org/abs/1707.02937). Residual branches begin small. PixelNorm leaves of a plain surface
    its hue, not its brightness, unless there is something to compare it with: the first biases. And latents begin with
    little noise.
    """
    for _, module in nnx.iter_modules(model):
        if isinstance(module, Upsample):
            _repeat_outputs(module.conv, prod(module.stride))
        if isinstance(module, ResBlock):
            module.conv2.kernel.set_value(module.conv2.kernel[...] * 0.1)
    _repeat_outputs(model.decoder.conv_out, model.decoder.config.patch_size**2)
    for key, conv in enumerate((model.encoder.conv_in, model.decoder.conv_in)):
        conv.bias.set_value(0.7 * jax.random.normal(jax.random.key(key), conv.bias.shape))
    bias = model.encoder.conv_out.bias
    bias.set_value(bias[...].at[-1].set(-4.0))


def _repeat_outputs(conv: Conv3d, count: int) -> None:
    conv.kernel.set_value(jnp.repeat(conv.kernel[..., ::count], count, axis=-1))


def audio_vae_loss(model: AudioVAE, mel: Float[Array, "batch frames bins channels"], key) -> tuple[Array, Metrics]:
    """Absolute error of the log-mel spectrogram, of its gradients, and the divergence.

    A clip decodes to `scale * T - (scale - 1)` frames of its mel; the others, at the end, are left out.
    """
    mean, log_variance = jnp.split(model.encoder.moments(mel), 2, axis=-1)
    latents, divergence = sampled(mean, log_variance, key)
    made = model.decoder(latents)
    true = mel[:, : made.shape[1]]
    made = made[:, : true.shape[1]]
    error = jnp.mean(jnp.abs(made - true))
    edges = gradient_difference(made, true, (1, 2))
    loss = error + 0.5 * edges + 10 * KL_WEIGHT * divergence
    return loss, {"error": error, "edges": edges, "divergence": divergence}


def magnitudes(waveform: Float[Array, "batch samples channels"], size: int) -> Float[Array, "rows windows frequencies"]:
    """Magnitudes of Hann-windowed Fourier transforms of `size` samples, a quarter of it apart."""
    x = jnp.moveaxis(waveform, -1, 1).reshape(-1, waveform.shape[1])
    x = jnp.pad(x, ((0, 0), (size // 2, size // 2)), mode="reflect")
    starts = np.arange(0, x.shape[1] - size + 1, size // 4)[:, None]
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(size) / size)
    spectrum = jnp.fft.rfft(x[:, starts + np.arange(size)] * window.astype(np.float32))
    # The magnitude has no gradient at zero.
    return jnp.sqrt(jnp.square(spectrum.real) + jnp.square(spectrum.imag) + 1e-8)


def spectral_loss(
    made: Float[Array, "batch samples channels"], true: Float[Array, "batch samples channels"]
) -> tuple[Array, Metrics]:
    """Spectral convergence and absolute error of log magnitudes, means over several sizes of window."""
    convergence, error = jnp.zeros(()), jnp.zeros(())
    sizes = [size for size in _STFT_SIZES if size // 2 < made.shape[1]]
    for size in sizes:
        a, b = magnitudes(made, size), magnitudes(true, size)
        convergence += jnp.linalg.norm((a - b).ravel()) / jnp.maximum(jnp.linalg.norm(b.ravel()), 1e-3) / len(sizes)
        error += jnp.mean(jnp.abs(jnp.log(a + 1e-3) - jnp.log(b + 1e-3))) / len(sizes)
    return convergence + error, {"convergence": convergence, "log_magnitude": error}


def vocoder_loss(
    model: Vocoder, batch: tuple[Array, Array], key, *, waveform_weight: float = 0.0
) -> tuple[Array, Metrics]:
    """`batch` is a mel and the waveform at the base generator's rate; its last samples beyond the mel are left out.

    Spectrograms have no phase, so spectra are compared. Where the phase of all sounds is a function of the spectrogram,
    samples may count too, by `waveform_weight`: that is learnt many times faster.
    """
    mel, waveform = batch
    made = model.base(mel.astype(jnp.float32))[:, : waveform.shape[1]]
    true = waveform[:, : made.shape[1]]
    loss, metrics = spectral_loss(made, true)
    samples = jnp.sum(jnp.square(made - true)) / jnp.maximum(jnp.sum(jnp.square(true)), 1e-3)
    return loss + waveform_weight * samples, metrics | {"samples": samples}


def bandwidth_loss(model: Vocoder, batch: tuple[Array, Array], key) -> tuple[Array, Metrics]:
    """`batch` is a waveform at the base generator's rate, and the same at the output's."""
    low, true = batch
    made = model.extend_bandwidth(low)
    length = min(made.shape[1], true.shape[1])
    return spectral_loss(made[:, :length], true[:, :length])


# ---------------------------------------------------------------------- what is set, not learnt


def learnt(*below: str) -> Callable[[Any, Any], bool]:
    """A filter for the parameters of a vocoder that are learnt, of one of its parts or of all of it."""

    def chosen(path: Any, value: Any) -> bool:
        return isinstance(value, nnx.Param) and path[-1] not in _FIXED and (not below or path[0] in below)

    return chosen


def low_pass() -> Float[np.ndarray, " 12"]:
    """The filter around activations: a Kaiser-windowed sinc that halves the band, of unit sum.

    Source: `kaiser_sinc_filter1d(0.25, 0.3, 12)` of NVIDIA/BigVGAN, alias_free_activation.
    """
    attenuation = 2.285 * (FILTER_TAPS // 2 - 1) * np.pi * 4 * 0.3 + 7.95
    beta = 0.1102 * (attenuation - 8.7) if attenuation > 50 else 0.5842 * (attenuation - 21) ** 0.4
    beta += 0.07886 * (attenuation - 21) if attenuation <= 50 else 0
    times = np.arange(FILTER_TAPS) - FILTER_TAPS / 2 + 0.5
    taps = 0.5 * np.kaiser(FILTER_TAPS, beta) * np.sinc(0.5 * times)
    return (taps / taps.sum()).astype(np.float32)


def set_filters(vocoder: Vocoder) -> None:
    """Gives a new vocoder the filters of its activations and the bases of its spectrogram, in place."""
    for _, module in nnx.iter_modules(vocoder):
        if isinstance(module, Snake):
            module.up_filter.set_value(jnp.asarray(low_pass())[:, None, None])
            module.down_filter.set_value(jnp.asarray(low_pass())[:, None, None])
    config = vocoder.config
    n_fft = config.bwe_n_fft
    angles = 2 * np.pi * np.arange(n_fft)[:, None] * np.arange(n_fft // 2 + 1) / n_fft
    window = (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(n_fft) / n_fft))[:, None]
    basis = np.concatenate([window * np.cos(angles), -window * np.sin(angles)], axis=1)
    vocoder.bwe_mel.forward_basis.set_value(jnp.asarray(basis[:, None], jnp.float32))
    vocoder.bwe_mel.mel_basis.set_value(jnp.asarray(mel_filterbank(_bwe_front_end(config))))


def centre(generator: Generator, mel_mean: float) -> None:
    """Gives a new generator a first bias that takes the mean of its spectrograms away, in place: it is far from 0."""
    conv = generator.conv_pre
    assert conv.bias is not None
    conv.bias.set_value(-mel_mean * jnp.sum(conv.kernel[...], axis=(0, 1)))


def _bwe_front_end(config: VocoderConfig) -> AudioVAEConfig:
    """The spectrogram that bandwidth extension reads, as the audio autoencoder's configuration describes its own."""
    return AudioVAEConfig(
        audio_channels=config.audio_channels, latent_channels=1, base_channels=1, channel_multipliers=(1,),
        num_res_blocks=1, mel_bins=config.bwe_mel_bins, sample_rate_hz=config.input_sample_rate_hz,
        n_fft=config.bwe_n_fft, hop_length=config.bwe_hop_length, win_length=config.bwe_n_fft, mel_fmin_hz=0.0,
        mel_fmax_hz=config.input_sample_rate_hz / 2,
    )  # fmt: skip


def measured_statistics(latents: Iterable[Float[np.ndarray, "..."]]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of every channel over many batches of latents, in float64."""
    count, total, squares = 0, np.zeros(()), np.zeros(())
    for batch in latents:
        flat = np.asarray(batch, np.float64).reshape(-1, batch.shape[-1])
        count, total, squares = count + len(flat), total + flat.sum(0), squares + np.square(flat).sum(0)
    mean = total / count
    return mean, np.sqrt(np.maximum(squares / count - mean**2, 1e-8))
