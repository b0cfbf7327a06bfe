"""The audio-video diffusion transformer of LTX-2.3.

Two streams, video and audio, go through the same blocks: self-attention, attention to the text, attention to each
other, feed-forward, each modulated by the noise level. Either stream may be absent, frozen (its sigma 0) or disabled
(read by the other stream but not updated).

Source: `model.py`, `transformer.py` and `transformer_args.py` in Lightricks/LTX-2 v1.2.0, ltx_core/model/transformer.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from ltx_jax.abstract import tree_dataclass
from ltx_jax.config import StreamConfig, TransformerConfig
from ltx_jax.models.adaln import AdaLN, layer_norm, modulate, rms_norm
from ltx_jax.models.attention import Attention, FeedForward, GroupBias, Tokens, log_mask, mask_to_bias
from ltx_jax.models.rope import Rotary, position_fractions, rotary_tables
from ltx_jax.stack import Entered, run_layers

VideoTokens = Float[Array, "batch video_tokens video_dim"]
AudioTokens = Float[Array, "batch audio_tokens audio_dim"]


@tree_dataclass
@dataclass(frozen=True, kw_only=True)
class StreamInput:
    """What one modality brings to a forward pass. Noise levels are in [0, 1]."""

    tokens: Float[Array, "batch tokens channels"]  # noisy latents, patchified
    timesteps: Float[Array, "batch levels"]  # denoise mask times sigma: of each token, or one column if all equal
    sigma: Float[Array, "batch"]  # of the sample; 0 for a frozen modality
    positions: Float[Array, "#batch tokens axes 2"]  # [start, end) in seconds, then pixels
    context: Float[Array, "batch keys context_dim"]
    context_mask: Float[Array, "batch keys"] | None = None
    self_mask: Float[Array, "#batch tokens tokens"] | None = None  # in [0, 1]; fractions weaken attention
    # The same where only groups of tokens differ: the group of each token, and the mask between groups.
    group: Int[Array, " tokens"] | None = None
    affinity: Float[Array, "groups groups"] | None = None
    # Where few timesteps are shared by many tokens: the column of `timesteps` that each token has.
    level: Int[Array, " tokens"] | None = None
    enabled: bool = field(default=True, metadata={"static": True})


class Velocity(NamedTuple):
    """Noise minus clean, per token; None for an absent modality."""

    video: Tokens | None
    audio: Tokens | None


class Keep(NamedTuple):
    """Guidance perturbations: per layer and sample 1 keeps, 0 skips. Slices of one layer inside a block."""

    video_self: Float[Array, "*layers batch"]
    audio_self: Float[Array, "*layers batch"]
    audio_to_video: Float[Array, "*layers batch"]
    video_to_audio: Float[Array, "*layers batch"]


@tree_dataclass
@dataclass(frozen=True, kw_only=True)
class Conditioning:
    """One stream's modulation, rotary tables and text for all blocks of a forward pass.

    Modulation is held for the distinct timesteps alone, as every token's own would be larger than the model's
    activations; it is spread over the tokens where it is used, within the kernel that uses it.
    """

    rows: Float[Array, "batch levels 9 dim"]
    prompt_rows: Float[Array, "batch 1 2 dim"]
    cross_rows: Float[Array, "batch levels 4 dim"] | None  # None where the other stream is absent
    level: Int[Array, " tokens"] | None
    cross_gate: Float[Array, "batch 1 1 dim"] | None
    rotary: Rotary
    cross_rotary: Rotary | None
    context: Float[Array, "batch keys context_dim"]
    context_bias: Float[Array, "batch 1 1 keys"] | None
    self_bias: Float[Array, "#batch 1 tokens tokens"] | GroupBias | None
    enabled: bool = field(metadata={"static": True})

    def spread(self, rows: Float[Array, "batch levels dim"]) -> Float[Array, "batch #tokens dim"]:
        """Modulation of each level to that of each token."""
        return spread(rows, self.level)


def spread(rows: Float[Array, "batch levels dim"], level: Int[Array, " tokens"] | None):
    """The row of each token; as it is where rows are already those of tokens, or one serves all.

    Choices between a few rows become part of the kernel that reads them; a gather would be written to memory first.
    """
    if level is None:
        return rows
    chosen = rows[:, :1]
    for k in range(1, rows.shape[1]):
        chosen = jnp.where((level == k)[:, None], rows[:, k : k + 1], chosen)
    return chosen


class StreamBlock(nnx.Module):
    """One modality's own layers within a block."""

    def __init__(self, config: StreamConfig, *, eps: float, gated: bool, rngs: nnx.Rngs):
        self.eps = eps
        heads = {"num_heads": config.num_heads, "head_dim": config.head_dim, "eps": eps, "gated": gated}
        self.self_attn = Attention(config.dim, config.dim, **heads, rngs=rngs)
        self.text_attn = Attention(config.dim, config.context_dim, **heads, rngs=rngs)
        self.ff = FeedForward(config.dim, rngs=rngs)
        self.scale_shift_table = nnx.Param(jnp.zeros((9, config.dim)))
        self.prompt_scale_shift_table = nnx.Param(jnp.zeros((2, config.context_dim)))
        self.cross_scale_shift_table = nnx.Param(jnp.zeros((5, config.dim)))

    def rows(self, cond: Conditioning, start: int) -> list[Tokens]:
        """Shift, scale and gate from three rows: 0 self-attention, 3 feed-forward, 6 attention to the text."""
        table = self.scale_shift_table.get_value().astype(cond.rows.dtype)
        return [cond.spread(table[i] + cond.rows[:, :, i]) for i in range(start, start + 3)]

    def attend(self, x: Tokens, cond: Conditioning, keep: Float[Array, "batch"] | None) -> Tokens:
        """Self-attention, then attention to the text."""
        shift, scale, gate = self.rows(cond, 0)
        n = modulate(rms_norm(x, self.eps), shift, scale)
        x = x + self.self_attn(n, n, rotary=cond.rotary, bias=cond.self_bias, keep=keep) * gate

        shift, scale, gate = self.rows(cond, 6)
        n = modulate(rms_norm(x, self.eps), shift, scale)
        # The text, too, is modulated by the noise level, but not normalised.
        prompt_table = self.prompt_scale_shift_table.get_value().astype(x.dtype)
        shift, scale = (prompt_table[i] + cond.prompt_rows[:, :, i] for i in range(2))
        context = modulate(cond.context, shift, scale)
        return x + self.text_attn(n, context, bias=cond.context_bias) * gate

    def cross_inputs(self, n: Tokens, cond: Conditioning) -> tuple[Tokens, Tokens]:
        """This stream as audio-to-video and as video-to-audio attention read it. Here scale comes before shift."""
        assert cond.cross_rows is not None
        table = self.cross_scale_shift_table.get_value().astype(n.dtype)
        rows = (cond.spread(table[i] + cond.cross_rows[:, :, i]) for i in range(4))
        scale_a2v, shift_a2v, scale_v2a, shift_v2a = rows
        return modulate(n, shift_a2v, scale_a2v), modulate(n, shift_v2a, scale_v2a)

    def cross_gate(self, cond: Conditioning) -> Float[Array, "batch 1 dim"]:
        """The gate on what this stream receives from the other."""
        assert cond.cross_gate is not None
        return self.cross_scale_shift_table.get_value()[4].astype(cond.cross_gate.dtype) + cond.cross_gate[:, :, 0]

    def feed_forward(self, x: Tokens, cond: Conditioning) -> Tokens:
        shift, scale, gate = self.rows(cond, 3)
        return x + self.ff(modulate(rms_norm(x, self.eps), shift, scale)) * gate


class Block(nnx.Module):
    """One transformer block of both streams."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        self.eps = config.eps
        video, audio = config.video, config.audio
        stream = {"eps": config.eps, "gated": config.gated_attention}
        self.video = StreamBlock(video, **stream, rngs=rngs)
        self.audio = StreamBlock(audio, **stream, rngs=rngs)
        cross = {"num_heads": audio.num_heads, "head_dim": audio.head_dim, **stream}
        self.audio_to_video = Attention(video.dim, audio.dim, **cross, rngs=rngs)
        self.video_to_audio = Attention(audio.dim, video.dim, **cross, rngs=rngs)

    def __call__(
        self,
        x: VideoTokens | None,
        ax: AudioTokens | None,
        video: Conditioning | None,
        audio: Conditioning | None,
        keep: Keep | None,
    ) -> tuple[VideoTokens | None, AudioTokens | None]:
        """Video tokens `x` and audio tokens `ax`, one block further."""
        if x is not None and video is not None and video.enabled:
            x = self.video.attend(x, video, None if keep is None else keep.video_self)
        if ax is not None and audio is not None and audio.enabled:
            ax = self.audio.attend(ax, audio, None if keep is None else keep.audio_self)

        if x is not None and ax is not None and video is not None and audio is not None:
            # Both directions read the streams as they are before either is updated.
            video_a2v, video_v2a = self.video.cross_inputs(rms_norm(x, self.eps), video)
            audio_a2v, audio_v2a = self.audio.cross_inputs(rms_norm(ax, self.eps), audio)
            if video.enabled:
                y = self.audio_to_video(
                    video_a2v, audio_a2v, rotary=video.cross_rotary, context_rotary=audio.cross_rotary
                )
                x = x + y * self.video.cross_gate(video) * _per_sample(keep and keep.audio_to_video, y)
            if audio.enabled:
                y = self.video_to_audio(
                    audio_v2a, video_v2a, rotary=audio.cross_rotary, context_rotary=video.cross_rotary
                )
                ax = ax + y * self.audio.cross_gate(audio) * _per_sample(keep and keep.video_to_audio, y)

        if x is not None and video is not None and video.enabled:
            x = self.video.feed_forward(x, video)
        if ax is not None and audio is not None and audio.enabled:
            ax = self.audio.feed_forward(ax, audio)
        return x, ax


def _per_sample(keep: Float[Array, "batch"] | None, like: Tokens):
    return 1 if keep is None else keep.astype(like.dtype)[:, None, None]


class Stream(nnx.Module):
    """One modality's way into and out of the blocks."""

    def __init__(self, config: StreamConfig, *, cross_dim: int, cross_heads: int, model: TransformerConfig, rngs):
        self.config = config
        self.model = model
        self.cross_dim = cross_dim
        self.cross_heads = cross_heads
        dim = config.dim
        self.patchify = nnx.Linear(config.in_channels, dim, rngs=rngs)
        self.adaln = AdaLN(dim, 9, rngs=rngs)
        self.prompt_adaln = AdaLN(dim, 2, rngs=rngs)
        self.cross_adaln = AdaLN(dim, 4, rngs=rngs)
        self.cross_gate_adaln = AdaLN(dim, 1, rngs=rngs)
        self.scale_shift_table = nnx.Param(jnp.zeros((2, dim)))
        self.proj_out = nnx.Linear(dim, config.out_channels, rngs=rngs)

    def condition(
        self, x: StreamInput, other: StreamInput | None, *, cross_max_seconds: float
    ) -> tuple[Conditioning, Float[Array, "batch levels dim"]]:
        """Everything the blocks need, and the timestep embedding that the output needs.

        Scale and shift between the streams follow this stream's own timesteps, the gate the other's sigma (the rule
        of ltx-core 1.2.0; 1.0.0 and diffusers take the other's sigma for both).
        """
        model, dtype = self.model, x.tokens.dtype
        rows, embedding = self.adaln(x.timesteps * model.timestep_scale, dtype)
        prompt_rows, _ = self.prompt_adaln(x.sigma[:, None] * model.timestep_scale, dtype)
        middle = jnp.mean(x.positions.astype(jnp.float32), axis=-1)
        fractions = position_fractions(middle, self.config.max_pos)
        rotary = rotary_tables(
            fractions, dim=self.config.dim, num_heads=self.config.num_heads, theta=model.rope_theta, dtype=dtype
        )
        cross_rows = cross_gate = cross_rotary = None
        if other is not None:
            cross_rows, _ = self.cross_adaln(x.timesteps * model.timestep_scale, dtype)
            cross_gate, _ = self.cross_gate_adaln(other.sigma[:, None] * model.av_gate_timestep_scale, dtype)
            cross_rotary = rotary_tables(
                position_fractions(middle[..., :1], (cross_max_seconds,)),  # time alone, for video as well
                dim=self.cross_dim,
                num_heads=self.cross_heads,
                theta=model.rope_theta,
                dtype=dtype,
            )
        conditioning = Conditioning(
            rows=rows,
            prompt_rows=prompt_rows,
            cross_rows=cross_rows,
            cross_gate=cross_gate,
            level=x.level,
            rotary=rotary,
            cross_rotary=cross_rotary,
            context=x.context.astype(dtype),
            context_bias=None if x.context_mask is None else mask_to_bias(x.context_mask[:, None, :]),
            self_bias=_self_bias(x),
            enabled=x.enabled,
        )
        return conditioning, embedding

    def velocity(
        self,
        x: Float[Array, "batch tokens dim"],
        embedding: Float[Array, "batch levels dim"],
        level: Int[Array, " tokens"] | None,
    ) -> Float[Array, "batch tokens out_channels"]:
        """The blocks' output to velocities, modulated by the timestep embedding."""
        table = self.scale_shift_table.get_value().astype(x.dtype)
        shift, scale = spread(table[0] + embedding, level), spread(table[1] + embedding, level)
        return self.proj_out(modulate(layer_norm(x, self.model.eps), shift, scale))


def _self_bias(x: StreamInput) -> Float[Array, "#batch 1 tokens tokens"] | GroupBias | None:
    if x.group is not None and x.affinity is not None:
        return GroupBias(log_mask(x.affinity), x.group)
    return None if x.self_mask is None else mask_to_bias(x.self_mask)


class Transformer(nnx.Module):
    """Noisy video and audio tokens, noise levels and text to velocities."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        self.config = config
        cross = {"cross_dim": config.cross_dim, "cross_heads": config.audio.num_heads, "model": config}
        self.video = Stream(config.video, **cross, rngs=rngs)
        self.audio = Stream(config.audio, **cross, rngs=rngs)
        self.blocks = nnx.List([Block(config, rngs=rngs) for _ in range(config.num_layers)])

    def __call__(
        self, video: StreamInput | None = None, audio: StreamInput | None = None, *, keep: Keep | None = None
    ) -> Velocity:
        """Predicts the velocity of each present modality. `keep` arrays have axes layer, sample."""
        entered = self.enter(video, audio, keep=keep)
        streams, _ = run_layers(
            self.blocks,
            lambda block, streams, keep: self.step(block, streams, entered.shared, keep),
            entered.carry,
            entered.per_layer,
        )
        return self.leave(streams, None, entered.rest)

    def enter(self, video: StreamInput | None, audio: StreamInput | None, *, keep: Keep | None = None) -> Entered:
        """All that comes before the blocks: both streams' hidden tokens and conditioning."""
        # Both streams share one time range in the attention between them.
        seconds = max(self.config.video.max_pos[0], self.config.audio.max_pos[0])
        hidden, conditioning, outputs = [], [], []
        for stream, x, other in ((self.video, video, audio), (self.audio, audio, video)):
            if x is None:
                hidden.append(None)
                conditioning.append(None)
                outputs.append((None, None))
                continue
            cond, embedding = stream.condition(x, other, cross_max_seconds=seconds)
            hidden.append(stream.patchify(x.tokens))
            conditioning.append(cond)
            outputs.append((embedding, x.level))
        return Entered(carry=tuple(hidden), shared=tuple(conditioning), per_layer=keep, rest=tuple(outputs))

    @staticmethod
    def step(block: Block, streams, conditioning, keep: Keep | None):
        """One block further."""
        x, ax = streams
        video, audio = conditioning
        return block(x, ax, video, audio, keep), None

    def leave(self, streams, outs: None, rest) -> Velocity:
        """All that comes behind the blocks."""
        velocities = (
            None if embedding is None else stream.velocity(x, embedding, level)
            for stream, x, (embedding, level) in zip((self.video, self.audio), streams, rest, strict=True)
        )
        return Velocity(*velocities)
