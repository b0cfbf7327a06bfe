"""The audio autoencoder against the reference, its sizes at the released configuration, and other configurations."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange
from flax import nnx

from convert.mapping import plan
from convert.tables.audio_vae import AUDIO_VAE, SKIP
from ltx_jax.config import AudioVAEConfig, ConfigError
from ltx_jax.mel import mel_spectrogram
from ltx_jax.models.audio_vae import AudioVAE, pixel_norm
from tests.conftest import fill, read_prefix

# One pass of some twenty convolutions in float32: rounding of other summation orders, as the fixtures' README suggests.
TOLERANCE = 5e-5

RELEASED = AudioVAEConfig(
    audio_channels=2,
    latent_channels=8,
    base_channels=128,
    channel_multipliers=(1, 2, 4),
    num_res_blocks=2,
    mel_bins=64,
    sample_rate_hz=16000,
    n_fft=1024,
    hop_length=160,
    win_length=1024,
    mel_fmin_hz=0.0,
    mel_fmax_hz=8000.0,
)
TINY = replace(RELEASED, audio_channels=1, latent_channels=3, base_channels=4, channel_multipliers=(2, 1), mel_bins=8)


@pytest.fixture(scope="module")
def audio(reference) -> dict[str, np.ndarray]:
    return reference("audio")


@pytest.fixture(scope="module")
def config(ltx_config) -> AudioVAEConfig:
    return AudioVAEConfig.from_metadata(ltx_config["audio_vae"])


@pytest.fixture(scope="module")
def vae(config, ltx_dir) -> Any:
    """Filled from the published names, each used once, each parameter filled once."""
    tensors = read_prefix(ltx_dir / "checkpoint.safetensors", "audio_vae.")
    return fill(lambda: AudioVAE(config, rngs=nnx.Rngs(0)), AUDIO_VAE, tensors)


@pytest.fixture(scope="module")
def tiny() -> AudioVAE:
    """Random weights."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: AudioVAE(TINY, rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(0)
    return nnx.merge(graphdef, jax.tree.map(lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape), x.dtype), state))


@nnx.jit
def encode(vae, mel):
    return vae.encode(mel)


@nnx.jit
def decode(vae, latents):
    return vae.decode(latents)


def last(array: np.ndarray) -> jax.Array:
    """Channels last."""
    return jnp.asarray(rearrange(array, "b c ... -> b ... c"))


@pytest.mark.parametrize("case", ["encode", "encode2"])
def test_encode_agrees_with_the_reference(vae, audio, case):
    ours = encode(vae, last(audio[f"{case}.in.mel"]))
    np.testing.assert_allclose(ours, last(audio[f"{case}.out.latent"]), atol=TOLERANCE, rtol=0)


def test_encoding_a_waveform_agrees_with_the_reference(vae, config, audio):
    ours = encode(vae, mel_spectrogram(last(audio["mel.wav16k.in"]), config))
    np.testing.assert_allclose(ours, last(audio["encode_waveform.out.latent"]), atol=TOLERANCE, rtol=0)


def test_decode_agrees_with_the_reference(vae, audio):
    ours = decode(vae, last(audio["decode.in.latent"]))
    np.testing.assert_allclose(ours, last(audio["decode.out.mel"]), atol=TOLERANCE, rtol=0)


def test_parameters_at_the_released_size_are_those_of_the_published_file():
    state = nnx.to_flat_state(nnx.state(nnx.eval_shape(lambda: AudioVAE(RELEASED, rngs=nnx.Rngs(0)))))
    counts = {}
    for path, variable in state:
        tensors, parameters = counts.get(path[0], (0, 0))
        counts[path[0]] = (tensors + 1, parameters + int(np.prod(variable.get_value().shape)))
    assert counts == {"encoder": (44, 21_333_008), "decoder": (56, 31_915_138), "statistics": (2, 256)}


def test_extra_statistics_are_left_to_the_skip_list(config):
    state = nnx.to_flat_state(nnx.state(nnx.eval_shape(lambda: AudioVAE(config, rngs=nnx.Rngs(0)))))
    target = {".".join(map(str, path)): variable.get_value().shape for path, variable in state}
    name = "per_channel_statistics.mean-of-stds"
    assert plan(AUDIO_VAE, {name: (32,)}, target).unknown == [name]
    assert SKIP == ("per_channel_statistics.*",)


@pytest.mark.parametrize(
    ("multipliers", "num_res_blocks", "frames", "time"),
    [((1,), 1, 5, 5), ((2, 1), 2, 6, 3), ((1, 2), 1, 7, 4), ((1, 1, 3), 3, 13, 4), ((1, 2, 2, 4), 1, 17, 3)],
)
def test_sizes_follow_the_levels(multipliers, num_res_blocks, frames, time):
    config = replace(TINY, channel_multipliers=multipliers, num_res_blocks=num_res_blocks, mel_bins=24)
    graphdef, state = nnx.split(nnx.eval_shape(lambda: AudioVAE(config, rngs=nnx.Rngs(0))))
    mel = jax.ShapeDtypeStruct((2, frames, 24, 1), jnp.float32)
    latents = jax.eval_shape(lambda s, x: nnx.merge(graphdef, s).encode(x), state, mel)
    assert latents.shape == (2, time, 24 // config.scale, 3)
    decoded = jax.eval_shape(lambda s, x: nnx.merge(graphdef, s).decode(x), state, latents)
    assert decoded.shape == (2, config.scale * time - (config.scale - 1), 24, 1)


def test_bfloat16_in_is_bfloat16_out(config):
    graphdef, state = nnx.split(nnx.eval_shape(lambda: AudioVAE(config, rngs=nnx.Rngs(0))))
    half = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), state)
    for dtype in (jnp.bfloat16, jnp.float32):
        for method, shape in (("encode", (1, 9, 64, 2)), ("decode", (1, 3, 16, 2))):
            out = jax.eval_shape(
                lambda s, x, method=method: getattr(nnx.merge(graphdef, s), method)(x),
                half,
                jax.ShapeDtypeStruct(shape, dtype),
            )
            assert out.dtype == dtype, (method, dtype)


def test_a_latent_frame_sees_no_later_mel_frame(tiny):
    mel = jax.random.normal(jax.random.key(0), (2, 9, 8, 1))
    changed = encode(tiny, mel.at[:, 5:].add(1.0))
    same = np.isclose(encode(tiny, mel), changed, atol=1e-6).all(axis=(0, 2, 3))
    assert same.tolist() == [True, True, True, False, False]  # latent frame t ends with mel frame 2 t


def test_a_mel_frame_sees_no_later_latent_frame(tiny):
    latents = jax.random.normal(jax.random.key(1), (2, 4, 4, 3))
    changed = decode(tiny, latents.at[:, 2:].add(1.0))
    same = np.isclose(decode(tiny, latents), changed, atol=1e-6).all(axis=(0, 2, 3))
    assert same.tolist() == [True, True, True, False, False, False, False]


def test_samples_of_a_batch_do_not_mix(tiny):
    latents = jax.random.normal(jax.random.key(2), (2, 4, 4, 3))
    changed = decode(tiny, latents.at[1].add(1.0))
    np.testing.assert_allclose(changed[0], decode(tiny, latents)[0], atol=1e-6)


def test_statistics_are_indexed_channel_first(tiny):
    """Of channel and bin, the bin is fastest: as in an audio token."""
    tiny = nnx.clone(tiny)
    tiny.statistics.mean[...] = jnp.arange(12.0)
    tiny.statistics.std[...] = jnp.full(12, 2.0)
    tokens = rearrange(tiny.statistics.normalise(jnp.zeros((1, 1, 4, 3))), "b t bins c -> b t (c bins)")
    np.testing.assert_array_equal(tokens[0, 0], -jnp.arange(12.0) / 2)
    x = jax.random.normal(jax.random.key(3), (1, 2, 4, 3))
    np.testing.assert_allclose(tiny.statistics.unnormalise(tiny.statistics.normalise(x)), x, atol=1e-5)


def test_pixel_norm_has_the_eps_of_the_audio_autoencoder():
    """1e-6, where the video autoencoder has 1e-8: it shows on small values."""
    x = jnp.full((1, 1, 1, 4), 1e-3)
    np.testing.assert_allclose(pixel_norm(x), 1e-3 / np.sqrt(2e-6), rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attn_resolutions": [16]}, "attn_resolutions"),
        ({"norm_type": "group"}, "norm_type"),
        ({"causality_axis": "none"}, "causality_axis"),
        ({"out_ch": 1}, "out_ch"),
        ({"ch_mult": [1] * 8}, "64 mel bins, which 8 levels cannot halve"),
    ],
)
def test_other_networks_are_refused(ltx_config, change, message):
    section = ltx_config["audio_vae"]
    params = section["model"]["params"]
    changed = {**section, "model": {"params": {**params, "ddconfig": {**params["ddconfig"], **change}}}}
    with pytest.raises(ConfigError, match=message):
        AudioVAEConfig.from_metadata(changed)
