"""Distillation of guided sampling: a student takes in one step, without guidance, what its teacher takes in several.

The student learns the steps of a fixed schedule, by default LTX-2.3's eight. From a clip noised to one of its levels
the teacher walks to the next in smaller, guided steps; the student's velocity is to lead there at once. As the student
is adapters beside its teacher's weights, what it learns is a LoRA.

Sources: Salimans & Ho, https://arxiv.org/abs/2202.00512 (progressive distillation); Meng et al.,
https://arxiv.org/abs/2210.03142 (of guided models).
"""

from dataclasses import dataclass
from itertools import pairwise

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from ltx_jax.models.connector import Contexts, TextConnectors
from ltx_jax.sampling import DISTILLED_SIGMAS
from ltx_jax.training.flow import (
    BothVelocities,
    DenoisingModel,
    FlowBatch,
    Levels,
    TextStates,
    mean_square,
    noised,
    velocity_of,
)
from ltx_jax.training.loop import Loss, Metrics


class Distilled(nnx.Module):
    """A student and its teacher, and the connectors that both read captions with."""

    def __init__(
        self,
        student: DenoisingModel,
        teacher: DenoisingModel,
        connectors: TextConnectors,
        no_text: Float[Array, "states tokens hidden"],
        no_text_mask: Bool[Array, " tokens"],
    ):
        """`no_text` is what the text encoder makes of the empty prompt: what the teacher is guided away from."""
        self.student = student
        self.teacher = teacher
        self.connectors = connectors
        self.no_text = nnx.Variable(jnp.asarray(no_text))
        self.no_text_mask = nnx.Variable(jnp.asarray(no_text_mask))

    def contexts(self, text: TextStates) -> tuple[Contexts, Contexts]:
        """Of captions, and of no text."""
        none = self.connectors(self.no_text[...][:, None], self.no_text_mask[...][None])
        return (
            self.connectors(jnp.moveaxis(text.hidden, 1, 0), text.mask),
            Contexts(*(jnp.repeat(context, len(text.mask), axis=0) for context in none)),
        )


@dataclass(frozen=True, kw_only=True)
class DistilSettings:
    """How the teacher walks, and what the student sees.

    Raises ValueError for levels that do not fall, for steps below one and a share that is none.
    """

    sigmas: tuple[float, ...] = DISTILLED_SIGMAS
    substeps: int = 3  # of the teacher, where levels are more than `near` apart; one elsewhere
    near: float = 0.02
    video_cfg_scale: float = 2.0
    audio_cfg_scale: float = 2.0
    image: float = 0.2  # share of the samples that know their first latent frame

    def __post_init__(self) -> None:
        if len(self.sigmas) < 2 or any(a <= b for a, b in pairwise(self.sigmas)):
            raise ValueError(f"sigmas must fall, at least two of them; got {list(self.sigmas)}")
        if self.substeps < 1:
            raise ValueError(f"substeps must be at least 1, got {self.substeps}")
        if not 0 <= self.image <= 1:
            raise ValueError(f"image is a share of the samples: expected 0 to 1, got {self.image}")


def step_shares(sigmas: tuple[float, ...], near: float) -> tuple[float, ...]:
    """How often each step of a schedule is trained: a step across little is a quarter as often as others."""
    weights = [0.25 if a - b <= near else 1.0 for a, b in pairwise(sigmas)]
    return tuple(weight / sum(weights) for weight in weights)


def distillation_loss(settings: DistilSettings) -> Loss:
    """The loss of `Distilled` for a `FlowBatch` with captions as `TextStates`, as `loop.Trainer` takes it."""
    sigmas = jnp.asarray(settings.sigmas, jnp.float32)
    shares = jnp.asarray(step_shares(settings.sigmas, settings.near))

    def loss(model: Distilled, batch: FlowBatch, key: jax.Array) -> tuple[Array, Metrics]:
        count = len(batch.video)
        keys = jax.random.split(key, 4)
        step = jax.random.choice(keys[0], len(shares), (count,), p=shares)
        start, end = sigmas[step], sigmas[step + 1]
        given = jax.random.uniform(keys[1], (count,)) < settings.image
        assert isinstance(batch.text, TextStates)
        contexts, none = jax.tree.map(jax.lax.stop_gradient, model.contexts(batch.text))

        def levels(sigma: Array) -> Levels:
            return Levels.of(batch, sigma, jnp.where(given, 0, sigma), sigma)

        before = levels(start)
        video = noised(batch.video, jax.random.normal(keys[2], batch.video.shape), before.video)
        audio = noised(batch.audio, jax.random.normal(keys[3], batch.audio.shape), before.audio)
        target = _walk(model.teacher, batch, video, audio, levels, start, end, contexts, none, settings)
        found = velocity_of(model.student, batch, video, audio, before, contexts)
        video_error = mean_square(found.video - target.video, before.video > 0)
        audio_error = mean_square(found.audio - target.audio, before.audio > 0)
        return video_error + audio_error, {"video": video_error, "audio": audio_error}

    return loss


def _walk(teacher, batch, video, audio, levels, start, end, contexts, none, settings: DistilSettings) -> BothVelocities:
    """The constant velocity that leads where the teacher's guided steps lead."""
    # Twice the batch: with captions, and without text.
    both = Contexts(*(jnp.concatenate(pair) for pair in zip(contexts, none, strict=True)))
    twice = jax.tree.map(_twice, batch)
    scales = settings.video_cfg_scale, settings.audio_cfg_scale
    near = start - end <= settings.near

    def step(number: int, tokens: tuple[Array, Array]) -> tuple[Array, Array]:
        # Where levels are near each other the first of the steps goes all the way.
        share, goes_on = number / settings.substeps, (number + 1) / settings.substeps
        sigma = jnp.where(near & (number > 0), end, start + share * (end - start))
        following = jnp.where(near, end, start + goes_on * (end - start))
        at = levels(sigma)
        doubled = Levels(_twice(at.sigma), _twice(at.first_sigma), _twice(at.audio_sigma), at.first)
        made = velocity_of(teacher, twice, _twice(tokens[0]), _twice(tokens[1]), doubled, both)
        moved = []
        for x, velocity, scale, level, target in zip(
            tokens, made, scales, (at.video, at.audio), (levels(following).video, levels(following).audio), strict=True
        ):
            with_text, without = jnp.split(velocity, 2)
            guided = without + scale * (with_text - without)
            moved.append(x + (target - level)[..., None] * guided)
        return moved[0], moved[1]

    tokens = jax.lax.stop_gradient((video, audio))
    for number in range(settings.substeps):
        tokens = step(number, tokens)
    gap = (start - end)[:, None, None]
    # What is given did not move; where it is, nothing counts.
    return BothVelocities(*(jax.lax.stop_gradient((x - y) / gap) for x, y in zip((video, audio), tokens, strict=True)))


def _twice(x: Array) -> Array:
    return jnp.concatenate([x, x])
