"""Batches from the little world, for the models that learn from pixels and waveforms alone."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ltx_jax.mel import mel_spectrogram
from scripts.tiny import release, world

SAMPLE_RATE_HZ: int = release.AUDIO_VAE["model"]["params"]["sampling_rate"]


def clip_of(index: int, *, seed: int, upright: bool) -> Float[np.ndarray, "frames height width 3"]:
    """A training clip of the first stage's size, as pixels in [-1, 1]; of one in three, so much of the second's.

    Such a piece lies around where the shape is at some time.
    """
    rng = np.random.default_rng([seed, index])
    scale = 2 if rng.random() < 1 / 3 else 1
    toy = world.sample("train", seed, index)
    width, height = size_of(upright=upright)
    clip = pixels_of(toy, width=scale * width, height=scale * height)
    if scale == 1:
        return clip
    frame = clip[rng.integers(len(clip))]
    shown = np.abs(frame - frame[:, :1]).max(-1) > 0.1  # a row of the background has one colour
    corner = []
    for axis, length in ((1, height), (0, width)):
        places = np.flatnonzero(shown.any(axis))
        centre = places.mean() if len(places) else length
        corner.append(int(np.clip(centre + length * rng.uniform(-0.9, -0.1), 0, length)))
    return clip[:, corner[0] : corner[0] + height, corner[1] : corner[1] + width]


def size_of(*, upright: bool) -> tuple[int, int]:
    """Width and height in the first stage."""
    return (release.HEIGHT, release.WIDTH) if upright else (release.WIDTH, release.HEIGHT)


def pixels_of(toy: world.Toy, *, width: int, height: int) -> Float[np.ndarray, "frames {height} {width} 3"]:
    """A whole clip, as pixels in [-1, 1]."""
    clip = world.render(toy, width=width, height=height, num_frames=release.NUM_FRAMES, fps=release.FPS)
    return clip.astype(np.float32) / 127.5 - 1


def sound_of(
    toy: world.Toy, sample_rate_hz: int = SAMPLE_RATE_HZ, *, grid_hz: float | None = None
) -> Float[np.ndarray, "samples channels"]:
    """The sound of a whole clip, by default at the audio autoencoder's sample rate."""
    return world.sound(toy, seconds=release.SECONDS, sample_rate_hz=sample_rate_hz, grid_hz=grid_hz)


@cache
def _places_of(kind: str, seed: int) -> tuple[int, ...]:
    """Where in the endless sequence toys of one sound stand, in its first rounds."""
    return tuple(i for i in range(6000) if world.sample("train", seed, i).sound == kind)


def toy_of_every_sound(index: int, *, seed: int) -> world.Toy:
    """A training toy; one of three clicks, though few of the world do."""
    kinds = tuple(world.SOUNDS)
    places = _places_of(kinds[index % len(kinds)], seed)
    return world.sample("train", seed, places[index // len(kinds) % len(places)])


def sounds_of(
    indices: range, *, seed: int, sample_rate_hz: int = SAMPLE_RATE_HZ, grid_hz: float | None = None
) -> Float[np.ndarray, "clips samples channels"]:
    """The sounds of whole clips; with `grid_hz` as a vocoder can make them."""
    toys = [toy_of_every_sound(index, seed=seed) for index in indices]
    return np.stack([sound_of(toy, sample_rate_hz, grid_hz=grid_hz) for toy in toys])


@partial(jax.jit, static_argnames="config")
def mel_of(waveform: Float[np.ndarray, "clips samples channels"], config) -> Float[Array, "clips frames bins channels"]:
    """Log-mel spectrograms of waveforms at the autoencoder's sample rate."""
    return mel_spectrogram(jnp.asarray(waveform), config)
