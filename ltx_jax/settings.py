"""The settings of a clip: one vocabulary for `generate.py`'s flags, the pipeline's arguments and `clip.json`."""

import math
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Literal, get_args

import numpy as np
import tyro

from ltx_jax.geometry import VideoGrid, size_of_aspect
from ltx_jax.guidance import Guidance
from ltx_jax.sampling import DISTILLED_SIGMAS, DISTILLED_SIGMAS_STAGE_2, ltx2_sigmas

PipelineName = Literal["distilled", "dev", "two-stage", "dev-two-stage", "hq"]
PIPELINES: tuple[PipelineName, ...] = get_args(PipelineName)
Several = Annotated[tuple[str, ...], tyro.conf.UseAppendAction]  # a flag that may be given several times
WIDTH, HEIGHT, NUM_FRAMES, FPS = 768, 512, 121, 24.0  # where neither flags nor a given clip say more

# Ours, in the spirit of the released pipelines' (a long list of the same faults): it is not their exact text.
NEGATIVE_PROMPT = (
    "blurry, out of focus, low contrast, washed out colours, overexposed, grainy, compression artefacts, flicker, "
    "subtitles, watermark, logo, distorted face, extra limbs, deformed hands, jittery motion, frozen frame, "
    "muffled or distorted sound, clipping, hiss, silence, sound out of sync with the picture"
)

# Guidance of the dev checkpoint as the released one-stage pipeline sets it, for 48 blocks.
DEV_VIDEO = Guidance(cfg_scale=3.0, stg_scale=1.0, rescale=0.7, modality_scale=3.0, stg_blocks=(28,))
DEV_AUDIO = replace(DEV_VIDEO, cfg_scale=7.0)
DEV_LAYERS = 48
DEV_STEPS = 30
# The high-quality pipeline: half as many steps of a second-order sampler.
HQ_VIDEO = Guidance(cfg_scale=3.0, rescale=0.45, modality_scale=3.0)
HQ_AUDIO = Guidance(cfg_scale=7.0, rescale=1.0, modality_scale=3.0)
HQ_STEPS = 15
STAGE_2_UPSCALER = "upscaler_spatial_x2"
# A preview: the distilled model's sigmas less three of its first, small steps; or a third of the guided steps.
PREVIEW_SIGMAS = (1.0, 0.975, 0.909375, 0.725, 0.421875, 0.0)
PREVIEW_DIVISOR = 3


@dataclass(frozen=True, kw_only=True)
class StageSettings:
    """One pass of denoising."""

    number: int  # from 1
    divisor: int  # of the clip's height and width
    sigmas: np.ndarray
    guidance: tuple[Guidance, Guidance] | None
    sampler: Literal["euler", "res_2s"] = "euler"
    noise_scale: float = 1.0  # below 1: it begins from the latents of the stage before

    def grid(self, whole: VideoGrid) -> VideoGrid:
        """The size of this stage of a clip."""
        return replace(whole, height=whole.height // self.divisor, width=whole.width // self.divisor)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a clip is made from. None means: as the chosen pipeline does."""

    prompt: str = ""
    """What the clip shows and sounds like."""
    enhance: bool = False
    """Have the text encoder write a full prompt from `prompt` first; the seed decides what it writes."""
    pipeline: PipelineName = "distilled"
    """distilled: 8 fixed sigmas, no guidance. dev: guided, `steps` of the shifted schedule. two-stage: half size,
    latent upscale by two, 3 more steps; guided in its first stage where a scale is given. dev-two-stage: the same,
    guided as dev is. hq: dev-two-stage with 15 steps of a second-order sampler."""
    width: int | None = None
    """Pixels (768, or as the given video); a multiple of 32, of 64 for two stages."""
    height: int | None = None
    """Pixels (512, or as the given video); a multiple of 32, of 64 for two stages."""
    aspect: str | None = None
    """In place of width and height: a shape, as 9:16; the nearest legal size of `megapixels` is taken."""
    megapixels: float | None = None
    """With `aspect`: millions of pixels a frame (0.4)."""
    num_frames: int | None = None
    """Frames of the clip: 8k + 1 (121, or as the given video)."""
    fps: float | None = None
    """Frames a second (24, or as the given video)."""
    steps: int | None = None
    """Denoising steps of a guided run (30; hq 15)."""
    seed: int = 10
    """Of the noise: the same seed gives the same clip."""
    negative_prompt: str = NEGATIVE_PROMPT
    """What a guided clip should not be."""
    video_cfg_scale: float | None = None
    """Classifier-free guidance of video; 1 is off (dev: 3)."""
    audio_cfg_scale: float | None = None
    """Classifier-free guidance of audio; 1 is off (dev: 7)."""
    video_stg_scale: float | None = None
    """Spatio-temporal guidance of video; 0 is off (dev: 1)."""
    audio_stg_scale: float | None = None
    """Spatio-temporal guidance of audio; 0 is off (dev: 1)."""
    video_modality_scale: float | None = None
    """Guidance of video away from what it is without audio; 1 is off (dev: 3)."""
    audio_modality_scale: float | None = None
    """Guidance of audio away from what it is without video; 1 is off (dev: 3)."""
    video_rescale: float | None = None
    """How far the deviation of guided video is pulled back; 0 is off (dev: 0.7)."""
    audio_rescale: float | None = None
    """How far the deviation of guided audio is pulled back; 0 is off (dev: 0.7)."""
    video_skip_step: int | None = None
    """Steps between which the last guided video is used again; 0 is none."""
    audio_skip_step: int | None = None
    """Steps between which the last guided audio is used again; 0 is none."""
    stg_blocks: tuple[int, ...] | None = None
    """Blocks whose self-attention spatio-temporal guidance skips (dev: 28 of 48)."""
    image: Several = ()
    """An image that the clip shows, as PATH, PATH@FRAME or PATH@FRAME:STRENGTH; may be given several times. At frame 0
    it is the first frame, elsewhere (-1 is the last frame) a keyframe that the clip passes through."""
    image_strength: float = 1.0
    """Of images that name none. 1: the frame is the image; 0: ignored."""
    interpolate: bool = False
    """Keyframe interpolation: the image at frame 0 is a keyframe like the others, not the first frame itself."""
    image_crf: int | None = 33
    """Quality of the H.264 round trip that the image goes through first, as in training; None: no round trip."""
    audio: Path | None = None
    """A sound file, or a clip with sound, that the clip is made for; it keeps this sound."""
    video: Path | None = None
    """A clip to work on: see `retake`."""
    extend: float | None = None
    """Seconds by which `video`, or the clip that is made, is continued: behind its end, or before its start where they
    are negative. Longer ones are made in windows of `num_frames` that overlap, each from the frames before it."""
    overlap: float = 1.0
    """With `extend`: seconds that each window sees of what is there."""
    retake: str | None = None
    """START:END in seconds: what of `video` is made anew; the rest stays."""
    keep_audio: bool = False
    """Retake the picture alone."""
    keep_video: bool = False
    """Retake the sound alone."""
    reference: Path | None = None
    """A clip that an IC-LoRA reads (`--lora`): depth, pose, edges or whatever it was trained on."""
    reference_strength: float = 1.0
    """1: the reference is as it is; below, it is noised with the clip."""
    reference_attention: float = 1.0
    """1: full attention between clip and reference; 0: none."""
    latents: Path | None = None
    """A safetensors file that an earlier run kept (--save-latents, --preview): to decode, upscale or refine."""
    preview: bool = False
    """The first of two stages alone: half the size, few steps. Its latents are kept, for `refine`."""
    refine: bool = False
    """The second of two stages alone, on `latents` or on `video`: twice their size, with detail from the prompt."""
    upscale: float | None = None
    """1.5 or 2: the latents are upscaled by this before they are decoded; `video` or `latents` without a denoising
    step, or those of the clip that is made."""
    upscale_time: bool = False
    """Twice the frames in the same time, by the temporal latent upscaler."""
    sound_only: bool = False
    """Make the sound alone, without a picture."""
    noise: Path | None = None
    """A safetensors file with the noise to start from instead of the seed's: in.video_noise and in.audio_noise, for two
    stages in.stage1_video_noise and so on."""
    sigmas: tuple[float, ...] | None = None
    """The noise levels, falling, in place of the (first stage's) schedule."""
    stage_2_sigmas: tuple[float, ...] | None = None
    """The noise levels of the second stage."""

    @property
    def num_stages(self) -> int:
        """1, or 2 where the clip's size is that of a second stage: twice the first's."""
        if self.decodes_only:
            return 1
        return 2 if self.refine or self.preview or self.pipeline not in ("distilled", "dev") else 1

    @property
    def given_whole(self) -> bool:
        """The latents of the whole clip are given: no first stage makes them."""
        return self.latents is not None or (self.video is not None and self.retake is None and self.extend is None)

    @property
    def decodes_only(self) -> bool:
        """Nothing is denoised: what is given is upscaled and decoded, without a prompt."""
        return self.given_whole and not self.refine

    @property
    def upscalers(self) -> tuple[str, ...]:
        """The latent upscalers that finished latents go through, by the names of a checkpoint."""
        spatial = () if self.upscale is None else (f"upscaler_spatial_x{self.upscale:g}".replace(".", "_"),)
        return (*spatial, "upscaler_temporal_x2") if self.upscale_time else spatial

    def grid(self, scale: tuple[int, int, int], clip: VideoGrid | None = None) -> VideoGrid:
        """The size of the clip before upscaling, `clip` being that of a given video.

        Raises ValueError for a shape that is none.
        """
        height, width = self.height, self.width
        if self.aspect is not None:
            height, width = size_of_aspect(self.aspect, self.megapixels or 0.4, step=scale[1] * self.num_stages)
        if clip is not None:
            # As near to the given video as sizes go.
            step, frames, factor = scale[1] * self.num_stages, scale[0], 2 if self.refine else 1
            height = height or max(round(clip.height * factor / step), 1) * step
            width = width or max(round(clip.width * factor / step), 1) * step
            whole = NUM_FRAMES if self.extend is not None else (clip.num_frames - 1) // frames * frames + 1
            num_frames = self.num_frames or whole
            fps = self.fps or clip.fps
        else:
            height, width, num_frames = height or HEIGHT, width or WIDTH, self.num_frames or NUM_FRAMES
            fps = self.fps or FPS
        return VideoGrid(num_frames=num_frames, height=height, width=width, fps=float(fps), scale=scale)

    def finished(self, grid: VideoGrid) -> VideoGrid:
        """The size at which a clip of a size is decoded: half of it for a preview, more behind the upscalers."""
        (_, rows, columns), factor = grid.scale, self.upscale or (0.5 if self.preview else 1.0)
        return replace(
            grid,
            height=math.ceil(grid.latent_height * factor) * rows,
            width=math.ceil(grid.latent_width * factor) * columns,
            num_frames=2 * grid.num_frames - 1 if self.upscale_time else grid.num_frames,
            fps=2 * grid.fps if self.upscale_time else grid.fps,
        )

    def check(self) -> None:
        """Raises ValueError for what no checkpoint could do; sizes are checked against the checkpoint's own grid."""
        if self.pipeline not in PIPELINES:
            raise ValueError(f"pipeline must be one of {', '.join(PIPELINES)}, got {self.pipeline!r}")
        for name in ("image_strength", "reference_strength", "reference_attention"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be from 0 to 1, got {getattr(self, name)}")
        self._check_modes()
        if self.image_crf is not None and not 0 <= self.image_crf <= 51:
            raise ValueError(f"image_crf must be from 0 (best) to 51, got {self.image_crf}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be from 0 to 2^63 - 1, got {self.seed}")
        self.schedule()
        self.second_schedule()

    def _check_modes(self) -> None:
        """Raises ValueError for modes that exclude each other, or lack what they work on."""
        if self.aspect is not None and (self.width is not None or self.height is not None):
            raise ValueError("aspect chooses width and height; give one or the other")
        if self.megapixels is not None and self.aspect is None:
            raise ValueError("megapixels goes with aspect, such as --aspect 9:16 --megapixels 0.9")
        self._check_given()
        if self.retake is not None:
            self.window()
            if self.num_stages != 1:
                raise ValueError(f"retake works at one size; {self.pipeline} has two stages: use distilled or dev")
            if self.keep_audio and self.keep_video:
                raise ValueError("keep_audio and keep_video together leave nothing to retake")
            if self.audio is not None:
                raise ValueError("retake keeps or remakes the sound of its video; audio excludes it")
        elif self.keep_audio or self.keep_video:
            raise ValueError("keep_audio and keep_video go with retake")
        if self.sound_only:
            names = ("image", "audio", "video", "latents", "reference", "upscale", "upscale_time", "extend")
            given = [name for name in names if getattr(self, name)]
            if given:
                raise ValueError(f"sound alone is made from a prompt alone; {', '.join(given)} cannot be used")
            if self.num_stages != 1:
                raise ValueError(f"sound has no second stage; use distilled or dev, not {self.pipeline}")

    def _check_given(self) -> None:
        """Raises ValueError where what is done to a clip, to latents or to the result excludes each other."""
        work = any((self.retake, self.extend is not None, self.refine, self.upscale, self.upscale_time))
        if self.upscale not in (None, 1.5, 2.0):
            raise ValueError(f"upscale must be 1.5 or 2, got {self.upscale:g}")
        if self.retake is not None and self.video is None:
            raise ValueError("retake works on a clip: give it too, with --video clip.mp4")
        if self.video is not None and not work:
            raise ValueError(
                "video is a clip to work on: say what to do, with --retake START:END, --extend SECONDS, --refine, "
                "--upscale 2 or --upscale-time"
            )
        if self.video is not None and self.latents is not None:
            raise ValueError("video and latents are both the clip to work on; give one")
        if self.refine and not self.given_whole:
            raise ValueError("refine works on latents or on a clip: --latents FILE, or --video clip.mp4")
        if self.preview and (self.given_whole or self.upscale is not None or self.upscale_time):
            raise ValueError("preview is the first stage of a new clip; latents, refine, upscale go with a later run")
        if self.decodes_only:
            given = [name for name in ("image", "audio", "reference", "enhance") if getattr(self, name)]
            if given:
                raise ValueError(f"nothing is denoised here, so {', '.join(given)} would do nothing; add refine")
        if self.extend is not None:
            if self.extend == 0 or not np.isfinite(self.extend):
                raise ValueError(f"extend must be seconds, below 0 for before the start; got {self.extend}")
            if not (self.overlap >= 0 and np.isfinite(self.overlap)):
                raise ValueError(f"overlap must be seconds, at least 0; got {self.overlap}")
            names = ("retake", "latents", "refine", "preview", "upscale", "upscale_time", "reference", "noise")
            given = [name for name in names if getattr(self, name)]
            if given:
                raise ValueError(f"extend excludes {', '.join(given)}; do one after the other")
        elif self.overlap != 1.0:
            raise ValueError("overlap goes with extend")

    def window(self) -> tuple[float, float]:
        """Start and end of `retake` in seconds. Raises ValueError for what is no window."""
        start, colon, end = (self.retake or "").partition(":")
        try:
            begin, stop = float(start or 0), float(end)
        except ValueError:
            colon, begin, stop = "", 0.0, 0.0
        if not colon or not 0 <= begin < stop:
            raise ValueError(f"retake must be START:END in seconds, as 1.5:4, got {self.retake!r}")
        return begin, stop

    @property
    def guided(self) -> bool:
        return self.pipeline in ("dev", "dev-two-stage", "hq") or any(
            getattr(self, field.name) is not None
            for field in fields(self)
            if field.name.startswith(("video_", "audio_")) or field.name == "stg_blocks"
        )

    def guidance(self, num_layers: int) -> tuple[Guidance, Guidance] | None:
        """Video's and audio's guidance for a transformer of `num_layers` blocks; None if nothing is guided."""
        if not self.guided:
            return None
        if self.pipeline == "hq":
            defaults = HQ_VIDEO, HQ_AUDIO
        elif self.pipeline in ("dev", "dev-two-stage"):
            # A transformer of another depth skips the block at the same relative depth.
            blocks = tuple(block * num_layers // DEV_LAYERS for block in DEV_VIDEO.stg_blocks)
            defaults = replace(DEV_VIDEO, stg_blocks=blocks), replace(DEV_AUDIO, stg_blocks=blocks)
        else:
            defaults = Guidance(), Guidance()
        names = ("cfg_scale", "stg_scale", "modality_scale", "rescale", "skip_step")
        result = []
        for modality, default in zip(("video", "audio"), defaults, strict=True):
            given = {name: getattr(self, f"{modality}_{name}") for name in names} | {"stg_blocks": self.stg_blocks}
            result.append(replace(default, **{name: value for name, value in given.items() if value is not None}))
            if result[-1].stg_scale != 0 and not result[-1].stg_blocks:
                raise ValueError(f"{modality}_stg_scale needs stg_blocks, the transformer blocks to skip")
        return result[0], result[1]

    def stages(self, num_layers: int, grid: VideoGrid) -> tuple[StageSettings, ...]:
        """The passes of denoising that make a clip of this size. Raises as `guidance` and the schedules do."""
        sampler = "res_2s" if self.pipeline == "hq" else "euler"
        half = replace(grid, height=grid.height // 2, width=grid.width // 2)
        first = StageSettings(
            number=1,
            divisor=self.num_stages,
            # Only the high-quality pipeline shifts its schedule by the real number of tokens.
            sigmas=self.schedule(num_tokens=half.num_tokens if self.pipeline == "hq" else 4096),
            guidance=self.guidance(num_layers),
            sampler=sampler,
        )
        if self.decodes_only:
            return ()
        if self.num_stages == 1 or self.preview:
            return (first,)
        sigmas = self.second_schedule()
        second = StageSettings(
            number=2, divisor=1, sigmas=sigmas, guidance=None, sampler=sampler, noise_scale=float(sigmas[0])
        )
        return (second,) if self.refine else (first, second)

    def schedule(self, *, num_tokens: int = 4096) -> np.ndarray:
        """The sigmas of the only or first stage. Raises ValueError for steps that the pipeline does not have."""
        if self.sigmas is not None:
            return _levels("sigmas", self.sigmas)
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")
        if self.guided:
            steps = HQ_STEPS if self.pipeline == "hq" else DEV_STEPS
            steps = steps // PREVIEW_DIVISOR if self.preview else steps
            return ltx2_sigmas(self.steps or steps, num_tokens=num_tokens)
        if self.preview:
            return np.asarray(PREVIEW_SIGMAS, np.float32)
        fixed = len(DISTILLED_SIGMAS) - 1
        if self.steps not in (None, fixed):
            raise ValueError(
                f"the distilled schedule has {fixed} fixed steps, got steps={self.steps}; leave it out, use the dev "
                "pipeline, or give sigmas"
            )
        return np.asarray(DISTILLED_SIGMAS, np.float32)

    def second_schedule(self) -> np.ndarray:
        """The sigmas of the second stage."""
        return _levels("stage_2_sigmas", self.stage_2_sigmas or DISTILLED_SIGMAS_STAGE_2)


def _levels(name: str, sigmas: tuple[float, ...]) -> np.ndarray:
    levels = np.asarray(sigmas, np.float32)
    if len(levels) < 2 or not np.all(np.diff(levels) < 0) or levels[-1] < 0 or levels[0] > 1:
        raise ValueError(f"{name} must fall from at most 1 to 0, at least two of them; got {list(sigmas)}")
    return levels
