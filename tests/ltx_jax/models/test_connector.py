"""Feature extractor and connectors against the reference, as lists of blocks and under scan."""

import json
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from convert.tables.connectors import CONNECTORS, PREFIXES
from ltx_jax.config import ConnectorConfig, TextConnectorsConfig
from ltx_jax.models.connector import Connector, TextConnectors
from ltx_jax.models.rope import rotary_tables
from ltx_jax.stack import Stack, stack_layers
from tests.conftest import DATA, fill, read_prefix

# One forward pass in float32: rounding of other summation orders, as the reference's README suggests.
TOLERANCE = 2e-5

ODD = ConnectorConfig(
    num_layers=1,
    num_heads=3,
    head_dim=4,
    num_registers=3,
    max_pos=64,
    rope_theta=10000.0,
    eps=1e-6,
    gated_attention=False,
)
SMALL = TextConnectorsConfig(
    hidden_dim=5, num_hidden_states=3, video=ODD, audio=replace(ODD, num_heads=1, num_layers=2, num_registers=4)
)
MASK = jax.ShapeDtypeStruct((2, 12), jnp.bool)


def load() -> TextConnectors:
    section = json.loads((DATA / "ltx/config.json").read_text())["transformer"]
    config = TextConnectorsConfig.from_metadata(section, num_hidden_states=7)
    tensors = read_prefix(DATA / "ltx/checkpoint.safetensors", "")
    tensors = {name: tensor for name, tensor in tensors.items() if name.startswith(PREFIXES)}
    model: Any = fill(lambda: TextConnectors(config, rngs=nnx.Rngs(0)), CONNECTORS, tensors)
    return model


@pytest.fixture(scope="module")
def connectors() -> TextConnectors:
    model = load()
    model.video.blocks = stack_layers(model.video.blocks)
    model.audio.blocks = stack_layers(model.audio.blocks)
    assert isinstance(model.video.blocks[0], Stack)
    return model


@jax.jit
def run_with_features(model, hidden_states, mask):
    return model.projection(hidden_states, mask), model(hidden_states, mask)


def run(model, hidden_states, mask):
    return run_with_features(model, hidden_states, mask)[1]


@pytest.fixture(scope="module")
def cases(reference) -> dict[str, dict]:
    """Both cases by name: hidden states, mask, and what is expected."""
    gemma, free = reference("gemma_text"), reference("text_connectors")
    gemma_states = np.stack([gemma[f"out.hidden.{i}"] for i in range(7)])
    return {
        name: {
            "hidden_states": jnp.asarray(hidden_states),
            "mask": jnp.asarray(free[f"{prefix}in.attention_mask"].astype(bool)),
            **{key.removeprefix(prefix): value for key, value in free.items() if key.startswith(prefix)},
        }
        for name, prefix, hidden_states in (("gemma", "", gemma_states), ("free", "free.", free["free.in.hidden"]))
    }


@pytest.mark.parametrize("layout", ["list", "scan"])
@pytest.mark.parametrize("name", ["gemma", "free"])
def test_features_and_contexts_agree_with_the_reference(connectors, cases, name, layout):
    case = cases[name]
    model = load() if layout == "list" else connectors
    features, contexts = run_with_features(model, case["hidden_states"], case["mask"])
    for stream in ("video", "audio"):
        expected = case[f"mid.{stream}_features"]
        np.testing.assert_allclose(getattr(features, stream), expected, atol=TOLERANCE, rtol=0, err_msg=stream)
        expected = case[f"out.{stream}_encoding"]
        np.testing.assert_allclose(getattr(contexts, stream), expected, atol=TOLERANCE, rtol=0, err_msg=stream)


def test_hidden_states_of_padding_do_not_matter(connectors, cases):
    case = cases["free"]
    other = jnp.where(case["mask"][..., None], case["hidden_states"], 1e4)
    expected = run(connectors, case["hidden_states"], case["mask"])
    for a, b in zip(run(connectors, other, case["mask"]), expected, strict=True):
        np.testing.assert_array_equal(a, b)


def test_contexts_do_not_depend_on_the_batch_or_on_the_side_of_the_padding(connectors, cases):
    case = cases["gemma"]
    whole = run(connectors, case["hidden_states"], case["mask"])
    # The second prompt, twice, with its padding moved from the left to the right.
    num_tokens = int(case["mask"][1].sum())
    mask = jnp.roll(case["mask"][1], num_tokens)
    states = jnp.roll(case["hidden_states"][:, 1], num_tokens, axis=1)
    assert mask.tolist() == [True] * num_tokens + [False] * (32 - num_tokens)
    found = run(connectors, jnp.stack([states, states], axis=1), jnp.stack([mask, mask]))
    for a, b in zip(found, whole, strict=True):
        np.testing.assert_allclose(a[0], b[1], atol=TOLERANCE, rtol=0)
        np.testing.assert_allclose(a[1], b[1], atol=TOLERANCE, rtol=0)


def test_padding_takes_the_register_of_its_position():
    connector = nnx.eval_shape(lambda: Connector(ODD, rngs=nnx.Rngs(0)))
    registers = np.arange(36, dtype=np.float32).reshape(3, 12)
    connector.registers.set_value(jnp.asarray(registers))
    features = jnp.broadcast_to(100.0 + jnp.arange(6.0)[None, :, None], (1, 6, 12))
    mask = jnp.asarray([[False, True, False, False, True, False]])
    found = connector.replace_padding(features, mask)[0]
    expected = [np.full(12, 101.0), np.full(12, 104.0), registers[2], registers[0], registers[1], registers[2]]
    np.testing.assert_array_equal(found, np.stack(expected))


def test_a_length_that_the_registers_do_not_divide_is_refused():
    connector = nnx.eval_shape(lambda: Connector(ODD, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=r"multiple of 3 tokens.*got 7 tokens"):
        connector.replace_padding(jnp.zeros((1, 7, 12)), jnp.ones((1, 7), bool))


def test_rotary_tables_at_real_width_agree_with_the_reference(reference):
    data = reference("rope")
    fractions = jnp.asarray(data["connector.positions"][:, 0, :, None] / 4096, jnp.float32)
    for stream, dim in (("video", 4096), ("audio", 2048)):
        rotary = rotary_tables(fractions, dim=dim, num_heads=32, theta=10000.0, dtype=jnp.float32)
        for table in ("cos", "sin"):
            expected = data[f"{stream}_connector.{table}"].transpose(0, 2, 1, 3)
            np.testing.assert_allclose(getattr(rotary, table), expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_contexts_have_the_dtype_of_the_hidden_states(dtype):
    model = nnx.eval_shape(lambda: TextConnectors(SMALL, rngs=nnx.Rngs(0)))
    model = jax.tree.map(lambda w: jax.ShapeDtypeStruct(w.shape, jnp.bfloat16), model)
    contexts = jax.eval_shape(run, model, jax.ShapeDtypeStruct((3, 2, 12, 5), dtype), MASK)
    assert contexts.video.dtype == contexts.audio.dtype == dtype


def test_other_sizes_run_without_gates():
    model = nnx.eval_shape(lambda: TextConnectors(SMALL, rngs=nnx.Rngs(0)))
    contexts = jax.eval_shape(run, model, jax.ShapeDtypeStruct((3, 2, 12, 5), jnp.float32), MASK)
    assert contexts.video.shape == (2, 12, 12)
    assert contexts.audio.shape == (2, 12, 4)
    names = {".".join(map(str, path)) for path in nnx.to_flat_state(nnx.state(model))}
    assert not any("gate" in name for name in names)


def test_the_published_configuration_has_the_published_sizes():
    section = {
        "connector_num_layers": 8,
        "connector_num_attention_heads": 32,
        "connector_attention_head_dim": 128,
        "audio_connector_num_attention_heads": 32,
        "audio_connector_attention_head_dim": 64,
        "connector_num_learnable_registers": 128,
        "connector_positional_embedding_max_pos": [4096],
        "connector_apply_gated_attention": True,
        "caption_channels": 3840,
    }
    config = TextConnectorsConfig.from_metadata(section, num_hidden_states=49)
    model = nnx.eval_shape(lambda: TextConnectors(config, rngs=nnx.Rngs(0)))

    def count(part) -> tuple[int, int]:
        leaves = jax.tree.leaves(nnx.state(part))
        return len(leaves), sum(leaf.size for leaf in leaves)

    assert count(model.projection) == (4, 1_156_061_184)
    assert count(model.video) == (129, 1_612_546_304)
    assert count(model.audio) == (129, 403_620_096)
