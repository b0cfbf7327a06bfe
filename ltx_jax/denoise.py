"""One guided denoised estimate: noisy tokens in, clean tokens out, with every guidance pass in one batched call.

Source: `denoisers` in Lightricks/LTX-2, ltx_pipelines.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ltx_jax.conditioning import LatentState
from ltx_jax.guidance import Guidance, Guider, Scales, guide, keep_masks
from ltx_jax.models.transformer import StreamInput, Transformer
from ltx_jax.offload import Streamed
from ltx_jax.stack import Entered, count_layers

Tokens = Float[Array, "batch tokens channels"]
Context = Float[Array, "1 keys context_dim"]


class Pair(NamedTuple):
    """Something of each modality; None for an absent one."""

    video: Tokens | None
    audio: Tokens | None


class Estimates(NamedTuple):
    """What a model call gives: the guided estimate, and the same with what is given held."""

    estimate: Pair
    held: Pair


@runtime_checkable
class Memory(Protocol):
    """Estimates of an earlier run of the same, by the number of the call; see `replay`."""

    def recall(self, call: int) -> Estimates | None: ...

    def keep(self, call: int, estimates: Estimates) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """The two contexts of one prompt."""

    video: Float[Array, "1 keys video_dim"]
    audio: Float[Array, "1 keys audio_dim"]


def _stream(state: LatentState, tokens: Tokens, contexts: Float[Array, "rows keys context_dim"], sigma) -> StreamInput:
    """One modality, repeated for every guidance pass."""
    rows = contexts.shape[0]
    return StreamInput(
        tokens=jnp.repeat(tokens, rows, axis=0),
        timesteps=jnp.repeat(state.timesteps(sigma), rows, axis=0),
        sigma=jnp.full((rows,), 0.0 if state.frozen else sigma, jnp.float32),
        positions=state.positions,
        context=contexts,
        level=state.level,
        group=state.group,
        affinity=state.affinity,
    )


def _streams(states, tokens, contexts, sigma) -> list[StreamInput | None]:
    return [
        None if state is None else _stream(state, x, context, sigma)
        for state, x, context in zip(states, tokens, contexts, strict=True)
    ]


def _kept(states, tokens) -> Pair:
    return Pair(*(None if state is None else state.kept(x) for state, x in zip(states, tokens, strict=True)))


def _guided(states, tokens, velocities, sigma, scales, passes: tuple[str, ...], guider: Guider) -> tuple[Pair, Pair]:
    """The guided estimate of each modality, and the same with what is given held: see `Denoiser`."""
    estimates, held = [], []
    for state, x, velocity, scale in zip(states, tokens, velocities, scales, strict=True):
        if state is None:
            estimates.append(None)
            held.append(None)
            continue
        # The estimate is per token: a token kept at another noise level has its own distance to go.
        timesteps = state.token_timesteps(sigma)[..., None]
        denoised = x.astype(jnp.float32) - timesteps * velocity.astype(jnp.float32)
        rows = dict(zip(("conditional", *passes), jnp.split(denoised, denoised.shape[0]), strict=True))
        guided = guider(rows, scale)
        estimates.append(guided.astype(x.dtype))
        held.append(state.hold(estimates[-1]))
    return Pair(*estimates), Pair(*held)


@partial(jax.jit, static_argnames=("passes", "precision", "guider"))
def estimate(
    transformer,
    states,
    tokens,
    contexts,
    sigma,
    scales,
    keep,
    *,
    passes: tuple[str, ...],
    precision: str,
    guider: Guider,
) -> tuple[Pair, Pair]:
    """One guided estimate in one program: what a denoising step is."""
    tokens = _kept(states, tokens)
    with jax.default_matmul_precision(precision):
        velocities = transformer(*_streams(states, tokens, contexts, sigma), keep=keep)
    return _guided(states, tokens, velocities, sigma, scales, passes, guider)


@partial(jax.jit, static_argnames="precision")
def enter(rest, states, tokens, contexts, sigma, keep, *, precision: str) -> Entered:
    """The part of `estimate` before the blocks, for blocks that are streamed."""
    tokens = _kept(states, tokens)
    with jax.default_matmul_precision(precision):
        return rest.enter(*_streams(states, tokens, contexts, sigma), keep=keep)


@partial(jax.jit, static_argnames=("passes", "precision", "guider"))
def leave(
    rest,
    streams,
    outs,
    outputs,
    states,
    tokens,
    sigma,
    scales,
    *,
    passes: tuple[str, ...],
    precision: str,
    guider: Guider,
) -> tuple[Pair, Pair]:
    """The part of `estimate` behind the blocks."""
    with jax.default_matmul_precision(precision):
        velocities = rest.leave(streams, outs, outputs)
    return _guided(states, _kept(states, tokens), velocities, sigma, scales, passes, guider)


def streamed_estimate(
    transformer: Streamed,
    states,
    tokens,
    contexts,
    sigma,
    scales,
    keep,
    *,
    passes: tuple[str, ...],
    precision: str,
    guider: Guider,
) -> tuple[Pair, Pair]:
    """`estimate`, bit for bit, with one block's weights on the device at a time."""
    rest = transformer.rest
    # What comes back from the layers is bound to their device: so is, then, the first step's input.
    tokens = jax.device_put(tokens, transformer.layers["blocks"].sharding)
    entered = enter(rest, states, tokens, contexts, sigma, keep, precision=precision)
    with jax.default_matmul_precision(precision):
        streams, outs = transformer.layers["blocks"].run(
            Transformer.step, entered.carry, entered.shared, entered.per_layer
        )
    inputs = rest, streams, outs, entered.rest, states, tokens, sigma, scales
    return leave(*inputs, passes=passes, precision=precision, guider=guider)


class Denoiser:
    """`predict(step, sigma, tokens) -> denoised` of one stage, as samplers call it.

    A pass runs if either modality needs it. The unconditional row reads the negative context of each modality that
    is generated; a frozen one keeps its positive context.
    """

    def __init__(
        self,
        transformer: Transformer | Streamed,
        states: tuple[LatentState | None, LatentState | None],
        prompt: Prompt,
        *,
        negative: Prompt | None = None,
        guidance: tuple[Guidance, Guidance] | None = None,
        guider: Guider = guide,
        precision: str = "default",
        callback: Callable[[int, float, Pair, Pair], None] | None = None,
        memory: Memory | None = None,
    ):
        """Raises ValueError where `cfg_scale` asks for a negative prompt that is not there.

        `callback(step, sigma, tokens, denoised)` is called after every model call (or reuse of one) with the guided
        estimate as the model gave it, before what is given (images, frozen tokens) is put back. What `memory` recalls
        is not computed again.
        """
        video, audio = guidance or (Guidance(), Guidance())
        wanted = set(video.passes if states[0] is not None else ()) | set(audio.passes if states[1] is not None else ())
        self.passes = tuple(name for name in ("unconditional", "perturbed", "isolated") if name in wanted)
        if "isolated" in wanted and None in states:
            self.passes = tuple(name for name in self.passes if name != "isolated")
        if "unconditional" in self.passes and negative is None:
            raise ValueError("cfg_scale other than 1 needs the contexts of a negative prompt; it may be empty text")
        self.transformer = transformer
        self.states = states
        self.guidance = video, audio
        self.guider = guider
        self.precision = precision
        self.callback = callback
        self.memory = memory
        self.calls = 0
        self.scales = Scales.of(video), Scales.of(audio)
        streamed = isinstance(transformer, Streamed)
        num_layers = len(transformer.layers["blocks"]) if streamed else count_layers(transformer.blocks)
        self.keep = keep_masks(self.passes, video, audio, num_layers)
        self.contexts = tuple(
            None if state is None else self._contexts(state, *contexts)
            for state, contexts in zip(
                states,
                (
                    (prompt.video, None if negative is None else negative.video),
                    (prompt.audio, None if negative is None else negative.audio),
                ),
                strict=True,
            )
        )
        self.last = Estimates(Pair(None, None), Pair(None, None))

    def _contexts(self, state: LatentState, positive: Context, negative: Context | None):
        rows = [positive]
        for name in self.passes:
            if name == "unconditional" and negative is not None and not state.frozen:
                rows.append(negative)
            else:
                rows.append(positive)
        return jnp.concatenate(rows).astype(state.initial.dtype)

    def arguments(self, sigma: float, tokens: Pair) -> tuple:
        """What `estimate` takes at a step; with `options`, for a plan to compile it as it will run."""
        level = jnp.asarray(sigma, jnp.float32)
        return self.transformer, self.states, tokens, self.contexts, level, self.scales, self.keep

    @property
    def options(self) -> dict[str, Any]:
        """What `estimate` is compiled for."""
        return {"passes": self.passes, "precision": self.precision, "guider": self.guider}

    def __call__(self, step: int, sigma: float, tokens: Pair) -> Pair:
        recalled = None if self.memory is None else self.memory.recall(self.calls)
        self.last = self._ask(step, sigma, tokens) if recalled is None else recalled
        if self.memory is not None and recalled is None:
            self.memory.keep(self.calls, self.last)
        self.calls += 1
        if self.callback is not None:
            self.callback(step, sigma, tokens, self.last.estimate)
        return self.last.held

    def _ask(self, step: int, sigma: float, tokens: Pair) -> Estimates:
        """The model's estimates; those of the call before where guidance skips this one."""
        runs = [g.runs(step) or last is None for g, last in zip(self.guidance, self.last.estimate, strict=True)]
        if not any(run for run, state in zip(runs, self.states, strict=True) if state is not None):
            return self.last
        compute = streamed_estimate if isinstance(self.transformer, Streamed) else estimate
        fresh = compute(*self.arguments(sigma, tokens), **self.options)
        # A modality whose guidance skips this step keeps its last estimate.
        return Estimates(
            *(
                Pair(*(new if run else old for run, new, old in zip(runs, news, olds, strict=True)))
                for news, olds in zip(fresh, self.last, strict=True)
            )
        )
