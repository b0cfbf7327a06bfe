"""Rotary tables at the real width against the reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange

from ltx_jax.models.rope import Rotary, apply_rotary, frequency_grid, position_fractions, rotary_tables

# cos and sin of angles up to 1e4 radians differ between libraries in the last place.
TOLERANCE = 2e-7


@pytest.fixture(scope="module")
def data(reference):
    return reference("rope")


@pytest.mark.parametrize(
    ("name", "dim", "axes"), [("video_self", 4096, 3), ("audio_self_or_cross", 2048, 1), ("video_connector", 4096, 1)]
)
def test_frequencies_equal_the_reference(data, name, dim, axes):
    np.testing.assert_array_equal(frequency_grid(dim, axes, 10000.0), data[f"grid.{name}"])


@pytest.mark.parametrize("name", ["video_self", "video_cross", "audio_self", "video_connector", "audio_connector"])
def test_tables_agree_with_the_reference(data, name):
    cos, sin = (rearrange(data[f"{name}.{part}"], "b h t half -> b t h half") for part in ("cos", "sin"))
    if "connector" in name:
        fractions = data["connector.positions"][:, 0, :, None] / 4096
    else:
        middle = rearrange(data[f"{name.partition('_')[0]}.positions"], "b axes t ends -> b t axes ends").mean(-1)
        fractions = middle[..., :1] / 20 if name != "video_self" else middle / np.array([20, 2048, 2048], np.float32)
    heads, half = cos.shape[2:]

    @jax.jit
    def tables(fractions):
        return rotary_tables(fractions, dim=2 * heads * half, num_heads=heads, theta=10000.0, dtype=jnp.float32)

    ours = tables(jnp.asarray(fractions, jnp.float32))
    np.testing.assert_allclose(ours.cos, cos, atol=TOLERANCE, rtol=0)
    np.testing.assert_allclose(ours.sin, sin, atol=TOLERANCE, rtol=0)


def test_rotation_agrees_with_the_reference(data):
    rotary = Rotary(*(jnp.asarray(rearrange(data[f"video_self.{p}"], "b h t d -> b t h d")) for p in ("cos", "sin")))
    x = jnp.asarray(rearrange(data["apply.in"], "b t (h d) -> b t h d", h=32))
    y = rearrange(apply_rotary(x, rotary), "b t h d -> b t (h d)")
    np.testing.assert_allclose(y, data["apply.out"], atol=1e-6, rtol=0)  # two products and a sum of values of size 3


def test_fractions_are_divided_as_numpy_divides():
    positions = np.random.default_rng(0).uniform(0, 20, (1, 500, 3)).astype(np.float32)
    ranges = (20.0, 2048.0, 1000.0)
    ours = jax.jit(lambda p: position_fractions(p, ranges))(jnp.asarray(positions))
    np.testing.assert_array_equal(ours, positions / np.asarray(ranges, np.float32))


def test_missing_angles_are_padded_in_front():
    rotary = rotary_tables(jnp.full((1, 1, 3), 0.25), dim=16, num_heads=1, theta=10000.0, dtype=jnp.float32)
    np.testing.assert_array_equal(rotary.cos[0, 0, 0, :2], [1, 1])  # 8 angles, 2 frequencies of 3 axes
    np.testing.assert_array_equal(rotary.sin[0, 0, 0, :2], [0, 0])
