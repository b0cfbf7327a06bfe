"""Gemma against the reference, as a list of layers and under scan."""

import json
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from convert.mapping import plan
from convert.tables.gemma import GEMMA
from ltx_jax.config import GemmaConfig
from ltx_jax.models.gemma import Gemma, attention_mask, rotary_tables
from ltx_jax.stack import Stack, stack_layers
from tests.conftest import DATA, fill, read_prefix

# One forward pass in float32: rounding of other summation orders, as the reference's README suggests.
TOLERANCE = 2e-5

SMALL = GemmaConfig(
    vocab_size=50,
    hidden_dim=24,
    intermediate_dim=40,
    num_layers=4,
    num_heads=6,
    num_kv_heads=2,
    head_dim=8,
    query_scalar=12.0,
    sliding_window=3,
    sliding_layers=(True, False, True, False),
    rope_theta=1e6,
    rope_local_theta=1e4,
    rope_scale=8.0,
    eps=1e-6,
)


def load() -> Gemma:
    config = GemmaConfig.from_metadata(json.loads((DATA / "ltx/gemma_config.json").read_text()))
    tensors = read_prefix(DATA / "ltx/gemma.safetensors", "language_model.model.")
    model: Any = fill(lambda: Gemma(config, rngs=nnx.Rngs(0)), GEMMA, tensors)
    return model


def stacked(gemma: Gemma) -> Gemma:
    gemma.layers = stack_layers(gemma.layers)
    return gemma


@partial(jax.jit, static_argnames="dtype")
def run(gemma, token_ids, mask, dtype=jnp.float32):
    return gemma(token_ids, mask, dtype=dtype)


@pytest.fixture(scope="module")
def data(reference) -> dict[str, np.ndarray]:
    return reference("gemma_text")


@pytest.fixture(scope="module")
def inputs(data) -> tuple[jax.Array, jax.Array]:
    return jnp.asarray(data["in.input_ids"]), jnp.asarray(data["in.attention_mask"].astype(bool))


@pytest.fixture(scope="module")
def gemma() -> Gemma:
    return stacked(load())


@pytest.fixture(scope="module")
def states(gemma, inputs) -> jax.Array:
    return run(gemma, *inputs)


def abstract(config: GemmaConfig) -> Gemma:
    return nnx.eval_shape(lambda: Gemma(config, rngs=nnx.Rngs(0)))


def random_small() -> Gemma:
    rng = np.random.default_rng(0)
    model = abstract(SMALL)
    return jax.tree.map(lambda w: jnp.asarray(rng.normal(size=w.shape, scale=0.3), w.dtype), model)


@pytest.fixture(scope="module")
def small() -> Gemma:
    return stacked(random_small())


def test_sliding_and_global_layers_make_one_stack():
    layers: Any = stack_layers(abstract(SMALL).layers)
    assert len(layers) == 1
    assert isinstance(layers[0], Stack)
    assert layers[0].num_layers == 4


@pytest.mark.parametrize("layout", ["list", "scan"])
def test_all_hidden_states_agree_with_the_reference(layout, states, data, inputs):
    mask = np.asarray(inputs[1])
    if layout == "list":
        states = run(load(), *inputs)
    assert states.shape == (7, 2, 32, 32)
    for i, state in enumerate(states):
        np.testing.assert_allclose(state[mask], data[f"out.hidden.{i}"][mask], atol=TOLERANCE, rtol=0, err_msg=str(i))


def test_padding_is_finite(states):
    assert np.isfinite(states).all()


def test_a_prompt_does_not_depend_on_its_batch(gemma, states, inputs):
    token_ids, mask = inputs
    alone = run(gemma, token_ids[1:], mask[1:])
    np.testing.assert_allclose(alone[:, 0], states[:, 1], atol=TOLERANCE, rtol=0)


def test_the_token_under_the_padding_does_not_matter(gemma, states, inputs):
    token_ids, mask = inputs
    other = run(gemma, jnp.where(mask, token_ids, 7), mask)
    np.testing.assert_array_equal(other[:, mask], states[:, mask])


def test_a_row_of_nothing_but_padding_is_finite(gemma, inputs):
    assert np.isfinite(run(gemma, inputs[0], jnp.zeros_like(inputs[1]))).all()


@pytest.mark.parametrize("weights", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_activations_keep_their_dtype_whatever_the_weights_are_stored_in(weights, dtype):
    model = jax.tree.map(lambda w: jax.ShapeDtypeStruct(w.shape, weights), abstract(SMALL))
    for layers in (model.layers, stack_layers(model.layers)):
        model.layers = layers
        row = jax.ShapeDtypeStruct((1, 12), jnp.int32), jax.ShapeDtypeStruct((1, 12), jnp.bool)
        assert jax.eval_shape(partial(run, dtype=dtype), model, *row).dtype == dtype


def test_the_embedding_factor_is_rounded_to_the_dtype_of_the_activations(small):
    token_ids, mask = jnp.arange(12)[None], jnp.ones((1, 12), bool)
    states = run(small, token_ids, mask, dtype=jnp.bfloat16)
    embedding = small.embed.embedding.get_value()[:12].astype(jnp.bfloat16)
    factor = jnp.bfloat16(24**0.5)
    assert float(factor) == 4.90625  # 4.89898 before rounding; for the 12 B model 62 instead of 61.97
    np.testing.assert_array_equal(states[0, 0], embedding * factor)


def test_attention_masks_on_a_padded_row():
    mask = jnp.asarray([[False, False, True, True, True, True]])
    whole = attention_mask(mask)[0, 0].astype(int).tolist()
    assert whole == [
        [1, 0, 0, 0, 0, 0],  # padding reads itself
        [0, 1, 0, 0, 0, 0],
        [0, 0, 1, 0, 0, 0],
        [0, 0, 1, 1, 0, 0],
        [0, 0, 1, 1, 1, 0],
        [0, 0, 1, 1, 1, 1],
    ]
    near = attention_mask(mask, window=2)[0, 0].astype(int).tolist()
    assert near[4:] == [[0, 0, 0, 1, 1, 0], [0, 0, 0, 0, 1, 1]]


def test_rotary_tables_of_scaled_positions_are_those_of_smaller_positions():
    scaled = rotary_tables(17, 8, theta=1e6, scale=8.0, dtype=jnp.float32)
    plain = rotary_tables(17, 8, theta=1e6, scale=1.0, dtype=jnp.float32)
    np.testing.assert_allclose(scaled.cos[:, ::8], plain.cos[:, :3], atol=1e-7)
    np.testing.assert_allclose(scaled.sin[:, 8, 0, 0], np.sin(1.0), atol=1e-7)


def test_a_change_reaches_only_later_tokens_and_at_most_a_window_further_a_sliding_layer(small):
    """Layers 0 and 2 slide over 3 tokens, layers 1 and 3 read everything before them."""
    token_ids, mask = jnp.arange(12)[None], jnp.ones((1, 12), bool)
    change = jnp.abs(run(small, token_ids, mask) - run(small, token_ids.at[0, 4].set(49), mask)).max(axis=(1, 3)) > 0
    assert change[0].tolist() == [i == 4 for i in range(12)]
    assert change[1].tolist() == [4 <= i < 7 for i in range(12)]
    assert change[2].tolist() == [i >= 4 for i in range(12)]


def test_the_published_configuration_has_the_published_size():
    config = GemmaConfig.from_metadata(
        {
            "model_type": "gemma3",
            "text_config": {
                "hidden_size": 3840,
                "intermediate_size": 15360,
                "model_type": "gemma3_text",
                "num_attention_heads": 16,
                "num_hidden_layers": 48,
                "num_key_value_heads": 8,
                "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
                "sliding_window": 1024,
            },
        }
    )
    assert sum(config.sliding_layers) == 40
    # All layers are alike; building all 48 takes ten seconds.
    models = [abstract(replace(config, num_layers=n, sliding_layers=(True,) * n)) for n in (1, 2)]
    one, two = (sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model))) for model in models)
    assert one + 47 * (two - one) == 11_766_034_176
    row = jax.ShapeDtypeStruct((1, 1024), jnp.int32), jax.ShapeDtypeStruct((1, 1024), jnp.bool)
    states = jax.eval_shape(partial(run, dtype=jnp.bfloat16), models[1], *row)
    assert (states.shape, states.dtype) == ((3, 1, 1024, 3840), jnp.bfloat16)


def test_a_missing_and_an_unknown_tensor_are_named():
    state = nnx.state(abstract(SMALL))
    target = {".".join(map(str, k)): v.get_value().shape for k, v in nnx.to_flat_state(state)}
    found = plan(GEMMA, {"layers.0.self_attn.q_proj.weight": (48, 24), "layers.0.self_attn.q_proj.bias": (48,)}, target)
    assert found.unknown == ["layers.0.self_attn.q_proj.bias"]
    assert "layers.3.mlp.down_proj.weight" in found.missing
    assert "embed_tokens.weight" in found.missing
    assert not any("no rule" in name for name in found.missing)
