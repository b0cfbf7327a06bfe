"""Gemma 3, run once over a prompt as a text encoder: every layer's hidden states, no language model head.

Source: Gemma 3 technical report, https://arxiv.org/abs/2503.19786; `models/gemma3/modeling_gemma3.py` in
huggingface/transformers for the order of norms and roundings.
"""

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from ltx_jax.config import GemmaConfig
from ltx_jax.models.rope import Rotary, apply_rotary
from ltx_jax.stack import Entered, run_layers

Hidden = Float[Array, "batch tokens hidden"]
HiddenStates = Float[Array, "states batch tokens hidden"]
AttentionMask = Bool[Array, "batch 1 tokens tokens"]


class Norm(nnx.Module):
    """`x / sqrt(mean(x^2) + eps) * (1 + weight)` over the last axis, in float32: the stored weight is around zero."""

    def __init__(self, dim: int, *, eps: float, rngs: nnx.Rngs):
        self.eps = eps
        self.weight = nnx.Param(nnx.initializers.zeros(rngs.params(), (dim,)))

    def __call__(self, x: Float[Array, "*shape dim"]) -> Float[Array, "*shape dim"]:
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        return (wide * (1.0 + self.weight.get_value().astype(jnp.float32))).astype(x.dtype)


class Attention(nnx.Module):
    """Self-attention where several query heads share a key and value head; queries and keys normalised per head."""

    def __init__(self, config: GemmaConfig, *, rngs: nnx.Rngs):
        self.num_heads = config.num_heads
        self.num_kv_heads = config.num_kv_heads
        self.scale = config.query_scalar**-0.5
        inner, kv_inner = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.to_q = nnx.Linear(config.hidden_dim, inner, use_bias=False, rngs=rngs)
        self.to_k = nnx.Linear(config.hidden_dim, kv_inner, use_bias=False, rngs=rngs)
        self.to_v = nnx.Linear(config.hidden_dim, kv_inner, use_bias=False, rngs=rngs)
        self.to_out = nnx.Linear(inner, config.hidden_dim, use_bias=False, rngs=rngs)
        self.q_norm = Norm(config.head_dim, eps=config.eps, rngs=rngs)
        self.k_norm = Norm(config.head_dim, eps=config.eps, rngs=rngs)

    def __call__(self, x: Hidden, rotary: Rotary, mask: AttentionMask) -> Hidden:
        q = rearrange(self.to_q(x), "b t (h d) -> b t h d", h=self.num_heads)
        k = rearrange(self.to_k(x), "b t (h d) -> b t h d", h=self.num_kv_heads)
        v = rearrange(self.to_v(x), "b t (h d) -> b t h d", h=self.num_kv_heads)
        q, k = apply_rotary(self.q_norm(q), rotary), apply_rotary(self.k_norm(k), rotary)
        y = jax.nn.dot_product_attention(q, k, v, mask=mask, scale=self.scale)
        return self.to_out(rearrange(y, "b t h d -> b t (h d)"))


class FeedForward(nnx.Module):
    """A linear gated by the tanh-approximated GELU of another, and a linear back."""

    def __init__(self, config: GemmaConfig, *, rngs: nnx.Rngs):
        self.gate = nnx.Linear(config.hidden_dim, config.intermediate_dim, use_bias=False, rngs=rngs)
        self.proj_in = nnx.Linear(config.hidden_dim, config.intermediate_dim, use_bias=False, rngs=rngs)
        self.proj_out = nnx.Linear(config.intermediate_dim, config.hidden_dim, use_bias=False, rngs=rngs)

    def __call__(self, x: Hidden) -> Hidden:
        return self.proj_out(jax.nn.gelu(self.gate(x), approximate=True) * self.proj_in(x))


class Layer(nnx.Module):
    """Attention and feed-forward, each normalised before and after; sliding and global layers have one structure."""

    def __init__(self, config: GemmaConfig, *, rngs: nnx.Rngs):
        self.attn = Attention(config, rngs=rngs)
        self.ff = FeedForward(config, rngs=rngs)
        self.pre_attn_norm = Norm(config.hidden_dim, eps=config.eps, rngs=rngs)
        self.post_attn_norm = Norm(config.hidden_dim, eps=config.eps, rngs=rngs)
        self.pre_ff_norm = Norm(config.hidden_dim, eps=config.eps, rngs=rngs)
        self.post_ff_norm = Norm(config.hidden_dim, eps=config.eps, rngs=rngs)

    def __call__(self, x: Hidden, rotary: Rotary, mask: AttentionMask) -> Hidden:
        x = x + self.post_attn_norm(self.attn(self.pre_attn_norm(x), rotary, mask)).astype(x.dtype)
        return x + self.post_ff_norm(self.ff(self.pre_ff_norm(x))).astype(x.dtype)


class Gemma(nnx.Module):
    """The text model of Gemma 3, from token ids to the hidden states of every layer."""

    def __init__(self, config: GemmaConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.embed = nnx.Embed(config.vocab_size, config.hidden_dim, rngs=rngs)
        self.layers = nnx.List([Layer(config, rngs=rngs) for _ in range(config.num_layers)])
        self.norm = Norm(config.hidden_dim, eps=config.eps, rngs=rngs)

    def __call__(
        self, token_ids: Int[Array, "batch tokens"], mask: Bool[Array, "batch tokens"], *, dtype: DTypeLike
    ) -> HiddenStates:
        """Embeddings, then each layer's output, the last one normalised: `num_layers + 1` states.

        `mask` is True at the prompt's tokens. Padding may stand anywhere (the tokenizer pads on the left); it counts
        as positions, and what comes out of padded tokens is finite but means nothing. All computation is in `dtype`,
        whatever the weights are stored in; statistics, softmax and angles are float32.
        """
        entered = self.enter(token_ids, mask, dtype=dtype)
        x, states = run_layers(
            self.layers,
            lambda layer, x, sliding: self.step(layer, x, entered.shared, sliding),
            entered.carry,
            entered.per_layer,
        )
        return self.leave(x, states, entered.rest)

    def enter(
        self, token_ids: Int[Array, "batch tokens"], mask: Bool[Array, "batch tokens"], *, dtype: DTypeLike
    ) -> Entered:
        """All that comes before the layers: embeddings, rotary tables and masks."""
        config = self.config
        # The factor is rounded as the embedding is: 62 rather than 61.97 for the 12 B model in bfloat16.
        x = self.embed(token_ids).astype(dtype) * jnp.asarray(config.hidden_dim**0.5, dtype)

        length = token_ids.shape[1]
        masks = attention_mask(mask), attention_mask(mask, window=config.sliding_window)
        rotary = (
            rotary_tables(length, config.head_dim, theta=config.rope_theta, scale=config.rope_scale, dtype=dtype),
            rotary_tables(length, config.head_dim, theta=config.rope_local_theta, scale=1.0, dtype=dtype),
        )

        return Entered(carry=x, shared=(rotary, masks), per_layer=jnp.asarray(config.sliding_layers), rest=None)

    @staticmethod
    def step(layer: Layer, x: Hidden, shared, sliding: Bool[Array, ""]) -> tuple[Hidden, Hidden]:
        """One layer further, and the state before it."""
        rotary, masks = shared
        layer_rotary, layer_mask = jax.tree.map(
            lambda whole, local: jnp.where(sliding, local, whole), (rotary[0], masks[0]), (rotary[1], masks[1])
        )
        return layer(x, layer_rotary, layer_mask), x

    def leave(self, x: Hidden, states: Float[Array, "layers batch tokens hidden"], rest: None) -> HiddenStates:
        """The states before all layers, and the last layer's output, normalised."""
        return jnp.concatenate([states, self.norm(x)[None]])


def rotary_tables(length: int, head_dim: int, *, theta: float, scale: float, dtype: DTypeLike) -> Rotary:
    """Rotary tables of positions `0 .. length - 1`, divided by `scale`, the same for all heads; angles in float32."""
    frequencies = (theta ** -(np.arange(0, head_dim, 2) / head_dim)).astype(np.float32) / np.float32(scale)
    angles = jnp.arange(length, dtype=jnp.float32)[None, :, None, None] * frequencies
    return Rotary(jnp.cos(angles).astype(dtype), jnp.sin(angles).astype(dtype))


def attention_mask(mask: Bool[Array, "batch tokens"], *, window: int | None = None) -> AttentionMask:
    """Which keys each query reads: itself, and prompt tokens before it that are less than `window` away.

    That a token always reads itself keeps padding finite; a prompt token does so anyway.
    """
    positions = jnp.arange(mask.shape[1])
    distance = positions[:, None] - positions[None, :]
    near = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    return ((mask[:, None, :] & near) | (distance == 0))[:, None]
