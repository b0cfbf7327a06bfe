"""The loss of a language model, with which a small text encoder learns what its words mean to each other.

Source: Gemma 3 technical report, https://arxiv.org/abs/2503.19786; cross-entropy of the next token.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from ltx_jax.models.gemma import Gemma
from ltx_jax.training.loop import Metrics


class Texts(NamedTuple):
    """Prompts as token ids, padded; `mask` is True at their tokens."""

    token_ids: Int[Array, "batch tokens"]
    mask: Bool[Array, "batch tokens"]


def language_loss(model: Gemma, batch: Texts, key: jax.Array) -> tuple[Array, Metrics]:
    """Cross-entropy in nats of every token behind another, and the share of them that is foretold."""
    states = model(batch.token_ids, batch.mask, dtype=jnp.float32)
    logits = states[-1] @ model.embed.embedding[...].T
    counted = batch.mask[:, :-1] & batch.mask[:, 1:]
    following = batch.token_ids[:, 1:]
    nats = -jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), following[..., None], axis=-1)[..., 0]
    total = jnp.maximum(jnp.sum(counted), 1)
    foretold = jnp.sum((jnp.argmax(logits[:, :-1], axis=-1) == following) & counted) / total
    return jnp.sum(jnp.where(counted, nats, 0)) / total, {"foretold": foretold}
