"""Tiles, their weights and blending, against the reference and on codecs whose answer is known."""

import json
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange, reduce, repeat
from flax import nnx

from convert.tables.video_vae import VIDEO_VAE
from ltx_jax.config import VideoVAEConfig
from ltx_jax.models.video_vae import VideoVAE
from ltx_jax.tiling import TileSize, decode_tiled, encode_tiled, tiles, trapezoid
from tests.conftest import fill, read_prefix

SCALE = (8, 32, 32)
REFERENCE_TILE = TileSize(side=64, side_overlap=32, num_frames=16, frame_overlap=8)
SMALL = (4, 2, 2)
SMALL_TILE = TileSize(side=10, side_overlap=4, num_frames=16, frame_overlap=8)


def extents(spans, what: str) -> list[tuple[int, int]]:
    return [(getattr(span, what).start, getattr(span, what).stop) for span in spans]


def test_tiles_and_masks_are_the_reference_s(ltx_dir, reference):
    info, data = json.loads((ltx_dir / "index.json").read_text())["video_vae"]["info"]["tiled"], reference("video_vae")
    plan = tiles((4, 4, 4), scale=SCALE, tile=REFERENCE_TILE)
    every = list(product(plan.time, plan.rows, plan.columns))
    assert [[list(x) for x in extents(spans, "latents")] for spans in every] == info["tiles_in_tHW"]
    assert [[list(x) for x in extents(spans, "pixels")] for spans in every] == info["tiles_out_tHW"]
    for k, spans in enumerate(every):
        for axis, span in zip("tHW", spans, strict=True):
            # Masks are made in float32 there, in float64 and rounded here.
            np.testing.assert_allclose(span.pixel_mask, data[f"tiled.mask.{k}.{axis}"], atol=1e-6, rtol=0)


def test_a_tiled_clip_agrees_with_the_reference(ltx_dir, ltx_config, reference):
    data = reference("video_vae")
    config = VideoVAEConfig.from_metadata(ltx_config["vae"])
    tensors = read_prefix(ltx_dir / "checkpoint.safetensors", "vae.")
    vae = fill(lambda: VideoVAE(config, rngs=nnx.Rngs(0)), VIDEO_VAE, tensors)
    latents = jnp.asarray(rearrange(data["tiled.in.latent"], "b c f h w -> b f h w c"))
    decode = jax.jit(lambda vae, x: vae.decode(x))
    chunks = list(decode_tiled(lambda x: decode(vae, x), latents, scale=config.scale, tile=REFERENCE_TILE))
    # The reference's chunks are of 0, 8 and 17 frames; empty ones are left out here.
    assert [chunk.shape for chunk in chunks] == [(1, 8, 128, 128, 3), (1, 17, 128, 128, 3)]
    stored = rearrange(np.concatenate(chunks, axis=1)[:, :, 1::4, 2::4], "b f h w c -> b c f h w")
    # A pass of the decoder in float32, as for the decoder itself.
    np.testing.assert_allclose(stored, data["tiled.out.pixels_quarter"], atol=5e-5, rtol=0)


def test_the_default_tiles_are_those_of_the_released_model():
    plan = tiles((16, 32, 48), scale=SCALE, tile=TileSize())  # 121 frames of 1024 x 1536
    # 80 and 24 frames are 10 and 3 latents; from the second tile on one latent more in front.
    assert extents(plan.time, "latents") == [(0, 10), (6, 16)]
    assert extents(plan.time, "pixels") == [(0, 73), (48, 121)]
    # 768 and 64 pixels are 24 and 2 latents along the long side, and in proportion 16 along the short one.
    assert extents(plan.columns, "latents") == [(0, 24), (22, 46), (44, 48)]
    assert extents(plan.rows, "latents") == [(0, 16), (14, 30), (28, 32)]


@pytest.mark.parametrize("shape", [(1, 1, 1), (10, 16, 24), (7, 24, 13)])
def test_a_clip_that_fits_is_one_tile_with_full_weight(shape):
    plan = tiles(shape, scale=SCALE, tile=TileSize())
    for spans, length in zip((plan.time, plan.rows, plan.columns), shape, strict=True):
        (span,) = spans
        assert span.latents == slice(0, length)
        assert (span.pixel_mask == 1).all()
        assert (span.latent_mask == 1).all()


def test_every_position_has_weight_and_tiles_start_in_order():
    for frames, height, width, overlap in product((1, 5, 23), (1, 7), (3, 40), (0, 8, 72)):
        tile = TileSize(side=160, side_overlap=overlap, num_frames=80, frame_overlap=overlap)
        plan = tiles((frames, height, width), scale=SCALE, tile=tile)
        for spans, length in ((plan.time, 8 * (frames - 1) + 1), (plan.rows, 32 * height), (plan.columns, 32 * width)):
            total = np.zeros(length)
            for span in spans:
                total[span.pixels] += span.pixel_mask
            assert (total > 0).all()
            assert [span.pixels.start for span in spans] == sorted(span.pixels.start for span in spans)


def test_ramps_leave_out_zero_and_one_unless_they_start_from_zero():
    np.testing.assert_allclose(trapezoid(6, 3, 1, from_zero=False), [0.25, 0.5, 0.75, 1, 1, 0.5])
    np.testing.assert_allclose(trapezoid(4, 2, 0, from_zero=True), [0, 0.5, 1, 1])


def nearest_decode(latents: jax.Array) -> jax.Array:
    """A decoder without a field of view: the first latent is one frame, each later one four."""
    pixels = repeat(np.asarray(latents), "b f h w c -> b (f t) (h r) (w q) c", t=SMALL[0], r=SMALL[1], q=SMALL[2])
    return jnp.asarray(pixels[:, SMALL[0] - 1 :])


def mean_encode(pixels: jax.Array) -> jax.Array:
    """Its inverse: the mean of every cell."""
    padded = np.concatenate([np.repeat(pixels[:, :1], SMALL[0] - 1, axis=1), pixels], axis=1)
    t, r, q = SMALL
    return jnp.asarray(reduce(padded, "b (f t) (h r) (w q) c -> b f h w c", "mean", t=t, r=r, q=q))


def test_tiles_of_a_decoder_without_a_field_of_view_add_up_to_the_whole():
    latents = jnp.asarray(np.random.default_rng(0).normal(size=(2, 11, 9, 13, 3)), jnp.float32)
    seen = set()

    def decode(x):
        seen.add(x.shape)
        return nearest_decode(x)

    chunks = decode_tiled(decode, latents, scale=SMALL, tile=SMALL_TILE)
    whole = np.concatenate(list(chunks), axis=1)
    # Weights add up to one within rounding.
    np.testing.assert_allclose(whole, nearest_decode(latents), atol=1e-5)
    # At most three lengths, two heights and two widths are compiled.
    assert len(seen) <= 12


def test_frames_come_while_later_tiles_are_not_yet_decoded():
    calls = []

    def decode(x):
        calls.append(x.shape)
        return nearest_decode(x)

    chunks = decode_tiled(decode, jnp.zeros((1, 21, 2, 2, 3)), scale=SMALL, tile=SMALL_TILE)
    assert not calls
    lengths = []
    for count, chunk in enumerate(chunks, start=1):
        assert len(calls) == count
        lengths.append(chunk.shape[1])
    assert sum(lengths) == 81
    assert max(lengths) <= 16


def test_tiles_of_an_encoder_without_a_field_of_view_add_up_to_the_whole():
    # 44 frames: 10 * 4 + 1 and three that are dropped. In host memory, as for long clips.
    pixels = np.random.default_rng(1).normal(size=(2, 44, 18, 26, 3)).astype(np.float32)
    latents = encode_tiled(mean_encode, pixels, scale=SMALL, tile=SMALL_TILE)
    np.testing.assert_allclose(latents, mean_encode(jnp.asarray(pixels[:, :41])), atol=1e-5)


def test_encoded_tiles_keep_the_encoder_s_dtype():
    pixels = jnp.zeros((1, 5, 4, 4, 3))
    latents = encode_tiled(lambda x: mean_encode(x).astype(jnp.bfloat16), pixels, scale=SMALL, tile=SMALL_TILE)
    assert latents.dtype == jnp.bfloat16
    assert latents.shape == (1, 2, 2, 2, 3)


def test_tiles_that_are_all_overlap_are_refused():
    with pytest.raises(ValueError, match="overlap must be from 0 to below its side, got 64 of 64"):
        TileSize(side=64, side_overlap=64)
    tile = TileSize(num_frames=31, frame_overlap=24)
    with pytest.raises(ValueError, match="num_frames must be at least 32"):
        decode_tiled(nearest_decode, jnp.zeros((1, 9, 1, 1, 3)), scale=SCALE, tile=tile)


def test_pixels_that_hold_no_whole_latents_are_refused():
    with pytest.raises(ValueError, match=r"multiple of 2 x 2 .* got 5 of 4 x 3"):
        encode_tiled(mean_encode, jnp.zeros((1, 5, 4, 3, 3)), scale=SMALL)
