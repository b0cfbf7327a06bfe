"""Arrays of pictures: levels and pixels, sizes and lengths that the model takes, and sheets for looking at results."""

import io
import warnings
from collections.abc import Sequence

import av
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image, ImageDraw, ImageFont

Frames = UInt8[np.ndarray, "frames height width 3"]
Sheet = UInt8[np.ndarray, "sheet_height sheet_width 3"]

_RESIZED_AT_ONCE = 2**24  # bytes of float32 frames that are in work at a time
_LABEL_HEIGHT = 24  # pixels of the strip above a row of a sheet
_LABEL_SIZE = 14  # pixels of its letters


def recompress(image: UInt8[np.ndarray, "rows columns 3"], *, crf: int) -> UInt8[np.ndarray, "height width 3"]:
    """The image after one frame of H.264 at quality `crf` (0 best, 51 worst).

    The model was trained on video frames: a still without their compression moves less. Odd sizes lose their last
    row or column, which H.264 cannot hold.
    """
    height, width = (size // 2 * 2 for size in image.shape[:2])
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=1, options={"crf": str(crf), "preset": "veryfast"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image[:height, :width]), format="rgb24")
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    buffer.seek(0)
    with av.open(buffer, "r") as container:
        return next(container.decode(video=0)).to_ndarray(format="rgb24")


def fit_image(
    image: UInt8[np.ndarray, "rows columns 3"], *, height: int, width: int
) -> Float[jax.Array, "1 1 height width 3"]:
    """The image scaled to cover `height` by `width` and cropped to its centre, as one frame in [-1, 1]."""
    return jnp.asarray(fit_video(image[None], height=height, width=width))


def fit_video(
    frames: UInt8[np.ndarray, "frames rows columns 3"], *, height: int, width: int
) -> Float[np.ndarray, "1 frames height width 3"]:
    """Each frame scaled to cover `height` by `width` and cropped to its centre, in [-1, 1], in host memory.

    Bilinear and not antialiased, as the reference does it. Beside the result, memory holds a few frames.
    """
    rows, columns = frames.shape[1:3]
    scale = max(height / rows, width / columns)
    size = (max(round(rows * scale), height), max(round(columns * scale), width))
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    fitted = np.empty((1, len(frames), height, width, 3), np.float32)
    at_once = max(1, _RESIZED_AT_ONCE // (12 * max(rows * columns, size[0] * size[1])))
    for first in range(0, len(frames), at_once):
        pixels = frames[first : first + at_once].astype(np.float32)
        if size != (rows, columns):
            pixels = np.asarray(jax.image.resize(pixels, (len(pixels), *size, 3), "bilinear", antialias=False))
        # Divided by numpy: a compiler turns the division into a product with a rounded reciprocal.
        cropped = pixels[:, top : top + height, left : left + width] / np.float32(127.5) - 1
        fitted[0, first : first + at_once] = cropped
    return fitted


def fit_frames(frames: Frames, *, height: int, width: int) -> UInt8[np.ndarray, "frames height width 3"]:
    """`fit_video` as levels again; frames that have the size already are given back as they are."""
    if frames.shape[1:3] == (height, width):
        return frames
    return np.round((fit_video(frames, height=height, width=width)[0] + 1) * 127.5).astype(np.uint8)


def to_uint8(pixels: Float[np.ndarray, "*shape"]) -> UInt8[np.ndarray, "*shape"]:
    """Pixels in [-1, 1] to levels, clipped and truncated as the reference does."""
    return (np.clip((np.asarray(pixels, np.float32) + 1) / 2, 0, 1) * 255).astype(np.uint8)


def trim_frames(num_frames: int, step: int) -> int:
    """The longest clip of `step * k + 1` frames that `num_frames` hold. Raises ValueError where there are none."""
    if num_frames < 1:
        raise ValueError(f"a clip needs at least one frame, got {num_frames}")
    return (num_frames - 1) // step * step + 1


def fit_length(frames: Frames, num_frames: int) -> UInt8[np.ndarray, "new_frames height width 3"]:
    """The first `num_frames` frames; a shorter clip is held on its last frame. Warns where that changes anything."""
    if not len(frames) or num_frames < 1:
        raise ValueError(f"cannot make {num_frames} frames of {len(frames)}; both must be at least one")
    if len(frames) > num_frames:
        warnings.warn(f"the clip has {len(frames)} frames, the first {num_frames} are used", stacklevel=2)
    elif len(frames) < num_frames:
        missing = num_frames - len(frames)
        warnings.warn(
            f"the clip has {len(frames)} frames, {num_frames} are needed: its last frame is held for {missing} more",
            stacklevel=2,
        )
        frames = np.concatenate([frames, frames[-1:].repeat(missing, axis=0)])
    return frames[:num_frames]


def evenly_spaced(frames: Frames, count: int) -> UInt8[np.ndarray, "count height width 3"]:
    """First and last frame and those between: what a row of a sheet shows of a clip, so all of it that need be kept."""
    return frames[evenly_spaced_numbers(len(frames), count)]


def evenly_spaced_numbers(num_frames: int, count: int) -> Int[np.ndarray, " count"]:
    """Which frames of a clip `evenly_spaced` takes."""
    return np.linspace(0, num_frames - 1, count).round().astype(int)


def contact_sheet(frames: Frames, *, columns: int = 4, rows: int = 1) -> Sheet:
    """Evenly spaced frames side by side, for looking at a clip without playing it."""
    picks = evenly_spaced(frames, columns * rows)
    return np.concatenate([np.concatenate(list(line), axis=1) for line in np.split(picks, rows)])


def sheet_of(
    clips: Sequence[UInt8[np.ndarray, "_ _ _ 3"]], labels: Sequence[str], *, columns: int = 4, tile_width: int = 320
) -> Sheet:
    """Several results below each other, for comparing: a row of evenly spaced frames each, its label above it.

    Frames wider than `tile_width` pixels are shrunk to it; clips may differ in size and length. Labels that are too
    long for a row end in an ellipsis. Raises ValueError unless there is one label for each clip, and one clip at least.
    """
    if not clips or len(clips) != len(labels):
        raise ValueError(f"a sheet needs clips and one label for each, got {len(clips)} clips and {len(labels)} labels")
    font = ImageFont.load_default(_LABEL_SIZE)
    rows = []
    for clip in clips:
        height, width = clip.shape[1:3]
        new_width = min(width, tile_width)
        size = (new_width, max(1, round(height * new_width / width)))
        tiles = [
            Image.fromarray(frame).resize(size, Image.Resampling.LANCZOS) for frame in evenly_spaced(clip, columns)
        ]
        rows.append(np.concatenate([np.asarray(tile) for tile in tiles], axis=1))
    sheet_width = max(row.shape[1] for row in rows)
    sheet = Image.new("RGB", (sheet_width, sum(len(row) + _LABEL_HEIGHT for row in rows)))
    draw = ImageDraw.Draw(sheet)
    top, margin = 0, 6
    for row, label in zip(rows, labels, strict=True):
        line = " ".join(label.split())
        if draw.textlength(line, font) > sheet_width - 2 * margin:
            while line and draw.textlength(line + "…", font) > sheet_width - 2 * margin:
                line = line[:-1]
            line += "…"
        draw.text((margin, top + _LABEL_HEIGHT // 2), line, "white", font, anchor="lm")
        sheet.paste(Image.fromarray(row), (0, top + _LABEL_HEIGHT))
        top += _LABEL_HEIGHT + len(row)
    return np.asarray(sheet)
