"""The rectified-flow loss of the diffusion transformer: both streams, each at its own noise level.

A clean latent x and noise n make `(1 - sigma) x + sigma n`; the model learns its velocity `n - x`. Some samples are
given their first frame, or the whole of one stream, as users' modes give them.

Sources: Liu et al., https://arxiv.org/abs/2209.03003 (rectified flow); Esser et al., https://arxiv.org/abs/2403.03206
(logit-normal levels and their shift); LTX-Video, https://arxiv.org/abs/2501.00103, section 3 (levels of single tokens).
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from ltx_jax.abstract import tree_dataclass
from ltx_jax.models.connector import Contexts, TextConnectors
from ltx_jax.models.transformer import Block, StreamInput, Transformer, Velocity
from ltx_jax.stack import run_layers
from ltx_jax.training.loop import Loss, Metrics


class TextStates(NamedTuple):
    """Prompts as the text encoder leaves them, for connectors that are trained too."""

    hidden: Float[Array, "batch states tokens hidden"]
    mask: Bool[Array, "batch tokens"]


@tree_dataclass
@dataclass(frozen=True, kw_only=True)
class FlowBatch:
    """Clips of one size as normalised latents, patchified, and their captions."""

    video: Float[Array, "batch video_tokens video_channels"]
    audio: Float[Array, "batch audio_tokens audio_channels"]
    video_positions: Float[Array, "batch video_tokens 3 2"]
    audio_positions: Float[Array, "batch audio_tokens 1 2"]
    text: TextStates | Contexts


class DenoisingModel(nnx.Module):
    """What is trained together: the transformer and, where captions come as `TextStates`, the connectors.

    With `remat`, blocks are computed again for their gradients, packed weights unpacked again: of each block no more
    than its input is kept.
    """

    def __init__(self, transformer: Transformer, connectors: TextConnectors | None = None, *, remat: bool = False):
        self.transformer = transformer
        self.connectors = connectors
        self.remat = remat

    def __call__(self, video: StreamInput, audio: StreamInput) -> Velocity:
        if not self.remat:
            return self.transformer(video, audio)
        model = self.transformer
        entered = model.enter(video, audio)

        def step(block: Block, streams: Any, keep: None) -> Any:
            return model.step(block, streams, entered.shared, keep)

        streams, _ = run_layers(model.blocks, jax.checkpoint(step), entered.carry, entered.per_layer)
        return model.leave(streams, None, entered.rest)

    def contexts(self, text: TextStates | Contexts) -> Contexts:
        if not isinstance(text, TextStates):
            return text
        if self.connectors is None:
            raise ValueError("captions came as hidden states, which connectors read; give the model its connectors")
        return self.connectors(jnp.moveaxis(text.hidden, 1, 0), text.mask)


@dataclass(frozen=True, kw_only=True)
class FlowSettings:
    """How samples are noised, and what of them is given. Shares are of the samples, each in [0, 1].

    Raises ValueError for what is no share, and for shares of given streams that are more than all.
    """

    shift: float = 3.0  # of the noise levels: above 1, more are high
    uniform: float = 0.1  # take any level, equally likely
    own_levels: float = 0.3  # have a level for the sound that is not the picture's
    image: float = 0.2  # know their first latent frame
    given_video: float = 0.05  # are sound for a picture that is there
    given_audio: float = 0.05  # are a picture for sound that is there
    audio_weight: float = 1.0

    def __post_init__(self) -> None:
        for name in ("uniform", "own_levels", "image", "given_video", "given_audio"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a share of the samples: expected 0 to 1, got {getattr(self, name)}")
        if self.given_video + self.given_audio > 1:
            raise ValueError("given_video and given_audio exclude each other: together they must be at most 1")
        if not self.shift > 0:
            raise ValueError(f"shift must be above 0, got {self.shift}")


def noise_levels(key: jax.Array, count: int, settings: FlowSettings) -> Float[Array, " {count}"]:
    """Levels in (0, 1): a shifted logit-normal distribution, and a share of a uniform one."""
    normal, uniform, choice = jax.random.split(key, 3)
    levels = jax.nn.sigmoid(jax.random.normal(normal, (count,)))
    levels = settings.shift * levels / (1 + (settings.shift - 1) * levels)
    flat = jax.random.uniform(uniform, (count,), minval=1e-3)
    return jnp.where(jax.random.uniform(choice, (count,)) < settings.uniform, flat, levels)


class Given(NamedTuple):
    """What of each sample is not noised."""

    video: Bool[Array, " batch"]
    audio: Bool[Array, " batch"]
    image: Bool[Array, " batch"]


def draw_given(key: jax.Array, count: int, settings: FlowSettings) -> Given:
    """At most one stream is given; an image only where the video is not."""
    stream, image = jax.random.uniform(key, (2, count))
    video = stream < settings.given_video
    audio = ~video & (stream < settings.given_video + settings.given_audio)
    return Given(video, audio, ~video & (image < settings.image))


def first_frame(positions: Float[Array, "batch tokens 3 2"]) -> Bool[Array, " tokens"]:
    """Which tokens begin at time zero, in clips of one size."""
    return positions[0, :, 0, 0] == 0


class Levels(NamedTuple):
    """The noise level of every token of clips of one size, and what they are made of."""

    sigma: Float[Array, " batch"]  # of the video, but for a first frame that is given
    first_sigma: Float[Array, " batch"]  # of its first frame
    audio_sigma: Float[Array, " batch"]
    first: Bool[Array, " video_tokens"]

    @classmethod
    def of(cls, batch: FlowBatch, sigma: Array, first_sigma: Array, audio_sigma: Array) -> "Levels":
        return cls(sigma, first_sigma, audio_sigma, first_frame(batch.video_positions))

    @property
    def video(self) -> Float[Array, "batch video_tokens"]:
        return jnp.where(self.first, self.first_sigma[:, None], self.sigma[:, None])

    @property
    def audio(self) -> Float[Array, "batch 1"]:
        return self.audio_sigma[:, None]


class BothVelocities(NamedTuple):
    """The velocity of both streams."""

    video: Float[Array, "batch video_tokens video_channels"]
    audio: Float[Array, "batch audio_tokens audio_channels"]


def velocity_of(
    model: DenoisingModel,
    batch: FlowBatch,
    video: Float[Array, "batch video_tokens video_channels"],
    audio: Float[Array, "batch audio_tokens audio_channels"],
    levels: Levels,
    contexts: Contexts,
) -> BothVelocities:
    """What a model makes of noised tokens of the clips of a batch."""
    made = model(
        StreamInput(
            tokens=video,
            timesteps=jnp.stack([levels.first_sigma, levels.sigma], axis=1),
            level=jnp.where(levels.first, 0, 1).astype(jnp.int32),
            sigma=levels.sigma,
            positions=batch.video_positions,
            context=contexts.video,
        ),
        StreamInput(
            tokens=audio,
            timesteps=levels.audio,
            sigma=levels.audio_sigma,
            positions=batch.audio_positions,
            context=contexts.audio,
        ),
    )
    assert made.video is not None
    assert made.audio is not None
    return BothVelocities(made.video, made.audio)


class NoisedClips(NamedTuple):
    """The clips of a batch on their way to noise."""

    video: Float[Array, "batch video_tokens video_channels"]
    audio: Float[Array, "batch audio_tokens audio_channels"]
    levels: Levels
    velocity: BothVelocities  # from the clips to their noise


def noise_clips(batch: FlowBatch, key: jax.Array, settings: FlowSettings) -> NoisedClips:
    """Every clip of a batch at levels of its own, some of them with what is given."""
    count = len(batch.video)
    keys = jax.random.split(key, 6)
    given = draw_given(keys[0], count, settings)
    sigma = noise_levels(keys[1], count, settings)
    own = jax.random.uniform(keys[2], (count,)) < settings.own_levels
    audio_sigma = jnp.where(own, noise_levels(keys[3], count, settings), sigma)
    sigma, audio_sigma = jnp.where(given.video, 0, sigma), jnp.where(given.audio, 0, audio_sigma)

    levels = Levels.of(batch, sigma, jnp.where(given.image, 0, sigma), audio_sigma)
    video_noise = jax.random.normal(keys[4], batch.video.shape)
    audio_noise = jax.random.normal(keys[5], batch.audio.shape)
    return NoisedClips(
        noised(batch.video, video_noise, levels.video),
        noised(batch.audio, audio_noise, levels.audio),
        levels,
        BothVelocities(video_noise - batch.video, audio_noise - batch.audio),
    )


def flow_loss(settings: FlowSettings) -> Loss:
    """The loss of a `DenoisingModel` for a `FlowBatch`, as `loop.Trainer` takes it."""

    def loss(model: DenoisingModel, batch: FlowBatch, key: jax.Array) -> tuple[Array, Metrics]:
        clips = noise_clips(batch, key, settings)
        contexts = model.contexts(batch.text)
        found = velocity_of(model, batch, clips.video, clips.audio, clips.levels, contexts)
        return velocity_error(found, clips.velocity, clips.levels, settings)

    return loss


def velocity_error(
    found: BothVelocities, target: BothVelocities, levels: Levels, settings: FlowSettings
) -> tuple[Array, Metrics]:
    """The mean square of both streams over the tokens that are noised; their weighted sum, and each."""
    video = mean_square(found.video - target.video, levels.video > 0)
    audio = mean_square(found.audio - target.audio, levels.audio > 0)
    return video + settings.audio_weight * audio, {"video": video, "audio": audio}


def noised(
    clean: Float[Array, "batch tokens channels"],
    noise: Float[Array, "batch tokens channels"],
    sigma: Float[Array, "batch #tokens"],
) -> Float[Array, "batch tokens channels"]:
    """Each token at its level."""
    return clean + sigma[..., None] * (noise - clean)


def mean_square(error: Float[Array, "batch tokens channels"], counted: Bool[Array, "batch #tokens"]) -> Array:
    """The mean over the tokens that count; zero where none does."""
    weights = jnp.broadcast_to(counted, error.shape[:2]).astype(jnp.float32)
    squares = jnp.mean(jnp.square(error.astype(jnp.float32)), axis=-1)
    return jnp.sum(weights * squares) / jnp.maximum(jnp.sum(weights), 1)


def start_quietly(transformer: Transformer) -> None:
    """Gives a new transformer gates and an output of zero, in place: every block begins as the identity.

    Source: adaLN-Zero of Peebles & Xie, https://arxiv.org/abs/2212.09748.
    """
    streams: list[Any] = [transformer.video, transformer.audio]
    for stream in streams:
        for adaln in (stream.adaln, stream.prompt_adaln, stream.cross_adaln, stream.cross_gate_adaln):
            adaln.linear.kernel.set_value(jnp.zeros_like(adaln.linear.kernel[...]))
        stream.proj_out.kernel.set_value(jnp.zeros_like(stream.proj_out.kernel[...]))
