"""Read images; write mp4 (H.264 and AAC) and PNG. Everything through PyAV and Pillow."""

import io
import os
import tempfile
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path

import av
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, UnidentifiedImageError

from ltx_jax.cache import written_whole

Frames = UInt8[np.ndarray, "frames height width 3"]
Waveform = Float[np.ndarray, "samples channels"]


class MediaError(ValueError):
    """A file that cannot be read as what it should be, or cannot be written where it should go."""


def check_writable(path: Path) -> None:
    """Raises MediaError unless a file can be made at `path`; called before any work."""
    folder = path.parent
    if path.is_dir():
        raise MediaError(f"the output {path} is a folder; give a file name such as {path / 'clip.mp4'}")
    if not folder.is_dir():
        raise MediaError(f"the output folder {folder} does not exist; make it first or choose another")
    try:
        with tempfile.NamedTemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise MediaError(f"cannot write into {folder}: {error.strerror or error}") from error
    if path.exists() and not os.access(path, os.W_OK):
        raise MediaError(f"the output {path} exists and is not writable")


def read_image(path: Path) -> UInt8[np.ndarray, "height width 3"]:
    """An image as RGB, turned upright as its metadata says. Raises MediaError if it cannot be read."""
    from PIL import ImageOps

    try:
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image)
            return np.asarray(upright.convert("RGB"))
    except FileNotFoundError as error:
        raise MediaError(f"there is no image at {path}") from error
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise MediaError(f"{path} cannot be read as an image ({error}); give a PNG, JPEG or WebP file") from error


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
    rows, columns = image.shape[:2]
    scale = max(height / rows, width / columns)
    size = (max(round(rows * scale), height), max(round(columns * scale), width))
    pixels = image.astype(np.float32)
    if size != (rows, columns):
        pixels = np.asarray(jax.image.resize(pixels, (*size, 3), "bilinear", antialias=False))
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    # Divided by numpy: a compiler turns the division into a product with a rounded reciprocal.
    return jnp.asarray((pixels[top : top + height, left : left + width] / np.float32(127.5) - 1)[None, None])


def to_uint8(pixels: Float[np.ndarray, "*shape"]) -> UInt8[np.ndarray, "*shape"]:
    """Pixels in [-1, 1] to levels, clipped and truncated as the reference does."""
    return (np.clip((np.asarray(pixels, np.float32) + 1) / 2, 0, 1) * 255).astype(np.uint8)


def write_mp4(
    path: Path,
    frames: Iterable[UInt8[np.ndarray, "height width 3"]],
    *,
    fps: float,
    waveform: Waveform | None = None,
    sample_rate_hz: int = 48_000,
    crf: int = 18,
) -> None:
    """Writes H.264 and AAC; frames are encoded as they come, and nothing stays under `path` if that fails."""
    rate = Fraction(fps).limit_denominator(1001)
    with written_whole(path) as temporary, av.open(str(temporary), "w", format="mp4") as container:
        video = container.add_stream("libx264", rate=rate, options={"crf": str(crf)})
        video.pix_fmt = "yuv420p"
        audio = None
        if waveform is not None:
            layout = "stereo" if waveform.shape[1] == 2 else "mono"
            audio = container.add_stream("aac", rate=sample_rate_hz, layout=layout)
        for index, frame in enumerate(frames):
            if index == 0:
                video.height, video.width = frame.shape[:2]
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            picture.pts, picture.time_base = index, 1 / rate
            container.mux(video.encode(picture))
        container.mux(video.encode())
        if audio is not None and waveform is not None:
            planes = np.ascontiguousarray(np.clip(waveform, -1, 1).T.astype(np.float32))
            sound = av.AudioFrame.from_ndarray(planes, format="fltp", layout=audio.layout.name)
            sound.sample_rate, sound.pts, sound.time_base = sample_rate_hz, 0, Fraction(1, sample_rate_hz)
            for chunk in av.AudioResampler(format="fltp", layout=audio.layout.name, rate=sample_rate_hz).resample(
                sound
            ):
                container.mux(audio.encode(chunk))
            container.mux(audio.encode())


def describe(path: Path) -> dict[str, object]:
    """What a player would say of a clip: frames, size, fps, channels, sample rate, durations."""
    with av.open(str(path)) as container:
        facts: dict[str, object] = {}
        if container.streams.video:
            video = container.streams.video[0]
            count = sum(1 for _ in container.decode(video))
            facts |= {
                "video_codec": video.codec_context.name,
                "num_frames": count,
                "width": video.codec_context.width,
                "height": video.codec_context.height,
                "fps": float(video.average_rate or 0),
            }
        if container.streams.audio:
            container.seek(0)
            audio = container.streams.audio[0]
            samples = sum(frame.samples for frame in container.decode(audio))
            facts |= {
                "audio_codec": audio.codec_context.name,
                "sample_rate_hz": audio.codec_context.sample_rate,
                "audio_channels": audio.codec_context.channels,
                "num_samples": samples,
            }
        return facts


def contact_sheet(
    frames: Frames, *, columns: int = 4, rows: int = 1
) -> UInt8[np.ndarray, "sheet_height sheet_width 3"]:
    """Evenly spaced frames side by side, for looking at a clip without playing it."""
    picks = np.linspace(0, len(frames) - 1, columns * rows).round().astype(int)
    lines = [np.concatenate([frames[i] for i in picks[r * columns : (r + 1) * columns]], axis=1) for r in range(rows)]
    return np.concatenate(lines, axis=0)
