"""How a clip comes about: what is given is encoded, then noise is denoised in one stage or two.

Source: the pipelines `ti2vid_one_stage`, `ti2vid_two_stages` (and its HQ form), `distilled`, `keyframe_interpolation`,
`a2vid_two_stage`, `retake`, `ic_lora` and `t2a_one_stage` in Lightricks/LTX-2, ltx_pipelines.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from inspect import signature
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8

from ltx_jax.checkpoint import Configs
from ltx_jax.conditioning import audio_state, video_state
from ltx_jax.conditions import Condition, Scene, States
from ltx_jax.denoise import Pair, Prompt
from ltx_jax.engine import Engine
from ltx_jax.geometry import VideoGrid, audio_latent_length, unpatchify_audio, unpatchify_video
from ltx_jax.guidance import Guider, guide
from ltx_jax.latents import Latents, read_latents
from ltx_jax.modes import Media
from ltx_jax.noise import Noise
from ltx_jax.replay import Replay
from ltx_jax.sampling import euler, res_2s
from ltx_jax.settings import Settings, StageSettings


@dataclass(frozen=True, kw_only=True)
class Clip:
    """A finished clip; of no frames where only sound was asked for."""

    frames: UInt8[np.ndarray, "frames height width 3"]
    fps: float
    waveform: Float[np.ndarray, "samples channels"]  # in [-1, 1]
    sample_rate_hz: int
    latents: Latents | None  # none of a clip that was put together from several windows


Sampler = Callable[..., Any]  # like those in `sampling`: predict, tokens and sigmas to tokens
SAMPLERS: dict[str, Sampler] = {"euler": euler, "res_2s": res_2s}

# called after every model call: stage, step, sigma, noisy tokens, the model's denoised tokens
Callback = Callable[[int, int, float, Pair, Pair], None]


def make_latents(
    engine: Engine,
    settings: Settings,
    grid: VideoGrid,
    conditions: Sequence[Condition],
    *,
    positive: Prompt | None,
    negative: Prompt | None,
    noise: Mapping[str, Any] | None,
    callback: Callback | None = None,
    replay: Replay | None = None,
    sampler: Sampler | None = None,
    guider: Guider = guide,
    first: Latents | None = None,
    window: int = 0,
) -> Latents:
    """Denoises a clip of a size: every stage with all that is given, and then the upscalers that settings ask for.

    `sampler` takes the place of each stage's own. `first` are latents in place of those of a first stage. `window`
    counts those of a clip that is extended. See `Pipeline.generate_latents`.
    """
    stages = settings.stages(engine.configs.transformer.num_layers, grid)
    several = settings.num_stages > 1
    scenes = [scene(engine, grid, stage) for stage in stages]
    # What is given is encoded for all stages before the transformer needs the room.
    placed = [[condition(scene) for condition in conditions] for scene in scenes]
    latents = first
    for stage, scene_, placements in zip(stages, scenes, placed, strict=True):
        if latents is not None:
            latents = replace(latents, video=engine.upscale(latents.video, then_denoise=True))
        assert positive is not None
        states = start(engine.configs, scene_.grid, latents, dtype=engine.dtype, sound_only=settings.sound_only)
        for place in placements:
            states = place(states)
        source = Noise(settings.seed, noise, engine.dtype, stage=stage.number, window=window)
        tokens = engine.denoise(
            states,
            source.draw(states, f"stage{stage.number}_" if several else ""),
            positive,
            sigmas=stage.sigmas,
            noise_scale=stage.noise_scale,
            negative=negative,
            guidance=stage.guidance,
            guider=guider,
            sampler=with_noise(sampler or SAMPLERS[stage.sampler], source.fresh),
            callback=callback and partial(callback, stage.number),
            memory=replay and replay.stage(f"window{window}-stage{stage.number}"),
            stage_number=stage.number,
            stage=f"denoise, stage {stage.number}" if several else "denoise",
        )
        latents = latents_of(engine, tokens, scene_.grid)
        first = first or latents
    assert latents is not None
    assert first is not None
    if settings.guided:  # a guided first stage has the better sound; the distilled one gains from the second
        latents = replace(latents, audio=first.audio)
    for upscaler in settings.upscalers:
        latents = replace(latents, video=engine.upscale(latents.video, upscaler))
    return latents


def with_noise(sampler: Sampler, fresh: Callable[[Any], Any]) -> Sampler:
    """A sampler that adds noise has an argument `noise`, which makes it: standard normal, shaped like the tokens."""
    return partial(sampler, noise=fresh) if "noise" in signature(sampler).parameters else sampler


def given_latents(engine: Engine, settings: Settings, grid: VideoGrid, media: Media) -> Latents | None:
    """The latents that the settings name or whose pixels they name, in place of those of a first stage."""
    if settings.latents is not None:
        return read_latents(settings.latents, engine.configs)
    if not settings.given_whole or media.video is None:
        return None
    if settings.refine:
        grid = replace(grid, height=grid.height // 2, width=grid.width // 2)
    audio = engine.configs.audio_vae
    # The sound of a clip stays as it is: where a second stage hears it, a condition encodes it.
    silence = jnp.zeros((1, 0, audio.latent_bins, audio.latent_channels), engine.dtype)
    return Latents(video=engine.encode_frames(media.video.frames, grid), audio=silence)


def scene(engine: Engine, grid: VideoGrid, stage: StageSettings) -> Scene:
    """A stage of a clip of a size, as conditions see it."""
    grid = stage.grid(grid)
    return Scene(
        grid=grid,
        encode_frames=engine.encode_frames,
        encode_audio=partial(engine.encode_audio, num_latents=sound_length(engine.configs, grid), seconds=grid.seconds),
    )


def sound_length(configs: Configs, grid: VideoGrid) -> int:
    """Latent frames of the sound of a clip."""
    return audio_latent_length(grid.num_frames, grid.fps, configs.audio_vae)


def start(configs: Configs, grid: VideoGrid, latents: Latents | None, *, dtype: Any, sound_only: bool) -> States:
    """What both modalities start from: nothing, or the latents of an earlier stage."""
    seen, heard = (None, None) if latents is None else (latents.video, latents.audio)
    heard = None if heard is None or not heard.shape[1] else heard
    audio = audio_state(sound_length(configs, grid), configs.audio_vae, dtype=dtype, latents=heard)
    if sound_only:
        return None, audio
    return video_state(grid, channels=configs.transformer.video.in_channels, dtype=dtype, latents=seen), audio


def latents_of(engine: Engine, tokens: Pair, grid: VideoGrid) -> Latents:
    """The clip's own tokens as latents; what was appended is cut off."""
    video, audio = tokens
    assert audio is not None
    if video is None:
        video = jnp.zeros((1, 0, engine.configs.transformer.video.out_channels), engine.dtype)
    return Latents(
        video=unpatchify_video(video[:, : grid.num_tokens], grid),
        audio=unpatchify_audio(audio, engine.configs.audio_vae),
    )
