"""Live frames from latents: factors fitted to a decoder, kept for a checkpoint, and written while a clip is made."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image
from safetensors import safe_open

from convert.tables.video_vae import VIDEO_VAE
from ltx_jax.cache import cache_folder
from ltx_jax.checkpoint import Manifest
from ltx_jax.config import VideoVAEConfig
from ltx_jax.media import MediaError
from ltx_jax.models.video_vae import VideoVAE
from ltx_jax.preview import fit_factors, kept_factors, patch_colours, preview, preview_factors, write_preview
from ltx_jax.stages import decode_pixels
from tests.conftest import DATA, fill, read_prefix

PUBLISHED = {
    "tiny": DATA / "ltx/checkpoint.safetensors",
    "mini": DATA / "mini-release/LTX-2.3-22B-PolarQuant-Q5/polarquant/bf16/ltx23_bf16.safetensors",
}


def load(name: str) -> VideoVAE:
    with safe_open(PUBLISHED[name], "np") as file:
        config = VideoVAEConfig.from_metadata(json.loads(file.metadata()["config"])["vae"])
    return fill(lambda: VideoVAE(config, rngs=nnx.Rngs(0)), VIDEO_VAE, read_prefix(PUBLISHED[name], "vae."))


@pytest.fixture(scope="module")
def tiny():
    return load("tiny")


def manifest(*digests: str) -> Manifest:
    sources = {f"{number}.safetensors": {"sha256": digest} for number, digest in enumerate(digests)}
    return Manifest(
        metadata={},
        gemma_metadata=None,
        upscaler_metadata={},
        num_hidden_states=1,
        text_length=None,
        model_version=None,
        parts={},
        quantized={},
        provenance={"sources": sources} if sources else {},
    )


@pytest.mark.parametrize("name", ["tiny", pytest.param("mini", marks=pytest.mark.slow)])
def test_a_preview_shows_what_the_decoder_will(name):
    vae = load(name)
    config = vae.decoder.config
    factors = preview_factors(vae)
    assert factors.shape == (config.latent_channels + 1, 3)
    random = np.random.default_rng(7)
    coarse = random.standard_normal((25, 1, 1, 6, 6, config.latent_channels)).astype(np.float32)
    latents = coarse.repeat(2, axis=3).repeat(2, axis=4)
    decoded = np.concatenate(
        [patch_colours(np.asarray(decode_pixels(vae, jnp.asarray(x))), config.scale)[0] for x in latents]
    )
    shown = np.concatenate([preview(jnp.asarray(x), factors)[:, ::42, ::42] for x in latents])  # 512 // 12 a latent

    def agreement(colours: np.ndarray) -> float:
        return np.mean([np.corrcoef(colours[..., i].ravel(), decoded[..., i].ravel())[0, 1] for i in range(3)])

    # 900 independent squares of latents: pictures of anything else correlate by 0, with a deviation of 1 / 30 or less
    # for three colours. Four of those are beyond chance. These decoders are random weights, far from linear: so it is
    # not near 1, but near what the linear map can do that was fitted to these very frames.
    assert agreement(shown) > 4 / 30
    best = fit_factors(latents.reshape(-1, config.latent_channels), decoded.reshape(-1, 3))
    assert agreement(shown) > agreement(latents[:, 0, 0] @ best[:-1] + best[-1]) / 2


def test_a_linear_decoder_is_found_exactly():
    random = np.random.default_rng(0)
    latents, factors = random.standard_normal((50, 7)), random.standard_normal((8, 3))
    found = fit_factors(latents, latents @ factors[:-1] + factors[-1])
    np.testing.assert_allclose(found, factors, atol=1e-6)  # returned in float32


def test_patches_are_the_pixels_of_a_latent():
    pixels = np.zeros((1, 9, 4, 6, 3), np.float32)
    pixels[0, 0, :2, :3] = 1  # the first latent frame is one pixel frame
    pixels[0, 1:5, 2:, 3:] = 1  # half of the eight of the second
    colours = patch_colours(pixels, (8, 2, 3))
    assert colours.shape == (1, 2, 2, 2, 3)
    np.testing.assert_array_equal(colours[0, :, :, :, 0], [[[1, 0], [0, 0]], [[0, 0], [0, 0.5]]])


def test_each_latent_is_a_square_of_its_colour():
    factors = np.asarray([[1, 0, 0], [0, -1, 0], [0, 0, 0.5]], np.float32)
    latents = np.zeros((1, 3, 2, 5, 2), np.float32)
    latents[0, 1, 1, 4] = [1, 1]
    frames = preview(jnp.asarray(latents), factors)
    assert frames.shape == (3, 2 * 102, 5 * 102, 3)  # 512 // 5
    assert (frames[1, 102:, 4 * 102 :] == [255, 0, 191]).all()
    assert (frames[0] == [127, 127, 191]).all()


def test_a_preview_larger_than_its_limit_is_one_pixel_a_latent():
    factors = np.zeros((3, 3), np.float32)
    assert preview(jnp.zeros((1, 1, 4, 600, 2)), factors).shape == (1, 4, 600, 3)


def test_factors_of_other_channels_are_refused():
    with pytest.raises(ValueError, match="clip of 2 channels with these factors, got 1 of 4"):
        preview(jnp.zeros((1, 1, 4, 4, 4)), np.zeros((3, 3), np.float32))


def test_factors_are_made_once_for_a_checkpoint(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("LTX_JAX_CACHE", str(tmp_path))
    made = []

    def vae() -> VideoVAE:
        made.append(1)
        return tiny

    first = kept_factors(manifest("ab", "cd"), vae)
    np.testing.assert_array_equal(kept_factors(manifest("ab", "cd"), vae), first)
    assert len(made) == 1
    kept_factors(manifest("ab", "ef"), vae)
    assert len(made) == 2
    for path in cache_folder("previews").iterdir():
        path.write_bytes(b"cut off")
    np.testing.assert_array_equal(kept_factors(manifest("ab", "cd"), vae), first)
    assert len(made) == 3
    np.testing.assert_array_equal(kept_factors(manifest(), vae), first)  # does not say what it was made from
    np.testing.assert_array_equal(kept_factors(manifest(), vae), first)
    assert len(made) == 5


@pytest.mark.parametrize("suffix", [".png", ".gif"])
def test_a_preview_is_one_animation_rewritten(tmp_path, suffix):
    path = tmp_path / f"clip{suffix}"
    write_preview(path, np.zeros((2, 20, 30, 3), np.uint8), fps=3.0)
    frames = np.arange(4, dtype=np.uint8)[:, None, None, None].repeat(20, 1).repeat(30, 2).repeat(3, 3) * 60
    write_preview(path, frames, fps=4.0)
    with Image.open(path) as image:
        assert (image.n_frames, image.size, image.info["duration"], image.info["loop"]) == (4, (30, 20), 250, 0)
        image.seek(3)
        assert np.unique(np.asarray(image.convert("RGB"))).tolist() == [180]
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_previews_have_a_name_that_says_what_they_are(tmp_path):
    with pytest.raises(MediaError, match=r"ends in \.png or \.gif"):
        write_preview(tmp_path / "clip.mp4", np.zeros((1, 8, 8, 3), np.uint8), fps=3.0)
