"""Gemma 3: run once over a prompt as a text encoder, which gives every layer's hidden states; and as a language model.

As a language model it reads tokens on from those it has read before, whose keys and values are kept in a `Cache`, and
gives the logits of the next token. The head is the embedding, transposed.

Source: Gemma 3 technical report, https://arxiv.org/abs/2503.19786; `models/gemma3/modeling_gemma3.py` in
huggingface/transformers for the order of norms and roundings.
"""

from functools import partial
from typing import NamedTuple

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
AttentionMask = Bool[Array, "#batch 1 tokens slots"]


class KeysValues(NamedTuple):
    """One layer's keys, rotated, and values."""

    keys: Float[Array, "batch slots kv_heads head_dim"]
    values: Float[Array, "batch slots kv_heads head_dim"]


class Cache(NamedTuple):
    """The keys and values of all layers. A token lies in the slot of its position, in sliding layers too."""

    keys: Float[Array, "layers batch slots kv_heads head_dim"]
    values: Float[Array, "layers batch slots kv_heads head_dim"]

    @classmethod
    def empty(cls, config: GemmaConfig, num_slots: int, *, dtype: DTypeLike) -> "Cache":
        """Room for `num_slots` tokens of one text."""
        shape = config.num_layers, 1, num_slots, config.num_kv_heads, config.head_dim
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))


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
        q, new = self.project(x, rotary)
        return self.attend(q, new, mask)

    def read_on(
        self, x: Hidden, rotary: Rotary, mask: AttentionMask, past: KeysValues, start: Int[Array, ""]
    ) -> tuple[Hidden, KeysValues]:
        """Attention of tokens from position `start` on to themselves and the past; and their keys and values."""
        # Weights of a wider dtype widen what they give; the cache is as wide as x.
        q, new = jax.tree.map(lambda a: a.astype(x.dtype), self.project(x, rotary))
        both = (jax.lax.dynamic_update_slice_in_dim(old, added, start, 1) for old, added in zip(past, new, strict=True))
        return self.attend(q, KeysValues(*both), mask), new

    def project(self, x: Hidden, rotary: Rotary) -> tuple[Float[Array, "batch tokens heads head_dim"], KeysValues]:
        q = rearrange(self.to_q(x), "b t (h d) -> b t h d", h=self.num_heads)
        k = rearrange(self.to_k(x), "b t (h d) -> b t h d", h=self.num_kv_heads)
        v = rearrange(self.to_v(x), "b t (h d) -> b t h d", h=self.num_kv_heads)
        q, k = apply_rotary(self.q_norm(q), rotary), apply_rotary(self.k_norm(k), rotary)
        return q, KeysValues(k, v)

    def attend(self, q: Float[Array, "batch tokens heads head_dim"], read: KeysValues, mask: AttentionMask) -> Hidden:
        y = jax.nn.dot_product_attention(q, read.keys, read.values, mask=mask, scale=self.scale)
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
        return self.add(x, self.attn(self.pre_attn_norm(x), rotary, mask))

    def read_on(
        self, x: Hidden, rotary: Rotary, mask: AttentionMask, past: KeysValues, start: Int[Array, ""]
    ) -> tuple[Hidden, KeysValues]:
        """As called, for tokens from position `start` on; and their keys and values."""
        y, new = self.attn.read_on(self.pre_attn_norm(x), rotary, mask, past, start)
        return self.add(x, y), new

    def add(self, x: Hidden, attended: Hidden) -> Hidden:
        """What attention gave, and then what the feed-forward gives, added to x."""
        x = x + self.post_attn_norm(attended).astype(x.dtype)
        return x + self.post_ff_norm(self.ff(self.pre_ff_norm(x))).astype(x.dtype)


class Gemma(nnx.Module):
    """The text model of Gemma 3: called, from token ids to the hidden states of every layer; `read_on` to logits."""

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
        masks = attention_mask(mask), attention_mask(mask, window=self.config.sliding_window)
        rotary = self.rotary_tables(token_ids.shape[1], dtype=dtype)
        sliding = jnp.asarray(self.config.sliding_layers)
        return Entered(
            carry=self.embedded(token_ids, dtype=dtype), shared=(rotary, masks), per_layer=sliding, rest=None
        )

    @staticmethod
    def step(layer: Layer, x: Hidden, shared, sliding: Bool[Array, ""]) -> tuple[Hidden, Hidden]:
        """One layer further, and the state before it."""
        rotary, masks = shared
        return layer(x, *of_layer(rotary, masks, sliding)), x

    def leave(self, x: Hidden, states: Float[Array, "layers batch tokens hidden"], rest: None) -> HiddenStates:
        """The states before all layers, and the last layer's output, normalised."""
        return jnp.concatenate([states, self.norm(x)[None]])

    def read_on(
        self,
        token_ids: Int[Array, "batch tokens"],
        cache: Cache,
        start: Int[Array, ""],
        last: Int[Array, ""],
        *,
        dtype: DTypeLike,
    ) -> tuple[Float[Array, "batch vocab"], Cache]:
        """The float32 logits of what follows token `last` of these, and the cache with these tokens in it.

        The tokens stand at the positions from `start` on, below which the cache is filled; what it holds above is not
        read. Tokens after `last` may be padding: they change no logits, and later tokens take their slots. Nothing is
        checked: the cache needs `start + tokens` slots at least.
        """
        entered = self.enter_on(token_ids, start, num_slots=cache.keys.shape[2], dtype=dtype)
        x, new = run_layers(
            self.layers,
            lambda layer, x, of_layer: self.step_on(layer, x, entered.shared, of_layer),
            entered.carry,
            (entered.per_layer, cache),
        )
        return self.leave_on(x, new, cache, start, last)

    def enter_on(
        self, token_ids: Int[Array, "batch tokens"], start: Int[Array, ""], *, num_slots: int, dtype: DTypeLike
    ) -> Entered:
        """All that comes before the layers in `read_on`; the layers also need the cache."""
        config = self.config
        length = token_ids.shape[1]
        distance = start + jnp.arange(length)[:, None] - jnp.arange(num_slots)[None, :]
        masks = reach(distance)[None, None], reach(distance, window=config.sliding_window)[None, None]
        rotary = self.rotary_tables(length, start=start, dtype=dtype)
        return Entered(
            carry=self.embedded(token_ids, dtype=dtype),
            shared=(rotary, masks, start),
            per_layer=jnp.asarray(config.sliding_layers),
            rest=None,
        )

    @staticmethod
    def step_on(layer: Layer, x: Hidden, shared, per_layer) -> tuple[Hidden, KeysValues]:
        """One layer further in `read_on`, and the keys and values of the new tokens."""
        rotary, masks, start = shared
        sliding, past = per_layer
        return layer.read_on(x, *of_layer(rotary, masks, sliding), KeysValues(*past), start)

    def leave_on(
        self, x: Hidden, new: KeysValues, cache: Cache, start: Int[Array, ""], last: Int[Array, ""]
    ) -> tuple[Float[Array, "batch vocab"], Cache]:
        """The logits of token `last`, and the cache with the new keys and values of all layers."""
        x = self.norm(jax.lax.dynamic_index_in_dim(x, last, axis=1, keepdims=False))
        # Apart from the embedding of one token, with which the compiler would share a float32 copy of all of it: 4 GB.
        head = jax.lax.optimization_barrier(self.embed.embedding.get_value()).astype(x.dtype)
        logits = jnp.einsum("bd,vd->bv", x, head, preferred_element_type=jnp.float32)
        filled = (jax.lax.dynamic_update_slice_in_dim(old, add, start, 2) for old, add in zip(cache, new, strict=True))
        return logits, Cache(*filled)

    def embedded(self, token_ids: Int[Array, "batch tokens"], *, dtype: DTypeLike) -> Hidden:
        # The factor is rounded as the embedding is: 62 rather than 61.97 for the 12 B model in bfloat16.
        return self.embed(token_ids).astype(dtype) * jnp.asarray(self.config.hidden_dim**0.5, dtype)

    def rotary_tables(self, length: int, *, start: Int[Array, ""] | int = 0, dtype: DTypeLike) -> tuple[Rotary, Rotary]:
        """Those of global layers and those of sliding layers."""
        config = self.config
        tables = partial(rotary_tables, length, config.head_dim, start=start, dtype=dtype)
        return (
            tables(theta=config.rope_theta, scale=config.rope_scale),
            tables(theta=config.rope_local_theta, scale=1.0),
        )


def of_layer(
    rotary: tuple[Rotary, Rotary], masks: tuple[AttentionMask, AttentionMask], sliding: Bool[Array, ""]
) -> tuple[Rotary, AttentionMask]:
    """The rotary tables and the mask of one layer, from those of global and of sliding layers."""
    return jax.tree.map(
        lambda whole, local: jnp.where(sliding, local, whole), (rotary[0], masks[0]), (rotary[1], masks[1])
    )


def rotary_tables(
    length: int, head_dim: int, *, theta: float, scale: float, dtype: DTypeLike, start: Int[Array, ""] | int = 0
) -> Rotary:
    """Rotary tables of `length` positions from `start` on, divided by `scale`, for all heads; angles in float32."""
    frequencies = (theta ** -(np.arange(0, head_dim, 2) / head_dim)).astype(np.float32) / np.float32(scale)
    angles = (start + jnp.arange(length, dtype=jnp.float32))[None, :, None, None] * frequencies
    return Rotary(jnp.cos(angles).astype(dtype), jnp.sin(angles).astype(dtype))


def attention_mask(mask: Bool[Array, "batch tokens"], *, window: int | None = None) -> AttentionMask:
    """Which keys each query reads: itself, and prompt tokens before it that are less than `window` away.

    That a token always reads itself keeps padding finite; a prompt token does so anyway.
    """
    positions = jnp.arange(mask.shape[1])
    distance = positions[:, None] - positions[None, :]
    return ((mask[:, None, :] & reach(distance, window=window)) | (distance == 0))[:, None]


def reach(distance: Int[Array, "tokens slots"], *, window: int | None = None) -> Bool[Array, "tokens slots"]:
    """Which keys so many positions before each query it may read: itself and those before, less than `window` away."""
    return distance >= 0 if window is None else (distance >= 0) & (distance < window)
