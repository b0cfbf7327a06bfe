"""A clip that goes on: behind its end or before its start, in windows that overlap, picture and sound in step.

Each window is a clip of its own. Some of its frames are those that are there already, encoded again from pixels:
latents could not be cut out of a longer clip, as the first latent of a clip holds one frame and all others eight. What
is there stays as it is; the new frames and the new sound of a window are put to it. Where a frame or a sample lies is
counted from the start of the whole clip, so that nothing adds up over many windows.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from jaxtyping import Float

from ltx_jax.clip import Callback, Clip, Sampler, make_latents
from ltx_jax.conditions import Condition, Frames, continuation, sound
from ltx_jax.denoise import Prompt
from ltx_jax.engine import Engine
from ltx_jax.geometry import VideoGrid
from ltx_jax.guidance import Guider, guide
from ltx_jax.modes import Media, given_size, kept_sound
from ltx_jax.pictures import fit_frames
from ltx_jax.replay import Replay
from ltx_jax.settings import Settings
from ltx_jax.sound import fit_audio
from ltx_jax.windows import windows_of

_FADE_SECONDS = 0.01  # in which old and new sound pass into each other: no click, no echo


def extended(
    engine: Engine,
    settings: Settings,
    media: Media,
    *,
    positive: Prompt | None,
    negative: Prompt | None,
    clip: Clip | None = None,
    conditions: Sequence[Condition] = (),
    callback: Callback | None = None,
    replay: Replay | None = None,
    sampler: Sampler | None = None,
    guider: Guider = guide,
) -> Clip:
    """What is there (`clip`, the video of the settings, or a clip made first), and what comes behind or before it.

    `conditions` hold in every window. See `Pipeline.extend`.
    """
    scale, rate = engine.configs.video_vae.scale, engine.configs.vocoder.sample_rate_hz
    size = settings.grid(scale, given_size(settings, scale))  # of the first clip and, at most, of a window
    fade = round(_FADE_SECONDS * rate)

    def make(grid: VideoGrid, number: int, begin: int, whole: VideoGrid, more: Sequence[Condition]) -> tuple:
        """Frames and waveform of the window that begins at a frame of the whole clip."""
        latents = make_latents(
            engine,
            replace(settings, video=None),
            grid,
            [*more, *conditions_within(media, begin, grid, whole), *conditions],
            positive=positive,
            negative=negative,
            noise=None,
            callback=callback,
            replay=replay,
            sampler=sampler,
            guider=guider,
            window=number,
        )
        return engine.frames(latents), engine.decode_audio(latents.audio)

    frames, waveform = there(media, clip, size, rate)
    given = None if frames is None else len(frames)
    windows = windows_of(settings, size, given or size.num_frames)
    whole = windows.total
    if given is not None:
        refuse_images_within(media, range(windows.first_frame, windows.first_frame + given), whole)
    silent = given is not None and waveform is None
    if frames is None:
        frames, waveform = make(size, 0, windows.first_frame, whole, [])
    if waveform is None:
        engine.progress.say("the clip has no sound: that part stays silent")
        waveform = np.zeros((round(len(frames) / size.fps * rate), 2), np.float32)

    def sample(frame: int) -> int:
        return round(frame / size.fps * rate)

    for number in range(windows.count):
        begin, context, step = windows.begin(number), windows.num_context, windows.step
        engine.progress.say(f"window {number + 1} of {windows.count}: {step} new frames")
        if windows.backwards:
            seen, heard = frames[:context], waveform[: sample(context)]
        else:
            seen, heard = frames[-context:], waveform[sample(begin) :]
        before = continuation(seen, None if silent else heard, rate, backwards=windows.backwards)
        silent = False  # from now on there is some sound to go on from
        new_frames, new_sound = make(windows.grid, 1 + number, begin, whole, [before])
        # Samples are counted between frames of the whole clip: roundings do not add up from window to window.
        if windows.backwards:
            at = sample(begin + step) - sample(begin)
            frames = np.concatenate([new_frames[:step], frames])
            waveform = joined(new_sound[: at + fade], waveform, at=at, fade=fade)
        else:
            frames = np.concatenate([frames, new_frames[context:]])
            waveform = joined(waveform, new_sound, at=sample(begin), fade=fade)
    if windows.backwards:
        surplus = len(frames) - whole.num_frames
        frames, waveform = frames[surplus:], waveform[sample(0) - sample(-surplus) :]
    kept = kept_sound(settings, media, whole)
    if kept is not None:
        waveform, rate = kept
    return Clip(
        frames=frames[: whole.num_frames],
        fps=size.fps,
        waveform=waveform[: round(whole.seconds * rate)],
        sample_rate_hz=rate,
        latents=None,
    )


def there(
    media: Media, clip: Clip | None, size: VideoGrid, rate: int
) -> tuple[Frames | None, Float[np.ndarray, "samples 2"] | None]:
    """The frames and the sound that are given, at the size and the rate of what will be made; none of what is not."""
    found = media.video if clip is None else clip
    if found is None:
        return None, None
    frames = fit_frames(found.frames, height=size.height, width=size.width)
    if found.waveform is None or found.sample_rate_hz is None:
        return frames, None
    return frames, fit_audio(found.waveform, found.sample_rate_hz, to_hz=rate, seconds=len(frames) / size.fps)


def refuse_images_within(media: Media, frames: range, whole: VideoGrid) -> None:
    """Raises ValueError for an image that is to be shown in a part of the whole clip that is given."""
    for image in media.images:
        if image.frame_in(whole) in frames:
            raise ValueError(
                f"the image is for frame {image.frame}, but frames {frames.start} to {frames.stop - 1} of the whole "
                "clip are given; images are for the others"
            )


def conditions_within(media: Media, begin: int, grid: VideoGrid, whole: VideoGrid) -> list[Condition]:
    """What is given for the whole clip, as far as it falls into the window that begins at one of its frames."""
    found: list[Condition] = []
    for image in media.images:
        frame = image.frame_in(whole) - begin
        if 0 <= frame < grid.num_frames:
            found.append(replace(image, frame=frame))
    if media.sound is not None:
        waveform, rate = media.sound
        first = round(begin / grid.fps * rate)
        ahead = np.zeros((max(-first, 0), waveform.shape[1]), np.float32)
        found.append(sound(np.concatenate([ahead, waveform[max(first, 0) :]]), rate))
    return found


def joined(
    first: Float[np.ndarray, "_ channels"], second: Float[np.ndarray, "_ channels"], *, at: int, fade: int
) -> Float[np.ndarray, "samples channels"]:
    """`first`, and from its end on `second`, which begins at its sample `at`; they pass into each other in `fade`."""
    end = len(first)
    fade = min(fade, end - at)
    rise = np.linspace(0, 1, fade, dtype=np.float32)[:, None]
    mixed = first[end - fade :] * (1 - rise) + second[end - at - fade : end - at] * rise
    return np.concatenate([first[: end - fade], mixed, second[end - at :]])
