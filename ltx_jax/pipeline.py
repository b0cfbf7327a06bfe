"""Prompt to clip: encode, denoise, decode; one stage or two. Each stage can also be called alone.

    pipe = load_pipeline("ltx-2.3-orbax")
    clip = pipe(prompt="a heron lands on still water", num_frames=121, seed=7)

Source: the pipelines `ti2vid_one_stage`, `ti2vid_two_stages` and `distilled` in Lightricks/LTX-2, ltx_pipelines.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, UInt8
from safetensors import SafetensorError, safe_open

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
from ltx_jax.load import load_component, load_configs
from ltx_jax.lora import add_loras
from ltx_jax.media import check_writable, fit_image, read_image, recompress, to_uint8, write_mp4
from ltx_jax.models.upscaler import upscale
from ltx_jax.sampling import Sigmas, euler
from ltx_jax.settings import Settings
from ltx_jax.text import load_tokenizer, text_contexts, text_hidden_states, tokenize
from ltx_jax.tiling import TileSize, decode_tiled

STAGE_2_UPSCALER = "upscaler_spatial_x2"
Image = UInt8[np.ndarray, "rows columns 3"]  # RGB levels


@runtime_checkable
class Progress(Protocol):
    """Told what goes on: each stage opens once, with its number of steps, and advances."""

    def stage(self, name: str, total: int) -> AbstractContextManager[Callable[[], None]]: ...


class Silent:
    """No progress shown."""

    def stage(self, name: str, total: int) -> AbstractContextManager[Callable[[], None]]:
        return nullcontext(lambda: None)


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
    """The models of one checkpoint. Models are loaded when first needed and stay until `free`."""

    def __init__(
        self,
        folder: Path,
        *,
        dtype: Any = None,
        loras: Sequence[tuple[Path, float]] = (),
        progress: Progress | None = None,
    ):
        """See `load_pipeline`."""
        self.folder = folder
        self.manifest = Manifest.read(folder)
        self.configs = load_configs(self.manifest)
        on_cpu = jax.default_backend() == "cpu"  # where bfloat16 matmuls are slower than float32
        self.dtype = jnp.dtype(dtype or (jnp.float32 if on_cpu else jnp.bfloat16))
        self.loras = tuple(loras)
        self.progress = progress or Silent()
        self.models: dict[str, nnx.Module] = {}

    # ------------------------------------------------------------------ models

    def model(self, component: str) -> Any:
        """A model of the checkpoint, loaded on first use."""
        if component not in self.models:
            with self.progress.stage(f"load {component.replace('_', ' ')}", 1) as advance:
                # Plain weights follow the compute dtype, as in the reference; the vocoder is always float32 inside.
                cast = self.dtype if self.dtype != jnp.float32 and component != "vocoder" else None
                model = load_component(self.folder, self.manifest, component, dtype=cast)
                if component == "transformer" and self.loras:
                    add_loras(model, self.loras, self._linears_below("model.diffusion_model.", component))
                self.models[component] = model
                advance()
        return self.models[component]

    def _linears_below(self, prefix: str, component: str) -> dict[str, str]:
        """Published names below a prefix -> paths in a component."""
        return {
            name.removeprefix(prefix): path.removeprefix(f"{component}/")
            for name, path in self.manifest.linear_names.items()
            if name.startswith(prefix) and path.startswith(f"{component}/")
        }

    def free(self, *components: str) -> None:
        """Drops models (all, if none is named) so that their memory can be used by others."""
        for component in components or tuple(self.models):
            self.models.pop(component, None)

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
        token_ids, mask = tokenize(self.tokenizer, [text])
        gemma, connectors = self.model("gemma"), self.model("connectors")
        with self.progress.stage("encode prompt", 2) as advance, jax.default_matmul_precision(self.precision):
            hidden_states = text_hidden_states(gemma, token_ids, mask, dtype=self.dtype)
            advance()
            contexts = text_contexts(connectors, hidden_states, mask)
            advance()
        return Prompt(video=contexts.video, audio=contexts.audio)

    def encode_image(self, condition: ImageCondition, *, height: int, width: int) -> VideoLatents:
        """The latents of one image at a size in pixels, after the H.264 round trip."""
        image = condition.image
        if condition.crf is not None:
            image = recompress(image, crf=condition.crf)
        pixels = fit_image(image, height=height, width=width).astype(self.dtype)
        with jax.default_matmul_precision(self.precision):
            return _encode_video(self.model("video_vae"), pixels)

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
        tokens = Pair(
            *(
                None if state is None or n is None else state.noised(n.astype(self.dtype), noise_scale)
                for state, n in zip(states, noise, strict=True)
            )
        )
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
        with jax.default_matmul_precision(self.precision):
            return _upscale(self.model(component), self.model("video_vae").statistics, latents)

    def decode_video(
        self, latents: VideoLatents, *, tile: TileSize | None = None
    ) -> Iterator[UInt8[np.ndarray, "frames height width 3"]]:
        """Yields the frames of a clip in order, in chunks, as they are decoded."""
        vae = self.model("video_vae")
        scale = self.configs.video_vae.scale
        total = (latents.shape[1] - 1) * scale[0] + 1

        def decode(latents: Array) -> Array:
            with jax.default_matmul_precision(self.precision):
                return _decode_video(vae, latents)

        with self.progress.stage("decode video", total) as advance:
            for chunk in decode_tiled(decode, latents, scale=scale, tile=tile or TileSize()):
                for _ in range(chunk.shape[1]):
                    advance()
                yield to_uint8(chunk[0])

    def decode_audio(self, latents: AudioLatents) -> Float[np.ndarray, "samples 2"]:
        """The waveform of a clip, at `sample_rate_hz` of the vocoder."""
        vae, vocoder = self.model("audio_vae"), self.model("vocoder")
        with self.progress.stage("decode audio", 2) as advance:
            with jax.default_matmul_precision(self.precision):
                mel = _decode_mel(vae, latents)
            advance()
            with jax.default_matmul_precision("highest"):  # the vocoder is not stable in less
                waveform = np.asarray(_vocode(vocoder, mel))[0]
            advance()
        return waveform

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
        source = _Noise(settings.seed, noise, self.dtype)
        positive = prompt or self.encode_prompt(settings.prompt)
        if negative is None and self.needs_negative(settings):
            negative = self.encode_prompt(settings.negative_prompt)

        two_stages = settings.num_stages == 2
        states = self._states(first, images)
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
        states = self._states(grid, images, Latents(video=self.upscale(latents.video), audio=latents.audio))
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

    def _states(
        self, grid: VideoGrid, images: Sequence[ImageCondition], latents: Latents | None = None
    ) -> tuple[LatentState, LatentState]:
        """What both modalities start from, with the images placed."""
        video = video_state(
            grid,
            channels=self.configs.transformer.video.in_channels,
            dtype=self.dtype,
            latents=None if latents is None else latents.video,
        )
        for condition in images:
            image = self.encode_image(condition, height=grid.height, width=grid.width)
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


def read_noise(path: Path) -> dict[str, Array]:
    """The arrays of a noise file. Raises ValueError if it cannot be read."""
    try:
        with safe_open(path, "flax") as file:
            return {key: file.get_tensor(key) for key in file.keys() if key.startswith("in.")}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ValueError(f"the noise file {path} cannot be read as safetensors: {error}") from error


class _Noise:
    """The noise of each stage: from a seed, video first and then audio, or given."""

    def __init__(self, seed: int, given: Mapping[str, Any] | None, dtype: Any):
        self.key = jax.random.key(seed)
        self.given = given
        self.dtype = dtype

    def draw(self, states: tuple[LatentState, LatentState], prefix: str) -> Pair:
        self.key, *keys = jax.random.split(self.key, 3)
        return Pair(
            *(
                self._given(f"in.{prefix}{name}_noise", state, key)
                if self.given is not None
                else jax.random.normal(key, state.initial.shape, jnp.float32).astype(self.dtype)
                for name, state, key in zip(("video", "audio"), states, keys, strict=True)
            )
        )

    def _given(self, name: str, state: LatentState, key: Array) -> Array:
        assert self.given is not None
        if name not in self.given:
            raise ValueError(f"the noise has no {name}; it has {', '.join(sorted(self.given)) or 'nothing'}")
        noise = jnp.asarray(self.given[name])
        expected = state.initial.shape
        if noise.ndim != 3 or noise.shape[0] != 1 or noise.shape[2] != expected[2] or noise.shape[1] > expected[1]:
            raise ValueError(f"{name} has shape {list(noise.shape)}; these settings need {list(expected)}")
        appended = expected[1] - noise.shape[1]
        if appended and appended != _appended(state):
            raise ValueError(f"{name} has shape {list(noise.shape)}; these settings need {list(expected)}")
        # Noise for appended images may be left out: whatever of it remains is drawn from the seed.
        extra = jax.random.normal(key, (1, appended, expected[2]), jnp.float32)
        return jnp.concatenate([noise.astype(jnp.float32), extra], axis=1).astype(self.dtype)


def _appended(state: LatentState) -> int:
    return state.initial.shape[1] - state.num_generated


@jax.jit
def _encode_video(vae, pixels):
    return vae.encode(pixels)


@jax.jit
def _decode_video(vae, latents):
    return vae.decode(latents)


@jax.jit
def _decode_mel(vae, latents):
    return vae.decode(latents)


@jax.jit
def _vocode(vocoder, mel):
    return vocoder(mel.astype(jnp.float32))


@jax.jit
def _upscale(upscaler, statistics, latents):
    return upscale(upscaler, statistics, latents)


def load_pipeline(
    checkpoint: str | Path,
    *,
    dtype: Any = None,
    loras: Sequence[tuple[str | Path, float]] = (),
    progress: Progress | None = None,
) -> Pipeline:
    """Opens a folder made by `python -m convert`. Models are read when first needed.

    `dtype` is that of activations: float32 (the reference's numbers; the default on a CPU) or bfloat16 (the default
    elsewhere). `loras` are files with their strengths, put beside the transformer's packed weights.
    Raises CheckpointError for a missing or foreign folder.
    """
    pairs = [(Path(path), float(strength)) for path, strength in loras]
    return Pipeline(Path(checkpoint), dtype=dtype, loras=pairs, progress=progress)


def save_mp4(path: str | Path, clip: Clip) -> None:
    """Writes a clip as H.264 with AAC sound. Raises MediaError where it cannot be written."""
    path = Path(path)
    check_writable(path)
    write_mp4(path, clip.frames, fps=clip.fps, waveform=clip.waveform, sample_rate_hz=clip.sample_rate_hz)
