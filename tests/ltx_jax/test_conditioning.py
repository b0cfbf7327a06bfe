"""Images, keyframes and frozen modalities on the tokens."""

import jax.numpy as jnp
import numpy as np
import pytest

from ltx_jax.conditioning import append_keyframe, frozen, replace_frame, video_state
from ltx_jax.geometry import VideoGrid

GRID = VideoGrid(num_frames=9, height=64, width=96, fps=24.0)


@pytest.fixture
def state():
    return video_state(GRID, channels=2, dtype=jnp.float32)


@pytest.fixture
def image():
    return jnp.full((1, 1, 2, 3, 2), 5.0)


def test_a_plain_clip_is_all_noise_and_shares_one_timestep(state):
    noise = jnp.ones_like(state.initial)
    np.testing.assert_array_equal(state.noised(noise), noise)
    assert state.timesteps(0.5).shape == (1, 1)
    np.testing.assert_array_equal(state.hold(noise), noise)


def test_an_image_replaces_the_first_latent_frame(state, image):
    placed = replace_frame(state, image, grid=GRID, strength=0.9)
    noisy = placed.noised(jnp.zeros_like(placed.initial))
    np.testing.assert_allclose(noisy[0, :6], 0.9 * 5, rtol=1e-6)  # a tenth of it is noise, here zero
    np.testing.assert_array_equal(noisy[0, 6:], 0)
    np.testing.assert_allclose(placed.timesteps(0.5), [[0.05, 0.5]], rtol=1e-6)  # one of each kind
    np.testing.assert_allclose(placed.token_timesteps(0.5)[0], [0.05] * 6 + [0.5] * 6, rtol=1e-6)
    np.testing.assert_allclose(placed.hold(jnp.zeros_like(noisy))[0, :6], 4.5, rtol=1e-6)


def test_a_keyframe_is_appended_at_its_time(state, image):
    placed = append_keyframe(state, image, grid=GRID, frame=8)
    assert placed.initial.shape == (1, 18, 2)
    assert placed.num_generated == 12
    np.testing.assert_allclose(placed.positions[0, 12, 0], [8 / 24, 9 / 24], rtol=1e-6)
    np.testing.assert_array_equal(placed.hold(jnp.zeros_like(placed.initial))[0, 12:], 5)


def test_a_later_stage_starts_between_latents_and_noise():
    latents = jnp.full((1, 2, 2, 3, 2), 2.0)
    state = video_state(GRID, channels=2, dtype=jnp.float32, latents=latents)
    np.testing.assert_allclose(state.noised(jnp.zeros_like(state.initial), 0.75), 0.5)


def test_a_frozen_modality_keeps_its_latents():
    latents = jnp.full((1, 2, 2, 3, 2), 2.0)
    state = frozen(video_state(GRID, channels=2, dtype=jnp.float32, latents=latents))
    assert state.frozen
    np.testing.assert_array_equal(state.noised(jnp.zeros_like(state.initial)), 2)
    np.testing.assert_array_equal(state.token_timesteps(0.5), np.zeros((1, 12)))
