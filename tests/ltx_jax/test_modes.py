"""Each mode by what it promises: what is given is in the clip, the rest follows it."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from ltx_jax import Prompt, Settings, load_pipeline
from ltx_jax.clip import scene, start
from ltx_jax.conditioning import LatentState
from ltx_jax.conditions import ImageCondition, States, reference, sound
from ltx_jax.denoise import Denoiser, Pair
from ltx_jax.lora import Lora, LoraError, reference_scales
from ltx_jax.media import read_audio, read_video, write_mp4, write_wav
from ltx_jax.modes import parse_image, size_of
from tests.conftest import STREAMED_ATOL

SMALL = {"width": 96, "height": 64, "num_frames": 17, "seed": 3}
LEVELS = (1.0, 0.6, 0.2, 0.0)
FPS = 24.0


@pytest.fixture(scope="module")
def pipe(mini_checkpoint):
    return load_pipeline(mini_checkpoint)


@pytest.fixture(scope="module")
def prompt(pipe):
    return pipe.encode_prompt("a cat on a table")


@pytest.fixture(scope="module")
def make(pipe, prompt):
    """`make(**settings)`: latents of a small clip in three steps."""

    def latents(*, image=None, conditions=(), callback=None, pipe=pipe, **settings):
        chosen = Settings(**{**SMALL, "sigmas": LEVELS, **settings})
        return pipe.generate_latents(
            chosen, prompt=prompt, negative=prompt, image=image, conditions=conditions, callback=callback
        )

    return latents


@pytest.fixture(scope="module")
def frames():
    return np.random.default_rng(0).integers(0, 256, (17, 64, 96, 3), np.uint8)


@pytest.fixture(scope="module")
def wave():
    return (0.3 * np.sin(np.arange(34_000)[:, None] * [0.05, 0.07])).astype(np.float32)


@pytest.fixture(scope="module")
def clip(frames, wave, tmp_path_factory):
    path = tmp_path_factory.mktemp("given") / "clip.mp4"
    write_mp4(path, frames, fps=FPS, waveform=wave, sample_rate_hz=48_000)
    return path


# Images


def test_the_first_frame_is_the_image_and_keyframes_leave_the_size_alone(pipe, make, frames):
    image = ImageCondition(image=frames[0])
    plain, made = make(), make(image=[image, ImageCondition(image=frames[5], frame=-1, strength=0.8)])
    assert made.video.shape == plain.video.shape
    np.testing.assert_array_equal(made.video[:, :1], pipe.encode_image(image, height=64, width=96))
    assert np.abs(made.video - plain.video)[:, 1:].max() > 1e-3


def test_keyframes_pull_the_frame_that_they_are_placed_at(make, frames):
    at = {frame: make(image=[ImageCondition(image=frames[5], frame=frame)]) for frame in (8, 16)}
    assert np.abs(at[8].video - at[16].video).max() > 1e-3


def test_interpolation_appends_the_first_image_too(pipe, make, frames):
    replaced = make(image=frames[0])
    appended = make(image=frames[0], interpolate=True)
    latents = pipe.encode_image(ImageCondition(image=frames[0], crf=33), height=64, width=96)
    np.testing.assert_array_equal(replaced.video[:, :1], latents)
    assert np.abs(appended.video[:, :1] - latents).max() > 1e-3


def test_images_are_named_with_frame_and_strength(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (4, 4)).save("at@home.png")
    assert parse_image("at@home.png") == (parse_image("at@home.png")[0], 0, None)
    assert [parse_image(f"at@home.png@{place}")[1:] for place in ("16", "-1:0.5")] == [(16, None), (-1, 0.5)]
    assert str(parse_image("b.png@3")[0]) == "b.png"


def test_a_frame_outside_of_the_clip_is_refused(make, frames):
    with pytest.raises(ValueError, match=r"for frame 17, but the clip has frames 0 to 16"):
        make(image=[ImageCondition(image=frames[0], frame=17)])


# Sound


def test_a_clip_keeps_its_sound_and_follows_it(pipe, make, wave, tmp_path):
    write_wav(tmp_path / "sound.wav", wave, 48_000)
    given = make(audio=tmp_path / "sound.wav")
    other = make(conditions=[sound(wave[::-1].copy(), 48_000)])
    read, rate = read_audio(tmp_path / "sound.wav")
    encoded = pipe.encode_audio(read, rate, num_latents=18, seconds=17 / 24)
    np.testing.assert_array_equal(given.audio, encoded)
    assert np.abs(given.video - other.video).max() > 1e-3
    kept, rate = pipe.sound(given, Settings(**SMALL, audio=tmp_path / "sound.wav"))
    assert rate == 48_000
    assert len(kept) == round(17 / 24 * rate)
    np.testing.assert_allclose(kept, wave[: len(kept)], atol=1e-4)


def test_sound_alone_has_no_frames(pipe, make):
    made = make(sound_only=True, num_frames=25)
    assert made.video.shape[1] == 0
    assert made.audio.shape[1] == round(25 / 24 * 25)
    assert pipe.frames(made).shape == (0, 64, 96, 3)


# Retake


def test_a_retake_changes_its_window_alone(pipe, make, clip):
    everything = {"video": clip, "width": None, "height": None, "num_frames": None}
    made = make(**everything, retake="0:0.3")
    source = pipe.encode_video(read_video(clip).frames, height=64, width=96)
    # Latent frames of 24 fps cover 0 to 1/24, to 9/24 and to 17/24 seconds: the last lies outside of the window.
    np.testing.assert_array_equal(made.video[:, 2:], source[:, 2:])
    assert all(np.abs(made.video[:, i] - source[:, i]).max() > 1e-2 for i in (0, 1))
    kept = make(**everything, retake="0:0.3", keep_video=True)
    np.testing.assert_array_equal(kept.video, source)
    assert np.abs(kept.audio - made.audio).max() > 1e-4
    silent = make(**everything, retake="0:0.3", keep_audio=True)
    np.testing.assert_array_equal(silent.audio[:, 9:], made.audio[:, 9:])
    assert np.abs(silent.audio[:, :6] - made.audio[:, :6]).max() > 1e-2


def test_a_window_outside_of_the_clip_is_refused(pipe, clip):
    settings = Settings(video=clip, retake="2:3")
    with pytest.raises(ValueError, match=r"starts at 2 s, but the clip lasts 0\.708 s"):
        pipe.check(settings)


# References of IC-LoRAs


def test_a_reference_guides_the_clip(make, frames):
    plain, guided = make(), make(conditions=[reference(frames)])
    assert guided.video.shape == plain.video.shape
    assert np.abs(guided.video - plain.video).max() > 1e-3


def test_without_attention_the_clip_does_not_see_its_reference(pipe, prompt, frames):
    """Of video alone: sound would still hear of the reference, and tell the clip."""
    settings = Settings(**SMALL, sigmas=LEVELS)
    grid = pipe.check(settings)
    stage = settings.stages(2, grid)[0]
    plain, _ = start(pipe.configs, grid, None, dtype=jnp.float32, sound_only=False)
    place = {a: reference(frames, attention=a)(scene(pipe, grid, stage)) for a in (0.0, 0.5, 1.0)}
    states = {a: seen(placed((plain, None))) for a, placed in place.items()}
    noise = jnp.asarray(np.random.default_rng(1).standard_normal(states[0.0].initial.shape, np.float32))

    def estimate(state: LatentState) -> np.ndarray:
        tokens = Pair(state.noised(noise[:, : state.initial.shape[1]]), None)
        predict = Denoiser(pipe.model("transformer"), (state, None), prompt, precision="highest")
        return np.asarray(predict(0, 1.0, tokens).video)

    assert plain is not None
    alone = estimate(plain)
    # As in one forward pass of float32: only the order of sums differs.
    np.testing.assert_allclose(estimate(states[0.0])[:, : grid.num_tokens], alone, atol=2e-5)
    weak, full = (np.abs(estimate(states[a])[:, : grid.num_tokens] - alone).max() for a in (0.5, 1.0))
    assert full > 1e-3
    assert weak > 1e-3
    assert states[1.0].group is None


def test_reference_scales_come_from_the_lora(mini_release, tmp_path):
    from safetensors.numpy import save_file

    plain = mini_release / "lora/ltx-2.3-mini-distilled-lora.safetensors"
    assert reference_scales([plain]) == (1, 1)
    files = {}
    for name, metadata in (
        ("half", {"reference_downscale_factor": "2"}),
        ("short", {"reference_temporal_scale_factor": "2"}),
        ("bad", {"reference_downscale_factor": "0"}),
    ):
        files[name] = tmp_path / f"{name}.safetensors"
        save_file({"x": np.zeros(1, np.float32)}, files[name], metadata=metadata)
    assert reference_scales([plain, files["half"]]) == (2, 1)
    with pytest.raises(LoraError, match="read their reference differently"):
        reference_scales([files["half"], files["short"]])
    with pytest.raises(LoraError, match="must be whole numbers"):
        reference_scales([files["bad"]])


def seen(states: States) -> LatentState:
    """The tokens of the picture."""
    video, _ = states
    assert video is not None
    return video


def test_a_smaller_and_shorter_reference_lies_over_the_clip(pipe, frames):
    settings = Settings(**SMALL | {"width": 128, "height": 64, "num_frames": 17})
    grid = pipe.check(settings)
    stage = settings.stages(2, grid)[0]
    place = reference(frames, downscale=2, time_stretch=2)(scene(pipe, grid, stage))
    placed = seen(place(start(pipe.configs, grid, None, dtype=jnp.float32, sound_only=False)))
    positions = np.asarray(placed.positions[0])
    own, theirs = positions[: grid.num_tokens], positions[grid.num_tokens :]
    assert len(theirs) == 2 * 1 * 2
    np.testing.assert_allclose(theirs[:, 1:].max(axis=(0, 2)), own[:, 1:].max(axis=(0, 2)))
    np.testing.assert_allclose(theirs[:, 0].max(), own[:, 0].max(), atol=1 / FPS)


# LoRAs and stages


def test_a_lora_of_the_second_stage_alone_leaves_the_first_as_it_is(mini_checkpoint, mini_release, prompt, make):
    path = mini_release / "lora/ltx-2.3-mini-distilled-lora.safetensors"
    size = {"width": 128, "height": 128, "num_frames": 9, "pipeline": "two-stage"}

    def steps(loras, **more):
        seen = {}
        made = load_pipeline(mini_checkpoint, loras=loras, **more)
        make(pipe=made, **size, callback=lambda stage, step, *x: seen.update({(stage, step): np.asarray(x[2].video)}))
        return seen

    none, second, both = steps([]), steps([Lora(path, 0.0, 1.0)]), steps([(path, 1.0)])
    for (stage, step), estimate in none.items():
        assert (np.abs(estimate - second[stage, step]).max() > 1e-4) == (stage == 2)
        assert np.abs(estimate - both[stage, step]).max() > 1e-4
    streamed = steps([Lora(path, 0.0, 1.0)], offload="blocks")
    for key, estimate in second.items():
        np.testing.assert_allclose(estimate, streamed[key], rtol=0, atol=STREAMED_ATOL)


def test_hq_takes_two_calls_a_step_and_keeps_its_image(pipe, make, frames):
    calls = []
    size = {"width": 128, "height": 128, "num_frames": 9, "pipeline": "hq", "sigmas": None, "steps": 2}
    image = ImageCondition(image=frames[0])
    made = [make(image=[image], **size, callback=lambda *x: calls.append(x[:2])) for _ in range(2)]
    assert len(calls) == 2 * ((2 * 2 + 1) + (2 * 3 + 1))
    np.testing.assert_array_equal(made[0].video, made[1].video)
    np.testing.assert_array_equal(made[0].video[:, :1], pipe.encode_image(image, height=128, width=128))


# Sizes


@pytest.mark.parametrize(
    ("aspect", "megapixels", "size"),
    [("9:16", 0.9, (704, 1280)), ("16:9", 0.9, (1280, 704)), ("1:1", 0.26, (512, 512)), ("4:5", 0.5, (640, 800))],
)
def test_shapes_become_the_nearest_legal_size(aspect, megapixels, size):
    grid = size_of(Settings(aspect=aspect, megapixels=megapixels), (8, 32, 32))
    assert (grid.width, grid.height) == size


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"aspect": "wide"}, "as 16:9 or 9:16"),
        ({"aspect": "9:16", "width": 512}, "one or the other"),
        ({"megapixels": 1.0}, "goes with aspect"),
        ({"retake": "1:2"}, "give it too, with --video"),
        ({"video": Path("x.mp4"), "retake": "2:1"}, "START:END"),
        ({"video": Path("x.mp4"), "retake": "0:1", "pipeline": "two-stage"}, "two stages"),
        ({"video": Path("x.mp4"), "retake": "0:1", "keep_audio": True, "keep_video": True}, "nothing to retake"),
        ({"keep_audio": True}, "go with retake"),
        ({"sound_only": True, "image": ("x.png",)}, "prompt alone"),
        ({"sound_only": True, "pipeline": "hq"}, "no second stage"),
        ({"image": ("x.png@0:7",)}, "from 0 to 1"),
        ({"reference": Path("x.mp4")}, "give it too, with --lora"),
    ],
)
def test_modes_that_do_not_go_together_are_refused(pipe, settings, message):
    with pytest.raises(ValueError, match=message):
        pipe.generate_latents(
            Settings(**settings), prompt=Prompt(video=jnp.zeros((1, 1, 1)), audio=jnp.zeros((1, 1, 1)))
        )
