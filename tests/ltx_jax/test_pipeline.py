"""The pipeline on the miniature release: the reference's runs, seeds, and what is refused."""

import warnings

import numpy as np
import pytest
from einops import rearrange
from safetensors.flax import load_file

from hlwq_jax import QuantizedLinear
from ltx_jax import CheckpointError, Settings, load_pipeline, save_mp4
from ltx_jax.lora import LoraLinear
from ltx_jax.media import describe
from ltx_jax.stack import Stack

# A whole run in float32, as the reference's README suggests.
TOLERANCE = 2e-4
PROMPT = "A small orange cat walks slowly across a wooden table while soft piano music plays."
SMALL = {"width": 96, "height": 64, "num_frames": 17, "seed": 3}  # the shapes of the first reference run


@pytest.fixture(scope="module")
def pipe(mini_checkpoint):
    return load_pipeline(mini_checkpoint)


@pytest.fixture(scope="module")
def run_a(mini_release):
    return load_file(mini_release / "reference/gen_a_distilled.safetensors")


@pytest.fixture(scope="module")
def clip(pipe, run_a):
    """The reference's first run from its noise, and its steps."""
    steps = {}

    def keep(stage, step, sigma, tokens, denoised):
        steps[step] = denoised

    clip = pipe(prompt=PROMPT, width=96, height=64, num_frames=17, noise=run_a, callback=keep)
    return clip, steps


def test_the_transformer_stays_packed_and_stacked(pipe, clip):
    transformer = pipe.model("transformer")
    assert [type(entry) for entry in transformer.blocks] == [Stack]
    layer = transformer.blocks[0].layer.video.self_attn.to_q
    assert isinstance(layer, QuantizedLinear)
    assert layer.lo.get_value().dtype == np.uint32
    assert layer.lo.get_value().shape == (2, 256, 256 // 8)


def test_every_step_agrees_with_the_reference(clip, run_a):
    steps = clip[1]
    assert sorted(steps) == list(range(8))
    for step, denoised in steps.items():
        np.testing.assert_allclose(denoised.video, run_a[f"step{step}.video_x0"], atol=TOLERANCE, rtol=0)
        np.testing.assert_allclose(denoised.audio, run_a[f"step{step}.audio_x0"], atol=TOLERANCE, rtol=0)


def test_latents_frames_and_waveform_agree_with_the_reference(clip, run_a):
    clip = clip[0]
    video = rearrange(clip.latents.video, "b f h w c -> b c f h w")
    np.testing.assert_allclose(video, run_a["out.video_latent"], atol=TOLERANCE, rtol=0)
    audio = rearrange(clip.latents.audio, "b t n c -> b c t n")
    np.testing.assert_allclose(audio, run_a["out.audio_latent"], atol=TOLERANCE, rtol=0)
    # Truncation to 8 bits turns the smallest difference into a level, rarely.
    levels = np.abs(clip.frames.astype(int) - np.asarray(run_a["out.frames"]).astype(int))
    assert levels.max() <= 1
    assert (levels > 0).mean() < 0.01
    np.testing.assert_allclose(clip.waveform.T, run_a["out.waveform"], atol=TOLERANCE, rtol=0)


def test_a_saved_clip_has_the_facts_of_its_settings(clip, tmp_path):
    save_mp4(tmp_path / "clip.mp4", clip[0])
    facts = describe(tmp_path / "clip.mp4")
    expected = {"num_frames": 17, "width": 96, "height": 64, "fps": 24.0, "sample_rate_hz": 48000, "audio_channels": 2}
    assert {name: facts[name] for name in expected} == expected


def test_seeds_decide_the_clip(pipe, clip):
    prompt = pipe.encode_prompt(PROMPT)

    def latents(seed):
        return np.asarray(pipe.generate_latents(Settings(**SMALL | {"seed": seed}), prompt=prompt).video)

    np.testing.assert_array_equal(latents(3), latents(3))
    assert np.abs(latents(3) - latents(4)).max() > 0.1


def test_loras_lie_beside_packed_weights(mini_checkpoint, mini_release):
    path = mini_release / "lora/ltx-2.3-mini-distilled-lora.safetensors"
    adapted = load_pipeline(mini_checkpoint, loras=[(path, 0.75)]).model("transformer")
    layer = adapted.blocks[0].layer.video.self_attn.to_q
    assert isinstance(layer, LoraLinear)
    assert isinstance(layer.base, QuantizedLinear)
    assert layer.a[0].get_value().shape == (2, 8, 256)
    assert isinstance(adapted.blocks[0].layer.audio.ff.proj_in, QuantizedLinear)  # not in the file


def test_long_prompts_are_cut_with_a_warning_and_empty_ones_allowed(pipe):
    with pytest.warns(UserWarning, match="longer than 64 tokens.*cut off"):
        pipe.encode_prompt("a cat " * 100)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pipe.encode_prompt("").video.shape == (1, 64, 256)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"width": 100, "height": 64}, "width must be a multiple of 32.*try 96 or 128"),
        ({"pipeline": "two-stage", "width": 96, "height": 64}, "multiple of 64 for two stages"),
        ({"num_frames": 16}, "try 9 or 17"),
        ({"stg_blocks": (7,), "video_stg_scale": 1.0}, "block 7"),
        ({"steps": 3}, "8 fixed steps"),
    ],
)
def test_settings_that_do_not_fit_say_what_would(pipe, settings, message):
    with pytest.raises(ValueError, match=message):
        pipe.generate_latents(Settings(**SMALL | settings), prompt=pipe.encode_prompt(""))


def test_noise_that_does_not_fit_says_what_would(pipe, run_a):
    prompt = pipe.encode_prompt("")
    with pytest.raises(ValueError, match=r"in.video_noise has shape \[1, 18, 16\]; these settings need \[1, 12, 16\]"):
        pipe.generate_latents(Settings(**SMALL | {"num_frames": 9}), prompt=prompt, noise=run_a)
    noise = {"in.video_noise": run_a["in.video_noise"]}
    with pytest.raises(ValueError, match=r"no in\.audio_noise"):
        pipe.generate_latents(Settings(**SMALL), prompt=prompt, noise=noise)


def test_missing_components_are_named(mini_checkpoint, tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint folder"):
        load_pipeline(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="upscaler_spatial_x1_5"):
        load_pipeline(mini_checkpoint).model("upscaler_spatial_x1_5")
