"""The latents of a clip, and the file that keeps them between runs."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float
from safetensors import SafetensorError, safe_open
from safetensors.flax import save_file

from ltx_jax.cache import written_whole
from ltx_jax.checkpoint import Configs
from ltx_jax.geometry import VideoGrid

# The axes that the reference uses: channels before frames.
VIDEO, AUDIO = "out.video_latent", "out.audio_latent"


@dataclass(frozen=True, kw_only=True)
class Latents:
    """What denoising gives: normalised latents of both modalities. Where only sound was made, of no frames."""

    video: Float[Array, "1 frames height width video_channels"]
    audio: Float[Array, "1 time bins audio_channels"]  # of no time for a silent clip


def save_latents(path: Path, latents: Latents, *, fps: float) -> None:
    """Writes latents and the clip's frames a second as safetensors, whole or not at all."""
    arrays = {
        VIDEO: rearrange(latents.video, "b f h w c -> b c f h w"),
        AUDIO: rearrange(latents.audio, "b t bins c -> b c t bins"),
    }
    with written_whole(path) as temporary:
        save_file({name: jnp.asarray(array) for name, array in arrays.items()}, str(temporary), {"fps": repr(fps)})


def read_latents(path: Path, configs: Configs) -> Latents:
    """The latents of a file. Raises ValueError for one that is not such a file, or of another model."""
    _shapes(path)
    with safe_open(path, "flax") as file:
        video, audio = file.get_tensor(VIDEO), file.get_tensor(AUDIO)
    expected: Any = (
        configs.transformer.video.in_channels,
        configs.audio_vae.latent_channels,
        configs.audio_vae.latent_bins,
    )
    found = video.shape[1], audio.shape[1], audio.shape[3]
    if found != expected:
        raise ValueError(
            f"{path} holds latents of {found[0]} video channels and {found[1]} x {found[2]} of audio; this checkpoint "
            f"has {expected[0]} and {expected[1]} x {expected[2]}: they are of another model"
        )
    return Latents(
        video=rearrange(video, "b c f h w -> b f h w c"),
        audio=rearrange(audio, "b c t bins -> b t bins c"),
    )


def latents_size(path: Path, scale: tuple[int, int, int], *, fps: float | None) -> VideoGrid:
    """The size of the clip that latents decode to, from the file's header; its own frames a second if none are given.

    Raises ValueError as `read_latents` does, for sound alone, and where nobody says how fast the clip is.
    """
    (_, _, frames, height, width), said = _shapes(path)
    fps = fps or said
    if not frames:
        raise ValueError(f"{path} holds sound alone; there is no picture to work on")
    if fps is None:
        raise ValueError(f"{path} does not say how many frames a second its clip has; give --fps")
    time, rows, columns = scale
    return VideoGrid(
        num_frames=(frames - 1) * time + 1, height=height * rows, width=width * columns, fps=fps, scale=scale
    )


def _shapes(path: Path) -> tuple[tuple[int, ...], float | None]:
    """The shape of the picture's latents and the frames a second that the file states."""
    try:
        with safe_open(path, "numpy") as file:
            video, audio = (tuple(file.get_slice(name).get_shape()) for name in (VIDEO, AUDIO))
            said = (file.metadata() or {}).get("fps")
        fps = None if said is None else float(said)
    except (OSError, SafetensorError, ValueError) as error:
        raise ValueError(
            f"{path} cannot be read as latents ({error}); give a file that --save-latents or --preview wrote"
        ) from error
    if len(video) != 5 or len(audio) != 4 or video[0] != 1 or audio[0] != 1:
        raise ValueError(f"{path} holds latents of shapes {list(video)} and {list(audio)}; one clip is 5 and 4 axes")
    return video, fps
