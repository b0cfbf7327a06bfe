"""Clips that go on: what is there stays, picture and sound keep step, windows follow one from the other."""

import numpy as np
import pytest

from ltx_jax import Settings, load_pipeline
from ltx_jax.conditions import ImageCondition
from ltx_jax.extend import joined
from ltx_jax.geometry import VideoGrid
from ltx_jax.media import write_mp4
from ltx_jax.video import read_video
from ltx_jax.windows import windows_of

LEVELS = (1.0, 0.5, 0.0)
FPS = 24.0
RATE = 48_000


@pytest.fixture(scope="module")
def pipe(mini_checkpoint):
    return load_pipeline(mini_checkpoint)


@pytest.fixture(scope="module")
def prompt(pipe):
    return pipe.encode_prompt("a cat on a table")


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """13 frames with sound: no 8k + 1, and no whole latent of sound."""
    random = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("given") / "clip.mp4"
    frames = random.integers(0, 256, (13, 64, 96, 3), np.uint8)
    wave = (0.3 * np.sin(np.arange(round(13 / FPS * RATE))[:, None] * [0.05, 0.07])).astype(np.float32)
    write_mp4(path, frames, fps=FPS, waveform=wave, sample_rate_hz=RATE)
    return path


@pytest.fixture(scope="module")
def extend(pipe, prompt, clip):
    """`extend(seconds, ...)`: the clip continued in windows of 17 frames, of which 9 are there already."""

    def make(seconds, *, image=None, callback=None, **settings):
        given = {"video": clip, "num_frames": 17, "overlap": 8 / FPS, "sigmas": LEVELS, **settings}
        return pipe.extend(Settings(extend=seconds, **given), prompt=prompt, image=image, callback=callback)

    return make


@pytest.fixture(scope="module")
def source(clip):
    return read_video(clip)


@pytest.fixture(scope="module")
def forwards(extend):
    return extend(20 / FPS)  # three windows of 8 new frames, 4 of which are too many


@pytest.fixture(scope="module")
def backwards(extend):
    return extend(-20 / FPS)


def test_forwards_the_clip_stays_and_new_frames_follow(forwards, source):
    assert forwards.frames.shape == (33, 64, 96, 3)
    np.testing.assert_array_equal(forwards.frames[:13], source.frames)
    assert forwards.fps == FPS
    new = forwards.frames[13:].astype(int)
    assert np.abs(np.diff(new, axis=0)).max(axis=(1, 2, 3)).min() > 0  # no frame is held


def test_backwards_the_clip_stays_and_new_frames_lead_to_it(backwards, source):
    assert backwards.frames.shape == (33, 64, 96, 3)
    np.testing.assert_array_equal(backwards.frames[20:], source.frames)


@pytest.mark.parametrize("direction", ["forwards", "backwards"])
def test_sound_lies_where_its_frames_lie(direction, source, request):
    """Counted from the start of the whole clip, to the sample."""
    made = request.getfixturevalue(direction)
    begin = 0 if direction == "forwards" else round(20 / FPS * RATE)
    kept = made.waveform[begin : begin + len(source.waveform)]
    fade = round(0.01 * RATE)
    inside = slice(fade, len(kept) - fade)
    np.testing.assert_array_equal(kept[inside], source.waveform[inside])
    # The last sound latent ends up to 50 ms before the last frame does: the model's own grid, not one for each window.
    assert 0 <= 33 / FPS - len(made.waveform) / RATE < 0.05
    new = made.waveform[len(source.waveform) + fade :] if direction == "forwards" else made.waveform[: begin - fade]
    assert np.abs(new).max() > 1e-4


def test_windows_follow_from_the_ones_before(extend, forwards):
    """The last frames of a longer extension depend on all before; its first are those of a shorter one."""
    shorter = extend(8 / FPS)
    np.testing.assert_array_equal(shorter.frames, forwards.frames[:21])
    # The clip's own end, by which windows differ: the fade, and the rest of the last sound latent.
    same = round(20 / FPS * RATE)
    np.testing.assert_array_equal(shorter.waveform[:same], forwards.waveform[:same])


def test_the_context_is_held(pipe, extend, source):
    """What a window sees of the clip are its own frames, encoded, in every step."""
    seen = []
    extend(8 / FPS, callback=lambda stage, step, sigma, tokens, denoised: seen.append(np.asarray(tokens.video)))
    latents = np.asarray(pipe.encode_video(source.frames[-9:], height=64, width=96))
    held = latents.reshape(1, -1, latents.shape[-1])
    for tokens in seen:
        np.testing.assert_array_equal(tokens[:, : held.shape[1]], held)


def test_images_are_for_frames_of_the_whole_clip(pipe, extend, source):
    image = ImageCondition(image=source.frames[0], frame=20)
    plain, pulled = extend(8 / FPS), extend(8 / FPS, image=[image])
    assert (plain.frames[13:] != pulled.frames[13:]).any()
    with pytest.raises(ValueError, match="frames 0 to 12 of the whole clip are given"):
        extend(8 / FPS, image=[ImageCondition(image=source.frames[0], frame=5)])
    with pytest.raises(ValueError, match="for frame 21, but the clip has frames 0 to 20"):
        extend(8 / FPS, image=[ImageCondition(image=source.frames[0], frame=21)])


def test_a_given_sound_is_that_of_the_whole_clip(extend, clip, tmp_path):
    from ltx_jax.media import read_audio, write_wav

    wave = (0.2 * np.sin(np.arange(60_000)[:, None] * [0.03, 0.02])).astype(np.float32)
    write_wav(tmp_path / "sound.wav", wave, RATE)
    made = extend(8 / FPS, audio=tmp_path / "sound.wav")
    np.testing.assert_array_equal(made.waveform, read_audio(tmp_path / "sound.wav")[0][: round(21 / FPS * RATE)])


def test_a_clip_is_made_first_where_none_is_given(pipe, prompt):
    settings = {"width": 96, "height": 64, "num_frames": 17, "sigmas": LEVELS, "seed": 3}
    first = pipe(prompt=prompt, **settings)
    longer = pipe(prompt=prompt, **settings, extend=8 / FPS, overlap=8 / FPS)
    assert longer.frames.shape == (25, 64, 96, 3)
    np.testing.assert_array_equal(longer.frames[:17], first.frames)
    assert longer.latents is None


def test_a_silent_clip_stays_silent_and_goes_on_with_sound(pipe, prompt, source, tmp_path):
    write_mp4(tmp_path / "silent.mp4", source.frames, fps=FPS)
    made = pipe(
        prompt=prompt,
        video=tmp_path / "silent.mp4",
        extend=8 / FPS,
        overlap=8 / FPS,
        num_frames=17,
        sigmas=LEVELS,
    )
    end = round(13 / FPS * RATE)
    assert not made.waveform[: end - 480].any()
    assert np.abs(made.waveform[end:]).max() > 1e-4


def test_many_windows_do_not_drift():
    """At 30000/1001 frames a second no window has a whole number of samples or of latents."""
    grid = VideoGrid(num_frames=33, height=64, width=64, fps=30_000 / 1001)
    for seconds in (40.0, -40.0):
        windows = windows_of(Settings(extend=seconds), grid, 33)
        assert windows.total.num_frames == 33 + round(40 * grid.fps)
        last = windows.begin(windows.count - 1)
        if windows.backwards:
            assert last <= 0 < last + windows.step
        else:
            assert last + windows.grid.num_frames >= windows.total.num_frames > last + windows.num_context
        starts = [windows.begin(number) for number in range(windows.count)]
        assert set(np.abs(np.diff(starts))) == {windows.step}
        assert windows.grid.num_frames % 8 == 1
        assert windows.grid.num_frames <= 33


def test_sounds_pass_into_each_other():
    first, second = np.full((10, 1), 1.0, np.float32), np.full((8, 1), 3.0, np.float32)
    made = joined(first, second, at=6, fade=3)
    assert len(made) == 14
    np.testing.assert_array_equal(made[:, 0], [1] * 7 + [1, 2, 3] + [3] * 4)
    np.testing.assert_array_equal(joined(first, second, at=10, fade=3)[:, 0], [1] * 10 + [3] * 8)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"extend": 0.0}, "below 0 for before the start"),
        ({"extend": 0.01}, "at least a frame"),
        ({"extend": 1.0, "num_frames": 9}, "num_frames must be at least 17"),
        ({"extend": -1.0, "overlap": 0.0, "num_frames": 9}, "num_frames must be at least 17"),
        ({"extend": 1.0, "overlap": -1.0}, "at least 0"),
        ({"extend": 1.0, "retake": "0:1"}, "extend excludes retake"),
        ({"extend": 1.0, "upscale": 2.0}, "extend excludes upscale"),
        ({"overlap": 0.5, "retake": "0:1"}, "overlap goes with extend"),
    ],
)
def test_extensions_that_cannot_be_are_refused(pipe, clip, settings, message):
    with pytest.raises(ValueError, match=message):
        pipe.check(Settings(**{"video": clip, "num_frames": 17} | settings))
