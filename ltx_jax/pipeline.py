"""Prompt to clip: encode, denoise, decode; one stage or two. Each stage can also be called alone.

    pipe = load_pipeline("ltx-2.3-orbax")
    clip = pipe(prompt="a heron lands on still water", num_frames=121, seed=7)

Source: the pipelines `ti2vid_one_stage`, `ti2vid_two_stages` and `distilled` in Lightricks/LTX-2, ltx_pipelines.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from ltx_jax.cards import Card
from ltx_jax.checkpoint import TOKENIZER, CheckpointError, Manifest
from ltx_jax.conditioning import LatentState, append_keyframe, audio_state, replace_frame, video_state
from ltx_jax.denoise import Denoiser, Pair, Prompt
from ltx_jax.geometry import (
    AudioLatents,
    VideoGrid,
    VideoLatents,
    audio_latent_length,
    unpatchify_audio,
    unpatchify_video,
)
from ltx_jax.guidance import Guidance
from ltx_jax.load import load_configs
from ltx_jax.media import check_writable, fit_image, read_image, recompress, to_uint8, write_mp4
from ltx_jax.models.attention import AttentionForm, has_cudnn_attention
from ltx_jax.noise import Noise, read_noise
from ltx_jax.plan import Offload, Plan, PlanError, make_plan, refusal
from ltx_jax.progress import Progress, Silent
from ltx_jax.prompt_cache import keep_prompt, prompt_key, read_prompt
from ltx_jax.residency import Residency, Way
from ltx_jax.sampling import Sigmas, euler
from ltx_jax.settings import Settings
from ltx_jax.stages import decode_mel, decode_pixels, encode_pixels, upscale, vocode
from ltx_jax.text import load_tokenizer, text_contexts, text_hidden_states, tokenize
from ltx_jax.tiling import TileSize, decode_tiled

STAGE_2_UPSCALER = "upscaler_spatial_x2"
Image = UInt8[np.ndarray, "rows columns 3"]  # RGB levels


@dataclass(frozen=True, kw_only=True)
class ImageCondition:
    """An image that the clip must show.

    At frame 0 it replaces the first latent frame; elsewhere its tokens are appended for the clip to follow.
    """

    image: Image
    frame: int = 0
    strength: float = 1.0  # 1 exactly this image, 0 ignored
    crf: int | None = None  # of an H.264 round trip before; None: none


@dataclass(frozen=True, kw_only=True)
class Latents:
    """What denoising gives: normalised latents of both modalities."""

    video: Float[Array, "1 frames height width video_channels"]
    audio: Float[Array, "1 time bins audio_channels"]


@dataclass(frozen=True, kw_only=True)
class Clip:
    """A finished clip."""

    frames: UInt8[np.ndarray, "frames height width 3"]
    fps: float
    waveform: Float[np.ndarray, "samples 2"]  # in [-1, 1]
    sample_rate_hz: int
    latents: Latents


# called after every model call: stage, step, sigma, noisy tokens, the model's denoised tokens
Callback = Callable[[int, int, float, Pair, Pair], None]


class Pipeline:
    """The models of one checkpoint, loaded when first needed.

    On a device with room for all of them they stay; else each stage frees those of the stage before. `plan` decides.
    """

    def __init__(
        self,
        folder: Path,
        *,
        dtype: Any = None,
        loras: Sequence[tuple[Path, float]] = (),
        offload: Offload = "auto",
        keep_prompts: bool = True,
        progress: Progress | None = None,
    ):
        """See `load_pipeline`."""
        self.folder = folder
        self.manifest = Manifest.read(folder)
        self.configs = load_configs(self.manifest)
        on_cpu = jax.default_backend() == "cpu"  # where bfloat16 matmuls are slower than float32
        self.dtype = jnp.dtype(dtype or (jnp.float32 if on_cpu else jnp.bfloat16))
        self.offload: Offload = offload
        self.keep_prompts = keep_prompts
        self.progress = progress or Silent()
        self.residency = Residency(
            folder, self.manifest, dtype=self.dtype, loras=[(Path(path), s) for path, s in loras], loading=self._loading
        )

    # ------------------------------------------------------------------ models

    def model(self, component: str) -> Any:
        """A model of the checkpoint, loaded on first use."""
        return self.residency.get(component)

    @contextmanager
    def _loading(self, component: str) -> Iterator[None]:
        with self.progress.stage(f"load {component.replace('_', ' ')}", 1) as advance:
            yield
            advance()

    def free(self, *components: str) -> None:
        """Drops models (all, if none is named) so that their memory can be used by others."""
        self.residency.free(*(components or tuple(self.residency.loaded)))

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
            loras=self.residency.loras,
            told=self.progress.say,
        )
        if target is not None or not adopt:
            return plan
        if not plan.fits:
            make = partial(self.plan, adopt=False)
            raise PlanError(refusal(make, settings, plan, scale=self.configs.video_vae.scale))
        self.residency.way = Way.of(plan)
        return plan

    def _retrying(self, work: Callable[[], Any]) -> Any:
        """Runs a stage; if the device runs out of memory, once more in a way that needs less."""
        try:
            return work()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            before = self.residency.way
        # Outside of the handler, whose traceback would keep the arrays of the failed attempt.
        if not self.residency.retreat():
            raise PlanError(f"{jax.devices()[0].device_kind} ran out of memory, and there is no smaller way left")
        way = self.residency.way
        self.progress.say(
            f"out of memory with {', '.join(before.offload) or 'nothing'} streamed; this stage again with "
            f"{', '.join(way.offload)} streamed and tiles of {way.tile.side} pixels and {way.tile.num_frames} frames"
        )
        return work()

    @property
    def precision(self) -> str:
        """Of matrix products: float32 is meant to be float32, also where a device would round its inputs."""
        return "highest" if self.dtype == jnp.float32 else "default"

    @cached_property
    def tokenizer(self):
        """The text encoder's tokenizer. Raises CheckpointError if the checkpoint was converted without one."""
        if self.configs.gemma is None:
            raise CheckpointError(
                f"{self.folder} was converted without a text encoder, so it cannot read prompts; convert again with "
                "--gemma FOLDER_OF_GEMMA_3, or pass contexts"
            )
        tokenizer = load_tokenizer(self.folder / TOKENIZER, vocab_size=self.configs.gemma.vocab_size)
        length = self.manifest.text_length
        return replace(tokenizer, text_length=length) if length else tokenizer

    # ------------------------------------------------------------------ stages

    def encode_prompt(self, text: str) -> Prompt:
        """The contexts of a prompt. Warns if it is too long, with what was cut off."""
        return self.encode_prompts([text])[0]

    def encode_prompts(self, texts: Sequence[str]) -> list[Prompt]:
        """The contexts of several prompts, the text encoder read once; of known ones without it.

        They are kept in the user's cache folder, under what they depend on: text, checkpoint, dtype, device, versions.
        """
        keys = [
            prompt_key(self.folder, self.manifest, text, self.dtype) if self.keep_prompts else None for text in texts
        ]
        known = dict(zip(texts, keys, strict=True))
        found: dict[str, Prompt] = {}
        for text, key in known.items():
            kept = None if key is None else read_prompt(key)
            if kept is not None:
                found[text] = kept
        new = [text for text in known if text not in found]
        if new:
            found |= dict(zip(new, self._retrying(lambda: self._read_prompts(new)), strict=True))
        for text in new:
            key = known[text]
            if key is not None:
                keep_prompt(key, found[text])
        return [found[text] for text in texts]

    def _read_prompts(self, texts: Sequence[str]) -> list[Prompt]:
        rows = [tokenize(self.tokenizer, [text]) for text in texts]
        self.residency.turn("gemma")
        gemma = self.model("gemma")
        stage = self.progress.stage("encode prompt", 2 * len(texts))
        with stage as advance, jax.default_matmul_precision(self.precision):
            hidden_states = []
            for token_ids, mask in rows:
                hidden_states.append(text_hidden_states(gemma, token_ids, mask, dtype=self.dtype))
                jax.block_until_ready(hidden_states)
                advance()
            del gemma
            self.residency.turn("connectors")
            connectors = self.model("connectors")
            prompts = []
            for states, (_, mask) in zip(hidden_states, rows, strict=True):
                contexts = text_contexts(connectors, states, mask)
                prompts.append(jax.block_until_ready(Prompt(video=contexts.video, audio=contexts.audio)))
                advance()
        return prompts

    def encode_image(self, condition: ImageCondition, *, height: int, width: int) -> VideoLatents:
        """The latents of one image at a size in pixels, after the H.264 round trip."""
        image = condition.image
        if condition.crf is not None:
            image = recompress(image, crf=condition.crf)
        pixels = fit_image(image, height=height, width=width).astype(self.dtype)

        def work() -> VideoLatents:
            self.residency.turn("video_vae")
            with jax.default_matmul_precision(self.precision):
                return jax.block_until_ready(encode_pixels(self.model("video_vae"), pixels))

        return self._retrying(work)

    def denoise(
        self,
        states: tuple[LatentState | None, LatentState | None],
        noise: Pair,
        prompt: Prompt,
        *,
        sigmas: Sigmas,
        noise_scale: float = 1.0,
        negative: Prompt | None = None,
        guidance: tuple[Guidance, Guidance] | None = None,
        sampler: Callable[..., Pair] = euler,
        callback: Callable[[int, float, Pair, Pair], None] | None = None,
        stage: str = "denoise",
    ) -> Pair:
        """Denoises tokens from noise down the sigmas; returns all tokens, appended conditioning included."""
        return self._retrying(
            lambda: self._denoise(
                states, noise, prompt, sigmas, noise_scale, negative, guidance, sampler, callback, stage
            )
        )

    def _denoise(
        self, states, noise, prompt, sigmas, noise_scale, negative, guidance, sampler, callback, stage
    ) -> Pair:
        tokens = Pair(
            *(
                None if state is None or n is None else state.noised(n.astype(self.dtype), noise_scale)
                for state, n in zip(states, noise, strict=True)
            )
        )
        self.residency.turn("transformer")
        transformer = self.model("transformer")
        with self.progress.stage(stage, len(sigmas) - 1) as advance:

            def after_call(step: int, sigma: float, tokens: Pair, denoised: Pair) -> None:
                jax.block_until_ready(denoised)
                if callback is not None:
                    callback(step, sigma, tokens, denoised)
                advance()

            predict = Denoiser(
                transformer,
                states,
                prompt,
                negative=negative,
                guidance=guidance,
                precision=self.precision,
                callback=after_call,
            )
            return sampler(predict, tokens, sigmas)

    def upscale(self, latents: VideoLatents, component: str = STAGE_2_UPSCALER) -> VideoLatents:
        """Video latents, larger or longer, by one of the checkpoint's latent upscalers."""

        def work() -> VideoLatents:
            kept = ("transformer",) if self.residency.way.keep_transformer else ()
            self.residency.turn(component, "video_vae", *kept)
            with jax.default_matmul_precision(self.precision):
                upscaler, statistics = self.model(component), self.model("video_vae").statistics
                return jax.block_until_ready(upscale(upscaler, statistics, latents))

        return self._retrying(work)

    def decode_video(
        self, latents: VideoLatents, *, tile: TileSize | None = None
    ) -> Iterator[UInt8[np.ndarray, "frames height width 3"]]:
        """Yields the frames of a clip in order, in chunks, as they are decoded.

        Tiles are as planned where `tile` is not given. Host memory holds one tile's length of frames, whatever the
        length of the clip.
        """
        scale = self.configs.video_vae.scale
        total = (latents.shape[1] - 1) * scale[0] + 1
        latents_on_host = np.asarray(latents)

        def decode(latents: Array) -> Array:
            with jax.default_matmul_precision(self.precision):
                return decode_pixels(self.model("video_vae"), latents)

        def chunks() -> Iterator[Any]:
            self.residency.turn("video_vae")
            return decode_tiled(decode, latents_on_host, scale=scale, tile=tile or self.residency.way.tile)

        done = 0  # frames yielded: they are not decoded again if memory runs out
        with self.progress.stage("decode video", total) as advance:
            decoding = chunks()

            def following() -> Any:
                nonlocal decoding
                if decoding is None:  # in the smaller way
                    decoding = chunks()
                    seen = 0
                    for chunk in decoding:
                        seen += chunk.shape[1]
                        if seen > done:
                            return chunk[:, done - seen :]
                    return None
                try:
                    return next(decoding, None)
                except jax.errors.JaxRuntimeError:
                    decoding = None  # a generator that has raised is over
                    raise

            while (chunk := self._retrying(following)) is not None:
                for _ in range(chunk.shape[1]):
                    advance()
                done += chunk.shape[1]
                yield to_uint8(chunk[0])

    def decode_audio(self, latents: AudioLatents) -> Float[np.ndarray, "samples 2"]:
        """The waveform of a clip, at `sample_rate_hz` of the vocoder."""

        def work() -> Float[np.ndarray, "samples 2"]:
            self.residency.turn("audio_vae", "vocoder")
            vae, vocoder = self.model("audio_vae"), self.model("vocoder")
            with self.progress.stage("decode audio", 2) as advance:
                with jax.default_matmul_precision(self.precision):
                    mel = decode_mel(vae, latents)
                advance()
                with jax.default_matmul_precision("highest"):  # the vocoder is not stable in less
                    waveform = np.asarray(vocode(vocoder, mel))[0]
                advance()
            return waveform

        return self._retrying(work)

    # ------------------------------------------------------------- whole clips

    def __call__(
        self,
        *,
        prompt: str | Prompt,
        image: str | Path | Image | None = None,
        noise: str | Path | Mapping[str, Any] | None = None,
        callback: Callback | None = None,
        **settings: Any,
    ) -> Clip:
        """A clip from a prompt: `generate_latents`, then both decoders.

        The keyword arguments are the fields of `Settings`, which `generate.py` has as flags. In Python, `prompt` may
        be contexts made before, `image` RGB levels, and `noise` a mapping of arrays.
        """
        given: dict[str, Any] = {}
        for name, value in (("prompt", prompt), ("image", image), ("noise", noise)):
            if isinstance(value, str | Path):
                settings[name] = value if name == "prompt" else Path(value)
            elif value is not None:
                given[name] = value
        chosen = Settings(**settings)
        return self.decode(self.generate_latents(chosen, **given, callback=callback), fps=chosen.fps)

    def decode(self, latents: Latents, *, fps: float) -> Clip:
        """Latents of both modalities to a clip."""
        return Clip(
            frames=np.concatenate(list(self.decode_video(latents.video))),
            fps=fps,
            waveform=self.decode_audio(latents.audio),
            sample_rate_hz=self.configs.vocoder.sample_rate_hz,
            latents=latents,
        )

    def generate_latents(
        self,
        settings: Settings,
        *,
        prompt: Prompt | None = None,
        negative: Prompt | None = None,
        image: Image | None = None,
        noise: Mapping[str, Any] | None = None,
        callback: Callback | None = None,
    ) -> Latents:
        """The latents of a clip. What is given beside `settings` takes the place of what they name.

        `callback(stage, step, sigma, tokens, denoised)` is called after every model call. Raises ValueError for sizes,
        steps, frames or noise that do not fit, naming what would; CheckpointError where a model is not there.
        """
        first, grid = self.check(settings)
        if image is None and settings.image is not None:
            image = read_image(settings.image)
        images = []
        if image is not None:
            images.append(ImageCondition(image=image, strength=settings.image_strength, crf=settings.image_crf))
        if noise is None and settings.noise is not None:
            noise = read_noise(settings.noise)
        guidance = settings.guidance(self.configs.transformer.num_layers)
        source = Noise(settings.seed, noise, self.dtype)
        texts = [settings.prompt] if prompt is None else []
        if negative is None and self.needs_negative(settings):
            texts.append(settings.negative_prompt)
        encoded = self.encode_prompts(texts)
        positive = prompt or encoded[0]
        if negative is None and self.needs_negative(settings):
            negative = encoded[-1]

        two_stages = settings.num_stages == 2
        # Images of both stages are encoded before the transformer needs the room.
        placed = {step: self._encode_images(images, step) for step in dict.fromkeys((first, grid))}
        states = self._states(first, placed[first])
        tokens = self.denoise(
            states,
            source.draw(states, "stage1_" if two_stages else ""),
            positive,
            sigmas=settings.schedule(),
            negative=negative,
            guidance=guidance,
            callback=callback and partial(callback, 1),
            stage="denoise, stage 1" if two_stages else "denoise",
        )
        latents = self._latents(tokens, first)
        if not two_stages:
            return latents

        sigmas = settings.second_schedule()
        states = self._states(grid, placed[grid], Latents(video=self.upscale(latents.video), audio=latents.audio))
        tokens = self.denoise(
            states,
            source.draw(states, "stage2_"),
            positive,
            sigmas=sigmas,
            noise_scale=float(sigmas[0]),
            callback=callback and partial(callback, 2),
            stage="denoise, stage 2",
        )
        refined = self._latents(tokens, grid)
        # A guided first stage has the better sound; the distilled one gains from the second.
        return refined if guidance is None else replace(refined, audio=latents.audio)

    def needs_negative(self, settings: Settings) -> bool:
        """Whether the settings ask for a pass with the negative prompt."""
        guidance = settings.guidance(self.configs.transformer.num_layers)
        return guidance is not None and any(g.cfg_scale != 1 for g in guidance)

    def check(self, settings: Settings) -> tuple[VideoGrid, VideoGrid]:
        """The grids of the first and the last stage. Raises what `generate_latents` raises, before any work."""
        settings.check()
        grid = VideoGrid(
            num_frames=settings.num_frames,
            height=settings.height,
            width=settings.width,
            fps=float(settings.fps),
            scale=self.configs.video_vae.scale,
        )
        stages = settings.num_stages
        grid.check(stages=stages)
        settings.guidance(self.configs.transformer.num_layers)
        if stages == 2 and STAGE_2_UPSCALER not in self.manifest.parts:
            raise CheckpointError(f"{self.folder} has no {STAGE_2_UPSCALER}, which two stages need; convert with it")
        return replace(grid, height=grid.height // stages, width=grid.width // stages), grid

    def _encode_images(
        self, images: Sequence[ImageCondition], grid: VideoGrid
    ) -> list[tuple[ImageCondition, VideoLatents]]:
        return [(image, self.encode_image(image, height=grid.height, width=grid.width)) for image in images]

    def _states(
        self,
        grid: VideoGrid,
        images: Sequence[tuple[ImageCondition, VideoLatents]],
        latents: Latents | None = None,
    ) -> tuple[LatentState, LatentState]:
        """What both modalities start from, with the images placed."""
        video = video_state(
            grid,
            channels=self.configs.transformer.video.in_channels,
            dtype=self.dtype,
            latents=None if latents is None else latents.video,
        )
        for condition, image in images:
            if condition.frame == 0:
                video = replace_frame(video, image, grid=grid, strength=condition.strength)
            else:
                video = append_keyframe(video, image, grid=grid, frame=condition.frame, strength=condition.strength)
        audio = audio_state(
            audio_latent_length(grid.num_frames, grid.fps, self.configs.audio_vae),
            self.configs.audio_vae,
            dtype=self.dtype,
            latents=None if latents is None else latents.audio,
        )
        return video, audio

    def _latents(self, tokens: Pair, grid: VideoGrid) -> Latents:
        assert tokens.video is not None
        assert tokens.audio is not None
        return Latents(
            video=unpatchify_video(tokens.video[:, : grid.num_tokens], grid),
            audio=unpatchify_audio(tokens.audio, self.configs.audio_vae),
        )


def load_pipeline(
    checkpoint: str | Path,
    *,
    dtype: Any = None,
    loras: Sequence[tuple[str | Path, float]] = (),
    offload: Offload = "auto",
    keep_prompts: bool = True,
    progress: Progress | None = None,
) -> Pipeline:
    """Opens a folder made by `python -m convert`. Models are read when first needed.

    `dtype` is that of activations: float32 (the reference's numbers; the default on a CPU) or bfloat16 (the default
    elsewhere). `loras` are files with their strengths, put beside the transformer's packed weights.
    `offload` streams the layers of large models from host memory: where a plan says so ("auto"), always ("blocks") or
    never ("none"). `keep_prompts` keeps contexts of prompts on disk.
    Raises CheckpointError for a missing or foreign folder.
    """
    pairs = [(Path(path), float(strength)) for path, strength in loras]
    return Pipeline(
        Path(checkpoint), dtype=dtype, loras=pairs, offload=offload, keep_prompts=keep_prompts, progress=progress
    )


def save_mp4(path: str | Path, clip: Clip) -> None:
    """Writes a clip as H.264 with AAC sound. Raises MediaError where it cannot be written."""
    path = Path(path)
    check_writable(path)
    write_mp4(path, clip.frames, fps=clip.fps, waveform=clip.waveform, sample_rate_hz=clip.sample_rate_hz)
