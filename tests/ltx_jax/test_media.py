"""Images in, clips out."""

import numpy as np
import pytest
from PIL import Image

from ltx_jax.media import (
    MediaError,
    check_writable,
    contact_sheet,
    describe,
    fit_image,
    read_image,
    recompress,
    to_uint8,
    write_mp4,
)


def test_a_clip_is_what_was_written(tmp_path):
    frames = np.random.default_rng(0).integers(0, 255, (9, 64, 96, 3), np.uint8)
    waveform = np.sin(np.linspace(0, 300, 18000))[:, None].repeat(2, 1).astype(np.float32) * 0.5
    write_mp4(tmp_path / "clip.mp4", iter(frames), fps=24.0, waveform=waveform, sample_rate_hz=48_000)
    facts = describe(tmp_path / "clip.mp4")
    assert facts["num_samples"] >= 18000  # AAC works in packets of 1,024
    assert {k: facts[k] for k in facts if k != "num_samples"} == {
        "video_codec": "h264",
        "num_frames": 9,
        "width": 96,
        "height": 64,
        "fps": 24.0,
        "audio_codec": "aac",
        "sample_rate_hz": 48_000,
        "audio_channels": 2,
    }
    assert [path.name for path in tmp_path.iterdir()] == ["clip.mp4"]


def test_the_same_frames_make_the_same_file(tmp_path):
    """At a size at which x264 with AVX-512 made 9 different files of 12; machines without it were never in doubt."""
    rows, columns = np.mgrid[:64, :96]
    texture = np.random.default_rng(0).normal(0, 8, (64, 96))
    frames = []
    for number in range(25):
        level = 127 + np.roll(60 * np.sin(columns / 17) + 50 * np.cos(rows / 23), 3 * number, 1)
        level += np.roll(texture, 2 * number, 0)
        level[(columns - 96 * (number + 3) / 31) ** 2 + (rows - 32) ** 2 < 10**2] = 230
        frames.append(np.clip(np.stack([level, 0.8 * level, 255 - level], -1), 0, 255).astype(np.uint8))
    wave = np.sin(np.arange(50_000)[:, None] * [0.05, 0.07]).astype(np.float32)
    for length in (17, 25):
        made = set()
        for number in range(12):
            rng = np.random.default_rng(number)
            _ = [rng.bytes(size) for size in 20 * (100, 1000, 5000, 20_000, 65_536)]  # what memory held decided
            write_mp4(tmp_path / "clip.mp4", frames[:length], fps=24.0, waveform=wave[: 2000 * length])
            made.add((tmp_path / "clip.mp4").read_bytes())
        assert len(made) == 1


@pytest.mark.parametrize("fps", [23.976, 25.0, 29.97, 50.0])
def test_frame_rates_survive(tmp_path, fps):
    write_mp4(tmp_path / "clip.mp4", np.zeros((3, 32, 32, 3), np.uint8), fps=fps)
    assert describe(tmp_path / "clip.mp4")["fps"] == pytest.approx(fps, rel=1e-4)


def test_a_failed_clip_leaves_nothing(tmp_path):
    def frames():
        yield np.zeros((32, 32, 3), np.uint8)
        raise RuntimeError("decoder failed")

    with pytest.raises(RuntimeError):
        write_mp4(tmp_path / "clip.mp4", frames(), fps=24.0)
    assert list(tmp_path.iterdir()) == []


def test_unwritable_outputs_are_refused_before_any_work(tmp_path):
    with pytest.raises(MediaError, match="does not exist"):
        check_writable(tmp_path / "nowhere" / "clip.mp4")
    with pytest.raises(MediaError, match="is a folder"):
        check_writable(tmp_path)
    check_writable(tmp_path / "clip.mp4")
    assert list(tmp_path.iterdir()) == []


def test_unreadable_images_are_refused(tmp_path):
    (tmp_path / "not.png").write_bytes(b"<html>404</html>")
    with pytest.raises(MediaError, match="cannot be read as an image"):
        read_image(tmp_path / "not.png")
    with pytest.raises(MediaError, match="no image at"):
        read_image(tmp_path / "missing.png")


def test_images_with_alpha_or_grey_become_rgb(tmp_path):
    Image.fromarray(np.full((5, 7), 90, np.uint8)).save(tmp_path / "grey.png")
    assert read_image(tmp_path / "grey.png").shape == (5, 7, 3)


def test_fit_covers_and_crops_the_centre():
    image = np.zeros((40, 100, 3), np.uint8)
    image[:, 40:60] = 255  # the middle fifth
    fitted = fit_image(image, height=80, width=40)
    assert fitted.shape == (1, 1, 80, 40, 3)
    # Scaled by 2, the crop is the middle fifth; its outermost columns are mixed with their dark neighbours.
    np.testing.assert_allclose(fitted[:, :, :, 1:-1], 1.0, atol=1e-5)
    exact = np.random.default_rng(0).integers(0, 255, (64, 32, 3), np.uint8)
    np.testing.assert_array_equal(fit_image(exact, height=64, width=32)[0, 0], exact.astype(np.float32) / 127.5 - 1)


def test_recompression_changes_a_little_and_keeps_the_size():
    rows, columns = np.mgrid[:64, :96]
    image = np.stack([rows * 3, columns * 2, rows + columns], axis=-1).astype(np.uint8)
    again = recompress(image, crf=33)
    assert again.shape == image.shape
    difference = np.abs(again.astype(int) - image).mean()
    assert 0 < difference < 8
    assert recompress(image[:63, :95], crf=33).shape == (62, 94, 3)


def test_levels_are_clipped_and_truncated():
    np.testing.assert_array_equal(to_uint8(np.array([-2.0, -1.0, 0.0, 0.999, 1.0, 3.0])), [0, 0, 127, 254, 255, 255])


def test_contact_sheet_shows_first_and_last():
    frames = np.arange(9, dtype=np.uint8)[:, None, None, None].repeat(3, 3)
    np.testing.assert_array_equal(contact_sheet(frames, columns=3)[0, :, 0], [0, 4, 8])
