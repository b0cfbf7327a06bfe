"""Distances between clips, from samples alone."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8
from scipy import ndimage

from ltx_jax.config import AudioVAEConfig
from ltx_jax.mel import mel_spectrogram, resample

Frames = UInt8[np.ndarray, "frames height width 3"]
Waveform = Float[np.ndarray, "samples channels"]


def ssim(a: Frames, b: Frames) -> float:
    """Mean structural similarity of frames of one size, of their brightness; 1 is equal.

    Windows of 7 x 7 pixels, as small clips have no room for 11. Source: Wang et al., 2004,
    https://doi.org/10.1109/TIP.2003.819861, with its constants.
    """
    if a.shape != b.shape:
        raise ValueError(f"frames of one size are compared; got {list(a.shape)} and {list(b.shape)}")
    x, y = (frames.astype(np.float64) @ np.array([0.299, 0.587, 0.114]) for frames in (a, b))

    def mean(values: np.ndarray) -> np.ndarray:
        for axis in (1, 2):
            values = ndimage.uniform_filter1d(values, 7, axis, mode="reflect")
        return values

    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    mx, my = mean(x), mean(y)
    vx, vy, vxy = mean(x * x) - mx * mx, mean(y * y) - my * my, mean(x * y) - mx * my
    similarity = (2 * mx * my + c1) * (2 * vxy + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2))
    return float(similarity.mean())


def psnr_db(a: Frames, b: Frames) -> float:
    """Peak signal to noise ratio of frames of one size."""
    return float(10 * np.log10(255**2 / max(np.mean((a.astype(np.float64) - b) ** 2), 1e-12)))


def mel_distance_db(a: Waveform, b: Waveform, sample_rate_hz: int, config: AudioVAEConfig) -> float:
    """Mean absolute difference of two sounds' mel spectrograms, in dB, over as much as both last.

    What is more than 60 dB below the louder one's peak counts as that: silence differs from nothing.
    """
    length = min(len(a), len(b))
    mels = []
    for wave in (a, b):
        fitted = resample(jnp.asarray(wave[None, :length]), sample_rate_hz, config.sample_rate_hz)
        mels.append(np.asarray(mel_spectrogram(fitted, config)) * 20 / np.log(10))
    floor = max(mel.max() for mel in mels) - 60
    x, y = (np.maximum(mel, floor) for mel in mels)
    return float(np.abs(x - y).mean())
