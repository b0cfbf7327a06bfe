"""The audio front end: resampling, and the log-mel spectrogram that the audio autoencoder reads.

Both follow torchaudio, which the reference calls: `torchaudio.functional.resample` with its defaults, and
`torchaudio.transforms.MelSpectrogram` with slaney scale and norm, as set up by `AudioProcessor` in Lightricks/LTX-2.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float

from ltx_jax.config import AudioVAEConfig

LOG_FLOOR = 1e-5  # magnitudes below this are raised to it before the logarithm

# torchaudio's defaults: zero crossings of the sinc on each side, and the cut-off as a fraction of half the lower rate.
_ZERO_CROSSINGS = 6
_ROLLOFF = 0.99


def sinc_filters(up: int, down: int) -> tuple[Float[np.ndarray, "taps up"], int]:
    """Hann-windowed sinc filters that resample by `up / down`, and how many samples they reach to each side.

    Output sample `i * up + p` is filter `p` on the input from `i * down - reach` on. Source: Julius O. Smith, Digital
    Audio Resampling, https://ccrma.stanford.edu/~jos/resample/, as in torchaudio's `_get_sinc_resample_kernel`.
    """
    cutoff = min(up, down) * _ROLLOFF
    reach = math.ceil(_ZERO_CROSSINGS * down / cutoff)
    # torchaudio computes this in float32, and its rounding moves the output by 2e-6: so does this.
    taps = np.arange(-reach, reach + down, dtype=np.float32)[:, None] / np.float32(down)
    phases = np.arange(up, dtype=np.float32)[None, :] / np.float32(up)
    t = np.clip((taps - phases) * np.float32(cutoff), -_ZERO_CROSSINGS, _ZERO_CROSSINGS)
    window = np.cos(t * np.float32(math.pi / _ZERO_CROSSINGS / 2)) ** 2
    return np.sinc(t) * window * np.float32(cutoff / down), reach


def resample(
    waveform: Float[Array, "batch samples channels"], from_hz: int, to_hz: int, *, pad_mode: str = "constant"
) -> Float[Array, "batch new_samples channels"]:
    """The waveform at another sample rate, `ceil(samples * to_hz / from_hz)` samples long, in float32.

    Outside the clip the waveform counts as silent, or with `pad_mode="edge"` as its first and last sample. Equal rates
    return the waveform untouched. Raises ValueError unless both rates are positive whole numbers.
    """
    if from_hz != int(from_hz) or to_hz != int(to_hz) or from_hz <= 0 or to_hz <= 0:
        raise ValueError(f"sample rates must be positive whole numbers of hertz, got {from_hz} and {to_hz}")
    if from_hz == to_hz:
        return waveform
    common = math.gcd(int(from_hz), int(to_hz))
    up, down = int(to_hz) // common, int(from_hz) // common
    filters, reach = sinc_filters(up, down)
    _, num_samples, num_channels = waveform.shape
    x = rearrange(waveform.astype(jnp.float32), "b n c -> (b c) n 1")
    x = jnp.pad(x, ((0, 0), (reach, reach + down), (0, 0)), mode=pad_mode)
    kernel = jnp.asarray(filters)[:, None]
    x = jax.lax.conv_general_dilated(x, kernel, (down,), "VALID", dimension_numbers=("NWC", "WIO", "NWC"))
    x = rearrange(x, "(b c) n p -> b (n p) c", c=num_channels)
    return x[:, : -(-num_samples * up // down)]


def _slaney_mels(hz: float) -> float:
    """Slaney's mel scale: linear below 1 kHz (200/3 Hz a mel), then 27 mels for each factor of 6.4."""
    return hz * 3 / 200 if hz < 1000 else 15 + 27 * math.log(hz / 1000) / math.log(6.4)


def mel_filterbank(config: AudioVAEConfig) -> Float[np.ndarray, "frequencies bins"]:
    """Triangles between neighbouring frequencies, evenly spaced in Slaney mels, each of unit area (in hertz).

    Source: M. Slaney, Auditory Toolbox (1998), as in torchaudio's `melscale_fbanks(norm="slaney", mel_scale="slaney")`.
    """
    lowest, highest = _slaney_mels(config.mel_fmin_hz), _slaney_mels(config.mel_fmax_hz)
    mels = np.linspace(lowest, highest, config.mel_bins + 2)
    corners = np.where(mels < 15, mels * 200 / 3, 1000 * 6.4 ** ((mels - 15) / 27))
    frequencies = np.linspace(0, config.sample_rate_hz // 2, config.n_fft // 2 + 1)[:, None]
    left, centre, right = corners[:-2], corners[1:-1], corners[2:]
    rising, falling = (frequencies - left) / (centre - left), (right - frequencies) / (right - centre)
    return (np.maximum(0, np.minimum(rising, falling)) * 2 / (right - left)).astype(np.float32)


def hann_window(config: AudioVAEConfig) -> Float[np.ndarray, " n_fft"]:
    """The periodic Hann window of `win_length` samples, centred among `n_fft`."""
    window = 0.5 - 0.5 * np.cos(2 * math.pi * np.arange(config.win_length) / config.win_length)
    before = (config.n_fft - config.win_length) // 2
    return np.pad(window, (before, config.n_fft - config.win_length - before)).astype(np.float32)


def mel_spectrogram(
    waveform: Float[Array, "batch samples channels"], config: AudioVAEConfig
) -> Float[Array, "batch frames bins channels"]:
    """The natural logarithm of mel-band magnitudes (not powers) of each channel, in float32.

    The waveform has the autoencoder's sample rate. Windows are centred on every `hop_length`-th sample, from the first
    on; the waveform is reflected at its ends: `1 + samples // hop_length` frames. Raises ValueError for a clip that is
    too short to reflect.
    """
    _, num_samples, num_channels = waveform.shape
    half = config.n_fft // 2
    if num_samples <= half:
        raise ValueError(
            f"a mel spectrogram with windows of {config.n_fft} samples needs more than {half} samples, "
            f"got {num_samples}; give a longer clip, or pad it with silence"
        )
    x = rearrange(waveform.astype(jnp.float32), "b n c -> (b c) n")
    x = jnp.pad(x, ((0, 0), (half, half)), mode="reflect")
    starts = np.arange(1 + num_samples // config.hop_length)[:, None] * config.hop_length
    windows = x[:, starts + np.arange(config.n_fft)] * hann_window(config)
    magnitudes = jnp.abs(jnp.fft.rfft(windows))
    mel = jnp.log(jnp.maximum(magnitudes @ mel_filterbank(config), LOG_FLOOR))
    return rearrange(mel, "(b c) f m -> b f m c", c=num_channels)
