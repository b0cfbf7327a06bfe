"""What trains the autoencoders and the vocoder: computed filters are the published ones, and losses fall."""

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors import safe_open

from ltx_jax.config import AudioVAEConfig, VAEBlock, VideoVAEConfig
from ltx_jax.models.audio_vae import AudioVAE
from ltx_jax.models.video_vae import VideoVAE
from ltx_jax.models.vocoder import Vocoder
from ltx_jax.training import autoencoders
from ltx_jax.training.loop import Schedule, Trainer, read_metrics
from tests.ltx_jax.models.test_vocoder import TINY

VIDEO = VideoVAEConfig(
    pixel_channels=3,
    latent_channels=8,
    patch_size=2,
    encoder_blocks=(VAEBlock(kind="compress_all_res", num_layers=0, multiplier=1),),
    decoder_blocks=(VAEBlock(kind="compress_all", num_layers=0, multiplier=1),),
    encoder_base_channels=8,
    decoder_base_channels=1,
)
AUDIO = AudioVAEConfig(
    audio_channels=2, latent_channels=4, base_channels=8, channel_multipliers=(1, 1), num_res_blocks=1, mel_bins=4,
    sample_rate_hz=16000, n_fft=256, hop_length=64, win_length=256, mel_fmin_hz=0.0, mel_fmax_hz=8000.0,
)  # fmt: skip


def falls(tmp_path, model, loss, batch, *, steps: int, rate: float = 1e-2, trainable=nnx.Param) -> list[dict]:
    schedule = Schedule(num_steps=steps, learning_rate=rate, warmup_steps=2, log_every=2)
    trainer = Trainer(model, loss, schedule, trainable=trainable)
    trainer.train(lambda step: batch, tmp_path)
    return read_metrics(tmp_path / "metrics.jsonl")


def test_a_video_autoencoder_learns(tmp_path):
    ramp = np.linspace(-1, 1, 8, dtype=np.float32)
    pixels = np.broadcast_to(ramp[:, None] * ramp[None, :], (2, 5, 8, 8))[..., None] * np.ones(3, np.float32)
    lines = falls(tmp_path, VideoVAE(VIDEO, rngs=nnx.Rngs(0)), autoencoders.video_vae_loss, pixels, steps=30)
    assert lines[-1]["error"] < 0.7 * lines[0]["error"]
    assert lines[-1]["psnr_db"] > lines[0]["psnr_db"]


def test_an_audio_autoencoder_learns(tmp_path):
    mel = np.random.default_rng(0).normal(size=(2, 9, 4, 2)).astype(np.float32)
    lines = falls(tmp_path, AudioVAE(AUDIO, rngs=nnx.Rngs(0)), autoencoders.audio_vae_loss, mel, steps=30)
    assert lines[-1]["error"] < 0.9 * lines[0]["error"]


def vocoder() -> Vocoder:
    made = Vocoder(TINY, rngs=nnx.Rngs(0))
    autoencoders.set_filters(made)
    return made


def test_a_vocoder_learns_and_its_filters_stay(tmp_path):
    model = vocoder()
    time = np.arange(400) / 16000
    waveform = np.repeat(0.3 * np.sin(2 * np.pi * 900 * time)[None, :, None], 2, axis=2).astype(np.float32)
    mel = np.ones((1, 40, TINY.mel_bins, 2), np.float32)
    schedule = Schedule(num_steps=10, learning_rate=1e-2, warmup_steps=2, log_every=2)
    trainer = Trainer(model, autoencoders.vocoder_loss, schedule, trainable=autoencoders.learnt("base"))
    trainer.train(lambda step: (mel, waveform), tmp_path)
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert lines[-1]["loss"] < 0.9 * lines[0]["loss"]
    trained = trainer.model()
    np.testing.assert_array_equal(trained.base.act_post.up_filter[...], model.base.act_post.up_filter[...])
    np.testing.assert_array_equal(trained.bwe.conv_pre.kernel[...], model.bwe.conv_pre.kernel[...])
    assert np.any(trained.base.conv_pre.kernel[...] != model.base.conv_pre.kernel[...])


def test_bandwidth_extension_has_a_gradient():
    low = 0.1 * jax.random.normal(jax.random.key(0), (1, 64, 2))
    true = jnp.repeat(low, TINY.sample_rate_hz // TINY.input_sample_rate_hz, axis=1)
    loss = lambda model: autoencoders.bandwidth_loss(model, (low, true), jax.random.key(1))[0]  # noqa: E731
    grads = nnx.grad(loss)(vocoder())
    assert np.any(np.asarray(grads["bwe"]["conv_post"]["kernel"][...]))


def test_equal_waveforms_have_no_spectral_loss():
    waveform = jax.random.normal(jax.random.key(0), (2, 700, 2))
    assert autoencoders.spectral_loss(waveform, waveform)[0] == 0


def test_magnitudes_are_those_of_numpy():
    waveform = np.random.default_rng(0).normal(size=(1, 300, 2)).astype(np.float32)
    found = autoencoders.magnitudes(jnp.asarray(waveform), 64)
    padded = np.pad(waveform[0, :, 1], 32, mode="reflect")[16 * 3 : 16 * 3 + 64]
    expected = np.abs(np.fft.rfft(padded * np.hanning(65)[:-1]))
    # Beside float32: 1e-8 is added under the root.
    np.testing.assert_allclose(found[1, 3], expected, rtol=1e-4, atol=2e-4)


def test_draws_have_the_encoder_s_mean_and_variance():
    mean, log_variance = jnp.full((200, 200), 0.5), jnp.full((200, 200), np.log(0.04))
    drawn, divergence = autoencoders.sampled(mean, log_variance, jax.random.key(0))
    # 40,000 draws: a standard error of 0.001 of the mean.
    assert float(jnp.mean(drawn)) == pytest.approx(0.5, abs=5e-3)
    assert float(jnp.std(drawn)) == pytest.approx(0.2, abs=5e-3)
    assert float(divergence) == pytest.approx(0.5 * (0.25 + 0.04 - 1 - np.log(0.04)), rel=1e-5)


def test_computed_filters_are_the_published_ones(mini_release: Path):
    """The released file stores them in bfloat16, which rounds by up to 1 part in 256."""
    release = mini_release / "LTX-2.3-22B-PolarQuant-Q5/polarquant/bf16/ltx23_bf16.safetensors"
    with safe_open(release, "flax") as file:
        found = {key: np.asarray(file.get_tensor(key), np.float32) for key in file.keys() if "vocoder" in key}  # noqa: SIM118
    basis = next(value for key, value in found.items() if key.endswith("forward_basis"))
    mels = next(value for key, value in found.items() if key.endswith("mel_basis"))
    filters = [value for key, value in found.items() if key.endswith("filter")]
    model = Vocoder(replace(TINY, bwe_n_fft=basis.shape[-1], bwe_mel_bins=mels.shape[0], bwe_hop_length=80, bwe=replace(
        TINY.bwe, upsample_rates=(160,), upsample_kernels=(160,))), rngs=nnx.Rngs(0))  # fmt: skip
    autoencoders.set_filters(model)
    assert filters
    for stored in filters:
        np.testing.assert_allclose(autoencoders.low_pass(), stored.ravel(), rtol=2**-8, atol=1e-6)
    np.testing.assert_allclose(model.bwe_mel.forward_basis[:, 0].T, basis[:, 0], rtol=2**-8, atol=1e-5)
    np.testing.assert_allclose(model.bwe_mel.mel_basis[...].T, mels, rtol=2**-8, atol=1e-6)


def test_statistics_over_batches_are_those_of_all():
    values = np.random.default_rng(0).normal(2, 3, size=(7, 5, 4))
    mean, std = autoencoders.measured_statistics([values[:3], values[3:]])
    np.testing.assert_allclose(mean, values.reshape(-1, 4).mean(0), rtol=1e-12)
    np.testing.assert_allclose(std, values.reshape(-1, 4).std(0), rtol=1e-9)
