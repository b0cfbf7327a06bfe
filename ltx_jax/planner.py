"""Every stage of a clip compiled at its real shapes: the work behind `plan.make_plan`.

The stages are the pipeline's own jitted functions, with shapes in place of arrays.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ltx_jax.cards import Card
from ltx_jax.checkpoint import Manifest
from ltx_jax.clip import sound_length, start
from ltx_jax.conditions import Condition, Frames, Scene, States, continuation
from ltx_jax.denoise import Denoiser, Pair, Prompt, enter, estimate, leave
from ltx_jax.geometry import VideoGrid, VideoLatents
from ltx_jax.load import abstract_component, load_configs
from ltx_jax.memory import Memory, measure, nbytes
from ltx_jax.models.attention import AttentionForm
from ltx_jax.models.connector import Connector
from ltx_jax.models.gemma import Gemma
from ltx_jax.models.transformer import Transformer
from ltx_jax.modes import blank_media, conditions_of, given_size, size_of
from ltx_jax.offload import Layout, Streamed, run_layer
from ltx_jax.plan import TILES, Offload, Plan, Stage
from ltx_jax.residency import adapt_component
from ltx_jax.settings import STAGE_2_UPSCALER, Settings, StageSettings
from ltx_jax.stack import Entered, layer_lists
from ltx_jax.stages import decode_mel, decode_pixels, encode_pixels, upscale, vocode
from ltx_jax.text import connect, enter_connector, enter_gemma, leave_connector, leave_gemma, project, read_text
from ltx_jax.tiling import TileSize, tiles
from ltx_jax.windows import windows_of


class Planner:
    """One plan being made."""

    def __init__(
        self,
        manifest: Manifest,
        settings: Settings,
        *,
        target: Card | jax.Device,
        dtype: Any,
        offload: Offload,
        attention: AttentionForm,
        limit_bytes: int,
        loras: Sequence[Path],
        told: Callable[[str], None],
    ):
        """See `make_plan`."""
        self.manifest = manifest
        self.settings = settings
        self.target = target
        self.dtype = dtype
        self.offload = offload
        self.attention: AttentionForm = attention
        self.limit_bytes = limit_bytes
        self.loras = loras
        self.told = told
        self.configs = load_configs(manifest)
        self.grid = size_of(settings, self.configs.video_vae.scale)
        self.denoising = settings.stages(self.configs.transformer.num_layers, self.grid)
        self.encoded: list[VideoGrid] = []  # sizes of what is given and encoded
        self.precision = "highest" if dtype == jnp.float32 else "default"
        self.streamed: list[str] = []
        self.abstract: dict[str, Any] = {}

    # ------------------------------------------------------------------- models

    def model(self, component: str) -> Any:
        """A model with shapes in place of arrays, as the pipeline will load it."""
        if component not in self.abstract:
            self.told(f"shapes of {component}")
            cast = self.dtype if self.dtype != jnp.float32 and component != "vocoder" else None
            model = abstract_component(self.manifest, component, dtype=cast)
            adapt_component(
                model, component, self.manifest, attention=self.attention, loras=[(path, 1.0) for path in self.loras]
            )
            self.abstract[component] = model
        return self.abstract[component]

    # -------------------------------------------------------------------- plan

    def plan(self) -> Plan:
        stages = [] if self.settings.decodes_only else [*self.text_stages()]
        denoising = list(self.denoise_stages())
        stages += [*self.encoding_stages(), *denoising, *self.audio_stages()]
        tile = TILES[0]
        if not self.settings.sound_only:
            most = max((stage.peak_bytes for stage in denoising), default=self.limit_bytes)
            decoding, tile = self.video_stage(self.settings.finished(self.grid), min(self.limit_bytes, most))
            stages.append(decoding)
        weights = {name: nbytes(model) for name, model in self.abstract.items()}
        together = sum(weights.values()) + max(stage.added_bytes for stage in stages)
        s = self.settings
        return Plan(
            target=self.target.title if isinstance(self.target, Card) else self.target.device_kind,
            limit_bytes=self.limit_bytes,
            pipeline=s.pipeline,
            width=self.grid.width,
            height=self.grid.height,
            num_frames=self.grid.num_frames,
            fps=self.grid.fps,
            dtype=self.dtype.name,
            stages=tuple(stages),
            offload=tuple(dict.fromkeys(self.streamed)),
            attention=self.attention,
            tile=tile,
            keep_models=not self.streamed and together <= self.limit_bytes,
            checkpoint_bytes=sum(weights.values()),
        )

    def stage(
        self, name: str, models: Sequence[str], *programs: Memory, held_bytes: int = 0, host_bytes: int = 0
    ) -> Stage:
        """A stage of programs that run one after the other with all their models resident.

        A compiler drops arguments that a program does not read, such as the encoder for a decoder; they lie on the
        device all the same.
        """
        largest = max(programs, key=lambda program: program.peak_bytes)
        weights = sum(nbytes(self.model(name)) for name in models)
        return Stage(
            name=name,
            models=tuple(models),
            streamed=False,
            argument_bytes=max(weights, largest.argument_bytes),
            added_bytes=max(program.added_bytes for program in programs),
            held_bytes=held_bytes,
            host_bytes=host_bytes,
            compile_seconds=sum(program.compile_seconds for program in programs),
        )

    def measure(self, function: Any, *args: Any, **static: Any) -> Memory:
        with jax.default_matmul_precision(self.precision):
            return measure(self.target, function, *args, **static)

    def bound(self, arguments: Any) -> Any:
        """Arguments as streaming gives them: bound to the device at hand, which is part of a compiled program's key."""
        if isinstance(self.target, Card):
            return arguments
        sharding = jax.sharding.SingleDeviceSharding(self.target)
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding) if hasattr(x, "dtype") else x, arguments
        )

    def resident_or_streamed(
        self, component: str, resident: Callable[[], Stage], streamed: Callable[[], Stage]
    ) -> Stage:
        """The stage with its layers resident if that fits, or as asked."""
        if self.offload == "blocks":
            self.streamed.append(component)
        elif component not in self.streamed:
            # Weights alone may be too large: that takes no compiler to see.
            too_large = nbytes(self.model(component)) > self.limit_bytes
            if self.offload == "none" or not too_large:
                stage = resident()
                if self.offload == "none" or stage.peak_bytes <= self.limit_bytes:
                    return stage
            self.streamed.append(component)
        return streamed()

    # -------------------------------------------------------------------- text

    def text_stages(self) -> Iterator[Stage]:
        if self.configs.gemma is None:
            return
        length = self.manifest.text_length or 1
        prompts = 2 if self.needs_negative() else 1
        token_ids = jax.ShapeDtypeStruct((1, length), jnp.int32)
        mask = jax.ShapeDtypeStruct((1, length), jnp.bool_)
        hidden = jax.eval_shape(lambda g, t, m: g(t, m, dtype=self.dtype), self.model("gemma"), token_ids, mask)
        waiting = (prompts - 1) * nbytes(hidden)

        def resident() -> Stage:
            program = self.measure(read_text, self.model("gemma"), token_ids, mask, dtype=self.dtype)
            return self.stage("text encoder", ("gemma",), program, held_bytes=waiting)

        def streamed() -> Stage:
            return self.streamed_stage(
                "text encoder",
                "gemma",
                [("layers", Gemma.step, enter_gemma, (token_ids, mask), {"dtype": self.dtype}, leave_gemma, (), {})],
                held_bytes=waiting,
            )

        self.told("text encoder")
        yield self.resident_or_streamed("gemma", resident, streamed)

        def connectors() -> Stage:
            program = self.measure(connect, self.model("connectors"), hidden, mask)
            return self.stage("connectors", ("connectors",), program, held_bytes=waiting)

        def streamed_connectors() -> Stage:
            model = self.model("connectors")
            features = jax.eval_shape(project, model.projection, hidden, mask)
            projection = self.measure(project, model.projection, hidden, mask)
            runs = [
                (f"{name}.blocks", Connector.step, enter_connector, (x, mask), {}, leave_connector, (), {})
                for name, x in (("video", features.video), ("audio", features.audio))
            ]
            return self.streamed_stage(
                "connectors", "connectors", runs, held_bytes=waiting + nbytes(hidden), before=projection
            )

        self.told("connectors")
        yield self.resident_or_streamed("connectors", connectors, streamed_connectors)

    def needs_negative(self) -> bool:
        guidance = self.settings.guidance(self.configs.transformer.num_layers)
        return guidance is not None and any(g.cfg_scale != 1 for g in guidance)

    # ---------------------------------------------------------------- denoising

    def states(self, stage: StageSettings) -> States:
        """What both modalities start from, with all that is given; its sizes are noted in `encoded`."""
        grid, channels = stage.grid(self.grid), self.configs.transformer.video.in_channels
        audio = self.configs.audio_vae
        heard = (1, sound_length(self.configs, grid), audio.latent_bins, audio.latent_channels)

        def encode_frames(frames: Frames, size: VideoGrid) -> VideoLatents:
            size = replace(size, num_frames=len(frames))
            self.encoded.append(size)
            return jnp.zeros((1, size.latent_frames, size.latent_height, size.latent_width, channels), self.dtype)

        scene = Scene(
            grid=grid, encode_frames=encode_frames, encode_audio=lambda waveform, rate: jnp.zeros(heard, self.dtype)
        )
        states = start(self.configs, grid, None, dtype=self.dtype, sound_only=self.settings.sound_only)
        media = blank_media(self.settings, self.grid, tuple(self.loras))
        for condition in [*self.continued(), *conditions_of(self.settings, media)]:
            states = condition(scene)(states)
        return states

    def continued(self) -> list[Condition]:
        """What a window of a clip that is extended sees of what is there."""
        if self.settings.extend is None:
            return []
        clip = given_size(self.settings, self.grid.scale)
        size = self.settings.grid(self.grid.scale, clip)
        windows = windows_of(self.settings, size, size.num_frames if clip is None else clip.num_frames)
        frames = np.broadcast_to(np.zeros(3, np.uint8), (windows.num_context, 1, 1, 3))
        return [continuation(frames, None, 1, backwards=windows.backwards)]

    def prompt(self) -> Prompt:
        length = self.manifest.text_length or 1
        dims = self.configs.connectors.video.dim, self.configs.connectors.audio.dim
        return Prompt(
            **{n: jnp.zeros((1, length, d), self.dtype) for n, d in zip(("video", "audio"), dims, strict=True)}
        )

    def denoise_stages(self) -> Iterator[Stage]:
        """The stages of denoising with the upscaler between them, and the upscalers behind."""
        half = replace(self.grid, height=self.grid.height // 2, width=self.grid.width // 2)
        for stage in self.denoising:
            name = "denoise" if self.settings.num_stages == 1 else f"denoise, stage {stage.number}"
            self.told(name)
            if stage.number == 2:
                yield self.upscale_stage("upscale", STAGE_2_UPSCALER, half, then_denoise=not self.settings.refine)
            yield self.denoise_stage(name, stage)
        if self.settings.decodes_only and self.settings.video is not None:
            self.encoded.append(self.grid)
        elif self.settings.refine and self.settings.video is not None:
            self.encoded.append(half)
        grid = self.grid
        for number, upscaler in enumerate(self.settings.upscalers):
            self.told(upscaler)
            yield self.upscale_stage(upscaler.replace("_", " "), upscaler, grid)
            first = replace(self.settings, upscale_time=False)
            grid = (first if number == 0 and self.settings.upscale else self.settings).finished(self.grid)

    def denoise_stage(self, name: str, stage: StageSettings) -> Stage:
        states, prompt, guidance = self.states(stage), self.prompt(), stage.guidance
        model = self.model("transformer")
        negative = prompt if guidance is not None else None
        tokens = Pair(*(None if state is None else state.initial for state in states))

        def denoiser(transformer: Any) -> Denoiser:
            return Denoiser(transformer, states, prompt, negative=negative, guidance=guidance, precision=self.precision)

        def resident() -> Stage:
            predict = denoiser(model)
            return self.stage(
                name, ("transformer",), self.measure(estimate, *predict.arguments(1.0, tokens), **predict.options)
            )

        def streamed() -> Stage:
            rest, layouts = split_layers(model)
            layers: Any = layouts  # all that a denoiser asks of them is how many there are
            predict = denoiser(Streamed(rest, layers))
            _, states, tokens_, contexts, sigma, scales, keep = predict.arguments(1.0, tokens)
            run = (
                "blocks",
                Transformer.step,
                enter,
                (states, tokens_, contexts, sigma, keep),
                {"precision": predict.precision},
                leave,
                (states, tokens_, sigma, scales),
                predict.options,
            )
            return self.streamed_stage(name, "transformer", [run], held_bytes=nbytes((states, contexts)))

        return self.resident_or_streamed("transformer", resident, streamed)

    def streamed_stage(
        self,
        name: str,
        component: str,
        runs: Sequence[tuple],
        *,
        held_bytes: int,
        before: Memory | None = None,
    ) -> Stage:
        """A stage whose layers are streamed: its way in, one layer with the next on its way, and its way out.

        Each run is a list of layers with its step, `enter`, `leave` and what these take. `before` is a program that
        runs first.
        """
        model = self.model(component)
        rest, layouts = split_layers(model)
        weights = nbytes(rest)
        seconds = 0.0 if before is None else before.compile_seconds
        peaks = [0 if before is None else before.added_bytes]
        for path, step, enter_, inputs, static, leave_, more, leave_static in runs:
            owner = rest
            for word in path.split(".")[:-1]:
                owner = getattr(owner, word)
            entered: Entered = jax.eval_shape(lambda r, *a, f=enter_, s=static: f(r, *a, **s), owner, *inputs)
            alive = nbytes((entered.shared, entered.per_layer, entered.rest, entered.carry))
            program = self.measure(enter_, owner, *inputs, **static)
            peaks.append(program.added_bytes)
            seconds += program.compile_seconds
            count = len(layouts[path])
            outs = 0
            out = None
            for layout in dict.fromkeys(layouts[path]):
                words = jax.ShapeDtypeStruct((layout.num_words,), jnp.uint32)
                arguments = words, entered.carry, entered.shared, entered.per_layer, 0
                options = {"layout": layout, "step": step}
                _, out = jax.eval_shape(lambda *a, o=options: run_layer(*a, **o), *arguments)
                program = self.measure(run_layer, *self.bound(arguments), **options)
                outs = nbytes(out) * count
                peaks.append(alive + 2 * nbytes(words) + program.added_bytes + outs)
                seconds += program.compile_seconds
            stacked = jax.tree.map(lambda x, n=count: jax.ShapeDtypeStruct((n, *x.shape), x.dtype), out)
            peaks.append(alive + 2 * outs)
            program = self.measure(leave_, owner, entered.carry, stacked, entered.rest, *more, **leave_static)
            peaks.append(alive + outs + program.added_bytes)
            seconds += program.compile_seconds
        return Stage(
            name=name,
            models=(component,),
            streamed=True,
            argument_bytes=weights,
            added_bytes=max(peaks),
            held_bytes=held_bytes,
            host_bytes=sum(4 * layout.num_words for layers in layouts.values() for layout in layers),
            compile_seconds=seconds,
        )

    def upscale_stage(self, name: str, upscaler: str, grid: VideoGrid, *, then_denoise: bool = False) -> Stage:
        """Between two denoising stages a resident transformer stays, as it is needed again."""
        latents = self.latents(grid)
        statistics = self.model("video_vae").statistics
        program = self.measure(upscale, self.model(upscaler), statistics, latents)
        stays = then_denoise and "transformer" not in self.streamed
        held = nbytes(self.model("transformer")) if stays else 0
        stage = self.stage(name, (upscaler, "video_vae"), program, held_bytes=held)
        return stage if stage.peak_bytes <= self.limit_bytes else replace(stage, held_bytes=0)

    # ----------------------------------------------------------------- decoding

    def latents(self, grid: VideoGrid) -> jax.ShapeDtypeStruct:
        channels = self.configs.transformer.video.out_channels
        shape = (1, grid.latent_frames, grid.latent_height, grid.latent_width, channels)
        return jax.ShapeDtypeStruct(shape, self.dtype)

    def encoding_stages(self) -> Iterator[Stage]:
        """Of what is given, as the states of the denoising stages noted it."""
        sizes = dict.fromkeys((size.num_frames, size.height, size.width) for size in self.encoded)
        if sizes:
            self.told("encode images and video")
            programs = [
                self.measure(encode_pixels, self.model("video_vae"), jax.ShapeDtypeStruct((1, *size, 3), self.dtype))
                for size in sizes
            ]
            yield self.stage("encode video" if max(sizes)[0] > 1 else "encode image", ("video_vae",), *programs)

    def audio_stages(self) -> Iterator[Stage]:
        self.told("decode audio")
        config = self.configs.audio_vae
        shape = (1, sound_length(self.configs, self.grid), config.latent_bins, config.latent_channels)
        latents = jax.ShapeDtypeStruct(shape, self.dtype)
        vae, vocoder = self.model("audio_vae"), self.model("vocoder")
        mel = jax.eval_shape(decode_mel, vae, latents)
        first = self.measure(decode_mel, vae, latents)
        with jax.default_matmul_precision("highest"):
            second = measure(self.target, vocode, vocoder, mel)
        yield self.stage("decode audio", ("audio_vae", "vocoder"), first, second)

    def video_stage(self, grid: VideoGrid, ceiling: int) -> tuple[Stage, TileSize]:
        """Decoding with the largest tiles that need no more than denoising does, or else the smallest."""
        latents = self.latents(grid)
        vae = self.model("video_vae")
        scale = self.configs.video_vae.scale
        done: dict[tuple[int, ...], Stage] = {}
        stage, tile = None, TILES[-1]
        for tile in TILES:
            plan = tiles(latents.shape[1:4], scale=scale, tile=tile)
            size = tuple(
                max(span.latents.stop - span.latents.start for span in spans)
                for spans in (plan.time, plan.rows, plan.columns)
            )
            if size not in done:
                self.told(f"decode video, tiles of {tile.side} pixels and {tile.num_frames} frames")
                part = jax.ShapeDtypeStruct((1, *size, latents.shape[-1]), self.dtype)
                # Frames are blended in float32: those of one tile's time, of the tile before and of this tile.
                frames = max(span.pixels.stop - span.pixels.start for span in plan.time)
                pixels = frames * (2 * grid.height * grid.width + 2 * prod(size[1:]) * prod(scale[1:])) * 3
                program = self.measure(decode_pixels, vae, part)
                done[size] = self.stage(
                    "decode video", ("video_vae",), program, held_bytes=nbytes(latents), host_bytes=4 * pixels
                )
            stage = done[size]
            if stage.peak_bytes <= ceiling:
                break
        assert stage is not None
        return stage, tile


def split_layers(model: nnx.Module) -> tuple[nnx.Module, dict[str, list[Layout]]]:
    """An abstract layered model without its layers, and how each of these lies in its buffer when streamed."""
    rest = nnx.merge(*nnx.split(model))  # the lists of the original stay as they are
    layouts: dict[str, list[Layout]] = {}
    for path, (owner, attribute) in layer_lists(rest).items():
        layouts[path] = []
        for stack in getattr(owner, attribute):
            graphdef, state = nnx.split(stack.layer)
            single = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), state)
            layouts[path] += [Layout.of(nnx.merge(graphdef, single))] * stack.num_layers
        setattr(owner, attribute, nnx.List([]))
    return rest, layouts
