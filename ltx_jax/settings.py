"""The settings of a clip: one vocabulary for `generate.py`'s flags, the pipeline's arguments and `clip.json`."""

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal

import numpy as np

from ltx_jax.guidance import Guidance
from ltx_jax.sampling import DISTILLED_SIGMAS, DISTILLED_SIGMAS_STAGE_2, ltx2_sigmas

PipelineName = Literal["distilled", "dev", "two-stage"]

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


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a clip is made from. None means: as the chosen pipeline does."""

    prompt: str = ""
    """What the clip shows and sounds like."""
    pipeline: PipelineName = "distilled"
    """distilled: 8 fixed sigmas, no guidance. dev: guided, `steps` of the shifted schedule. two-stage: half size,
    latent upscale by two, 3 more steps; guided in its first stage where a scale is given."""
    width: int = 768
    """Pixels; a multiple of 32, of 64 for two stages."""
    height: int = 512
    """Pixels; a multiple of 32, of 64 for two stages."""
    num_frames: int = 121
    """Frames of the clip: 8k + 1."""
    fps: float = 24.0
    """Frames a second."""
    steps: int | None = None
    """Denoising steps of a guided run (30)."""
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
    image: Path | None = None
    """An image that the clip starts from."""
    image_strength: float = 1.0
    """1: the first frame is the image; 0: ignored."""
    image_crf: int | None = 33
    """Quality of the H.264 round trip that the image goes through first, as in training; None: no round trip."""
    noise: Path | None = None
    """A safetensors file with the noise to start from instead of the seed's: in.video_noise and in.audio_noise, for two
    stages in.stage1_video_noise and so on."""
    sigmas: tuple[float, ...] | None = None
    """The noise levels, falling, in place of the (first stage's) schedule."""
    stage_2_sigmas: tuple[float, ...] | None = None
    """The noise levels of the second stage."""

    @property
    def num_stages(self) -> int:
        return 2 if self.pipeline == "two-stage" else 1

    def check(self) -> None:
        """Raises ValueError for what no checkpoint could do; sizes are checked against the checkpoint's own grid."""
        names = ("distilled", "dev", "two-stage")
        if self.pipeline not in names:
            raise ValueError(f"pipeline must be one of {', '.join(names)}, got {self.pipeline!r}")
        if not 0 <= self.image_strength <= 1:
            raise ValueError(f"image_strength must be from 0 to 1, got {self.image_strength}")
        if self.image_crf is not None and not 0 <= self.image_crf <= 51:
            raise ValueError(f"image_crf must be from 0 (best) to 51, got {self.image_crf}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be from 0 to 2^63 - 1, got {self.seed}")
        self.schedule()
        self.second_schedule()

    @property
    def guided(self) -> bool:
        return self.pipeline == "dev" or any(
            getattr(self, field.name) is not None
            for field in fields(self)
            if field.name.startswith(("video_", "audio_")) or field.name == "stg_blocks"
        )

    def guidance(self, num_layers: int) -> tuple[Guidance, Guidance] | None:
        """Video's and audio's guidance for a transformer of `num_layers` blocks; None if nothing is guided."""
        if not self.guided:
            return None
        if self.pipeline == "dev":
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

    def schedule(self) -> np.ndarray:
        """The sigmas of the only or first stage. Raises ValueError for steps that the pipeline does not have."""
        if self.sigmas is not None:
            return _levels("sigmas", self.sigmas)
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")
        if self.guided:
            return ltx2_sigmas(self.steps or DEV_STEPS)
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
