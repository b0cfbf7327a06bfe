"""What a clip is given beside its prompt: images, sound, a clip to retake, a reference. One function each.

A condition is made from what the user has, and called once for each denoising stage. It encodes what it needs at that
stage's size and returns how it is put on the tokens:

    def still(frame):                     # what the user has
        def encode(scene):                # once a stage, before the transformer is needed
            latents = scene.encode_frames(frame[None], scene.grid)

            def place(states):            # on the tokens that denoising starts from
                video, audio = states
                return replace_frame(video, latents, grid=scene.grid), audio

            return place

        return encode

`Pipeline.generate_latents(settings, conditions=[still(frame)])` takes any number of them, in this order.
Source: `conditioning` in Lightricks/LTX-2, ltx_core, and the pipelines of ltx_pipelines.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float, UInt8

from ltx_jax.conditioning import (
    LatentState,
    append_keyframe,
    append_reference,
    frozen,
    given,
    replace_frame,
    retake_window,
)
from ltx_jax.geometry import AudioLatents, VideoGrid, VideoLatents
from ltx_jax.pictures import fit_length, recompress
from ltx_jax.video import Video

Frames = UInt8[np.ndarray, "pixel_frames rows columns 3"]
Image = UInt8[np.ndarray, "rows columns 3"]  # RGB levels
Waveform = Float[np.ndarray, "samples channels"]
States = tuple[LatentState | None, LatentState | None]  # of video and audio


@dataclass(frozen=True, kw_only=True)
class Scene:
    """One denoising stage as conditions see it: its size, and the autoencoders."""

    grid: VideoGrid
    encode_frames: Callable[[Frames, VideoGrid], VideoLatents]  # at the size of a grid; 8k + 1 frames
    encode_audio: Callable[[Waveform, int], AudioLatents]  # a waveform and its sample rate; as long as the clip


Placement = Callable[[States], States]
Condition = Callable[[Scene], Placement]


@dataclass(frozen=True, kw_only=True)
class ImageCondition:
    """An image that the clip must show.

    At frame 0 it replaces the first latent frame; elsewhere, and where `append` says so, its tokens are appended for
    the clip to follow. Called with a `Scene` it is a condition. Raises ValueError for a frame outside of the clip.
    """

    image: Image
    frame: int = 0  # negative: from the end
    strength: float = 1.0  # 1 exactly this image, 0 ignored
    crf: int | None = None  # of an H.264 round trip before; None: none
    append: bool = False

    def __call__(self, scene: Scene) -> Placement:
        frame = self.frame_in(scene.grid)
        image = self.image if self.crf is None else recompress(self.image, crf=self.crf)
        latents = scene.encode_frames(image[None], scene.grid)

        def place(states: States) -> States:
            video, audio = states
            if video is None:
                return states
            if frame == 0 and not self.append:
                return replace_frame(video, latents, grid=scene.grid, strength=self.strength), audio
            return append_keyframe(video, latents, grid=scene.grid, frame=frame, strength=self.strength), audio

        return place

    def frame_in(self, grid: VideoGrid) -> int:
        """The frame of a clip that shows the image."""
        frame = self.frame + grid.num_frames if self.frame < 0 else self.frame
        if not 0 <= frame < grid.num_frames:
            raise ValueError(
                f"the image is for frame {self.frame}, but the clip has frames 0 to {grid.num_frames - 1} (-1 is the "
                "last one)"
            )
        return frame


def sound(waveform: Waveform, sample_rate_hz: int) -> Condition:
    """The sound of the clip, kept as it is for the picture to follow."""

    def encode(scene: Scene) -> Placement:
        latents = scene.encode_audio(waveform, sample_rate_hz)

        def place(states: States) -> States:
            video, audio = states
            return video, None if audio is None else frozen(given(audio, latents))

        return place

    return encode


def retake(video: Video, start: float, stop: float, *, keep_audio: bool = False, keep_video: bool = False) -> Condition:
    """A clip of which the window [start, stop) seconds is made anew; `keep_…` keeps all of one modality.

    Raises ValueError where the window lies outside of the clip, and where a clip without sound is to keep it.
    """

    def encode(scene: Scene) -> Placement:
        grid = scene.grid
        picture = scene.encode_frames(video.frames, grid)
        heard = None
        if video.waveform is not None and video.sample_rate_hz is not None:
            heard = scene.encode_audio(video.waveform, video.sample_rate_hz)
        elif keep_audio:
            raise ValueError("keep_audio: the video has no sound to keep; leave it out and sound is made for it")

        def place(states: States) -> States:
            seen, sounding = states
            assert seen is not None
            seen = given(seen, picture)
            seen = frozen(seen) if keep_video else retake_window(seen, start, stop)
            if heard is None or sounding is None:  # all of it is made anew
                return seen, sounding
            sounding = given(sounding, heard)
            return seen, frozen(sounding) if keep_audio else retake_window(sounding, start, stop)

        return place

    return encode


def continuation(
    frames: Frames, waveform: Waveform | None, sample_rate_hz: int, *, backwards: bool = False
) -> Condition:
    """The 8k + 1 last frames of a clip and the sound of the same time, for a clip that goes on from them.

    They are kept as the first of the new clip; `backwards` the first frames of a clip as the last of the new one. Where
    there is no waveform, sound is made anew for all of the clip.
    """

    def encode(scene: Scene) -> Placement:
        grid = scene.grid
        latents = scene.encode_frames(frames, grid)
        # As the last frames, they are whole latents but for the first frame: it shares its latent with new ones.
        picture = latents[:, 1:] if backwards else latents
        at = grid.latent_frames - picture.shape[1] if backwards else 0
        heard, seconds = None, 0.0
        if waveform is not None:
            seconds = len(waveform) / sample_rate_hz
            missing = max(round(grid.seconds * sample_rate_hz) - len(waveform), 0)
            # The encoder hears what came before: its own echo disturbs it less than silence.
            padded = np.pad(waveform, ((missing, 0), (0, 0)), "reflect") if backwards else waveform
            heard = scene.encode_audio(padded, sample_rate_hz)

        def place(states: States) -> States:
            video, audio = states
            assert video is not None
            video = replace_frame(video, picture, grid=grid, latent_frame=at)
            if heard is None or audio is None:
                return video, audio
            audio = given(audio, heard)
            if backwards:
                return video, retake_window(audio, 0.0, grid.seconds - seconds)
            return video, retake_window(audio, seconds, np.inf)

        return place

    return encode


def reference(
    frames: Frames, *, downscale: int = 1, time_stretch: int = 1, strength: float = 1.0, attention: float = 1.0
) -> Condition:
    """A clip that an IC-LoRA reads while it makes another: see `append_reference`.

    `frames` are as many and as fast as those of the clip; the LoRA's metadata says by how much they are made smaller
    and fewer before they are encoded. Raises ValueError where the clip's size cannot be divided so.
    """

    def encode(scene: Scene) -> Placement:
        grid = reduced(scene.grid, downscale, time_stretch)
        latents = scene.encode_frames(fit_length(frames[::time_stretch], grid.num_frames), grid)

        def place(states: States) -> States:
            video, audio = states
            if video is None:
                return states
            placed = append_reference(
                video,
                latents,
                grid=scene.grid,
                downscale=downscale,
                time_stretch=time_stretch,
                strength=strength,
                attention=attention,
            )
            return placed, audio

        return place

    return encode


def reduced(grid: VideoGrid, downscale: int, time_stretch: int) -> VideoGrid:
    """The size of a reference for a clip: smaller and shorter by whole factors. Raises ValueError where it has none."""
    rows, columns = grid.scale[1] * downscale, grid.scale[2] * downscale
    if grid.height % rows or grid.width % columns:
        raise ValueError(
            f"the LoRA reads its reference at 1/{downscale} of the clip's size, so height must be a multiple of {rows} "
            f"and width of {columns}; got {grid.width}x{grid.height}"
        )
    num_frames = (grid.num_frames - 1) // time_stretch // grid.scale[0] * grid.scale[0] + 1
    return replace(grid, num_frames=num_frames, height=grid.height // downscale, width=grid.width // downscale)
