"""A checkpoint's models and what each does, alone: encode, denoise, upscale, decode; arrays in, arrays out.

`pipeline` puts them together.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from ltx_jax.checkpoint import LAYERED, TOKENIZER, CheckpointError, Manifest
from ltx_jax.conditioning import LatentState
from ltx_jax.conditions import Frames, ImageCondition, Waveform
from ltx_jax.denoise import Denoiser, Memory, Pair, Prompt
from ltx_jax.enhance import MAX_NEW_TOKENS, enhance_prompt
from ltx_jax.geometry import AudioLatents, VideoGrid, VideoLatents
from ltx_jax.guidance import Guidance, Guider, guide
from ltx_jax.latents import Latents
from ltx_jax.load import load_configs
from ltx_jax.lora import Lora
from ltx_jax.mel import mel_spectrogram
from ltx_jax.pictures import fit_video, recompress, to_uint8
from ltx_jax.plan import Offload, PlanError
from ltx_jax.progress import Progress, Silent
from ltx_jax.prompt_cache import keep_prompt, prompt_key, read_prompt
from ltx_jax.residency import Residency, Way
from ltx_jax.sampling import Sigmas, euler, num_calls
from ltx_jax.settings import STAGE_2_UPSCALER
from ltx_jax.sound import fit_audio
from ltx_jax.stages import decode_mel, decode_pixels, encode_mel, encode_pixels, upscale, vocode
from ltx_jax.text import load_tokenizer, text_contexts, text_hidden_states, tokenize
from ltx_jax.tiling import TileSize, decode_tiled


class Engine:
    """The models of one checkpoint, loaded when first needed, and what each does.

    On a device with room for all of them they stay; else each stage frees those of the stage before. `plan` decides.
    """

    def __init__(
        self,
        folder: Path,
        *,
        dtype: Any = None,
        loras: Sequence[Lora] = (),
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
        self.residency = Residency(folder, self.manifest, dtype=self.dtype, loras=loras, loading=self._loading)
        if offload == "blocks":  # also where no plan is made
            self.residency.way = Way(offload=LAYERED)

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

    def enhance(self, prompt: str, *, seed: int, with_image: bool = False) -> str:
        """A full prompt from a short one, written by the text encoder. Raises what `enhance_prompt` raises."""

        def work() -> str:
            self.residency.turn("gemma")
            gemma = self.model("gemma")
            stage = self.progress.stage("enhance prompt", MAX_NEW_TOKENS)
            with stage as advance, jax.default_matmul_precision(self.precision):
                return enhance_prompt(
                    gemma, self.tokenizer, prompt, seed=seed, dtype=self.dtype, with_image=with_image, advance=advance
                )

        return self._retrying(work)

    def encode_image(self, condition: ImageCondition, *, height: int, width: int) -> VideoLatents:
        """The latents of one image at a size in pixels, after the H.264 round trip."""
        image = condition.image if condition.crf is None else recompress(condition.image, crf=condition.crf)
        return self.encode_video(image[None], height=height, width=width)

    def encode_video(self, frames: Frames, *, height: int, width: int) -> VideoLatents:
        """The latents of 8k + 1 frames at a size in pixels: scaled to cover it and cut to its centre."""
        scale = self.configs.video_vae.scale
        grid = VideoGrid(num_frames=len(frames), height=height, width=width, fps=1.0, scale=scale)
        grid.check()
        return self.encode_frames(frames, grid)

    def encode_frames(self, frames: Frames, grid: VideoGrid) -> VideoLatents:
        """`encode_video` at the size of a grid."""
        pixels = fit_video(frames, height=grid.height, width=grid.width)

        def work() -> VideoLatents:
            self.residency.turn("video_vae")
            with jax.default_matmul_precision(self.precision):
                return jax.block_until_ready(encode_pixels(self.model("video_vae"), pixels.astype(self.dtype)))

        return self._retrying(work)

    def encode_audio(
        self, waveform: Waveform, sample_rate_hz: int, *, num_latents: int | None = None, seconds: float | None = None
    ) -> AudioLatents:
        """The latents of a sound: of `seconds` of it, `num_latents` long; silence where there is no more of it."""
        config = self.configs.audio_vae
        wave = fit_audio(
            waveform, sample_rate_hz, to_hz=config.sample_rate_hz, channels=config.audio_channels, seconds=seconds
        )
        if num_latents is not None:
            # The mel frames that so many latents hold: the first of them holds one frame.
            least = ((num_latents - 1) * config.scale) * config.hop_length
            wave = np.pad(wave, ((0, max(least - len(wave), 0)), (0, 0)))

        def work() -> AudioLatents:
            self.residency.turn("audio_vae")
            with jax.default_matmul_precision(self.precision):
                mel = mel_spectrogram(jnp.asarray(wave)[None], config).astype(self.dtype)
                return jax.block_until_ready(encode_mel(self.model("audio_vae"), mel))

        return self._retrying(work)[:, :num_latents]

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
        guider: Guider = guide,
        sampler: Callable[..., Pair] = euler,
        callback: Callable[[int, float, Pair, Pair], None] | None = None,
        memory: Memory | None = None,
        stage_number: int = 1,
        stage: str = "denoise",
    ) -> Pair:
        """Denoises tokens from noise down the sigmas; returns all tokens, appended conditioning included.

        `sampler` is one of `sampling`, or any function like them, `guider` one like `guidance.guide`. `stage_number`
        chooses the strengths of LoRAs that have one for each stage; `stage` is what progress calls it. What `memory`
        recalls of an earlier run is not computed again.
        """
        self.residency.stage_number = stage_number
        return self._retrying(
            lambda: self._denoise(
                states, noise, prompt, sigmas, noise_scale, negative, guidance, guider, sampler, callback, memory, stage
            )
        )

    def _denoise(
        self, states, noise, prompt, sigmas, noise_scale, negative, guidance, guider, sampler, callback, memory, stage
    ) -> Pair:
        tokens = Pair(
            *(
                None if state is None or n is None else state.noised(n.astype(self.dtype), noise_scale)
                for state, n in zip(states, noise, strict=True)
            )
        )
        self.residency.turn("transformer")
        transformer = self.model("transformer")
        with self.progress.stage(stage, num_calls(sampler, sigmas)) as advance:

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
                guider=guider,
                precision=self.precision,
                callback=after_call,
                memory=memory,
            )
            return sampler(predict, tokens, sigmas)

    def upscale(
        self, latents: VideoLatents, component: str = STAGE_2_UPSCALER, *, then_denoise: bool = False
    ) -> Float[Array, "batch new_frames new_height new_width channels"]:
        """Video latents, larger or longer, by one of the checkpoint's latent upscalers.

        The transformer stays where it is if it is needed again and the plan has room for both.
        """

        def work() -> Array:
            kept = ("transformer",) if then_denoise and self.residency.way.keep_transformer else ()
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

    def frames(self, latents: Latents) -> Frames:
        """All frames of a clip; none where only sound was made."""
        _, count, height, width, _ = latents.video.shape
        if not count:
            _, rows, columns = self.configs.video_vae.scale
            return np.zeros((0, height * rows, width * columns, 3), np.uint8)
        return np.concatenate(list(self.decode_video(latents.video)))

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
