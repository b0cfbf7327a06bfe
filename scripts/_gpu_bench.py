"""What the parts of `gpu_check.py` share: a model with random weights made on the device, clips, time, and FLOPs."""

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from math import ceil, prod
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hlwq_jax import QuantizedLinear, lloyd_max, set_form
from ltx_jax.checkpoint import published_manifest
from ltx_jax.conditioning import audio_state, video_state
from ltx_jax.config import StreamConfig, TransformerConfig
from ltx_jax.denoise import Denoiser, Pair, Prompt, estimate, streamed_estimate
from ltx_jax.geometry import VideoGrid, audio_latent_length
from ltx_jax.load import abstract_component, load_configs
from ltx_jax.memory import free_bytes, nbytes
from ltx_jax.models.attention import set_attention_form
from ltx_jax.offload import Streamed
from ltx_jax.presets import LTX_2_3

GiB = 2**30
DTYPE = jnp.bfloat16
# Beside the weights: a step at 1280x704 with 121 frames (1.4 GiB as compiled for an RTX 4090), or filling a model. The
# rest is for the compiler's trials of products, which no plan counts.
ROOM = 3 * GiB
EFFICIENCY = 0.4  # of the ceiling, to guess beforehand how long a step will take
FULL_SECONDS = 12.0  # the longest step that is run; slower cards run fewer blocks
SHORT_SECONDS = 2.5  # the longest with which forms are compared


class Skip(Exception):
    """Why a part was not measured."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table; `figures` are the numbers of `result`, for the JSON file."""

    part: str
    what: str = ""
    clip: str = ""
    status: Literal["ok", "skipped", "failed"] = "ok"
    result: str = ""
    figures: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What is measured: the model by its metadata, two clips as width, height and frames, and the ceilings' arrays."""

    metadata: dict[str, Any]
    clips: tuple[tuple[int, int, int], ...]
    keys: int  # of the text
    gemm: int  # rows and columns
    copy_bytes: int
    fused_shapes: tuple[tuple[int, int], ...]


REAL = Sizes(
    metadata=LTX_2_3,
    clips=((768, 512, 121), (1280, 704, 121)),
    keys=1024,
    gemm=8192,
    copy_bytes=2**29,
    fused_shapes=((4096, 4096), (1000, 384), (1, 128)),
)
_TINY = {
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 64,
    "cross_attention_dim": 128,
    "audio_num_attention_heads": 2,
    "audio_attention_head_dim": 32,
    "audio_cross_attention_dim": 64,
}
TINY = Sizes(
    metadata=LTX_2_3 | {"transformer": LTX_2_3["transformer"] | _TINY},
    clips=((64, 64, 9),),
    keys=16,
    gemm=128,
    copy_bytes=2**16,
    fused_shapes=((100, 256),),
)


# ------------------------------------------------------------------------- FLOPs


def attention_flops(queries: int, keys: int, *, dim: int, context_dim: int, num_heads: int, head_dim: int) -> int:
    """Of one `Attention` without its gate: four projections, scores and their product with the values."""
    inner = num_heads * head_dim
    return 2 * inner * (2 * queries * dim + 2 * keys * context_dim) + 4 * queries * keys * inner


def step_flops(config: TransformerConfig, *, video: int, audio: int, keys: int, num_blocks: int) -> int:
    """Multiplications and additions of one pass over so many tokens and keys of text: linears and attention.

    Left out are rotations, norms, rotary positions and the modulation by the noise level, which is of one row.
    """
    block = ends = 0
    cross = {"num_heads": config.audio.num_heads, "head_dim": config.audio.head_dim}
    gates = int(config.gated_attention)

    def gate(tokens: int, stream: StreamConfig, num_heads: int) -> int:
        return gates * 2 * tokens * stream.dim * num_heads

    streams = ((config.video, video, config.audio, audio), (config.audio, audio, config.video, video))
    for stream, tokens, other, other_tokens in streams:
        own = {"dim": stream.dim, "num_heads": stream.num_heads, "head_dim": stream.head_dim}
        block += attention_flops(tokens, tokens, context_dim=stream.dim, **own)
        block += attention_flops(tokens, keys, context_dim=stream.context_dim, **own)
        block += attention_flops(tokens, other_tokens, dim=stream.dim, context_dim=other.dim, **cross)
        block += 2 * gate(tokens, stream, stream.num_heads) + gate(tokens, stream, config.audio.num_heads)
        block += 2 * 2 * tokens * stream.dim * 4 * stream.dim
        ends += 2 * tokens * stream.dim * (stream.in_channels + stream.out_channels)
    return num_blocks * block + ends


# ----------------------------------------------------------------- random weights


class Recipe(NamedTuple):
    """How one variable is drawn: random bits as they are, or bytes shifted and scaled."""

    shape: tuple[int, ...]
    dtype: Any
    offset: float | None  # of a byte, 0 to 255; None: bits
    scale: float = 1.0

    @property
    def num_words(self) -> int:
        return prod(self.shape) if self.offset is None else ceil(prod(self.shape) / 4)


def recipe_of(owner: nnx.Module, name: str, shape: tuple[int, ...], dtype: Any) -> Recipe | np.ndarray:
    """A recipe for weights that keep activations at their size; the centroids are what they are."""
    centred, positive = (-127.5, 1 / 73.9), (128.0, 1 / 255.5)  # standard deviation one; mean one
    if isinstance(owner, QuantizedLinear):
        levels = lloyd_max(owner.bits)
        if name in ("lo", "hi"):
            return Recipe(shape, dtype, None)
        if name == "scaled_centroids":
            return levels / np.float32(owner.block_size**0.5)
        if name == "norms":
            # All codes are equally likely here, and so the levels larger than those of Gaussian weights.
            norm = (owner.block_size / owner.in_features) ** 0.5 / float(levels.std())
            return Recipe(shape, dtype, positive[0], positive[1] * norm)
    if name == "kernel":
        return Recipe(shape, dtype, centred[0], centred[1] * shape[-2] ** -0.5)
    if name == "scale":
        return Recipe(shape, dtype, *positive)
    return Recipe(shape, dtype, centred[0], centred[1] * 0.02)  # biases and tables


@partial(jax.jit, static_argnames="recipes")
def draw(key: jax.Array, recipes: tuple[Recipe, ...]) -> list[jax.Array]:
    """All variables from one stream of random words, which compiles faster than a generator for each."""
    words = jax.random.bits(key, (sum(recipe.num_words for recipe in recipes),), jnp.uint32)
    words = jax.lax.optimization_barrier(words)  # else generated again for each variable
    values, start = [], 0
    for recipe in recipes:
        part = words[start : start + recipe.num_words]
        start += recipe.num_words
        if recipe.offset is not None:
            part = jax.lax.bitcast_convert_type(part, jnp.uint8).reshape(-1)[: prod(recipe.shape)]
            part = (part.astype(jnp.float32) + recipe.offset) * recipe.scale
        values.append(part.astype(recipe.dtype).reshape(recipe.shape))
    return values


def filled(module: nnx.Module, seed: int) -> nnx.Module:
    """A module of shapes with random weights, made on the device."""
    graphdef, state = nnx.split(module)
    owners = dict(nnx.iter_modules(module))
    flat = dict(nnx.to_flat_state(state))
    recipes: dict[Any, Any] = {}
    for path, variable in flat.items():
        shape = variable.get_value()
        recipes[path] = recipe_of(owners[path[:-1]], str(path[-1]), tuple(shape.shape), shape.dtype)
    drawn = {path: recipe for path, recipe in recipes.items() if isinstance(recipe, Recipe)}
    values: dict[Any, Any] = dict(zip(drawn, draw(jax.random.key(seed), tuple(drawn.values())), strict=True))
    for path, variable in flat.items():
        value = values[path] if path in values else jnp.asarray(recipes[path])
        flat[path] = variable.replace(value)
    return nnx.merge(graphdef, nnx.from_flat_state(flat))


def blocks(model: Any, count: int) -> Iterator[Any]:
    """Blocks of the abstract model one by one, filled; the same ones whoever asks."""
    (stack,) = model.blocks
    graphdef, state = nnx.split(stack.layer)
    single = nnx.merge(graphdef, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), state))
    for number in range(count):
        yield filled(single, 2 + number)


def with_depth(model: Any, depth: int) -> Any:
    """The abstract model with another number of blocks; with none it has what lies around them alone."""
    copy = nnx.merge(*nnx.split(model))
    if depth == 0:
        copy.blocks = nnx.List([])
        return copy
    (stack,) = copy.blocks
    graphdef, state = nnx.split(stack.layer)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct((depth, *x.shape[1:]), x.dtype), state)
    stack.num_layers, stack.layer = depth, nnx.merge(graphdef, shapes)
    return copy


@partial(jax.jit, donate_argnames="stacks")
def _place(stacks: Any, layer: Any, index: Any) -> Any:
    return jax.tree.map(lambda a, x: jax.lax.dynamic_update_index_in_dim(a, x, index, 0), stacks, layer)


def fill(model: Any, depth: int) -> Any:
    """The abstract model with so many blocks and random weights; never more than a block of them twice."""
    model = with_depth(model, depth)
    model.video, model.audio = filled(model.video, 0), filled(model.audio, 1)
    if depth:
        (stack,) = model.blocks
        graphdef, shapes = nnx.split(stack.layer)
        stacks = jax.jit(lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes))()
        for number, block in enumerate(blocks(model, depth)):
            stacks = jax.block_until_ready(_place(stacks, nnx.state(block), number))
        stack.layer = nnx.merge(graphdef, stacks)
    return model


# ------------------------------------------------------------------------ the bench


class Clock:
    """The time left, in seconds; `started` as `time.monotonic` gave it."""

    def __init__(self, limit: float, started: float):
        self.end = started + limit

    @property
    def left(self) -> float:
        return self.end - time.monotonic()

    def need(self, seconds: float) -> None:
        """Raises Skip where less time is left."""
        if self.left < seconds:
            raise Skip(f"needs about {seconds:.0f} s, and {max(self.left, 0):.0f} s of the time are left")


class Result(NamedTuple):
    """Of a step: seconds, and both modalities' estimates as they lie in memory."""

    seconds: float
    outputs: tuple[np.ndarray, ...]


class Bench:
    """What the parts share: the device, the model's shapes, the clips, the time, and what was measured so far."""

    def __init__(self, sizes: Sizes, device: Any, clock: Clock):
        self.sizes, self.device, self.clock = sizes, device, clock
        section = sizes.metadata["transformer"]
        # One block tells the shapes of all.
        manifest = published_manifest(metadata=sizes.metadata | {"transformer": section | {"num_layers": 1}})
        self.configs = load_configs(manifest)
        self.num_blocks: int = section["num_layers"]
        self.packed: Any = abstract_component(manifest, "transformer", dtype=DTYPE)
        self.plain: Any = abstract_component(replace(manifest, quantized={}), "transformer", dtype=DTYPE)
        self.attention: Any = "chunked"
        self.ceilings: dict[str, float] = {}  # FLOP/s, bytes/s
        self.compiling = 30.0  # seconds, as guessed from the last step's program
        self.model: Any = None
        self.model_depth = 0
        self.resident: dict[str, Result] = {}
        self.streamed: dict[str, Result] = {}
        self.transfer = 0.0  # seconds for all blocks
        self.compared: dict[str, float] = {}  # seconds at `short_depth`, with the default form and attention
        self.fused: Any = None

    # ------------------------------------------------------------------- sizes

    @property
    def config(self) -> TransformerConfig:
        return self.configs.transformer

    @cached_property
    def clips(self) -> dict[str, VideoGrid]:
        scale = self.configs.video_vae.scale
        grids = (VideoGrid(width=w, height=h, num_frames=n, fps=24.0, scale=scale) for w, h, n in self.sizes.clips)
        return {f"{grid.width}x{grid.height}x{grid.num_frames}": grid for grid in grids}

    def flops(self, clip: str, depth: int) -> int:
        grid = self.clips[clip]
        audio = audio_latent_length(grid.num_frames, grid.fps, self.configs.audio_vae)
        return step_flops(self.config, video=grid.num_tokens, audio=audio, keys=self.sizes.keys, num_blocks=depth)

    def guess(self, clip: str, depth: int) -> float:
        """Seconds that a step may take, from the ceiling."""
        return self.flops(clip, depth) / (EFFICIENCY * self.ceilings.get("gemm", 50e12))

    def _within(self, seconds: float) -> int:
        """The most blocks with which a step of the largest clip takes no longer."""
        return max(int(self.num_blocks * seconds / max(self.guess(clip, self.num_blocks) for clip in self.clips)), 1)

    @cached_property
    def depth(self) -> int:
        """The blocks that a resident model may have, for memory and for time. First asked for before any is there."""
        depth = min(self.num_blocks, self._within(FULL_SECONDS))
        if memory_stats(self.device):
            free = 0.95 * free_bytes(self.device) - nbytes(with_depth(self.packed, 0)) - ROOM
            depth = min(depth, int(free / nbytes(self.packed.blocks)))
        if depth < 1:
            raise Skip(f"{free_bytes(self.device) / GiB:.1f} GiB are free on the device: too little for one block")
        return depth

    @property
    def short_depth(self) -> int:
        return min(self.depth, self._within(SHORT_SECONDS))

    def scaled(self, seconds: float, depth: int) -> str:
        """Seconds of all blocks, in words."""
        if depth == self.num_blocks:
            return f"{seconds:.4g} s"
        return f"{seconds * self.num_blocks / depth:.4g} s (scaled from {depth} of {self.num_blocks} blocks)"

    # -------------------------------------------------------------------- steps

    def hold(self, depth: int) -> Any:
        """The packed model with so many blocks, the only one that is kept."""
        if self.model is None or self.model_depth != depth:
            self.drop()
            self.clock.need(self.compiling)
            self.model, self.model_depth = fill(self.packed, depth), depth
        set_form(self.model, "auto")
        set_attention_form(self.model, self.attention)
        return self.model

    def drop(self) -> None:
        self.model = None
        gc.collect()

    def denoiser(self, model: Any, clip: str) -> tuple[Denoiser, Pair]:
        """A step's denoiser and its tokens: no guidance, as in the distilled pipeline."""
        grid, stream = self.clips[clip], self.config
        states = (
            video_state(grid, channels=stream.video.in_channels, dtype=DTYPE),
            audio_state(
                audio_latent_length(grid.num_frames, grid.fps, self.configs.audio_vae),
                self.configs.audio_vae,
                dtype=DTYPE,
            ),
        )
        keys = jax.random.split(jax.random.key(1), 4)
        video, audio = (
            jax.random.normal(key, (1, self.sizes.keys, part.context_dim), DTYPE)
            for key, part in zip(keys, (stream.video, stream.audio), strict=False)
        )
        tokens = Pair(
            *(jax.random.normal(k, s.initial.shape, DTYPE) for k, s in zip(keys[2:], states, strict=True)),
        )
        return Denoiser(model, states, Prompt(video=video, audio=audio)), tokens

    def step(self, model: Any, clip: str, depth: int) -> Result:
        """One denoising step, timed."""
        denoiser, tokens = self.denoiser(model, clip)
        arguments, options = denoiser.arguments(0.9, tokens), denoiser.options
        compute = streamed_estimate if isinstance(model, Streamed) else estimate
        seconds, out = self.timed(lambda: compute(*arguments, **options), self.guess(clip, depth))
        return Result(seconds, tuple(np.asarray(x) for x in jax.tree.leaves(out)))

    def timed(self, run: Callable[[], Any], guess: float = 0.0) -> tuple[float, Any]:
        """Median seconds of a few calls after one that compiles, and the last one's output.

        `guess` are the seconds that a step may take; without it the program is a small one.
        """
        self.clock.need((self.compiling if guess else 0.1 * self.compiling) + 2 * guess)
        started = time.monotonic()
        out = jax.block_until_ready(run())
        first = time.monotonic() - started
        times: list[float] = []
        # Short programs run more often, as a single launch is not short beside them.
        while not times or (sum(times) < 8 and len(times) < 3) or (sum(times) < 0.1 and len(times) < 20):
            started = time.perf_counter()
            out = jax.block_until_ready(run())
            times.append(time.perf_counter() - started)
        seconds = statistics.median(times)
        if guess:
            self.compiling = max(first - seconds, 0.7 * self.compiling)
        return seconds, out

    def speed(self, flops: float, seconds: float) -> tuple[str, dict[str, float]]:
        """Achieved FLOP/s in words and figures."""
        figures = {"seconds": seconds, "tflops": flops / seconds / 1e12}
        text = f"{figures['tflops']:.4g} TFLOP/s"
        if "gemm" in self.ceilings:
            figures["ceiling_percent"] = 100 * flops / seconds / self.ceilings["gemm"]
            text += f", {figures['ceiling_percent']:.0f} % of the ceiling"
        return text, figures


def on_card(device: Any) -> bool:
    return device.platform == "gpu"


def memory_stats(device: Any) -> dict[str, int]:
    """What the device's allocator tells; empty where it tells nothing, as on a CPU."""
    return dict(device.memory_stats() or {})
