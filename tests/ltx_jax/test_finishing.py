"""What is done to latents and clips that are there: upscaled, refined, decoded; and previews that are refined."""

import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from convert import convert
from ltx_jax import Settings, load_pipeline
from ltx_jax.clip import Latents
from ltx_jax.latents import latents_size, read_latents, save_latents
from ltx_jax.media import write_mp4
from ltx_jax.settings import PREVIEW_SIGMAS
from ltx_jax.sound import read_audio
from ltx_jax.video import read_video

LEVELS = (1.0, 0.5, 0.0)


@pytest.fixture(scope="module")
def pipe(mini_checkpoint):
    return load_pipeline(mini_checkpoint)


@pytest.fixture(scope="module")
def prompt(pipe):
    return pipe.encode_prompt("a cat on a table")


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    path = tmp_path_factory.mktemp("given") / "clip.mp4"
    frames = np.random.default_rng(0).integers(0, 256, (9, 64, 64, 3), np.uint8)
    wave = (0.3 * np.sin(np.arange(18_000)[:, None] * [0.05, 0.07])).astype(np.float32)
    write_mp4(path, frames, fps=24.0, waveform=wave, sample_rate_hz=48_000)
    return path


@pytest.fixture(scope="module")
def kept(pipe, prompt, tmp_path_factory):
    """Latents of a clip of 64 x 64 with 9 frames, in a file."""
    latents = pipe.generate_latents(Settings(width=64, height=64, num_frames=9, sigmas=LEVELS), prompt=prompt)
    path = tmp_path_factory.mktemp("kept") / "latents.safetensors"
    save_latents(path, latents, fps=25.0)
    return path, latents


# Latents on the disk


def test_latents_come_back_from_the_disk(pipe, kept):
    path, latents = kept
    back = read_latents(path, pipe.configs)
    np.testing.assert_array_equal(back.video, latents.video)
    np.testing.assert_array_equal(back.audio, latents.audio)
    size = latents_size(path, (8, 32, 32), fps=None)
    assert (size.num_frames, size.height, size.width, size.fps) == (9, 64, 64, 25.0)


def test_latents_are_decoded_without_a_prompt(pipe, kept):
    path, latents = kept
    made = pipe(latents=path)
    np.testing.assert_array_equal(made.frames, pipe.frames(latents))
    np.testing.assert_array_equal(made.waveform, pipe.decode_audio(latents.audio))
    assert made.fps == 25.0


def test_latents_that_do_not_fit_are_refused(pipe, kept, tmp_path):
    path, _ = kept
    with pytest.raises(ValueError, match="leave out width, height and num_frames"):
        pipe.check(Settings(latents=path, width=128))
    arrays = load_file(path)
    for name, change, message in (
        ("other", {"out.video_latent": arrays["out.video_latent"][:, 1:]}, "of another model"),
        ("flat", {"out.video_latent": arrays["out.video_latent"][0]}, "one clip is 5 and 4 axes"),
        ("less", {"out.video_latent": None}, "cannot be read as latents"),
    ):
        changed = {key: np.ascontiguousarray(v) for key, v in (arrays | change).items() if v is not None}
        save_file(changed, tmp_path / f"{name}.safetensors", {"fps": "25.0"})
        with pytest.raises(ValueError, match=message):
            pipe(latents=tmp_path / f"{name}.safetensors")
    save_file(arrays, tmp_path / "slow.safetensors")
    with pytest.raises(ValueError, match="give --fps"):
        pipe(latents=tmp_path / "slow.safetensors")
    assert pipe.check(Settings(latents=tmp_path / "slow.safetensors", fps=8.0)).fps == 8.0


# Upscaling


def test_a_clip_is_upscaled_and_keeps_its_sound(pipe, clip):
    made = pipe(video=clip, upscale=2.0)
    source = read_video(clip)
    expected = pipe.upscale(pipe.encode_video(source.frames, height=64, width=64))
    np.testing.assert_array_equal(made.frames, pipe.frames(Latents(video=expected, audio=jnp.zeros((1, 0, 1, 1)))))
    assert made.frames.shape == (9, 128, 128, 3)
    np.testing.assert_array_equal(made.waveform, read_audio(clip)[0][: len(made.waveform)])
    assert len(made.waveform) == 9 * 2000


def test_a_silent_clip_stays_silent(pipe, clip, tmp_path):
    write_mp4(tmp_path / "silent.mp4", read_video(clip).frames, fps=24.0)
    assert len(pipe(video=tmp_path / "silent.mp4", upscale=2.0).waveform) == 0


def test_twice_the_frames_are_twice_as_fast(pipe, kept):
    path, latents = kept
    made = pipe(latents=path, upscale_time=True)
    assert made.frames.shape == (17, 64, 64, 3)
    assert made.fps == 50.0
    longer = pipe.upscale(latents.video, "upscaler_temporal_x2")
    np.testing.assert_array_equal(made.frames, pipe.frames(Latents(video=longer, audio=latents.audio)))


def test_what_is_made_is_upscaled_in_space_and_time(pipe, prompt, kept):
    _, latents = kept
    settings = Settings(width=64, height=64, num_frames=9, sigmas=LEVELS, upscale=2.0, upscale_time=True)
    made = pipe.generate_latents(settings, prompt=prompt)
    larger = pipe.upscale(pipe.upscale(latents.video), "upscaler_temporal_x2")
    np.testing.assert_array_equal(made.video, larger)
    finished = settings.finished(pipe.check(settings))
    assert (finished.height, finished.width, finished.num_frames, finished.fps) == (128, 128, 17, 48.0)


@pytest.fixture(scope="module")
def rational_checkpoint(mini_release, tmp_path_factory):
    """The miniature release with an upscaler of x1.5, of random weights, beside the others."""
    folder = tmp_path_factory.mktemp("rational")
    package = folder / "package"
    shutil.copytree(mini_release / "LTX-2.3-22B-PolarQuant-Q5", package)
    source = next((package / "upscalers").glob("*spatial*"))
    with safe_open(source, "numpy") as file:
        config = json.loads(file.metadata()["config"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    conv = next(name for name in tensors if name.startswith("upsampler") and name.endswith("weight"))
    middle = config["mid_channels"]
    stem = conv.rsplit(".", 2)[0]
    for name in [name for name in tensors if name.startswith(stem)]:
        tensors.pop(name)
    random = np.random.default_rng(0)
    kind = tensors["initial_conv.weight"].dtype
    tensors["upsampler.conv.weight"] = (0.05 * random.standard_normal((9 * middle, middle, 3, 3))).astype(kind)
    tensors["upsampler.conv.bias"] = np.zeros(9 * middle, kind)
    row = np.array([1, 4, 6, 4, 1], np.float32) / 16
    tensors["upsampler.blur_down.kernel"] = np.outer(row, row)[None, None].astype(kind)
    config |= {"spatial_scale": 1.5, "rational_resampler": True}
    save_file(
        tensors, package / "upscalers" / "ltx-2.3-spatial-upscaler-x1.5.safetensors", {"config": json.dumps(config)}
    )
    convert(package, folder / "checkpoint", gemma=None)
    return folder / "checkpoint"


def test_one_and_a_half_times_the_size(rational_checkpoint, kept):
    path, _ = kept
    made = load_pipeline(rational_checkpoint)(latents=path, upscale=1.5)
    assert made.frames.shape == (9, 96, 96, 3)


def test_an_upscaler_that_is_not_there_is_named(pipe, kept):
    with pytest.raises(ValueError, match="has no upscaler_spatial_x1_5"):
        pipe(latents=kept[0], upscale=1.5)


# Refining


def test_a_preview_and_its_refinement_are_both_stages_of_one_clip(pipe, prompt, tmp_path):
    size = {"width": 128, "height": 128, "num_frames": 9, "seed": 4}
    whole = pipe.generate_latents(Settings(**size, pipeline="two-stage", sigmas=PREVIEW_SIGMAS), prompt=prompt)
    small = pipe.generate_latents(Settings(**size, preview=True), prompt=prompt)
    assert small.video.shape[1:4] == (2, 2, 2)
    save_latents(tmp_path / "preview.safetensors", small, fps=24.0)
    refined = Settings(seed=4, latents=tmp_path / "preview.safetensors", refine=True)
    made = pipe.generate_latents(refined, prompt=prompt)
    np.testing.assert_array_equal(made.video, whole.video)
    np.testing.assert_array_equal(made.audio, whole.audio)


def test_a_clip_is_refined_under_its_own_sound(pipe, prompt, clip):
    seen = []
    made = pipe(
        prompt=prompt,
        video=clip,
        refine=True,
        stage_2_sigmas=(0.6, 0.3, 0.0),
        callback=lambda stage, step, sigma, tokens, denoised: seen.append((stage, tokens)),
    )
    assert made.frames.shape == (9, 128, 128, 3)
    np.testing.assert_array_equal(made.waveform, read_audio(clip)[0][: len(made.waveform)])
    assert [stage for stage, _ in seen] == [2, 2]
    np.testing.assert_array_equal(seen[0][1].audio, seen[1][1].audio)  # heard, not changed


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"video": Path("x.mp4")}, "say what to do"),
        ({"refine": True}, "refine works on latents or on a clip"),
        ({"upscale": 3.0}, "1.5 or 2"),
        ({"video": Path("x.mp4"), "latents": Path("x"), "upscale": 2.0}, "give one"),
        ({"latents": Path("x"), "upscale": 2.0, "image": ("x.png",)}, "image would do nothing"),
        ({"preview": True, "upscale": 2.0}, "go with a later run"),
        ({"video": Path("x.mp4"), "retake": "0:1", "preview": True}, "retake works at one size"),
        ({"sound_only": True, "upscale_time": True}, "upscale_time cannot be used"),
    ],
)
def test_work_that_excludes_each_other_is_refused(pipe, settings, message):
    with pytest.raises(ValueError, match=message):
        pipe.check(Settings(**settings))
