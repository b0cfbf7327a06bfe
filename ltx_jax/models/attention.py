"""Multi-head attention with RMS-normalised queries and keys, rotary positions and a gate per head; feed-forward.

Source: `attention.py` and `feed_forward.py` in Lightricks/LTX-2; Vaswani et al., https://arxiv.org/abs/1706.03762.
"""

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from ltx_jax.models.rope import Rotary, apply_rotary

Tokens = Float[Array, "batch tokens channels"]


def mask_to_bias(mask: Float[Array, "batch queries keys"]) -> Float[Array, "batch 1 queries keys"]:
    """What is added to attention scores for a mask in [0, 1]: `log(mask)`, the smallest finite number where it is 0."""
    mask = mask.astype(jnp.float32)
    bias = jnp.where(mask > 0, jnp.log(jnp.maximum(mask, jnp.finfo(jnp.float32).tiny)), jnp.finfo(jnp.float32).min)
    return bias[:, None]


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
        bias: Float[Array, "#batch 1 #queries keys"] | None = None,
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
        y = jax.nn.dot_product_attention(q, k, v, bias=bias)
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
