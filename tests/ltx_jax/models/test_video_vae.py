"""The video autoencoder against the reference in two configurations, and its sizes at the released one."""

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

from convert.mapping import plan
from convert.tables.video_vae import SKIP, VIDEO_VAE
from ltx_jax.config import ConfigError, VideoVAEConfig
from ltx_jax.models.conv import _conv_folded, _conv_native, conv3d, pad_time
from ltx_jax.models.video_vae import (
    VideoVAE,
    depth_to_space,
    patchify_pixels,
    space_to_depth,
    unpatchify_pixels,
)
from tests.conftest import DATA, fill, read_prefix

# One pass of some twenty convolutions in float32: rounding of other summation orders, as the fixtures' README suggests.
TOLERANCE = 5e-5

# The released model's block lists.
RELEASED = {
    "latent_channels": 128,
    "patch_size": 4,
    "encoder_base_channels": 128,
    "decoder_base_channels": 128,
    "encoder_blocks": [
        ["res_x", {"num_layers": 4}],
        ["compress_space_res", {"multiplier": 2}],
        ["res_x", {"num_layers": 6}],
        ["compress_time_res", {"multiplier": 2}],
        ["res_x", {"num_layers": 4}],
        ["compress_all_res", {"multiplier": 2}],
        ["res_x", {"num_layers": 2}],
        ["compress_all_res", {"multiplier": 1}],
        ["res_x", {"num_layers": 2}],
    ],
    "decoder_blocks": [
        ["res_x", {"num_layers": 4}],
        ["compress_space", {"multiplier": 2}],
        ["res_x", {"num_layers": 6}],
        ["compress_time", {"multiplier": 2}],
        ["res_x", {"num_layers": 4}],
        ["compress_all", {"multiplier": 1}],
        ["res_x", {"num_layers": 2}],
        ["compress_all", {"multiplier": 2}],
        ["res_x", {"num_layers": 2}],
    ],
}

# Another list: time last, two changes in a row, patches of two pixels, a scale of (4, 4, 4).
OTHER = {
    "latent_channels": 8,
    "patch_size": 2,
    "decoder_base_channels": 2,
    "encoder_blocks": [
        ["compress_space_res", {"multiplier": 1}],
        ["compress_time_res", {"multiplier": 2}],
        ["res_x", 1],
        ["compress_time_res", {"multiplier": 1}],
    ],
    "decoder_blocks": [
        ["compress_space", {"multiplier": 2}],
        ["res_x", 1],
        ["compress_time", {}],
        ["compress_time", {}],
    ],
}


def noise(*shape: int) -> jax.Array:
    # numpy, because compiling jax.random for every shape takes longer than the tests.
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


def channels_last(array: np.ndarray) -> jax.Array:
    return jnp.asarray(rearrange(array, "b c f h w -> b f h w c"))


def assert_close(ours: jax.Array, reference: np.ndarray) -> None:
    np.testing.assert_allclose(ours, channels_last(reference), atol=TOLERANCE, rtol=0)


def load(path):
    with safe_open(path, "np") as file:
        config = VideoVAEConfig.from_metadata(json.loads(file.metadata()["config"])["vae"])
    return fill(lambda: VideoVAE(config, rngs=nnx.Rngs(0)), VIDEO_VAE, read_prefix(path, "vae."))


@pytest.fixture(scope="module")
def vae():
    return load(DATA / "ltx/checkpoint.safetensors")


@pytest.fixture(scope="module")
def mini_vae():
    return load(DATA / "mini-release/LTX-2.3-22B-PolarQuant-Q5/polarquant/bf16/ltx23_bf16.safetensors")


@pytest.fixture(scope="module")
def other_vae():
    config = VideoVAEConfig.from_metadata(OTHER)
    graphdef, state = nnx.split(nnx.eval_shape(lambda: VideoVAE(config, rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(0)
    return nnx.merge(graphdef, jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.2, x.shape), x.dtype), state))


@jax.jit
def encode(vae: VideoVAE, pixels):
    """Latents, and the output of every stage of the encoder (the compiler merges the two passes)."""
    stages = [vae.encoder.conv_in(patchify_pixels(pixels, vae.encoder.config.patch_size))]
    for block in vae.encoder.blocks:
        stages.append(block(stages[-1]))
    return vae.encode(pixels), stages


@jax.jit
def decode(vae: VideoVAE, latents):
    stages = [vae.decoder.conv_in(vae.unnormalise(latents))]
    for block in vae.decoder.blocks:
        stages.append(block(stages[-1]))
    return vae.decode(latents), stages


def test_latents_and_every_encoder_stage_agree_with_the_reference(vae, reference):
    data = reference("video_vae")
    latents, stages = encode(vae, channels_last(data["encode.in.pixels"]))
    for name, ours in zip(["conv_in", *(f"down_blocks.{i}" for i in range(9))], stages, strict=True):
        assert_close(ours, data[f"mid.enc.{name}"])
    assert_close(latents, data["encode.out.latent"])


def test_pixels_and_every_decoder_stage_agree_with_the_reference(vae, reference):
    data = reference("video_vae")
    pixels, stages = decode(vae, channels_last(data["decode.in.latent"]))
    for name, ours in zip(["conv_in", *(f"up_blocks.{i}" for i in range(9))], stages, strict=True):
        assert_close(ours, data[f"mid.dec.{name}"])
    assert_close(pixels, data["decode.out.pixels"])


def test_single_images_agree_with_the_reference(vae, reference):
    data = reference("video_vae")
    assert_close(encode(vae, channels_last(data["encode_image.in.pixels"]))[0], data["encode_image.out.latent"])
    assert_close(decode(vae, channels_last(data["decode_image.in.latent"]))[0], data["decode_image.out.pixels"])


def test_a_bfloat16_checkpoint_runs_in_float32_on_float32_latents(mini_vae, mini_release):
    data = load_file(mini_release / "reference/gen_a_distilled.safetensors")
    pixels = np.asarray(decode(mini_vae, channels_last(data["out.video_latent"]))[0])
    assert pixels.dtype == np.float32
    frames = (np.clip(pixels[0] / 2 + 0.5, 0, 1) * 255).astype(np.uint8)
    off = np.abs(frames.astype(int) - data["out.frames"])
    # Truncation to a level turns a rounding error into a whole level now and then.
    assert off.max() <= 1
    assert (off > 0).mean() < 0.01


def test_an_image_condition_agrees_with_the_reference(mini_vae, mini_release):
    data = load_file(mini_release / "reference/gen_d_image_to_video.safetensors")
    pixels = jnp.asarray(data["in.image"], jnp.float32)[None, None] / 127.5 - 1
    assert_close(encode(mini_vae, pixels)[0], data["out.image_latent"])


def test_bfloat16_latents_decode_to_bfloat16_pixels_near_the_float32_ones(other_vae):
    latents = noise(1, 2, 3, 4, 8)
    expected, _ = decode(other_vae, latents)
    pixels, stages = decode(other_vae, latents.astype(jnp.bfloat16))
    assert {pixels.dtype, *(stage.dtype for stage in stages)} == {jnp.dtype(jnp.bfloat16)}
    error = np.asarray(pixels, np.float32) - expected
    # Seven convolutions, each with its output, weights and input rounded to 8 bits (relative 2^-9).
    assert np.sqrt(np.mean(np.square(error))) < 0.02 * np.std(expected)


def test_bfloat16_pixels_encode_to_bfloat16_latents(vae):
    out = jax.eval_shape(lambda x: vae.encode(x), jax.ShapeDtypeStruct((1, 9, 64, 64, 3), jnp.bfloat16))
    assert out.dtype == jnp.bfloat16


def test_the_released_configuration_has_the_published_sizes():
    config = VideoVAEConfig.from_metadata(RELEASED)
    assert config.scale == (8, 32, 32)
    model = nnx.eval_shape(lambda: VideoVAE(config, rngs=nnx.Rngs(0)))
    for part, count in ((model.encoder, 318_936_897), (model.decoder, 407_169_072), (model.statistics, 256)):
        leaves = jax.tree.leaves(nnx.state(part))
        assert sum(prod(leaf.shape) for leaf in leaves) == count
        assert len(leaves) == (2 if part is model.statistics else 84)
    graphdef, state = nnx.split(model)

    def shape(method: str, *sizes: int) -> tuple[int, ...]:
        x = jax.ShapeDtypeStruct(sizes, jnp.bfloat16)
        return jax.eval_shape(lambda state, x: getattr(nnx.merge(graphdef, state), method)(x), state, x).shape

    assert shape("encode", 1, 121, 512, 768, 3) == (1, 16, 16, 24, 128)
    assert shape("decode", 1, 16, 17, 30, 128) == (1, 121, 544, 960, 3)


def test_other_block_lists_have_the_sizes_they_say(other_vae):
    assert other_vae.encoder.config.scale == (4, 4, 4)
    latents, _ = encode(other_vae, jnp.zeros((2, 9, 12, 20, 3)))
    assert latents.shape == (2, 3, 3, 5, 8)
    pixels = jax.eval_shape(lambda x: other_vae.decode(x), latents)
    assert pixels.shape == (2, 9, 12, 20, 3)


def test_the_encoder_drops_frames_behind_the_last_whole_latent(other_vae):
    pixels = noise(2, 12, 12, 20, 3)
    # The same compiled shape as above; 12 = 2 * 4 + 1 + 3.
    expected, _ = encode(other_vae, pixels[:, :9])
    np.testing.assert_allclose(jax.jit(other_vae.encode)(pixels), expected, atol=1e-6)


def test_the_encoder_does_not_look_ahead(other_vae):
    pixels = noise(2, 9, 12, 20, 3)
    first, _ = encode(other_vae, pixels)
    second, _ = encode(other_vae, pixels.at[:, 5:].set(0))
    np.testing.assert_array_equal(first[:, :2], second[:, :2])
    assert np.abs(first[:, 2] - second[:, 2]).max() > 1e-3


def test_sizes_that_hold_no_whole_latents_are_refused(other_vae):
    with pytest.raises(ValueError, match=r"multiple of 4 x 4 .* got 9 of 10 x 20"):
        other_vae.encode(jnp.zeros((1, 9, 10, 20, 3)))


def test_normalise_inverts_unnormalise(vae):
    latents = noise(1, 2, 3, 4, 8)
    np.testing.assert_allclose(vae.normalise(vae.unnormalise(latents)), latents, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"decoder_blocks": [["compress_all", {"residual": True}]]}, "residual = True"),
        ({"decoder_blocks": [["res_x", {"num_layers": 1, "inject_noise": True}]]}, "inject_noise = True"),
        ({"decoder_blocks": [["compress_all", {}]]}, "must agree"),
        ({"encoder_blocks": [["attention", {}]]}, "a block 'attention'"),
        ({"timestep_conditioning": True}, "timestep_conditioning = True"),
    ],
)
def test_what_is_not_implemented_is_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        VideoVAEConfig.from_metadata(OTHER | change)


def test_widths_that_cannot_be_folded_are_refused():
    blocks = {"encoder_blocks": [["compress_all_res", {"multiplier": 1}]], "decoder_blocks": [["compress_all", {}]]}
    config = VideoVAEConfig.from_metadata(OTHER | blocks | {"latent_channels": 4})
    with pytest.raises(ValueError, match="4 does not"):
        nnx.eval_shape(lambda: VideoVAE(config, rngs=nnx.Rngs(0)))


def test_unused_statistics_are_the_only_tensors_left_out(vae):
    extra = "per_channel_statistics.mean-of-stds"
    assert plan(VIDEO_VAE, {extra: (8,)}, {}).unknown == [extra]
    assert SKIP == ("per_channel_statistics.*",)


def test_a_patch_puts_columns_before_rows():
    image = jnp.arange(12.0).reshape(1, 1, 2, 2, 3)  # value = 6 * row + 3 * column + channel
    patches = patchify_pixels(image, 2)
    assert patches.ravel().tolist() == [0, 6, 3, 9, 1, 7, 4, 10, 2, 8, 5, 11]
    np.testing.assert_array_equal(unpatchify_pixels(patches, 2), image)


def test_space_to_depth_puts_columns_last():
    video = jnp.arange(8.0).reshape(1, 2, 2, 2, 1)
    cells = space_to_depth(video, (2, 2, 2))
    assert cells.ravel().tolist() == list(range(8))
    np.testing.assert_array_equal(depth_to_space(cells, (2, 2, 2)), video)


def test_frames_are_padded_as_the_three_kinds_say():
    x = jnp.asarray([1.0, 2.0, 3.0]).reshape(1, 3, 1, 1, 1)
    padded = {kind: pad_time(x, kind).ravel().tolist() for kind in ("causal", "copies", "zeros")}
    assert padded == {"causal": [1, 1, 1, 2, 3], "copies": [1, 1, 2, 3, 3], "zeros": [0, 1, 2, 3, 0]}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_folded_convolution_is_the_native_one(dtype):
    x, kernel = noise(2, 5, 4, 6, 8).astype(dtype), noise(3, 3, 3, 8, 5).astype(dtype)
    folded, native = jax.jit(_conv_folded)(x, kernel), jax.jit(_conv_native)(x, kernel)
    assert folded.dtype == native.dtype == dtype
    # Values up to 60. float32: other orders of 216 sums; bfloat16: both sum in float32 and round once, to 8 bits.
    tolerance = 1e-4 if dtype == jnp.float32 else 0.25
    np.testing.assert_allclose(np.asarray(folded, np.float32), np.asarray(native, np.float32), atol=tolerance)


@pytest.mark.parametrize(("platform", "dims"), [("cpu", "[b, 0, 1, f]"), ("cuda", "[b, 0, 1, 2, f]")])
def test_only_cpus_run_the_folded_convolution(platform, dims):
    shapes = jax.ShapeDtypeStruct((1, 5, 4, 4, 2), jnp.float32), jax.ShapeDtypeStruct((3, 3, 3, 2, 2), jnp.float32)
    lowered = jax.jit(conv3d).trace(*shapes).lower(lowering_platforms=(platform,)).as_text()
    assert lowered.count("stablehlo.convolution") == 1
    assert f"dim_numbers = {dims}" in lowered
