"""What reading of video and of sound have in common: files opened, and their frames decoded from a time on."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import av
from av.error import FFmpegError

# Titles that are not UTF-8 are no reason to refuse a clip: PyAV refuses them before version 19, unless told not to.
_TAGS: dict[str, Any] = {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}


class MediaError(ValueError):
    """A file that cannot be read as what it should be, or cannot be written where it should go."""


def check_suffix(path: Path, *suffixes: str) -> None:
    """Raises MediaError unless the name ends in one of them."""
    if path.suffix.lower() not in suffixes:
        raise MediaError(f"cannot write {path}: give a name that ends in {' or '.join(suffixes)}")


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A media file, open. Raises MediaError if it is none, and for what is found to be damaged while the block runs."""
    if path.is_dir():
        raise MediaError(f"{path} is a folder; give a video or audio file")
    if not path.exists():
        raise MediaError(f"there is no file at {path}")
    container = None
    try:
        # With its protocol named: a colon in a file's name would be taken for one.
        with av.open(f"file:{path}", **_TAGS) as container:
            yield container
    except FFmpegError as error:
        if container is None:
            problem = f"{path} cannot be read as video or audio ({error.strerror}); give an mp4 or WAV file"
            raise MediaError(problem) from error
        raise MediaError(f"{path} is damaged or cut off ({error.strerror}); make it again, or repair it") from error


def start_seconds(stream: Any) -> float:
    """When a stream begins, by its file's clock."""
    return float((stream.start_time or 0) * stream.time_base)


def stated_end_seconds(stream: Any) -> float | None:
    """When a stream ends, by its file's clock; None where the header does not say."""
    if stream.duration is not None:
        return start_seconds(stream) + float(stream.duration * stream.time_base)
    try:  # Matroska's
        hours, minutes, seconds = stream.metadata["DURATION"].split(":")
        return int(hours) * 3600 + int(minutes) * 60 + float(seconds)
    except (KeyError, ValueError):
        return None


def decoded_from(container: Any, stream: Any, time: float) -> Iterator[Any]:
    """Decoded frames in order, from one at or before `time` on where there is one."""
    if stream.start_time is None or time <= start_seconds(stream):
        return container.decode(stream)
    for target in (int(time / stream.time_base), stream.start_time):
        container.seek(target, stream=stream)
        frames = container.decode(stream)
        first = next(frames, None)
        # Some containers know only about where a time is, and may begin behind it: then from the start.
        if first is not None and (target == stream.start_time or (first.time is not None and first.time <= time)):
            return chain([first], frames)
    return iter(())
