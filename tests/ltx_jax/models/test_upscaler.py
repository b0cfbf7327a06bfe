"""The latent upscalers against the reference in two configurations, and the sizes that they make."""

import json
from math import prod

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import load_file

from convert.tables.upscaler import UPSCALERS
from ltx_jax.config import ConfigError, UpscalerConfig
from ltx_jax.models.upscaler import LatentUpscaler, binomial_filter, blur_down, upscale
from ltx_jax.models.video_vae import Statistics
from tests.conftest import DATA, fill, read_prefix

# A handful of convolutions and norms in float32: rounding of other summation orders.
TOLERANCE = 2e-5

MINI = DATA / "mini-release/LTX-2.3-22B-PolarQuant-Q5"
TINY = {"in_channels": 4, "mid_channels": 32, "num_blocks_per_stage": 2, "dims": 3}


def channels_last(array: np.ndarray) -> jax.Array:
    return jnp.asarray(rearrange(array, "b c f h w -> b f h w c"))


def load(path):
    with safe_open(path, "np") as file:
        config = UpscalerConfig.from_metadata(json.loads(file.metadata()["config"]))
    return fill(lambda: LatentUpscaler(config, rngs=nnx.Rngs(0)), UPSCALERS[config.kind], read_prefix(path, ""))


def load_statistics(path) -> Statistics:
    tensors = read_prefix(path, "vae.per_channel_statistics.")
    statistics = Statistics(len(tensors["mean-of-means"]))
    statistics.mean[...], statistics.std[...] = tensors["mean-of-means"], tensors["std-of-means"]
    return statistics


run = jax.jit(upscale)


@pytest.mark.parametrize("kind", ["spatial_x2", "spatial_x1_5", "temporal_x2"])
def test_upscaled_latents_agree_with_the_reference(kind, reference):
    upscaler = load(DATA / f"ltx/upscaler_{kind}.safetensors")
    data = reference(f"upscaler_{kind}_io")
    statistics = load_statistics(DATA / "ltx/checkpoint.safetensors")
    latents = channels_last(data["in.latent"])
    # Mean 0 and deviation 1 leave latents as they are, so that one compiled function gives the network alone too.
    raw, normalised = run(upscaler, Statistics(8), latents), run(upscaler, statistics, latents)
    np.testing.assert_allclose(raw, channels_last(data["out.raw"]), atol=TOLERANCE, rtol=0)
    np.testing.assert_allclose(normalised, channels_last(data["out.normalised"]), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(
    ("file", "recording", "before", "after"),
    [
        ("temporal-upscaler-x2-1.0", "temporal_upscaler", "in.latent", "out.latent"),
        ("spatial-upscaler-x2-1.1", "gen_c_two_stage", "out.stage1_video_latent", "out.upscaled_latent"),
    ],
)
def test_bfloat16_checkpoints_agree_with_the_reference_on_float32_latents(file, recording, before, after, mini_release):
    upscaler = load(MINI / f"upscalers/ltx-2.3-{file}.safetensors")
    data = load_file(mini_release / f"reference/{recording}.safetensors")
    statistics = load_statistics(MINI / "polarquant/bf16/ltx23_bf16.safetensors")
    normalised = run(upscaler, statistics, channels_last(data[before]))
    assert normalised.dtype == jnp.float32
    np.testing.assert_allclose(normalised, channels_last(data[after]), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(
    ("settings", "frames", "height", "width"),
    [
        ({}, 3, 10, 6),
        ({"rational_resampler": True, "spatial_scale": 1.5}, 3, 8, 5),  # (3 n + 1) // 2
        ({"rational_resampler": True, "spatial_scale": 0.75}, 3, 4, 3),  # (3 n + 3) // 4
        ({"rational_resampler": True, "spatial_scale": 2.0}, 3, 10, 6),
        ({"rational_resampler": True, "spatial_scale": 4.0}, 3, 20, 12),
        ({"spatial_upsample": False, "temporal_upsample": True}, 5, 5, 3),
    ],
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_odd_sizes_grow_as_the_scale_says_and_keep_their_dtype(settings, frames, height, width, dtype):
    config = UpscalerConfig.from_metadata(TINY | settings)
    latents = jax.ShapeDtypeStruct((1, 3, 5, 3, 4), dtype)
    out = jax.eval_shape(lambda x: upscale(LatentUpscaler(config, rngs=nnx.Rngs(0)), Statistics(4), x), latents)
    assert out.shape == (1, frames, height, width, 4)
    assert out.dtype == dtype


def test_the_released_spatial_upscaler_has_the_published_size():
    config = UpscalerConfig.from_metadata({"in_channels": 128, "mid_channels": 1024, "num_blocks_per_stage": 4})
    state = nnx.state(nnx.eval_shape(lambda: LatentUpscaler(config, rngs=nnx.Rngs(0))))
    # Two ends, sixteen convolutions of the residual blocks with their norms, the first norm, and the upsampler.
    ends = 27 * 128 * 1024 * 2 + 1024 + 128
    assert sum(prod(leaf.shape) for leaf in jax.tree.leaves(state)) == (
        ends + 16 * (27 * 1024**2 + 3 * 1024) + 2 * 1024 + 4 * (9 * 1024**2 + 1024)
    )
    assert 497e6 < sum(prod(leaf.shape) for leaf in jax.tree.leaves(state)) < 499e6


def test_the_checkpoint_holds_the_binomial_filter():
    stored = read_prefix(DATA / "ltx/upscaler_spatial_x1_5.safetensors", "upsampler.")["blur_down.kernel"]
    np.testing.assert_array_equal(binomial_filter(), rearrange(stored, "one single h w -> h w one single"))
    assert binomial_filter()[2, 2, 0, 0] == 36 / 256


def test_the_blur_keeps_a_constant_away_from_the_edges():
    y = blur_down(jnp.ones((1, 1, 9, 7, 2)), jnp.asarray(binomial_filter()), 2)
    assert y.shape == (1, 1, 5, 4, 2)
    np.testing.assert_allclose(y[:, :, 1:-1, 1:-1], 1, atol=1e-6)
    np.testing.assert_allclose(y[:, :, 0, 0], (11 / 16) ** 2, atol=1e-6)  # zeros around it


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"spatial_scale": 1.5}, "rational_resampler False; implemented with that: 2.0"),
        ({"spatial_scale": 3.0, "rational_resampler": True}, "with that: 0.75, 1.5, 2.0, 4.0"),
        ({"temporal_upsample": True}, "both or neither"),
        ({"mid_channels": 48}, "multiple of 32"),
        ({"dims": 2}, "dims = 2"),
    ],
)
def test_what_is_not_implemented_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        UpscalerConfig.from_metadata(TINY | settings)
