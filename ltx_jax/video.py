"""Clips in: read at any frame rate, from any time on, upright, with the sound of the same time."""

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from av.stream import Disposition
from jaxtyping import UInt8

from ltx_jax.decoding import MediaError, decoded_from, opened, start_seconds, stated_end_seconds
from ltx_jax.pictures import Frames
from ltx_jax.sound import Waveform, sound_of

_LOST_SECONDS = 0.5  # that a header may promise beyond the last frame before the file counts as cut off


@dataclass(frozen=True, kw_only=True)
class VideoFacts:
    """What a clip is said to hold; its size as it is shown, upright and with square pixels."""

    width: int
    height: int
    fps: float
    num_frames: int  # of an even frame rate; an estimate, the file may hold more or fewer
    seconds: float
    has_audio: bool


@dataclass(frozen=True, kw_only=True)
class Video:
    """A clip, or a window of one, at an even frame rate."""

    frames: Frames
    fps: float
    waveform: Waveform | None  # stereo, in [-1, 1], over the same time as the frames; None for a silent film
    sample_rate_hz: int | None


def probe_video(path: Path) -> VideoFacts:
    """The size and length of a clip from its header and first frame, without decoding the rest.

    A clip whose header says no length is read through once, still not decoded. Raises what `read_video` raises.
    """
    with opened(path) as container:
        stream = _video_stream(container, path)
        frame = next(container.decode(stream), None)
        if frame is None:
            raise MediaError(f"{path} has no frames")
        height, width = _levels(frame, stream).shape[:2]
        fps = _frame_rate(stream, path)
        end = stated_end_seconds(stream)
        if end is not None:
            seconds = end - start_seconds(stream)
        elif container.duration is not None:
            seconds = container.duration / 1e6
        else:
            with opened(path) as again:  # the decoder has read ahead in this one
                packets = again.demux(again.streams[stream.index])
                seconds = sum(1 for packet in packets if packet.size) / fps
        return VideoFacts(
            width=width,
            height=height,
            fps=fps,
            num_frames=max(1, round(seconds * fps)),
            seconds=seconds,
            has_audio=bool(container.streams.audio),
        )


def read_video(
    path: Path,
    *,
    fps: float | None = None,
    start: float = 0.0,
    seconds: float | None = None,
    num_frames: int | None = None,
) -> Video:
    """The frames of a clip and its sound, from `start` seconds on: `seconds` or `num_frames` of it, or all the rest.

    Frames are those nearest in time to an even grid of `fps` frames a second, by default the clip's own rate; the
    first frame of the clip is at 0 s. Where the clip ends before the window does, what there is of it is returned.
    Only the window is held in memory. Warns where frames had to be repeated or left out, or sound mixed down.

    Raises MediaError for a file that is not there or no clip, that is damaged or cut off, that has no video stream or
    no frame in the window.
    """
    if start < 0 or (fps is not None and fps <= 0):
        raise MediaError(f"a window starts at 0 s or later and has a positive frame rate, got {start} s and {fps}")
    if (seconds is not None and num_frames is not None) or not (seconds is None or seconds > 0):
        raise MediaError(f"give the length of a window in seconds or in frames, got {seconds} s and {num_frames}")
    if num_frames is not None and num_frames < 1:
        raise MediaError(f"a window has at least one frame, got {num_frames}")
    with opened(path) as container:
        stream = _video_stream(container, path)
        native = _frame_rate(stream, path, or_else=fps)
        rate = fps or native
        count = max(1, round(seconds * rate)) if seconds is not None else num_frames
        since = start_seconds(stream) + start
        end = stated_end_seconds(stream)
        expected = 64 if end is None else max(1, math.ceil((end - since) * rate) + 1)

        frames: np.ndarray | None = None
        numbers: list[int] = []  # in the file, of the frames taken
        shown = _shown(decoded_from(container, stream, since), container, stream, path, native)
        for number, frame in _nearest(shown, since, rate, native, count):
            if frames is None:
                first = _levels(frame, stream)
                frames = np.empty((min(count or expected, expected), *first.shape), np.uint8)
            elif len(numbers) == len(frames):
                frames = np.concatenate([frames, np.empty_like(frames)])
            same = bool(numbers) and numbers[-1] == number
            frames[len(numbers)] = frames[len(numbers) - 1] if same else _levels(frame, stream, frames.shape[1:3])
            numbers.append(number)
        has_audio = bool(container.streams.audio)
    if frames is None:
        raise MediaError(f"{path} has no frame at {start:g} s; it is {probe_video(path).seconds:g} s long")
    steps = np.diff(numbers)
    repeated, left_out = int((steps == 0).sum()), int((steps - 1).clip(0).sum())
    if abs(rate / native - 1) > 1e-3:
        warnings.warn(
            f"{path} has {native:g} frames a second and is read at {rate:g}, each time the nearest frame: "
            f"{repeated} frames are repeated, {left_out} left out",
            stacklevel=2,
        )
    elif repeated or left_out:
        warnings.warn(
            f"the frames of {path} do not follow evenly; at {rate:g} a second {repeated} are repeated and "
            f"{left_out} left out",
            stacklevel=2,
        )
    waveform = sample_rate_hz = None
    if has_audio:
        waveform, sample_rate_hz = sound_of(path, since=since, seconds=len(numbers) / rate)
    return Video(frames=frames[: len(numbers)], fps=rate, waveform=waveform, sample_rate_hz=sample_rate_hz)


def _video_stream(container: Any, path: Path) -> Any:
    for stream in container.streams.video:
        if not stream.disposition & Disposition.attached_pic:  # the cover of an album
            stream.thread_type = "AUTO"
            return stream
    raise MediaError(f"{path} has no video stream; give a clip with pictures")


def _frame_rate(stream: Any, path: Path, *, or_else: float | None = None) -> float:
    rate = stream.average_rate or stream.guessed_rate or or_else
    if not rate:
        raise MediaError(f"{path} does not say its frame rate; give one")
    return float(rate)


def _shown(
    frames: Iterator[Any], container: Any, stream: Any, path: Path, fps: float
) -> Iterator[tuple[float, float, Any]]:
    """Frames with the seconds when each appears and goes. Raises MediaError if they end before the header says."""
    time = end = start_seconds(stream)
    for frame in frames:
        time = end if frame.time is None else frame.time
        end = time + (float(frame.duration * frame.time_base) if frame.duration else 1 / fps)
        yield time, end, frame
    stated = stated_end_seconds(stream)
    if stated is not None and end < stated - _LOST_SECONDS:
        raise MediaError(f"{path} is cut off: its frames end at {end:.1f} s of {stated:.1f} s; copy or make it again")


def _nearest(
    shown: Iterator[tuple[float, float, Any]], since: float, rate: float, native: float, count: int | None
) -> Iterator[tuple[int, Any]]:
    """For each time `since + k / rate` the frame that appears nearest to it, with its number; at most `count`."""
    # Of two frames equally near the earlier one, also where timestamps are rounded.
    margin = min(0.002, 0.25 / native)
    k = 0
    before: tuple[float, float, Any] | None = None
    number = -1
    for time, end, frame in shown:
        while before is not None and k != count and since + k / rate - before[0] <= time - since - k / rate + margin:
            yield number, before[2]
            k += 1
        if k == count:
            return
        before, number = (time, end, frame), number + 1
    # The last frame lasts until the time it goes, to the nearest whole number of frames.
    while before is not None and k != count and since + (k + 0.5 * (k > 0)) / rate < before[1]:
        yield number, before[2]
        k += 1


def _levels(frame: Any, stream: Any, size: tuple[int, ...] | None = None) -> UInt8[np.ndarray, "height width 3"]:
    """A decoded frame as it is shown, of the given size if any: RGB, square pixels, upright."""
    width = round(frame.width * (stream.sample_aspect_ratio or 1))
    across, down, swapped = _orientation(frame)
    height, width = size[:: -1 if swapped else 1] if size else (frame.height, width)
    image = frame.to_ndarray(format="rgb24", width=width, height=height)
    if swapped:
        image = image.swapaxes(0, 1)
    return image[::down, ::across]


def _orientation(frame: Any) -> tuple[int, int, bool]:
    """Steps of columns and rows (-1: mirrored) once they are swapped, if they are: what the display matrix says.

    It takes a point (x, y) to (a x + c y, b x + d y), in 16.16 fixed point. Source: libavutil/display.h of FFmpeg.
    """
    data = frame.side_data.get("DISPLAYMATRIX")
    if data is None:
        return 1, 1, False
    a, b, _, c, d = np.frombuffer(bytes(data), np.int32)[:5].tolist()
    swapped = abs(b) > abs(a)
    return (-1 if (c if swapped else a) < 0 else 1), (-1 if (b if swapped else d) < 0 else 1), swapped
