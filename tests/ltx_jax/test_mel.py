"""The mel front end against the reference (torchaudio), and what it promises for other rates and sizes."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange

from ltx_jax.config import AudioVAEConfig
from ltx_jax.mel import LOG_FLOOR, hann_window, mel_filterbank, mel_spectrogram, resample, sinc_filters

# The reference computes filters, window and filterbank in float32: a few of its roundings.
TOLERANCE = 5e-7
# A logarithm of sums of 513 products, each with the filterbank's rounding.
MEL_TOLERANCE = 5e-5


@pytest.fixture(scope="module")
def audio(reference) -> dict[str, np.ndarray]:
    return reference("audio")


@pytest.fixture(scope="module")
def config(ltx_config) -> AudioVAEConfig:
    return AudioVAEConfig.from_metadata(ltx_config["audio_vae"])


def waveform(array: np.ndarray) -> jax.Array:
    return jnp.asarray(rearrange(array, "b c n -> b n c"))


def sine(hz: float, num_samples: int, rate_hz: int) -> jax.Array:
    return jnp.asarray(np.sin(2 * np.pi * hz * np.arange(num_samples) / rate_hz, dtype=np.float64))[None, :, None]


def test_filterbank_and_window_agree_with_the_reference(audio, config):
    np.testing.assert_allclose(mel_filterbank(config), audio["mel.filterbank"], atol=1e-7, rtol=0)
    np.testing.assert_allclose(hann_window(config), audio["mel.window"], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(("name", "rate_hz"), [("wav44k", 44100), ("wav48k", 48000)])
def test_resampling_agrees_with_the_reference(audio, config, name, rate_hz):
    ours = resample(waveform(audio[f"mel.{name}.in"]), rate_hz, config.sample_rate_hz)
    expected = rearrange(audio[f"mel.{name}.resampled"], "b c n -> b n c")
    np.testing.assert_allclose(ours, expected, atol=TOLERANCE, rtol=0)


def test_upsampling_filters_agree_with_the_reference(audio):
    filters, reach = sinc_filters(3, 1)
    # The reference keeps the phases interleaved and a third as large, and leaves out the two outermost taps: zeros.
    interleaved = rearrange(filters[::-1], "taps phases -> (taps phases)") / 3
    assert reach == 7
    np.testing.assert_allclose(interleaved[:43], audio["vocoder.resampler.filter"][0, 0], atol=TOLERANCE, rtol=0)
    np.testing.assert_allclose(interleaved[43:], 0, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(("name", "rate_hz"), [("wav16k", 16000), ("wav44k", 44100), ("wav48k", 48000)])
def test_mel_agrees_with_the_reference(audio, config, name, rate_hz):
    ours = mel_spectrogram(resample(waveform(audio[f"mel.{name}.in"]), rate_hz, config.sample_rate_hz), config)
    expected = rearrange(audio[f"mel.{name}.out"], "b c f m -> b f m c")
    np.testing.assert_allclose(ours, expected, atol=MEL_TOLERANCE, rtol=0)


@pytest.mark.parametrize(("from_hz", "to_hz"), [(22050, 16000), (8000, 16000), (16000, 48000), (96000, 16000), (5, 7)])
def test_resampling_keeps_a_slow_sine(from_hz, to_hz):
    seconds_hz = from_hz / 50  # well below both Nyquist frequencies
    num_samples = 401
    ours = resample(sine(seconds_hz, num_samples, from_hz), from_hz, to_hz)
    assert ours.shape == (1, -(-num_samples * to_hz // from_hz), 1)
    expected = sine(seconds_hz, ours.shape[1], to_hz)
    edge = 40 * to_hz // from_hz + 10  # silence outside the clip leaks in
    # The window of the sinc is not flat to better than this.
    np.testing.assert_allclose(ours[:, edge:-edge], expected[:, edge:-edge], atol=5e-3)


def test_resampling_to_the_same_rate_changes_nothing():
    x = jnp.ones((1, 7, 2), jnp.bfloat16)
    assert resample(x, 24000, 24000) is x


def test_resampling_with_edges_keeps_a_constant():
    flat = resample(jnp.ones((1, 50, 1)), 16000, 48000, pad_mode="edge")
    np.testing.assert_allclose(flat, 1, atol=2e-3)  # as flat as the filter
    silent_outside = resample(jnp.ones((1, 50, 1)), 16000, 48000)
    assert float(silent_outside[0, -1, 0]) < 0.9


@pytest.mark.parametrize("rates", [(0, 16000), (16000, -1), (44100.5, 16000)])
def test_resampling_refuses_rates_that_are_none(rates):
    with pytest.raises((ValueError, TypeError)):
        resample(jnp.zeros((1, 9, 1)), *rates)


@pytest.mark.parametrize(("n_fft", "win_length", "hop"), [(128, 128, 32), (64, 50, 20), (33, 20, 7)])
def test_mel_is_the_log_of_filtered_magnitudes_around_every_hop(config, n_fft, win_length, hop):
    config = replace(config, n_fft=n_fft, win_length=win_length, hop_length=hop, mel_bins=6)
    x = np.random.default_rng(0).normal(size=(2, 201, 3))
    ours = mel_spectrogram(jnp.asarray(x, jnp.float32), config)
    assert ours.shape == (2, 1 + 201 // hop, 6, 3)
    padded = np.pad(x, ((0, 0), (n_fft // 2, n_fft // 2), (0, 0)), mode="reflect")
    frame = padded[1, 3 * hop : 3 * hop + n_fft, 2] * hann_window(config)
    expected = np.log(np.maximum(np.abs(np.fft.rfft(frame)) @ mel_filterbank(config), LOG_FLOOR))
    np.testing.assert_allclose(ours[1, 3, :, 2], expected, atol=1e-5)


def test_filterbank_triangles_have_unit_area(config):
    config = replace(config, n_fft=1 << 16)
    step = config.sample_rate_hz / config.n_fft
    np.testing.assert_allclose(mel_filterbank(config).sum(axis=0) * step, 1, atol=1e-3)


def test_silence_is_the_floor(config):
    np.testing.assert_allclose(mel_spectrogram(jnp.zeros((1, 600, 1)), config), np.log(LOG_FLOOR), rtol=1e-6)


def test_mel_is_float32_whatever_the_waveform(config):
    assert mel_spectrogram(jnp.zeros((1, 600, 1), jnp.bfloat16), config).dtype == jnp.float32


def test_a_clip_too_short_to_reflect_is_refused(config):
    assert mel_spectrogram(jnp.zeros((1, 513, 1)), config).shape == (1, 4, 64, 1)
    with pytest.raises(ValueError, match="more than 512 samples, got 512"):
        mel_spectrogram(jnp.zeros((1, 512, 1)), config)
