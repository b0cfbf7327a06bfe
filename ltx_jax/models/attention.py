"""Multi-head attention with RMS-normalised queries and keys, rotary positions and a gate per head; feed-forward.

The scores of all queries with all keys are never in memory for long sequences: see `attend`.

Source: `attention.py` and `feed_forward.py` in Lightricks/LTX-2; Vaswani et al., https://arxiv.org/abs/1706.03762.
"""

from functools import cache
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float, Int

from ltx_jax.models.rope import Rotary, apply_rotary

Tokens = Float[Array, "batch tokens channels"]
Queries = Float[Array, "batch queries heads head_dim"]
Keys = Float[Array, "batch keys heads head_dim"]
ScoreBias = Float[Array, "#batch 1 #queries keys"]

# chunked: XLA's own, queries in slices where there are many scores; cudnn: the fused kernel of NVIDIA's library.
AttentionForm = Literal["chunked", "cudnn"]
ATTENTION_FORMS: tuple[AttentionForm, ...] = get_args(AttentionForm)

SLICE_BYTES = 2**28  # of float32 scores that one sample, or one slice of its queries, may need


class GroupBias(NamedTuple):
    """A bias that only the groups of query and key decide; never in memory as a whole where there are many tokens."""

    table: Float[Array, "groups groups"]
    group: Int[Array, " tokens"]

    def rows(self, group: Int[Array, " queries"]) -> Float[Array, "1 1 queries tokens"]:
        """The bias of queries of these groups to all tokens."""
        return self.table[group][:, self.group][None, None]


def mask_to_bias(mask: Float[Array, "batch queries keys"]) -> Float[Array, "batch 1 queries keys"]:
    """What is added to attention scores for a mask in [0, 1]: `log(mask)`, the smallest finite number where it is 0."""
    return log_mask(mask)[:, None]


def log_mask(mask: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """`log(mask)` of a mask in [0, 1], the smallest finite number where it is 0."""
    mask = mask.astype(jnp.float32)
    return jnp.where(mask > 0, jnp.log(jnp.maximum(mask, jnp.finfo(jnp.float32).tiny)), jnp.finfo(jnp.float32).min)


def attend(
    q: Queries, k: Keys, v: Keys, *, bias: ScoreBias | GroupBias | None = None, form: AttentionForm = "chunked"
) -> Queries:
    """Softmax attention of every head, scores in float32; `bias` is added to them.

    "cudnn" needs a card and 16-bit values, and so leaves float32 and biased attention to "chunked".
    """
    if form == "cudnn" and bias is None and q.dtype != jnp.float32:
        return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")
    groups = bias if isinstance(bias, GroupBias) else None
    dense = None if isinstance(bias, GroupBias) else bias
    queries, keys = q.shape[1], k.shape[1]
    size = SLICE_BYTES // (4 * q.shape[2] * keys)  # queries a slice
    if size >= queries:
        if groups is not None:
            dense = groups.rows(groups.group)
        return jax.nn.dot_product_attention(q, k, v, bias=dense)
    size = max(size // 64, 1) * 64
    num_slices = -(-queries // size)
    padding = num_slices * size - queries

    def one_sample(arrays):  # one sample's tokens: `[tokens, heads, head_dim]`
        q, k, v, bias = arrays
        q = jnp.pad(q, ((0, padding), (0, 0), (0, 0)))
        slices = rearrange(q, "(n s) h d -> n s h d", s=size)
        if groups is not None:
            rows, group = groups.rows, rearrange(jnp.pad(groups.group, (0, padding)), "(n s) -> n s", s=size)
            y = jax.lax.map(
                lambda one: jax.nn.dot_product_attention(one[0], k, v, bias=rows(one[1])[0]), (slices, group)
            )
        elif bias is None or bias.shape[1] == 1:  # one row of bias serves all queries
            y = jax.lax.map(lambda q: jax.nn.dot_product_attention(q, k, v, bias=bias), slices)
        else:
            bias = rearrange(jnp.pad(bias, ((0, 0), (0, padding), (0, 0))), "one (n s) k -> n one s k", s=size)
            y = jax.lax.map(lambda one: jax.nn.dot_product_attention(one[0], k, v, bias=one[1]), (slices, bias))
        return rearrange(y, "n s h d -> (n s) h d")[:queries]

    if dense is not None:
        dense = jnp.broadcast_to(dense, (q.shape[0], *dense.shape[1:]))
    return jax.lax.map(one_sample, (q, k, v, dense))


@cache
def has_cudnn_attention(device: jax.Device) -> bool:
    """Whether cuDNN's attention runs on a device at hand with this model's head sizes, and agrees with XLA's."""
    if device.platform != "gpu":
        return False
    keys = jax.random.split(jax.random.key(0), 3)
    with jax.default_device(device):
        for head_dim in (64, 128):
            q, k, v = (jax.random.normal(key, (1, 192, 4, head_dim), jnp.bfloat16) for key in keys)
            try:
                fused = attend(q, k, v, form="cudnn")
            except Exception:  # a missing library, an old card or driver: each fails in its own way
                return False
            # Both round their result to bfloat16, after sums in float32 in another order.
            difference = jnp.max(jnp.abs(fused.astype(jnp.float32) - attend(q, k, v).astype(jnp.float32)))
            if not float(difference) < 0.02:
                return False
    return True


def set_attention_form(model: nnx.Module, form: AttentionForm) -> None:
    """Sets the form of every `Attention` of a model, in place."""
    if form not in ATTENTION_FORMS:
        raise ValueError(f"the attention form must be one of {', '.join(ATTENTION_FORMS)}, got {form!r}")
    for _, module in nnx.iter_modules(model):
        if isinstance(module, Attention):
            module.form = form


class Attention(nnx.Module):
    """Attention from `x` (queries) to `context` (keys and values); the gate reads `x`.

    Queries and keys are normalised over the full inner width, all heads together.
    """

    def __init__(
        self,
        dim: int,
        context_dim: int,
        *,
        num_heads: int,
        head_dim: int,
        eps: float,
        gated: bool,
        rngs: nnx.Rngs,
    ):
        inner = num_heads * head_dim
        self.num_heads = num_heads
        self.form: AttentionForm = "chunked"
        self.to_q = nnx.Linear(dim, inner, rngs=rngs)
        self.to_k = nnx.Linear(context_dim, inner, rngs=rngs)
        self.to_v = nnx.Linear(context_dim, inner, rngs=rngs)
        self.to_out = nnx.Linear(inner, dim, rngs=rngs)
        self.q_norm = nnx.RMSNorm(inner, epsilon=eps, rngs=rngs)
        self.k_norm = nnx.RMSNorm(inner, epsilon=eps, rngs=rngs)
        self.to_gate_logits = nnx.Linear(dim, num_heads, rngs=rngs) if gated else None

    def __call__(
        self,
        x: Tokens,
        context: Float[Array, "batch keys context_dim"],
        *,
        rotary: Rotary | None = None,
        context_rotary: Rotary | None = None,
        bias: Float[Array, "#batch 1 #queries keys"] | GroupBias | None = None,
        keep: Float[Array, "batch"] | None = None,
    ) -> Tokens:
        """Attends. `context_rotary` defaults to `rotary`; `bias` is added to the scores of every head.

        `keep` is spatio-temporal guidance: where a sample's value is 0 the attention is replaced by the values.
        """
        q = self.q_norm(self.to_q(x)).astype(x.dtype)
        k = self.k_norm(self.to_k(context)).astype(x.dtype)
        v = self.to_v(context).astype(x.dtype)
        q, k, v = (rearrange(y, "b t (h d) -> b t h d", h=self.num_heads) for y in (q, k, v))
        if rotary is not None:
            q, k = apply_rotary(q, rotary), apply_rotary(k, context_rotary or rotary)
        y = attend(q, k, v, bias=bias, form=self.form)
        if keep is not None:
            kept = keep.astype(y.dtype)[:, None, None, None]
            y = kept * y + (1 - kept) * v
        if self.to_gate_logits is not None:
            y = y * (2 * jax.nn.sigmoid(self.to_gate_logits(x)))[..., None]
        return self.to_out(rearrange(y, "b t h d -> b t (h d)"))


class FeedForward(nnx.Module):
    """Two linears with a tanh-approximated GELU between, four times as wide inside."""

    def __init__(self, dim: int, *, rngs: nnx.Rngs):
        self.proj_in = nnx.Linear(dim, 4 * dim, rngs=rngs)
        self.proj_out = nnx.Linear(4 * dim, dim, rngs=rngs)

    def __call__(self, x: Tokens) -> Tokens:
        return self.proj_out(jax.nn.gelu(self.proj_in(x), approximate=True))
