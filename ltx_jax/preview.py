"""Frames to watch while a clip is denoised: one pixel a latent, by a linear map from channels to colours.

No such map is published for LTX-2.3, and checkpoints differ in width: it is fitted, once, to the checkpoint's own
decoder.
"""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from einops import reduce
from jaxtyping import Array, Float, UInt8
from PIL import Image
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from ltx_jax.cache import cache_folder, digest, keep_newest, source_digest, written_whole
from ltx_jax.checkpoint import Manifest
from ltx_jax.decoding import check_suffix
from ltx_jax.geometry import VideoLatents
from ltx_jax.models.video_vae import VideoVAE
from ltx_jax.pictures import Frames, to_uint8
from ltx_jax.stages import decode_pixels

_SIDE = 12  # latents of the frames that are decoded; the outermost see padding and are left out of the fit
# The patches that share one latent: from noise without any shape to shapes of a third of the frame.
_SHAPES = (1, 2, 4)
# How a patch looks is not linear in its latents; the rest must average out: patches for each number that is fitted, and
# frames where there are few numbers.
_PATCHES, _FRAMES = 9, 12
_LONGER_SIDE = 512  # pixels of a preview, at most
_KEPT = 16  # checkpoints whose factors are kept; 2 kB each


def preview_factors(vae: VideoVAE) -> Float[np.ndarray, "factors 3"]:
    """The linear map from normalised latents to the mean colour of the pixels they become, in [-1, 1].

    A row for each channel, and last the colour of latents that are zero. Least squares on what the decoder makes of
    single frames of noise with variance 1 in each channel, as normalised latents have, and shapes of several sizes. At
    LTX-2.3's width that decodes 12 frames of 384 x 384 pixels, one at a time.
    """
    config = vae.decoder.config
    num_frames = max(_FRAMES, -(-_PATCHES * (config.latent_channels + 1) // (_SIDE - 2) ** 2))
    latents, colours = [], []
    random = np.random.default_rng(0)
    for number in range(num_frames):
        size = _SHAPES[number % len(_SHAPES)]
        noise = random.standard_normal((1, 1, _SIDE // size, _SIDE // size, config.latent_channels), np.float32)
        noise = noise.repeat(size, axis=2).repeat(size, axis=3)
        pixels = np.asarray(decode_pixels(vae, jnp.asarray(noise)))
        colours.append(patch_colours(pixels, config.scale)[:, :, 1:-1, 1:-1].reshape(-1, 3))
        latents.append(noise[:, :, 1:-1, 1:-1].reshape(-1, config.latent_channels))
    return fit_factors(np.concatenate(latents), np.concatenate(colours))


def patch_colours(
    pixels: Float[np.ndarray, "batch pixel_frames pixel_height pixel_width 3"], scale: tuple[int, int, int]
) -> Float[np.ndarray, "batch frames height width 3"]:
    """The mean colour of the pixels of each latent: what a preview approximates. `scale` is pixels per latent.

    The first latent is one pixel frame, those behind it are `scale[0]` each.
    """
    time, row, column = scale
    patches = reduce(pixels, "b f (h r) (w c) colour -> b f h w colour", "mean", r=row, c=column)
    later = reduce(patches[:, 1:], "b (f t) h w colour -> b f h w colour", "mean", t=time)
    return np.concatenate([patches[:, :1], later], axis=1)


def fit_factors(
    latents: Float[np.ndarray, "patches channels"], colours: Float[np.ndarray, "patches 3"]
) -> Float[np.ndarray, "factors 3"]:
    """The factors that bring latents nearest to colours, by least squares."""
    inputs = np.concatenate([latents, np.ones((len(latents), 1), latents.dtype)], axis=1)
    return np.linalg.lstsq(inputs, colours, rcond=None)[0].astype(np.float32)


def kept_factors(manifest: Manifest, vae: Callable[[], VideoVAE]) -> Float[np.ndarray, "factors 3"]:
    """The factors of a checkpoint from the user's cache folder, where they are kept when they are made.

    `vae` gives the autoencoder, and is called only where they are not there. A checkpoint that does not say what it was
    made from has its factors made each time.
    """
    sources = manifest.provenance.get("sources")
    if not sources:
        return preview_factors(vae())
    key = digest(sorted(source["sha256"] for source in sources.values()), source_digest())
    path = cache_folder("previews") / f"{key}.safetensors"
    with suppress(OSError, SafetensorError, KeyError):
        factors = load_file(path)["factors"]
        path.touch()  # used last
        return factors
    factors = preview_factors(vae())
    with suppress(OSError):  # a folder that cannot be written only costs time later
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(path) as temporary:
            save_file({"factors": factors}, temporary)
        keep_newest(path.parent, "*.safetensors", _KEPT)
    return factors


def preview(
    latents: VideoLatents, factors: Float[np.ndarray, "factors 3"]
) -> UInt8[np.ndarray, "frames view_height view_width 3"]:
    """What normalised latents will look like: a frame for each latent frame, each latent a square of one colour.

    For live frames give it the model's denoised latents, not the noisy ones. Raises ValueError for factors of another
    number of channels, and for more than one clip.
    """
    batch, _, height, width, channels = latents.shape
    if batch != 1 or len(factors) != channels + 1:
        raise ValueError(
            f"a preview shows one clip of {len(factors) - 1} channels with these factors, got {batch} of {channels}; "
            "take one, and the factors of its checkpoint"
        )
    colours = np.asarray(_colours(latents, jnp.asarray(factors)))
    zoom = max(1, _LONGER_SIDE // max(height, width))
    return to_uint8(colours).repeat(zoom, axis=1).repeat(zoom, axis=2)


@jax.jit
def _colours(
    latents: Float[Array, "1 frames height width channels"], factors: Float[Array, "factors 3"]
) -> Float[Array, "frames height width 3"]:
    # Beside the latents, on their device: only colours come to the host, a fortieth of them.
    return jnp.einsum("fhwc,cd->fhwd", latents[0].astype(jnp.float32), factors[:-1]) + factors[-1]


def write_preview(path: Path, frames: Frames, *, fps: float) -> None:
    """Writes frames as an animation that repeats. A viewer sees the one that was there or this one, never half of it.

    An animated PNG, which browsers show, or a GIF, by the name; for anything else raises MediaError. A preview has one
    frame for each latent frame: in step with the clip, `fps` is the clip's divided by the pixel frames of a latent.
    """
    check_suffix(path, ".png", ".gif")
    first, *others = [Image.fromarray(frame) for frame in frames]
    with written_whole(path) as temporary:
        first.save(temporary, save_all=True, append_images=others, duration=round(1000 / fps), loop=0)
