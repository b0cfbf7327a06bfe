"""Clips made to fit a size and a length, and sheets that show results below each other."""

import warnings

import numpy as np
import pytest
from PIL import Image

from ltx_jax import pictures
from ltx_jax.media import MediaError, read_image, write_png
from ltx_jax.pictures import evenly_spaced, fit_image, fit_length, fit_video, sheet_of, trim_frames


def clip(count: int, height: int = 20, width: int = 30) -> np.ndarray:
    return np.random.default_rng(count).integers(0, 255, (count, height, width, 3), np.uint8)


@pytest.mark.parametrize(("height", "width"), [(20, 30), (40, 24), (16, 64)])
def test_each_frame_is_fitted_as_an_image_is(height, width, monkeypatch):
    frames = clip(7)
    # Room for three frames at a time, so that the last chunk is shorter.
    monkeypatch.setattr(pictures, "_RESIZED_AT_ONCE", 3 * 12 * max(20 * 30, 40 * 60, 43 * 64))
    fitted = fit_video(frames, height=height, width=width)
    assert (fitted.shape, fitted.dtype) == ((1, 7, height, width, 3), np.float32)
    for number, frame in enumerate(frames):
        image = np.asarray(fit_image(frame, height=height, width=width))[0, 0]
        # The same weights, summed in an order that may depend on how many frames there are.
        np.testing.assert_allclose(fitted[0, number], image, atol=1e-6)


@pytest.mark.parametrize(("num_frames", "step", "legal"), [(1, 8, 1), (8, 8, 1), (9, 8, 9), (120, 8, 113), (7, 4, 5)])
def test_legal_lengths(num_frames, step, legal):
    assert trim_frames(num_frames, step) == legal


def test_no_frames_have_no_legal_length():
    with pytest.raises(ValueError, match="at least one frame"):
        trim_frames(0, 8)


def test_lengths_are_cut_or_held_and_said():
    frames = clip(5)
    with warnings.catch_warnings(action="error"):
        np.testing.assert_array_equal(fit_length(frames, 5), frames)
    with pytest.warns(UserWarning, match="5 frames, the first 3 are used"):
        np.testing.assert_array_equal(fit_length(frames, 3), frames[:3])
    with pytest.warns(UserWarning, match="9 are needed: its last frame is held for 4 more"):
        longer = fit_length(frames, 9)
    np.testing.assert_array_equal(longer[:5], frames)
    assert (longer[5:] == frames[4]).all()
    with pytest.raises(ValueError, match="at least one"):
        fit_length(frames[:0], 3)


def test_a_sheet_has_a_labelled_row_for_each_clip():
    small, large = clip(9, 20, 30), np.full((5, 90, 160, 3), 200, np.uint8)
    sheet = sheet_of([small, large], ["seed 1", "seed 2"], columns=3, tile_width=80)
    assert sheet.shape == (24 + 20 + 24 + 45, 3 * 80, 3)  # the large one is shrunk, the small one is not blown up
    np.testing.assert_array_equal(sheet[24:44, :90], np.concatenate(list(small[[0, 4, 8]]), axis=1))
    assert not sheet[24:44, 90:].any()
    assert (sheet[68:] == 200).all()
    labels = sheet[:24], sheet[44:68]
    assert all(label.max() == 255 for label in labels)  # written in white
    assert (labels[0] != labels[1]).any()


def test_a_sheet_of_picks_is_the_sheet_of_the_clips():
    clips = [clip(9), clip(17)]
    picks = [evenly_spaced(frames, 4) for frames in clips]
    np.testing.assert_array_equal(sheet_of(picks, ["a", "b"]), sheet_of(clips, ["a", "b"]))


def test_long_labels_end_within_the_row():
    sheet = sheet_of([clip(3, 20, 60)], ["a heron lands on still water\nat dawn " * 20], columns=3)
    assert sheet.shape == (44, 180, 3)
    assert not sheet[:24, -6:].any()
    assert sheet[:24, 150:].any()  # it uses the row


def test_sheets_need_a_label_for_each_clip():
    with pytest.raises(ValueError, match="got 1 clips and 2 labels"):
        sheet_of([clip(3)], ["a", "b"])
    with pytest.raises(ValueError, match="got 0 clips"):
        sheet_of([], [])


def test_pictures_are_written_exactly_and_whole(tmp_path):
    image = clip(1)[0]
    write_png(tmp_path / "sheet.png", image)
    np.testing.assert_array_equal(read_image(tmp_path / "sheet.png"), image)
    with Image.open(tmp_path / "sheet.png") as file:
        assert file.format == "PNG"
    with pytest.raises(MediaError, match=r"ends in \.png"):
        write_png(tmp_path / "sheet.jpg", image)
    assert [path.name for path in tmp_path.iterdir()] == ["sheet.png"]
