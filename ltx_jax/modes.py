"""What settings ask for, read from its files: images, sound, a clip to retake, a reference; as conditions."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ltx_jax.conditions import Condition, Frames, ImageCondition, Waveform, reference, retake, sound
from ltx_jax.geometry import VideoGrid
from ltx_jax.latents import latents_size
from ltx_jax.lora import reference_scales
from ltx_jax.media import read_image
from ltx_jax.pictures import fit_length
from ltx_jax.settings import Settings
from ltx_jax.sound import read_audio
from ltx_jax.video import Video, probe_video, read_video
from ltx_jax.windows import windows_of


@dataclass(frozen=True, kw_only=True)
class Media:
    """The files that settings name, read."""

    images: tuple[ImageCondition, ...] = ()
    sound: tuple[Waveform, int] | None = None  # a waveform and its sample rate in hertz
    video: Video | None = None
    reference: Frames | None = None
    reference_scales: tuple[int, int] = (1, 1)  # how much smaller and shorter the LoRA reads it


def size_of(settings: Settings, scale: tuple[int, int, int]) -> VideoGrid:
    """The size of the clip that settings ask for, from the headers of files alone.

    Raises MediaError or ValueError for a video that cannot be read, and for sizes that are not legal.
    """
    clip = given_size(settings, scale)
    grid = settings.grid(scale, clip)
    grid.check(stages=settings.num_stages)
    if settings.latents is not None and clip is not None:
        factor = 2 if settings.refine else 1
        if (grid.height, grid.width, grid.num_frames) != (factor * clip.height, factor * clip.width, clip.num_frames):
            raise ValueError(
                f"{settings.latents} are of a clip of {clip.width}x{clip.height} with {clip.num_frames} frames, which "
                f"makes {factor * clip.width}x{factor * clip.height} here, not {grid.width}x{grid.height} with "
                f"{grid.num_frames}; leave out width, height and num_frames"
            )
    if settings.extend is not None:
        windows = windows_of(settings, grid, grid.num_frames if clip is None else clip.num_frames)
        return grid if clip is None else windows.grid  # the first clip, where one is made, is the largest
    if settings.retake is not None:
        start, _ = settings.window()
        if start >= grid.seconds:
            raise ValueError(f"the retake starts at {start:g} s, but the clip lasts {grid.seconds:.3g} s")
    return grid


def given_size(settings: Settings, scale: tuple[int, int, int]) -> VideoGrid | None:
    """The size of the clip or the latents that settings name, from the header of the file."""
    if settings.latents is not None:
        return latents_size(settings.latents, scale, fps=settings.fps)
    if settings.video is None:
        return None
    facts = probe_video(settings.video)
    return VideoGrid(num_frames=facts.num_frames, height=facts.height, width=facts.width, fps=facts.fps, scale=scale)


def parse_image(text: str) -> tuple[Path, int, float | None]:
    """`PATH`, `PATH@FRAME` or `PATH@FRAME:STRENGTH`: path, frame, strength."""
    if Path(text).exists():
        return Path(text), 0, None
    path, at, place = text.rpartition("@")
    if not at:
        return Path(text), 0, None
    frame, colon, strength = place.partition(":")
    try:
        return Path(path), int(frame), float(strength) if colon else None
    except ValueError:
        return Path(text), 0, None  # an at sign within the name


def images_of(settings: Settings) -> list[tuple[Path, ImageCondition]]:
    """The images that settings name, not yet read: their conditions have none. Raises ValueError for a strength."""
    found = []
    for text in settings.image:
        path, frame, strength = parse_image(text)
        strength = settings.image_strength if strength is None else strength
        if not 0 <= strength <= 1:
            raise ValueError(f"the strength of an image must be from 0 to 1, got {strength:g} in {text!r}")
        condition = ImageCondition(
            image=np.zeros((1, 1, 3), np.uint8),
            frame=frame,
            strength=strength,
            crf=settings.image_crf,
            append=settings.interpolate,
        )
        found.append((path, condition))
    return found


def read_media(settings: Settings, grid: VideoGrid, loras: tuple[Path, ...] = ()) -> Media:
    """Reads what settings name. Raises MediaError for what cannot be read, ValueError for what does not fit."""
    scales = scales_of(settings, loras)
    images = tuple(replace(condition, image=read_image(path)) for path, condition in images_of(settings))
    video = waves = guide = None
    if settings.video is not None:
        length = grid.num_frames if settings.extend is None else None
        video = read_video(settings.video, fps=grid.fps, num_frames=length)
        video = video if length is None else replace(video, frames=fit_length(video.frames, length))
    if settings.extend is None:  # else they are for frames of a clip whose length is known later
        for image in images:
            image.frame_in(grid)
    if settings.audio is not None:
        waves = read_audio(settings.audio)
    if settings.reference is not None:
        frames = read_video(settings.reference, fps=grid.fps, num_frames=grid.num_frames).frames
        guide = fit_length(frames, grid.num_frames)
    return Media(
        images=images,
        sound=waves,
        video=video,
        reference=guide,
        reference_scales=scales,
    )


def blank_media(settings: Settings, grid: VideoGrid, loras: tuple[Path, ...] = ()) -> Media:
    """As `read_media`, without reading: black and silent, for a plan."""
    frames = np.broadcast_to(np.zeros(3, np.uint8), (grid.num_frames, 1, 1, 3))
    images = tuple(replace(condition, crf=None) for _, condition in images_of(settings))
    if settings.extend is not None:  # their frames are of the whole clip; any window may have all of them
        images = tuple(replace(image, frame=-1) for image in images)
    silence = np.zeros((2, 2), np.float32)
    video = None
    if settings.video is not None:
        heard = probe_video(settings.video).has_audio
        video = Video(frames=frames, fps=grid.fps, waveform=silence if heard else None, sample_rate_hz=48_000)
    return Media(
        images=images,
        sound=None if settings.audio is None else (silence, 48_000),
        video=video,
        reference=None if settings.reference is None else frames,
        reference_scales=scales_of(settings, loras),
    )


def scales_of(settings: Settings, loras: tuple[Path, ...]) -> tuple[int, int]:
    """How much smaller and shorter the LoRAs read a reference. Raises ValueError where there is none to read it."""
    if settings.reference is None:
        return 1, 1
    if not loras:
        raise ValueError("a reference is read by an IC-LoRA: give it too, with --lora PATH")
    return reference_scales(loras)


def conditions_of(settings: Settings, media: Media) -> list[Condition]:
    """What is given, in the order in which it is put on the tokens."""
    found: list[Condition] = []
    if media.video is not None and settings.retake is not None:
        start, stop = settings.window()
        kept = {"keep_audio": settings.keep_audio, "keep_video": settings.keep_video}
        found.append(retake(media.video, start, stop, **kept))
    found += media.images
    if media.reference is not None:
        downscale, time_stretch = media.reference_scales
        found.append(
            reference(
                media.reference,
                downscale=downscale,
                time_stretch=time_stretch,
                strength=settings.reference_strength,
                attention=settings.reference_attention,
            )
        )
    if media.sound is not None:
        found.append(sound(*media.sound))
    elif settings.refine and media.video is not None and media.video.waveform is not None:
        assert media.video.sample_rate_hz is not None
        found.append(sound(media.video.waveform, media.video.sample_rate_hz))
    return found


def kept_sound(settings: Settings, media: Media, grid: VideoGrid) -> tuple[Waveform, int] | None:
    """The sound that a clip keeps as it came, cut to its length; None where it is made."""
    if media.sound is not None:
        waveform, rate = media.sound
    elif (settings.keep_audio or settings.given_whole) and media.video is not None:
        if media.video.waveform is None or media.video.sample_rate_hz is None:
            return None
        waveform, rate = media.video.waveform, media.video.sample_rate_hz
    else:
        return None
    return waveform[: round(grid.seconds * rate)], rate
