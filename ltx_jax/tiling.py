"""Decoding and encoding clips that are too large or too long at once: overlapping tiles, blended where they overlap.

Sizes are given in pixels and frames and cut in whole latents. A clip that fits in one tile is one tile, so the same
call serves every size. Source: `tiling.py` and `video_vae.py` in Lightricks/LTX-2, ltx_core/model/video_vae.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

VideoLatents = Float[Array | np.ndarray, "batch frames height width channels"]
Axes = tuple[int, int, int]  # time, height, width


@dataclass(frozen=True, kw_only=True)
class TileSize:
    """The largest tile and how far neighbours overlap.

    `side` is for the longer of height and width; a tile's other side is in proportion to the clip's.
    """

    side: int = 768
    side_overlap: int = 64
    num_frames: int = 80
    frame_overlap: int = 24

    def __post_init__(self):
        for name, size, overlap in (
            ("side", self.side, self.side_overlap),
            ("num_frames", self.num_frames, self.frame_overlap),
        ):
            if not 0 <= overlap < size:
                raise ValueError(f"a tile's overlap must be from 0 to below its {name}, got {overlap} of {size}")


DEFAULT_TILE = TileSize()


@dataclass(frozen=True, kw_only=True)
class Span:
    """One tile along one axis: what it covers and, before they are made to add up to one, the weights of blending."""

    latents: slice
    pixels: slice
    latent_mask: Float[np.ndarray, " latents"]
    pixel_mask: Float[np.ndarray, " pixels"]


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """Every combination of the three axes' spans is one tile."""

    time: tuple[Span, ...]
    rows: tuple[Span, ...]
    columns: tuple[Span, ...]


def trapezoid(length: int, rise: int, fall: int, *, from_zero: bool) -> Float[np.ndarray, " length"]:
    """Ones with linear ramps over the first `rise` and the last `fall` positions.

    Ramps leave out their ends, 0 and 1; a rise that starts `from_zero` has the 0.
    """
    mask = np.ones(length)
    if rise:
        mask[:rise] *= np.linspace(0, 1, rise + 1)[:-1] if from_zero else np.linspace(0, 1, rise + 2)[1:-1]
    if fall:
        mask[-fall:] *= np.linspace(1, 0, fall + 2)[1:-1]
    return mask.astype(np.float32)


def _starts(length: int, size: int, overlap: int) -> list[int]:
    """First position of each tile: as few as cover `length` in steps of size - overlap; the last may be shorter."""
    return [0] if length <= size else list(range(0, length - overlap, size - overlap))


def space_spans(length: int, size: int, overlap: int, *, scale: int) -> tuple[Span, ...]:
    """Tiles of at most `size` latents along height or width. `scale` is pixels per latent."""
    starts = _starts(length, size, overlap)
    spans = []
    for start in starts:
        stop = min(start + size, length)
        rise, fall = overlap if start > 0 else 0, overlap if stop < length else 0
        spans.append(
            Span(
                latents=slice(start, stop),
                pixels=slice(start * scale, stop * scale),
                latent_mask=trapezoid(stop - start, rise, fall, from_zero=False),
                pixel_mask=trapezoid((stop - start) * scale, rise * scale, fall * scale, from_zero=False),
            )
        )
    return tuple(spans)


def time_spans(length: int, size: int, overlap: int, *, scale: int) -> tuple[Span, ...]:
    """Tiles along time; all but the first begin one latent earlier and so are one longer.

    The first latent of any tile stands for a single frame, which is not what it is in the middle of a clip: its weight
    is zero.
    """
    starts = _starts(length, size, overlap)
    spans = []
    for start in starts:
        stop = min(start + size, length)
        first = max(start - 1, 0)
        rise, fall = overlap + 1 if start > 0 else 0, overlap if stop < length else 0
        frames = (stop - first - 1) * scale + 1
        frames_rise = (rise - 1) * scale + 1 if rise else 0
        spans.append(
            Span(
                latents=slice(first, stop),
                pixels=slice(first * scale, first * scale + frames),
                latent_mask=trapezoid(stop - first, rise, fall, from_zero=True),
                pixel_mask=trapezoid(frames, frames_rise, fall * scale, from_zero=True),
            )
        )
    return tuple(spans)


def tiles(latent_shape: Axes, *, scale: Axes, tile: TileSize) -> Tiles:
    """The tiles of a clip of `latent_shape` (frames, height, width) latents, each `scale` pixels.

    Raises ValueError where, in whole latents, nothing of a tile's frames would be left beside the overlap.
    """
    num_frames, *sides = latent_shape
    size, overlap = tile.num_frames // scale[0], tile.frame_overlap // scale[0]
    if size <= overlap and num_frames > size:
        raise ValueError(
            f"tiles of {tile.num_frames} frames that overlap by {tile.frame_overlap} are {size} and {overlap} latents; "
            f"num_frames must be at least {(overlap + 1) * scale[0]}"
        )
    time = time_spans(num_frames, size, overlap, scale=scale[0])

    def side_spans(length: int, scale: int) -> tuple[Span, ...]:
        overlap = tile.side_overlap // scale
        size = round(tile.side // scale * length / max(sides))
        return space_spans(length, max(size, overlap + 1, 2), overlap, scale=scale)

    rows, columns = (side_spans(*side) for side in zip(sides, scale[1:], strict=True))
    return Tiles(time=time, rows=rows, columns=columns)


def _weights(parts: list[tuple[slice, np.ndarray]]) -> list[np.ndarray]:
    """The masks of one axis, divided by their sum at every position."""
    total = np.zeros(max(where.stop for where, _ in parts), np.float32)
    for where, mask in parts:
        total[where] += mask
    return [mask / total[where] for where, mask in parts]


def _outer(
    time: Float[np.ndarray, " frames"], rows: Float[np.ndarray, " height"], columns: Float[np.ndarray, " width"]
) -> Float[np.ndarray, "frames height width 1"]:
    return time[:, None, None, None] * rows[:, None, None] * columns[:, None]


def decode_tiled(
    decode: Callable[[Array], Array],
    latents: VideoLatents,
    *,
    scale: Axes,
    tile: TileSize = DEFAULT_TILE,
) -> Iterator[np.ndarray]:
    """Decodes latents tile by tile and yields finished frames in order, float32 `[batch, frames, height, width, 3]`.

    `decode` takes latents and gives pixels, such as a jitted `VideoVAE.decode`; it compiles once for each shape that
    tiles have (at most three along time, two along a side). `scale` is pixels per latent in (time, height, width).
    Only the frames of one tile's length are held here, whatever the length of the clip.
    """
    _, frames, height, width, _ = latents.shape
    # On the host, where cutting a tile out compiles nothing.
    return decode_planned(decode, np.asarray(latents), tiles((frames, height, width), scale=scale, tile=tile))


def decode_planned(decode: Callable[[Array], Array], latents: np.ndarray, plan: Tiles) -> Iterator[np.ndarray]:
    """`decode_tiled` over tiles that were planned before."""
    time_weights, row_weights, column_weights = (
        _weights([(span.pixels, span.pixel_mask) for span in spans]) for spans in (plan.time, plan.rows, plan.columns)
    )
    batch, height, width = len(latents), plan.rows[-1].pixels.stop, plan.columns[-1].pixels.stop
    ends = [span.pixels.start for span in plan.time[1:]] + [plan.time[-1].pixels.stop]
    done = 0  # frames yielded
    blended = np.zeros((batch, 0, height, width, 3), np.float32)  # frames from `done` on
    for time, time_weight, end in zip(plan.time, time_weights, ends, strict=True):
        missing = time.pixels.stop - done - blended.shape[1]
        blended = np.concatenate([blended, np.zeros((batch, missing, height, width, 3), np.float32)], axis=1)
        for rows, row_weight in zip(plan.rows, row_weights, strict=True):
            for columns, column_weight in zip(plan.columns, column_weights, strict=True):
                pixels = decode(jnp.asarray(latents[:, time.latents, rows.latents, columns.latents]))
                weight = _outer(time_weight, row_weight, column_weight)
                where = blended[:, time.pixels.start - done :, rows.pixels, columns.pixels]
                where += weight * np.asarray(pixels.astype(jnp.float32))
        if end > done:  # later tiles begin here
            yield blended[:, : end - done]
            blended = blended[:, end - done :].copy()
            done = end


def encode_tiled(
    encode: Callable[[Array], Array],
    pixels: Float[Array | np.ndarray, "batch frames height width 3"],
    *,
    scale: Axes,
    tile: TileSize = DEFAULT_TILE,
) -> Float[Array, "batch latent_frames latent_height latent_width latent_channels"]:
    """Encodes pixels in [-1, 1] tile by tile; the tiles are those of `decode_tiled`, blended in latents.

    `encode` takes pixels and gives latents, such as a jitted `VideoVAE.encode`. Long clips may stay a numpy array in
    host memory: one tile at a time is moved. Frames behind the last whole latent are dropped. Raises ValueError where
    height or width does not hold whole latents.
    """
    num_frames, height, width = pixels.shape[1:4]
    if height % scale[1] or width % scale[2] or not (num_frames and height and width):
        raise ValueError(
            f"pixels must be at least one frame of a multiple of {scale[1]} x {scale[2]} (height x width), got "
            f"{num_frames} of {height} x {width}; crop or resize"
        )
    shape = ((num_frames - 1) // scale[0] + 1, height // scale[1], width // scale[2])
    plan = tiles(shape, scale=scale, tile=tile)
    pixels = np.asarray(pixels)
    weights = [
        _weights([(span.latents, span.latent_mask) for span in spans]) for spans in (plan.time, plan.rows, plan.columns)
    ]
    blended, dtype = np.zeros(0), jnp.float32
    for time, time_weight in zip(plan.time, weights[0], strict=True):
        for rows, row_weight in zip(plan.rows, weights[1], strict=True):
            for columns, column_weight in zip(plan.columns, weights[2], strict=True):
                latents = encode(jnp.asarray(pixels[:, time.pixels, rows.pixels, columns.pixels]))
                if not blended.size:
                    blended, dtype = np.zeros((len(pixels), *shape, latents.shape[-1]), np.float32), latents.dtype
                weight = _outer(time_weight, row_weight, column_weight)
                where = blended[:, time.latents, rows.latents, columns.latents]
                where += weight * np.asarray(latents.astype(jnp.float32))
    return jnp.asarray(blended, dtype)
