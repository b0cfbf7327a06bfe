"""The losses of the text encoder as a language model, and of the latent upscaler."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ltx_jax.config import GemmaConfig, UpscalerConfig
from ltx_jax.models.gemma import Gemma
from ltx_jax.models.upscaler import LatentUpscaler, upscale
from ltx_jax.models.video_vae import Statistics
from ltx_jax.training.language import Texts, language_loss
from ltx_jax.training.loop import Schedule, Trainer, read_metrics
from ltx_jax.training.upscaling import LatentPairs, upscaler_loss

GEMMA = GemmaConfig(
    vocab_size=12, hidden_dim=16, intermediate_dim=32, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8,
    query_scalar=8.0, sliding_window=4, sliding_layers=(False,), rope_theta=10000.0, rope_local_theta=10000.0,
    rope_scale=1.0, eps=1e-6,
)  # fmt: skip


def texts() -> Texts:
    """A walk through the vocabulary, padded on the left."""
    token_ids = jnp.asarray([[0, 0, 5, 6, 7, 8], [0, 2, 3, 4, 5, 6]])
    return Texts(token_ids, jnp.asarray([[0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1]], bool))


def test_a_language_model_learns_what_follows(tmp_path):
    trainer = Trainer(
        Gemma(GEMMA, rngs=nnx.Rngs(0)),
        language_loss,
        Schedule(num_steps=40, learning_rate=2e-2, warmup_steps=2, log_every=4),
    )
    trainer.train(lambda step: texts(), tmp_path)
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert lines[-1]["foretold"] == 1
    assert lines[-1]["loss"] < 0.2 * lines[0]["loss"]


def test_padding_is_not_foretold():
    model = Gemma(GEMMA, rngs=nnx.Rngs(0))
    given = texts()
    other = given._replace(token_ids=jnp.where(given.mask, given.token_ids, 9))
    loss = jax.jit(lambda model, batch: language_loss(model, batch, jax.random.key(0))[0])
    # Another sum of the same terms: padded tokens still take part in the arithmetic, with weights of zero.
    assert float(loss(model, given)) == pytest.approx(float(loss(model, other)), rel=1e-5)


def test_an_upscaler_learns(tmp_path):
    config = UpscalerConfig.from_metadata(
        {
            "_class_name": "LatentUpsampler", "in_channels": 4, "mid_channels": 32, "num_blocks_per_stage": 1,
            "dims": 3, "spatial_upsample": True, "temporal_upsample": False, "spatial_scale": 2.0,
            "rational_resampler": False,
        }
    )  # fmt: skip
    statistics = Statistics(4)
    statistics.std.set_value(jnp.full(4, 2.0))
    small = jax.random.normal(jax.random.key(0), (2, 2, 2, 3, 4))
    pairs = LatentPairs(small, jnp.repeat(jnp.repeat(small, 2, axis=2), 2, axis=3))
    model = LatentUpscaler(config, rngs=nnx.Rngs(0))
    difference = upscale(model, statistics, pairs.small) - pairs.large
    value, metrics = upscaler_loss(statistics)(model, pairs, jax.random.key(0))
    np.testing.assert_allclose(metrics["error"], jnp.mean(jnp.abs(difference)), rtol=1e-5)
    np.testing.assert_allclose(value, metrics["error"] + metrics["squared"], rtol=1e-6)
    trainer = Trainer(model, upscaler_loss(statistics), Schedule(num_steps=20, learning_rate=3e-3, warmup_steps=2,
                                                                 log_every=2))  # fmt: skip
    trainer.train(lambda step: pairs, tmp_path)
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert lines[-1]["error"] < 0.6 * lines[0]["error"]
