"""From the text encoder's hidden states to the contexts that the transformer's cross-attention reads.

The states of all layers are normalised and projected to the width of each stream; a small transformer a stream, the
connector, then mixes the tokens, padding replaced by learned registers.

Source: the feature extractor (`text_embedding_projection` in the checkpoint) and the embeddings connectors of
Lightricks/LTX-2 v1.2.0, ltx_core.
"""

from typing import NamedTuple

import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Bool, Float

from ltx_jax.config import ConnectorConfig, TextConnectorsConfig
from ltx_jax.models.adaln import rms_norm
from ltx_jax.models.attention import Attention, FeedForward, Tokens
from ltx_jax.models.gemma import HiddenStates
from ltx_jax.models.rope import Rotary, rotary_tables
from ltx_jax.stack import Entered, run_layers

Mask = Bool[Array, "batch tokens"]
FEATURE_EPS = 1e-6  # of the norm before the projection


class Contexts(NamedTuple):
    """The text as each stream reads it: features, or the finished context."""

    video: Float[Array, "batch tokens video_dim"]
    audio: Float[Array, "batch tokens audio_dim"]


class FeatureExtractor(nnx.Module):
    """Hidden states of all layers, normalised, to one feature vector a token for each stream."""

    def __init__(self, config: TextConnectorsConfig, *, rngs: nnx.Rngs):
        width = config.hidden_dim * config.num_hidden_states
        self.video = nnx.Linear(width, config.video.dim, rngs=rngs)
        self.audio = nnx.Linear(width, config.audio.dim, rngs=rngs)

    def __call__(self, hidden_states: HiddenStates, mask: Mask) -> Contexts:
        """Projects; padded tokens give the bias alone."""
        x = jnp.where(mask[..., None], rms_norm(hidden_states, FEATURE_EPS), 0)
        x = rearrange(x, "states b t d -> b t (d states)")
        hidden_dim = hidden_states.shape[-1]
        # A wider projection gets larger inputs, so that features of both streams are of one magnitude.
        return Contexts(
            self.video(x * (self.video.out_features / hidden_dim) ** 0.5).astype(x.dtype),
            self.audio(x * (self.audio.out_features / hidden_dim) ** 0.5).astype(x.dtype),
        )


class ConnectorBlock(nnx.Module):
    """Self-attention and feed-forward, normalised before, without modulation."""

    def __init__(self, config: ConnectorConfig, *, rngs: nnx.Rngs):
        self.eps = config.eps
        self.attn = Attention(
            config.dim,
            config.dim,
            num_heads=config.num_heads,
            head_dim=config.head_dim,
            eps=config.eps,
            gated=config.gated_attention,
            rngs=rngs,
        )
        self.ff = FeedForward(config.dim, rngs=rngs)

    def __call__(self, x: Tokens, rotary: Rotary) -> Tokens:
        n = rms_norm(x, self.eps)
        x = x + self.attn(n, n, rotary=rotary).astype(x.dtype)
        return x + self.ff(rms_norm(x, self.eps)).astype(x.dtype)


class Connector(nnx.Module):
    """One stream's features to its context; every token of the result counts, so no mask is left."""

    def __init__(self, config: ConnectorConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.registers = nnx.Param(nnx.initializers.normal(1.0)(rngs.params(), (config.num_registers, config.dim)))
        self.blocks = nnx.List([ConnectorBlock(config, rngs=rngs) for _ in range(config.num_layers)])

    def __call__(self, features: Tokens, mask: Mask) -> Tokens:
        """Raises ValueError for a length that is no multiple of the number of registers."""
        entered = self.enter(features, mask)
        x, _ = run_layers(
            self.blocks, lambda block, x, _: self.step(block, x, entered.shared, None), entered.carry, entered.per_layer
        )
        return self.leave(x, None, entered.rest)

    def enter(self, features: Tokens, mask: Mask) -> Entered:
        """All that comes before the blocks."""
        config = self.config
        x = self.replace_padding(features, mask)
        positions = jnp.arange(x.shape[1], dtype=jnp.float32)[None, :, None]
        rotary = rotary_tables(
            positions / config.max_pos,
            dim=config.dim,
            num_heads=config.num_heads,
            theta=config.rope_theta,
            dtype=x.dtype,
        )
        return Entered(carry=x, shared=rotary, per_layer=None, rest=None)

    @staticmethod
    def step(block: ConnectorBlock, x: Tokens, rotary: Rotary, per_layer: None) -> tuple[Tokens, None]:
        """One block further."""
        return block(x, rotary), None

    def leave(self, x: Tokens, outs: None, rest: None) -> Tokens:
        """All that comes behind the blocks."""
        return rms_norm(x, self.config.eps)

    def replace_padding(self, features: Tokens, mask: Mask) -> Tokens:
        """Moves the prompt's tokens to the front, in order; the places behind take the register of their position."""
        length, num_registers = features.shape[1], self.config.num_registers
        if length % num_registers != 0:
            raise ValueError(
                f"the text must be padded to a multiple of {num_registers} tokens, the number of learned registers "
                f"that stand for padding; got {length} tokens"
            )
        order = jnp.argsort(~mask, axis=1, stable=True)
        x = jnp.take_along_axis(features, order[..., None], axis=1)
        registers = jnp.tile(self.registers.get_value().astype(x.dtype), (length // num_registers, 1))
        return jnp.where(jnp.take_along_axis(mask, order, axis=1)[..., None], x, registers)


class TextConnectors(nnx.Module):
    """Projection and both connectors: hidden states of the text encoder to the contexts of video and audio."""

    def __init__(self, config: TextConnectorsConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.projection = FeatureExtractor(config, rngs=rngs)
        self.video = Connector(config.video, rngs=rngs)
        self.audio = Connector(config.audio, rngs=rngs)

    def __call__(self, hidden_states: HiddenStates, mask: Mask) -> Contexts:
        """`mask` is True at the prompt's tokens. Computed, and returned, in the dtype of `hidden_states`."""
        features = self.projection(hidden_states, mask)
        return Contexts(self.video(features.video, mask), self.audio(features.audio, mask))
