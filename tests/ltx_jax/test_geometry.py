"""Sizes, positions, patchify."""

import json
import re

import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange

from ltx_jax.config import AudioVAEConfig
from ltx_jax.geometry import (
    VideoGrid,
    audio_latent_length,
    audio_positions,
    keyframe_positions,
    patchify_audio,
    patchify_video,
    unpatchify_audio,
    unpatchify_video,
    video_positions,
)
from tests.conftest import DATA

AUDIO = AudioVAEConfig.from_metadata(json.loads((DATA / "ltx/config.json").read_text())["audio_vae"])


def test_every_position_set_equals_the_reference(reference):
    data = reference("rope")
    for name in (name for name in data if name.startswith("positions.")):
        numbers = [int(n) for n in re.findall(r"\d+", name)]
        kind = name.split(".")[1]
        if kind == "video":
            ours = video_positions((numbers[0], numbers[1], numbers[2]), fps=float(numbers[3]))
        elif kind == "audio":
            ours = audio_positions(numbers[0], AUDIO)
        elif kind == "keyframe":
            ours = keyframe_positions((2, 3), frame=numbers[0], fps=24.0)
        else:
            ours = video_positions((2, 1, 2), fps=24.0, downscale=float(numbers[0]), time_stretch=float(numbers[1]))
        theirs = rearrange(data[name], "b axes t ends -> b t axes ends")
        # One unit in the last place: the reference divides and stretches in another order.
        np.testing.assert_allclose(ours, theirs, rtol=1.2e-7, atol=0, err_msg=name)


def test_positions_are_float32_whatever_the_activations():
    assert video_positions((2, 2, 2), fps=25.0).dtype == jnp.float32


def test_patchify_is_inverted_by_unpatchify():
    grid = VideoGrid(num_frames=17, height=64, width=96, fps=24.0)
    latents = jnp.arange(3 * 2 * 3 * 4.0).reshape(1, 3, 2, 3, 4)
    tokens = patchify_video(latents)
    assert tokens.shape == (1, grid.num_tokens, 4)
    np.testing.assert_array_equal(tokens[0, 7], latents[0, 1, 0, 1])  # frame, row, column
    np.testing.assert_array_equal(unpatchify_video(tokens, grid), latents)

    audio = jnp.arange(5 * 16 * 2.0).reshape(1, 5, 16, 2)
    tokens = patchify_audio(audio)
    np.testing.assert_array_equal(tokens[0, 3, 16:], audio[0, 3, :, 1])  # channel, bin
    np.testing.assert_array_equal(unpatchify_audio(tokens, AUDIO), audio)


@pytest.mark.parametrize(
    ("frames", "fps", "length"), [(121, 24, 126), (17, 24, 18), (9, 24, 9), (1, 50, 0), (3, 50, 2), (121, 25, 121)]
)
def test_audio_length_rounds_half_to_even(frames, fps, length):
    assert audio_latent_length(frames, float(fps), AUDIO) == length


def test_illegal_sizes_name_the_nearest_legal_ones():
    with pytest.raises(ValueError, match=r"width must be a multiple of 32.*got 100; try 96 or 128"):
        VideoGrid(num_frames=9, height=64, width=100, fps=24.0).check()
    with pytest.raises(ValueError, match=r"height must be a multiple of 64 for two stages, got 96; try 64 or 128"):
        VideoGrid(num_frames=9, height=96, width=128, fps=24.0).check(stages=2)
    with pytest.raises(ValueError, match=r"num_frames must be 8k \+ 1, got 120; try 113 or 121"):
        VideoGrid(num_frames=120, height=64, width=64, fps=24.0).check()
    with pytest.raises(ValueError, match="fps must be positive"):
        VideoGrid(num_frames=9, height=64, width=64, fps=0.0).check()
    VideoGrid(num_frames=1, height=64, width=64, fps=24.0).check(stages=2)
