"""Prompt to clip: what settings ask for is planned, read and made.

    pipe = load_pipeline("ltx-2.3-orbax")
    clip = pipe(prompt="a heron lands on still water", num_frames=121, seed=7)

Each stage can be called alone: `encode_prompt`, `denoise`, `upscale`, `decode_video`, `decode_audio`; see `engine`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ltx_jax.cards import Card
from ltx_jax.checkpoint import CheckpointError
from ltx_jax.clip import Callback, Clip, Sampler, given_latents, make_latents
from ltx_jax.conditions import Condition, Image, ImageCondition, Waveform
from ltx_jax.denoise import Prompt
from ltx_jax.engine import Engine
from ltx_jax.extend import extended
from ltx_jax.geometry import VideoGrid
from ltx_jax.guidance import Guider, guide
from ltx_jax.latents import Latents
from ltx_jax.lora import Lora
from ltx_jax.media import MediaError, check_writable, write_mp4, write_wav
from ltx_jax.models.attention import AttentionForm, has_cudnn_attention
from ltx_jax.modes import conditions_of, kept_sound, read_media, size_of
from ltx_jax.noise import read_noise
from ltx_jax.plan import Offload, Plan, PlanError, make_plan, refusal
from ltx_jax.progress import Progress
from ltx_jax.replay import Replay
from ltx_jax.residency import Way
from ltx_jax.settings import STAGE_2_UPSCALER, Settings


class Pipeline(Engine):
    """The models of one checkpoint, and whole clips made with them.

    On a device with room for all models they stay; else each stage frees those of the stage before. `plan` decides.
    """

    def plan(self, settings: Settings, *, target: Card | None = None, adopt: bool = True) -> Plan:
        """What a clip needs on the device at hand, or on a named card; see `make_plan`.

        A plan for the device at hand is adopted: models are loaded, streamed and tiled as it says. Raises what
        `check` raises; PlanError, with the nearest sizes that fit, where it is to be adopted and does not fit.
        """
        self.check(settings)
        device = jax.devices()[0]
        attention: AttentionForm = "chunked"
        if target is None and self.dtype != jnp.float32 and has_cudnn_attention(device):
            attention = "cudnn"

        plan = make_plan(
            self.manifest,
            settings,
            target=target or device,
            dtype=jnp.bfloat16 if target is not None else self.dtype,
            offload=self.offload,
            attention=attention,
            loras=[lora.path for lora in self.residency.loras],
            told=self.progress.say,
        )
        if target is not None or not adopt:
            return plan
        if not plan.fits:
            make = partial(self.plan, adopt=False)
            raise PlanError(refusal(make, settings, plan, scale=self.configs.video_vae.scale))
        self.adopt(plan)
        return plan

    def adopt(self, plan: Plan) -> None:
        """Loads, streams and tiles from now on as a plan says."""
        self.residency.way = Way.of(plan)

    def __call__(
        self,
        *,
        prompt: str | Prompt = "",
        image: Any = (),
        noise: str | Path | Mapping[str, Any] | None = None,
        conditions: Sequence[Condition] = (),
        callback: Callback | None = None,
        sampler: Sampler | None = None,
        guider: Guider = guide,
        **settings: Any,
    ) -> Clip:
        """A clip from a prompt: `generate_latents`, then both decoders.

        The keyword arguments are the fields of `Settings`, which `generate.py` has as flags. In Python, `prompt` may
        be contexts made before, `image` one or several of RGB levels, `ImageCondition`s and paths, and `noise` a
        mapping of arrays.
        """
        given: dict[str, Any] = {"sampler": sampler, "guider": guider}
        for name, value in (("prompt", prompt), ("noise", noise)):
            if isinstance(value, str | Path):
                settings[name] = value if name == "prompt" else Path(value)
            elif value is not None:
                given[name] = value
        images = list(image) if isinstance(image, list | tuple) else [] if image is None else [image]
        settings["image"] = tuple(str(item) for item in images if isinstance(item, str | Path))
        given["image"] = [item for item in images if not isinstance(item, str | Path)]
        for name in ("audio", "video", "reference", "latents"):
            if settings.get(name) is not None:
                settings[name] = Path(settings[name])
        chosen = Settings(**settings)
        if chosen.extend is not None:
            return self.extend(chosen, **given, conditions=conditions, callback=callback)
        latents = self.generate_latents(chosen, **given, conditions=conditions, callback=callback)
        return self.decode(latents, settings=chosen)

    def decode(self, latents: Latents, *, settings: Settings) -> Clip:
        """Latents to a clip: both decoders, but the sound that the settings keep as it came."""
        grid = size_of(settings, self.configs.video_vae.scale)
        waveform, rate = self.sound(latents, settings)
        return Clip(
            frames=self.frames(latents),
            fps=settings.finished(grid).fps,
            waveform=waveform,
            sample_rate_hz=rate,
            latents=latents,
        )

    def sound(self, latents: Latents, settings: Settings) -> tuple[Waveform, int]:
        """The waveform of a clip and its sample rate: decoded, or the one that the settings keep as it came.

        It has no samples where a silent clip is upscaled.
        """
        if settings.audio is not None or settings.keep_audio or settings.given_whole:
            grid = size_of(settings, self.configs.video_vae.scale)
            media = read_media(replace(settings, image=(), reference=None), grid)
            kept = kept_sound(settings, media, grid)
            if kept is not None:
                return kept
        rate = self.configs.vocoder.sample_rate_hz
        return (self.decode_audio(latents.audio) if latents.audio.shape[1] else np.zeros((0, 2), np.float32)), rate

    def generate_latents(
        self,
        settings: Settings,
        *,
        prompt: Prompt | None = None,
        negative: Prompt | None = None,
        image: Image | Sequence[Image | ImageCondition] | None = None,
        conditions: Sequence[Condition] = (),
        noise: Mapping[str, Any] | None = None,
        callback: Callback | None = None,
        replay: Replay | None = None,
        sampler: Sampler | None = None,
        guider: Guider = guide,
    ) -> Latents:
        """The latents of a clip. What is given beside `settings` takes the place of what they name.

        `conditions` come on top of those of the settings. `callback(stage, step, sigma, tokens, denoised)` is called
        after every model call; `replay` keeps what the model says, for a run that is cut off; `sampler` and `guider`
        take the place of the pipeline's own, see docs/extending.md. Raises ValueError for sizes, steps, frames, files
        or noise that do not fit, naming what would; CheckpointError where a model is not there.
        """
        grid = self.check(settings)
        if image is not None and len(image):
            settings = replace(settings, image=())
        media = read_media(settings, grid, tuple(lora.path for lora in self.residency.loras))
        placed = [*conditions_of(settings, media), *self._images(image, settings), *conditions]
        if noise is None and settings.noise is not None:
            noise = read_noise(settings.noise)
        first = given_latents(self, settings, grid, media)
        positive, negative = self.contexts(settings, prompt, negative)
        return make_latents(
            self,
            settings,
            grid,
            placed,
            positive=positive,
            negative=negative,
            noise=noise,
            callback=callback,
            replay=replay,
            sampler=sampler,
            guider=guider,
            first=first,
        )

    def extend(
        self,
        settings: Settings,
        *,
        clip: Clip | None = None,
        prompt: Prompt | None = None,
        negative: Prompt | None = None,
        image: Image | Sequence[Image | ImageCondition] | None = None,
        conditions: Sequence[Condition] = (),
        callback: Callback | None = None,
        replay: Replay | None = None,
        sampler: Sampler | None = None,
        guider: Guider = guide,
    ) -> Clip:
        """A clip that goes on, by `settings.extend` seconds: the video of the settings, `clip`, or one made first.

        The frames of images, and the sound, are those of the whole clip. `conditions` hold in every window. Raises what
        `generate_latents` raises; see `windows_of` too.
        """
        if clip is not None:
            height, width = clip.frames.shape[1:3]
            settings = replace(settings, video=None, height=height, width=width, fps=clip.fps)
        grid = self.check(settings)
        media = read_media(settings, grid)
        media = replace(media, images=(*media.images, *self._images(image, settings)))
        positive, negative = self.contexts(settings, prompt, negative)
        return extended(
            self,
            settings,
            media,
            positive=positive,
            negative=negative,
            clip=clip,
            conditions=conditions,
            callback=callback,
            replay=replay,
            sampler=sampler,
            guider=guider,
        )

    def contexts(
        self, settings: Settings, prompt: Prompt | None = None, negative: Prompt | None = None
    ) -> tuple[Prompt | None, Prompt | None]:
        """The contexts of the prompt and of the negative prompt, as far as they are needed and not given."""
        if prompt is None:
            prompt, wanted = self.contexts_of([settings])[0]
            return prompt, negative or wanted
        if negative is None and self.needs_negative(settings):
            negative = self.encode_prompt(settings.negative_prompt)
        return prompt, negative

    def contexts_of(self, clips: Sequence[Settings]) -> list[tuple[Prompt | None, Prompt | None]]:
        """The contexts of the prompts of several clips, enhanced where asked for, and of their negative prompts.

        The text encoder is read once for all. Of a clip that needs none, None.
        """
        texts: list[tuple[str | None, str | None]] = []
        for settings in clips:
            text = None if settings.decodes_only else settings.prompt
            if settings.enhance and text is not None:
                text = self.enhance(text, seed=settings.seed, with_image=bool(settings.image))
                self.progress.say(f"prompt: {text}")
            texts.append(
                (text, settings.negative_prompt if text is not None and self.needs_negative(settings) else None)
            )
        wanted = list(dict.fromkeys(text for pair in texts for text in pair if text is not None))
        known: dict[str | None, Prompt | None] = dict(zip(wanted, self.encode_prompts(wanted), strict=True))
        return [(known.get(text), known.get(negative)) for text, negative in texts]

    def _images(self, image: Any, settings: Settings) -> list[ImageCondition]:
        """Images given in Python, as the settings would have them."""
        images = [image] if isinstance(image, np.ndarray) else list(image or ())
        strength, crf, append = settings.image_strength, settings.image_crf, settings.interpolate
        return [
            item
            if isinstance(item, ImageCondition)
            else ImageCondition(image=item, strength=strength, crf=crf, append=append)
            for item in images
        ]

    def needs_negative(self, settings: Settings) -> bool:
        """Whether the settings ask for a pass with the negative prompt."""
        guidance = settings.guidance(self.configs.transformer.num_layers)
        return guidance is not None and any(g.cfg_scale != 1 for g in guidance)

    def check(self, settings: Settings) -> VideoGrid:
        """The size of the clip. Raises what `generate_latents` raises, before any work."""
        settings.check()
        grid = size_of(settings, self.configs.video_vae.scale)
        settings.guidance(self.configs.transformer.num_layers)
        second = (STAGE_2_UPSCALER,) if settings.num_stages == 2 and not settings.preview else ()
        for upscaler in (*second, *settings.upscalers):
            if upscaler not in self.manifest.parts:
                raise CheckpointError(f"{self.folder} has no {upscaler}, which is needed here; convert with its file")
        return grid


def load_pipeline(
    checkpoint: str | Path,
    *,
    dtype: Any = None,
    loras: Sequence[Lora | tuple[str | Path, float]] = (),
    offload: Offload = "auto",
    keep_prompts: bool = True,
    progress: Progress | None = None,
) -> Pipeline:
    """Opens a folder made by `python -m convert`. Models are read when first needed.

    `dtype` is that of activations: float32 (the reference's numbers; the default on a CPU) or bfloat16 (the default
    elsewhere). `loras` are files with their strengths, put beside the transformer's packed weights; a `Lora` may have
    another strength in the second of two stages.
    `offload` streams the layers of large models from host memory: where a plan says so ("auto"), always ("blocks") or
    never ("none"). `keep_prompts` keeps contexts of prompts on disk.
    Raises CheckpointError for a missing or foreign folder.
    """
    found = [lora if isinstance(lora, Lora) else Lora(Path(lora[0]), float(lora[1])) for lora in loras]
    return Pipeline(
        Path(checkpoint), dtype=dtype, loras=found, offload=offload, keep_prompts=keep_prompts, progress=progress
    )


def save_mp4(path: str | Path, clip: Clip) -> None:
    """Writes a clip as H.264 with AAC sound. Raises MediaError where it cannot be written."""
    path = Path(path)
    check_writable(path)
    if not len(clip.frames):
        raise MediaError("the clip has no frames; save_wav writes its sound")
    write_mp4(
        path,
        clip.frames,
        fps=clip.fps,
        waveform=clip.waveform if len(clip.waveform) else None,
        sample_rate_hz=clip.sample_rate_hz,
    )


def save_wav(path: str | Path, clip: Clip) -> None:
    """Writes the sound of a clip as 16-bit PCM. Raises MediaError where it cannot be written."""
    path = Path(path)
    check_writable(path)
    write_wav(path, clip.waveform, clip.sample_rate_hz)
