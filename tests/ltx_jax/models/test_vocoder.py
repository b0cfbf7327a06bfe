"""The vocoder against the reference in two configurations, its sizes at the released one, and other configurations."""

import json
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import load_file

from convert.tables.audio_vae import AUDIO_VAE
from convert.tables.vocoder import SKIP, VOCODER
from ltx_jax.config import AudioVAEConfig, ConfigError, GeneratorConfig, VocoderConfig
from ltx_jax.mel import resample
from ltx_jax.models.audio_vae import AudioVAE
from ltx_jax.models.vocoder import FILTER_TAPS, Vocoder, antialiased_snake, banded
from tests.conftest import fill, read_prefix

# One pass in float32, as the fixtures' README suggests; a whole run from its latents, as the mini release's does.
TOLERANCE = 5e-5
RUN_TOLERANCE = 2e-4

_KERNELS = {"resblock_kernels": (3, 7, 11), "resblock_dilations": ((1, 3, 5),) * 3}
RELEASED = VocoderConfig(
    audio_channels=2,
    mel_bins=64,
    base=GeneratorConfig(
        initial_channels=1536, upsample_rates=(5, 2, 2, 2, 2, 2), upsample_kernels=(11, 4, 4, 4, 4, 4), **_KERNELS
    ),
    bwe=GeneratorConfig(
        initial_channels=512, upsample_rates=(6, 5, 2, 2, 2), upsample_kernels=(12, 11, 4, 4, 4), **_KERNELS
    ),
    bwe_hop_length=80,
    bwe_n_fft=512,
    bwe_mel_bins=64,
    input_sample_rate_hz=16000,
    sample_rate_hz=48000,
)
# 10 samples a frame, of which the extension reads hops of 4 and makes 8: odd frame counts need padding.
TINY = replace(
    RELEASED,
    mel_bins=3,
    base=GeneratorConfig(
        initial_channels=8,
        upsample_rates=(5, 2),
        upsample_kernels=(7, 2),
        resblock_kernels=(3, 5),
        resblock_dilations=((1, 2), (3,)),
    ),
    bwe=GeneratorConfig(
        initial_channels=4,
        upsample_rates=(8,),
        upsample_kernels=(8,),
        resblock_kernels=(3,),
        resblock_dilations=((1,),),
    ),
    bwe_hop_length=4,
    bwe_n_fft=10,
    bwe_mel_bins=5,
    sample_rate_hz=32000,
)


class OneKey(nnx.Rngs):
    """The same key for every layer: the weights are replaced anyway, and counting keys is most of the time of
    `nnx.eval_shape` for a model of hundreds of layers."""

    def __init__(self):
        self.key = jax.random.key(0)

    def params(self) -> jax.Array:
        return self.key


def abstract(config: VocoderConfig) -> Vocoder:
    return nnx.eval_shape(lambda: Vocoder(config, rngs=OneKey()))


def filled(config: VocoderConfig, tensors: dict[str, np.ndarray]) -> Any:
    """Filled from the published names, each used once or listed as skipped, each parameter filled once."""
    used = {name: array for name, array in tensors.items() if name not in SKIP}
    assert len(tensors) - len(used) == len(SKIP)
    return fill(lambda: Vocoder(config, rngs=OneKey()), VOCODER, used)


@pytest.fixture(scope="module")
def audio(reference) -> dict[str, np.ndarray]:
    return reference("audio")


@pytest.fixture(scope="module")
def computed(ltx_config, ltx_dir, audio) -> dict[str, jax.Array]:
    """What the vocoder makes of the reference's mel in its two halves, and what lies between."""
    config = VocoderConfig.from_metadata(ltx_config["vocoder"])
    vocoder = filled(config, read_prefix(ltx_dir / "checkpoint.safetensors", "vocoder."))
    waveform = nnx.jit(lambda vocoder, mel: vocoder.base_waveform(mel))(vocoder, last(audio["vocoder.in.mel"]))
    return {
        "mid.wav16k": waveform,
        "mid.bwe_mel": vocoder.bwe_mel(waveform),
        "mid.skip": resample(waveform, config.input_sample_rate_hz, config.sample_rate_hz, pad_mode="edge"),
        "out.wav48k": nnx.jit(lambda vocoder, waveform: vocoder.extend_bandwidth(waveform))(vocoder, waveform),
    }


@pytest.fixture(scope="module")
def tiny() -> Vocoder:
    """Random weights, among them filters and bases that would be zero."""
    graphdef, state = nnx.split(abstract(TINY))
    rng = np.random.default_rng(0)
    return nnx.merge(graphdef, jax.tree.map(lambda x: jnp.asarray(0.2 * rng.normal(size=x.shape), x.dtype), state))


@nnx.jit
def vocode(vocoder, mel):
    return vocoder(mel)


def last(array: np.ndarray) -> jax.Array:
    """Channels last."""
    return jnp.asarray(rearrange(array, "b c ... -> b ... c"))


def test_activation_agrees_with_the_reference(audio):
    taps = jnp.asarray(audio["snake.filter"][0, 0])
    alpha, beta = jnp.asarray(audio["snake.alpha"]), jnp.asarray(audio["snake.beta"])
    x = last(audio["snake.in"])
    ours = antialiased_snake(x, alpha=alpha, beta=beta, up_filter=taps, down_filter=taps)
    np.testing.assert_allclose(ours, last(audio["snake.out"]), atol=2e-6, rtol=0)  # sums of twelve, twice


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 50])
def test_activation_filters_at_twice_the_rate_with_edges_held(length):
    """By definition, in numpy, with filters that are not symmetric."""
    rng = np.random.default_rng(length)
    x = rng.normal(size=length)
    up, down = rng.normal(size=(2, FILTER_TAPS)) * 0.3
    alpha, beta = 0.3, -0.2

    padded = np.pad(x, 5, mode="edge")
    stuffed = np.zeros(2 * len(padded) - 1)
    stuffed[::2] = padded
    doubled = 2 * np.convolve(stuffed, up)[15 : 15 + 2 * length]
    bent = doubled + np.sin(np.exp(alpha) * doubled) ** 2 / (np.exp(beta) + 1e-9)
    expected = np.correlate(np.pad(bent, (5, 6), mode="edge"), down)[::2]

    ours = antialiased_snake(
        jnp.asarray(x, jnp.float32)[None, :, None],
        alpha=jnp.full(1, alpha),
        beta=jnp.full(1, beta),
        up_filter=jnp.asarray(up, jnp.float32),
        down_filter=jnp.asarray(down, jnp.float32),
    )
    np.testing.assert_allclose(ours[0, :, 0], expected, atol=1e-5)


def test_rows_of_a_banded_matrix_start_two_columns_apart():
    matrix = np.asarray(banded(jnp.arange(1.0, 13.0), 3))
    expected = np.zeros((3, 16))
    for row in range(3):
        expected[row, 2 * row : 2 * row + 12] = np.arange(1.0, 13.0)
    np.testing.assert_array_equal(matrix, expected)


@pytest.mark.parametrize("name", ["mid.wav16k", "mid.bwe_mel", "mid.skip", "out.wav48k"])
def test_vocoder_agrees_with_the_reference(computed, audio, name):
    np.testing.assert_allclose(computed[name], last(audio[f"vocoder.{name}"]), atol=TOLERANCE, rtol=0)


def test_residual_agrees_with_the_reference_where_nothing_is_clamped(computed, audio):
    residual = computed["out.wav48k"] - computed["mid.skip"]
    inside = jnp.abs(computed["out.wav48k"]) < 1
    assert inside.mean() > 0.5
    np.testing.assert_allclose(residual[inside], last(audio["vocoder.mid.residual"])[inside], atol=TOLERANCE, rtol=0)


def test_the_reference_waveform_is_clamped_before_bandwidth_extension(computed):
    assert float(jnp.abs(computed["mid.wav16k"]).max()) == 1.0


def test_latents_to_waveform_agrees_with_the_reference_of_the_mini_release(mini_release):
    """Weights in bfloat16, and another size of the extension's transform."""
    path = mini_release / "LTX-2.3-22B-PolarQuant-Q5/polarquant/bf16/ltx23_bf16.safetensors"
    run = load_file(mini_release / "reference/gen_a_distilled.safetensors")
    with safe_open(path, "np") as file:
        metadata = json.loads(file.metadata()["config"])
    audio_config = AudioVAEConfig.from_metadata(metadata["audio_vae"])
    vae = fill(lambda: AudioVAE(audio_config, rngs=OneKey()), AUDIO_VAE, read_prefix(path, "audio_vae."))
    config = VocoderConfig.from_metadata(metadata["vocoder"], mel_bins=audio_config.mel_bins)
    vocoder = filled(config, read_prefix(path, "vocoder."))
    latents = last(run["out.audio_latent"])

    waveform = nnx.jit(lambda vae, vocoder, latents: vocoder(vae.decode(latents)))(vae, vocoder, latents)

    mel_frames = audio_config.scale * latents.shape[1] - (audio_config.scale - 1)
    assert waveform.shape == (1, 480 * mel_frames, 2)
    np.testing.assert_allclose(waveform[0], rearrange(run["out.waveform"], "c n -> n c"), atol=RUN_TOLERANCE, rtol=0)


def test_parameters_at_the_released_size_are_those_of_the_published_file():
    counts = {}
    for path, variable in nnx.to_flat_state(nnx.state(abstract(RELEASED))):
        tensors, parameters = counts.get(path[0], (0, 0))
        counts[path[0]] = (tensors + 1, parameters + int(np.prod(variable.get_value().shape)))
    inverse_basis = (1, 514 * 512)  # published as well, and skipped
    assert counts == {
        "base": (667, 115_077_648),
        "bwe": (557, 13_464_600),
        "bwe_mel": (3 - inverse_basis[0], 542_784 - inverse_basis[1]),
    }


@pytest.mark.parametrize("frames", [1, 5])
def test_length_follows_frames_and_rates(tiny, frames):
    mel = jax.random.normal(jax.random.key(1), (2, frames, 3, 2))
    waveform = vocode(tiny, mel)
    assert waveform.shape == (2, 20 * frames, 2)
    assert waveform.dtype == jnp.float32
    assert 0 < float(jnp.abs(waveform).max()) <= 1


def test_bfloat16_inputs_and_weights_are_computed_in_float32(tiny):
    mel = jax.random.normal(jax.random.key(1), (2, 5, 3, 2)).astype(jnp.bfloat16)
    graphdef, state = nnx.split(tiny)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), state)
    widened = jax.tree.map(lambda x: x.astype(jnp.float32), half)
    ours = vocode(nnx.merge(graphdef, half), mel)
    expected = vocode(nnx.merge(graphdef, widened), mel.astype(jnp.float32))
    assert ours.dtype == jnp.float32
    np.testing.assert_allclose(ours, expected, atol=1e-6)


def test_samples_of_a_batch_do_not_mix(tiny):
    mel = jax.random.normal(jax.random.key(2), (2, 5, 3, 2))
    np.testing.assert_allclose(vocode(tiny, mel.at[1].add(1.0))[0], vocode(tiny, mel)[0], atol=1e-6)


def test_the_extension_s_mel_looks_back_only(tiny):
    waveform = jax.random.normal(jax.random.key(3), (1, 16, 2))
    changed = tiny.bwe_mel(waveform.at[:, 8:].add(1.0))
    same = np.isclose(tiny.bwe_mel(waveform), changed).all(axis=(0, 2, 3))
    assert same.tolist() == [True, True, False, False]


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        ("vocoder", {"activation": "snake"}, "activation"),
        ("vocoder", {"use_tanh_at_final": True}, "use_tanh_at_final"),
        ("vocoder", {"upsample_kernel_sizes": [11, 4]}, "6 upsample rates and 2 kernels"),
        ("bwe", {"upsample_initial_channel": 40}, "40 channels"),
        ("bwe", {"win_size": 400}, "win_size 400"),
        ("bwe", {"output_sampling_rate": 44100}, "16000 Hz to 44100 Hz, but its bwe makes 240 samples from 80"),
    ],
)
def test_other_networks_are_refused(ltx_config, section, change, message):
    metadata = ltx_config["vocoder"]
    with pytest.raises(ConfigError, match=message):
        VocoderConfig.from_metadata({**metadata, section: {**metadata[section], **change}})
