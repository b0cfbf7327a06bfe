"""Pixel, latent and token grids: legal sizes, positions of tokens, patchify and unpatchify.

Source: `patchifiers` and `types` in Lightricks/LTX-2, ltx_core; positions as in the architecture's rotary embedding.
"""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float

from ltx_jax.config import AudioVAEConfig

VideoLatents = Float[Array, "batch frames height width channels"]
AudioLatents = Float[Array, "batch time bins channels"]
Tokens = Float[Array, "batch tokens channels"]
AudioTokens = Float[Array, "batch time features"]
Positions = Float[Array, "1 tokens axes 2"]  # [start, end) of each token: seconds, then pixels


@dataclass(frozen=True, kw_only=True)
class VideoGrid:
    """A clip's size in pixels and in latents. `scale` is pixels per latent in (time, height, width)."""

    num_frames: int
    height: int
    width: int
    fps: float
    scale: tuple[int, int, int] = (8, 32, 32)

    @property
    def seconds(self) -> float:
        return self.num_frames / self.fps

    @property
    def latent_frames(self) -> int:
        """The first pixel frame stands alone, each later latent frame holds eight."""
        return (self.num_frames - 1) // self.scale[0] + 1

    @property
    def latent_height(self) -> int:
        return self.height // self.scale[1]

    @property
    def latent_width(self) -> int:
        return self.width // self.scale[2]

    @property
    def num_tokens(self) -> int:
        return self.latent_frames * self.latent_height * self.latent_width

    def check(self, *, stages: int = 1) -> None:
        """Raises ValueError where a size is not legal, naming the nearest that are.

        Height and width must hold whole latents, in the half-size first stage too where there are two.
        """
        problems = []
        for name, value, step in (
            ("height", self.height, self.scale[1] * stages),
            ("width", self.width, self.scale[2] * stages),
        ):
            if value < step or value % step:
                below, above = value // step * step, (value // step + 1) * step
                near = " or ".join(str(x) for x in (below, above) if x > 0)
                what = "two stages" if stages == 2 else "one stage"
                problems.append(f"{name} must be a multiple of {step} for {what}, got {value}; try {near}")
        step = self.scale[0]
        if self.num_frames < 1 or self.num_frames % step != 1 % step:
            below = max(self.num_frames - 1, 0) // step * step + 1
            problems.append(f"num_frames must be {step}k + 1, got {self.num_frames}; try {below} or {below + step}")
        if not self.fps > 0:
            problems.append(f"fps must be positive, got {self.fps}")
        if problems:
            raise ValueError("; ".join(problems))


def size_of_aspect(aspect: str, megapixels: float, *, step: int) -> tuple[int, int]:
    """Height and width of a shape such as "9:16", multiples of `step`, as near as they can be to a number of pixels.

    Raises ValueError for what is no shape.
    """
    sides = aspect.replace("x", ":").split(":")
    try:
        across, down = (float(side) for side in sides)
    except ValueError:
        across = down = 0.0
    if not (across > 0 and down > 0 and 1 / 16 <= across / down <= 16):
        raise ValueError(f"aspect must be width:height, as 16:9 or 9:16, at most 16 to 1; got {aspect!r}")
    if not 0 < megapixels <= 64:
        raise ValueError(f"megapixels must be above 0 and at most 64, got {megapixels:g}")
    ratio, pixels = across / down, megapixels * 1e6
    exact = (pixels / ratio) ** 0.5, (pixels * ratio) ** 0.5
    choices = [[max(int(side / step), 1) * step, (int(side / step) + 1) * step] for side in exact]

    def badness(size: tuple[int, int]) -> float:
        """How far shape and area are off, in powers of e."""
        height, width = size
        return abs(np.log(width / height / ratio)) + abs(np.log(height * width / pixels))

    return min(((height, width) for height in choices[0] for width in choices[1]), key=badness)


def audio_latent_length(num_frames: int, fps: float, config: AudioVAEConfig) -> int:
    """Latent frames of the sound of a clip: 25 a second, rounded half to even as in the reference."""
    return round(num_frames / fps * config.latents_per_second)


def _bounds(axes: list[np.ndarray]) -> np.ndarray:
    """Every combination of per-axis bounds `[n, 2]`, the last axis fastest: `[tokens, axes, 2]`."""
    grids = np.meshgrid(*(np.arange(len(axis)) for axis in axes), indexing="ij")
    return np.stack([axis[grid.ravel()] for axis, grid in zip(axes, grids, strict=True)], axis=1)


def _steps(count: int, size: float) -> np.ndarray:
    start = np.arange(count, dtype=np.float32) * np.float32(size)
    return np.stack([start, start + np.float32(size)], axis=1)


def video_positions(
    latent_shape: tuple[int, int, int],
    *,
    fps: float,
    scale: tuple[int, int, int] = (8, 32, 32),
    downscale: float = 1.0,
    time_stretch: float = 1.0,
) -> Positions:
    """Positions of the tokens of a latent grid (frames, height, width): seconds, row and column pixels; float32.

    The first latent frame covers one pixel frame. A reference video of an IC-LoRA is placed on the pixels of the
    output by `downscale`, and on its time by `time_stretch`.
    """
    frames, height, width = latent_shape
    time = np.maximum(_steps(frames, float(scale[0])) + 1 - scale[0], 0).astype(np.float32)
    first = time[:1].copy()
    time = time * np.float32(time_stretch)
    if time_stretch != 1:
        # The first frame stays one frame long and the others follow it.
        time = np.concatenate([first, time[1:] + first[:, 1:] * np.float32(1 - time_stretch)])
    time = time / np.float32(fps)
    rows, columns = (_steps(n, float(s * downscale)) for n, s in ((height, scale[1]), (width, scale[2])))
    return jnp.asarray(_bounds([time, rows, columns])[None])


def keyframe_positions(
    latent_shape: tuple[int, int], *, frame: int, fps: float, scale: tuple[int, int, int] = (8, 32, 32)
) -> Positions:
    """Positions of one image (latent height, width) shown at pixel frame `frame`."""
    time = np.array([[frame, frame + 1]], np.float32) / np.float32(fps)
    rows, columns = (_steps(n, float(s)) for n, s in zip(latent_shape, scale[1:], strict=True))
    return jnp.asarray(_bounds([time, rows, columns])[None])


def audio_positions(length: int, config: AudioVAEConfig) -> Positions:
    """Positions in seconds of audio tokens; like video, the first latent frame covers a single mel frame."""
    bounds = np.maximum(np.arange(length + 1) * config.scale - (config.scale - 1), 0).astype(np.float32)
    seconds = bounds * np.float32(config.hop_length) / np.float32(config.sample_rate_hz)
    return jnp.asarray(np.stack([seconds[:-1], seconds[1:]], axis=1)[None, :, None, :])


def patchify_video(latents: VideoLatents) -> Tokens:
    """One token a latent pixel, in the order frame, row, column."""
    return rearrange(latents, "b f h w c -> b (f h w) c")


def unpatchify_video(tokens: Tokens, grid: VideoGrid) -> VideoLatents:
    """The latents of the first tokens; conditioning tokens appended behind them must have been cut off."""
    return rearrange(tokens, "b (f h w) c -> b f h w c", h=grid.latent_height, w=grid.latent_width)


def patchify_audio(latents: AudioLatents) -> AudioTokens:
    """One token a latent frame; feature index = channel * bins + bin."""
    return rearrange(latents, "b t bins c -> b t (c bins)")


def unpatchify_audio(tokens: AudioTokens, config: AudioVAEConfig) -> AudioLatents:
    return rearrange(tokens, "b t (c bins) -> b t bins c", bins=config.latent_bins)
