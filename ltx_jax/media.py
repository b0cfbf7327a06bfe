"""Files of pictures, video and sound, through PyAV and Pillow: read what people have; write PNG, WAV and mp4.

What is read comes back as levels (RGB, upright, square pixels) and as stereo in [-1, 1]; what had to be changed on the
way is said as a warning.
"""

import os
import tempfile
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

from ltx_jax.cache import written_whole
from ltx_jax.decoding import MediaError, check_suffix
from ltx_jax.pictures import Frames, contact_sheet, fit_image, recompress, to_uint8
from ltx_jax.sound import Waveform, fit_audio, read_audio, write_wav
from ltx_jax.video import Video, VideoFacts, probe_video, read_video

try:
    from numpy._core._multiarray_umath import __cpu_features__ as _cpu_features  # what numpy chooses its loops by
except ImportError:  # no public name
    _cpu_features = {}

__all__ = [
    "Frames",
    "MediaError",
    "Video",
    "VideoFacts",
    "Waveform",
    "check_writable",
    "contact_sheet",
    "describe",
    "fit_audio",
    "fit_image",
    "probe_video",
    "read_audio",
    "read_image",
    "read_video",
    "recompress",
    "to_uint8",
    "write_mp4",
    "write_png",
    "write_wav",
]

RGB = UInt8[np.ndarray, "height width 3"]

_BT709 = 1  # AVCOL_SPC_BT709
# With AVX-512, x264's look-ahead makes another file of the same frames now and then where a row's number of 16 x 16
# blocks is no multiple of 8 (seen with PyAV 18 and 19). What it may use is forced by name, so only where there is more.
_REPEATABLE = {"x264-params": "asm=AVX2"} if _cpu_features.get("AVX512F") else {}


def check_writable(path: Path, *, suffixes: tuple[str, ...] = ()) -> None:
    """Raises MediaError unless a file, with one of `suffixes` if any, can be made at `path`; called before any work."""
    folder = path.parent
    if path.is_dir():
        raise MediaError(f"the output {path} is a folder; give a file name such as {path / 'clip.mp4'}")
    if not folder.is_dir():
        raise MediaError(f"the output folder {folder} does not exist; make it first or choose another")
    if suffixes:
        check_suffix(path, *suffixes)
    try:
        with tempfile.NamedTemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise MediaError(f"cannot write into {folder}: {error.strerror or error}") from error
    if path.exists() and not os.access(path, os.W_OK):
        raise MediaError(f"the output {path} exists and is not writable")


def read_image(path: Path) -> RGB:
    """An image as RGB, turned upright as its metadata says. Raises MediaError if it cannot be read."""
    try:
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image)
            return np.asarray(upright.convert("RGB"))
    except FileNotFoundError as error:
        raise MediaError(f"there is no image at {path}") from error
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise MediaError(f"{path} cannot be read as an image ({error}); give a PNG, JPEG or WebP file") from error


def write_png(path: Path, image: RGB) -> None:
    """Writes one picture, whole or not at all. Raises MediaError for a name that does not end in .png."""
    check_suffix(path, ".png")
    with written_whole(path) as temporary:
        Image.fromarray(image).save(temporary)


def write_mp4(
    path: Path,
    frames: Iterable[RGB],
    *,
    fps: float,
    waveform: Waveform | None = None,
    sample_rate_hz: int = 48_000,
    crf: int = 18,
) -> None:
    """Writes H.264 and AAC; frames are encoded as they come, and nothing stays under `path` if that fails.

    On one machine the same frames and sound make the same file.

    A waveform keeps its rate where AAC has it, else it takes the next higher one. Raises MediaError for a name that
    does not end in .mp4, a clip without frames or of odd size, and a waveform of other than one or two channels.
    """
    check_suffix(path, ".mp4")
    rate = Fraction(fps).limit_denominator(1001)
    if waveform is not None:
        possible = av.Codec("aac", "w").audio_rates or [sample_rate_hz]
        new_rate = min((r for r in possible if r >= sample_rate_hz), default=max(possible))
        waveform = fit_audio(waveform, sample_rate_hz, to_hz=new_rate, channels=waveform.shape[1])
        sample_rate_hz = new_rate
    index = -1
    with written_whole(path) as temporary, av.open(f"file:{temporary}", "w", format="mp4") as container:
        video = container.add_stream("libx264", rate=rate, options={"crf": str(crf), **_REPEATABLE})
        video.pix_fmt = "yuv420p"
        # Players take large clips for BT.709 and small ones for BT.601 where a file does not say which it is.
        video.codec_context.colorspace, video.codec_context.color_range = _BT709, ColorRange.MPEG
        audio = None
        if waveform is not None:
            layout = "stereo" if waveform.shape[1] == 2 else "mono"
            audio = container.add_stream("aac", rate=sample_rate_hz, layout=layout)
            # Twice the default, at which a rising tone comes back with an error of up to 18 %; here below 1 %.
            audio.bit_rate = 128_000 * waveform.shape[1]
        for index, frame in enumerate(frames):
            if index == 0:
                video.height, video.width = frame.shape[:2]
                if video.height % 2 or video.width % 2:
                    raise MediaError(f"H.264 needs even sizes, got frames of {video.width} x {video.height}; crop them")
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24").reformat(
                format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG
            )
            picture.pts, picture.time_base = index, 1 / rate
            container.mux(video.encode(picture))
        if index < 0:
            raise MediaError(f"there are no frames to write to {path}")
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
