"""Training of the transformer: the loss, what is given and not noised, adapters over packed weights."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hlwq_jax import QuantizedLinear
from ltx_jax.config import ConnectorConfig, StreamConfig, TextConnectorsConfig, TransformerConfig
from ltx_jax.geometry import video_positions
from ltx_jax.lora import Factors, add_loras, read_lora
from ltx_jax.models.connector import Contexts, TextConnectors
from ltx_jax.models.transformer import Transformer
from ltx_jax.stack import stack_layers
from ltx_jax.training import flow
from ltx_jax.training.adapters import adapters, add_adapters, write_adapters
from ltx_jax.training.loop import Schedule, Trainer, read_metrics

VIDEO = StreamConfig(
    in_channels=4, out_channels=4, num_heads=2, head_dim=16, context_dim=32, max_pos=(20.0, 512.0, 512.0)
)
AUDIO = replace(VIDEO, head_dim=8, context_dim=16, max_pos=(20.0,))
CONFIG = TransformerConfig(
    num_layers=2, video=VIDEO, audio=AUDIO, eps=1e-6, rope_theta=10000.0, timestep_scale=1000.0,
    av_gate_timestep_scale=1000.0, gated_attention=True,
)  # fmt: skip
CONNECTOR = ConnectorConfig(
    num_layers=1, num_heads=2, head_dim=16, num_registers=4, max_pos=16, rope_theta=10000.0, eps=1e-6,
    gated_attention=True,
)  # fmt: skip
CONNECTORS = TextConnectorsConfig(
    hidden_dim=8, num_hidden_states=2, video=CONNECTOR, audio=replace(CONNECTOR, head_dim=8)
)
EVERYTHING = flow.FlowSettings(image=0.5, given_video=0.2, given_audio=0.2)
NAMES = {
    f"transformer_blocks.{i}.{theirs}": f"blocks.{i}.{ours}"
    for i in range(2)
    for theirs, ours in (("attn1.to_q", "video.self_attn.to_q"), ("ff.net.2", "video.ff.proj_out"))
}


@pytest.fixture(scope="module")
def transformer() -> Transformer:
    made = jax.jit(lambda: Transformer(CONFIG, rngs=nnx.Rngs(0)))()
    flow.start_quietly(made)
    return made


def normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def batch(count: int = 8) -> flow.FlowBatch:
    positions = video_positions((2, 2, 2), fps=8.0, scale=(8, 16, 16))
    seconds = jnp.arange(5.0)[None, :, None, None] * 0.1 + jnp.asarray([0.0, 0.1])
    return flow.FlowBatch(
        video=jnp.repeat(normal(1, 1, 8, 4), count, axis=0),
        audio=jnp.repeat(normal(2, 1, 5, 4), count, axis=0),
        video_positions=jnp.repeat(positions, count, axis=0),
        audio_positions=jnp.repeat(seconds, count, axis=0),
        text=Contexts(normal(3, count, 4, 32), normal(4, count, 4, 16)),
    )


def copied(model: nnx.Module) -> Any:
    return nnx.merge(*nnx.split(model))


def trained(model: nnx.Module, folder: Path, *, steps: int, trainable=nnx.Param, settings=EVERYTHING) -> list[dict]:
    schedule = Schedule(num_steps=steps, learning_rate=1e-2, warmup_steps=2, log_every=steps // 4, average_decay=0.5)
    trainer = Trainer(model, flow.flow_loss(settings), schedule, trainable=trainable)
    trainer.train(lambda step: batch(), folder)
    nnx.update(model, nnx.state(trainer.model(), trainable))
    return read_metrics(folder / "metrics.jsonl")


def test_the_transformer_learns_one_clip(transformer, tmp_path):
    """All samples are one clip, so its velocity can be told from what is noised."""
    lines = trained(flow.DenoisingModel(copied(transformer)), tmp_path, steps=40)
    # A model that says nothing has the variance of noise minus clean: 2 for clips of variance 1.
    assert lines[0]["video"] > 1.2
    assert lines[-1]["video"] < 0.7 * lines[0]["video"]
    assert lines[-1]["audio"] < 0.7 * lines[0]["audio"]


def loss_of(transformer, settings, **changes):
    model = flow.DenoisingModel(transformer, **changes)
    return jax.jit(lambda model, batch, key: flow.flow_loss(settings)(model, batch, key))(
        model, batch(), jax.random.key(5)
    )


def test_a_given_stream_has_no_loss(transformer):
    _, metrics = loss_of(transformer, replace(EVERYTHING, given_video=1.0, given_audio=0.0))
    assert metrics["video"] == 0
    assert metrics["audio"] > 0
    _, metrics = loss_of(transformer, replace(EVERYTHING, given_video=0.0, given_audio=1.0))
    assert metrics["video"] > 0
    assert metrics["audio"] == 0


def test_what_is_given_is_as_often_as_settings_say():
    given = flow.draw_given(jax.random.key(0), 20_000, EVERYTHING)
    # Standard errors of 20,000 draws are below 0.004.
    assert float(given.video.mean()) == pytest.approx(0.2, abs=0.015)
    assert float(given.audio.mean()) == pytest.approx(0.2, abs=0.015)
    assert float(given.image.mean()) == pytest.approx(0.8 * 0.5, abs=0.015)
    assert not bool((given.video & given.audio).any())
    assert not bool((given.video & given.image).any())


def test_tokens_are_noised_at_their_own_levels():
    clean, noise = normal(0, 2, 3, 4), normal(1, 2, 3, 4)
    sigma = jnp.asarray([[0.0, 0.25, 1.0], [0.5, 0.5, 0.5]])
    found = flow.noised(clean, noise, sigma)
    np.testing.assert_array_equal(found[0, 0], clean[0, 0])
    # One rounding: clean + 1 * (noise - clean).
    np.testing.assert_allclose(found[0, 2], noise[0, 2], atol=1e-6)
    np.testing.assert_allclose(found[0, 1], 0.75 * clean[0, 1] + 0.25 * noise[0, 1], atol=1e-6)


def test_the_first_frame_is_where_time_is_zero():
    positions = video_positions((3, 2, 4), fps=24.0, scale=(8, 16, 16))
    np.testing.assert_array_equal(flow.first_frame(positions), np.arange(24) < 8)


def test_levels_are_shifted():
    levels = flow.noise_levels(jax.random.key(0), 20_000, flow.FlowSettings(shift=3.0, uniform=0.0))
    # The shift moves the median of the logistic normal, one half, to 3 / (1 + 3).
    assert float(jnp.median(levels)) == pytest.approx(0.75, abs=0.01)
    flat = flow.noise_levels(jax.random.key(0), 20_000, flow.FlowSettings(uniform=1.0))
    np.testing.assert_allclose(np.quantile(flat, [0.25, 0.5, 0.75]), [0.25, 0.5, 0.75], atol=0.015)


@pytest.mark.parametrize("wrong", [{"image": 1.5}, {"given_video": 0.6, "given_audio": 0.6}, {"shift": 0.0}])
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(ValueError, match=r"expected 0 to 1|at most 1|above 0"):
        flow.FlowSettings(**wrong)


def test_connectors_learn_from_hidden_states(transformer):
    connectors = TextConnectors(CONNECTORS, rngs=nnx.Rngs(1))
    model = flow.DenoisingModel(copied(transformer), connectors)
    mask = jnp.arange(8)[None] >= jnp.asarray([3, 6])[:, None]
    text = flow.TextStates(normal(6, 2, 2, 8, 8), mask)
    contexts = model.contexts(text)
    expected = connectors(jnp.moveaxis(text.hidden, 1, 0), mask)
    np.testing.assert_array_equal(contexts.video, expected.video)
    assert contexts.audio.shape == (2, 8, 16)
    with pytest.raises(ValueError, match="connectors"):
        flow.DenoisingModel(transformer).contexts(text)


def packed_and_stacked(transformer: Transformer) -> Transformer:
    """The same at 5 bits, in the form that a checkpoint is loaded in."""
    model = copied(transformer)
    for block in model.blocks:
        for part, name in ((block.video.self_attn, "to_q"), (block.video.ff, "proj_out")):
            setattr(part, name, QuantizedLinear.from_linear(getattr(part, name)))
    model.blocks = stack_layers(list(model.blocks))
    return model


def test_adapters_learn_over_packed_weights_that_stay(transformer, tmp_path):
    base = packed_and_stacked(transformer)
    model = packed_and_stacked(transformer)
    before = loss_of(base, EVERYTHING)
    assert add_adapters(model, NAMES, rank=2) == len(NAMES)
    added = loss_of(model, EVERYTHING, remat=True)
    np.testing.assert_allclose(added[0], before[0], rtol=1e-5)  # new adapters change nothing; rematerialised, too

    whole = flow.DenoisingModel(model, remat=True)
    # Gates are zero in a new transformer, and hide the blocks from the loss.
    open_gates(model)
    open_gates(base)
    lines = trained(whole, tmp_path, steps=12, trainable=adapters)
    assert lines[-1]["loss"] < lines[0]["loss"]
    for place, variable in nnx.to_flat_state(nnx.state(model, nnx.Not(nnx.Any(Factors, nnx.Param)))):
        unpacked = nnx.to_flat_state(nnx.state(base))
        same = dict(unpacked)[tuple(step for step in place if step != "base")]
        np.testing.assert_array_equal(variable.get_value(), same.get_value())

    write_adapters(tmp_path / "lora.safetensors", model, NAMES)
    assert set(read_lora(tmp_path / "lora.safetensors")) == set(NAMES)
    add_loras(base, [(tmp_path / "lora.safetensors", 1.0)], NAMES)
    found, expected = loss_of(base, EVERYTHING), loss_of(model, EVERYTHING)
    assert abs(float(expected[0] - before[0])) > 1e-3
    # The file holds bfloat16: a part in 256 of what the adapters change.
    np.testing.assert_allclose(found[0], expected[0], rtol=2e-3)


def open_gates(model: Transformer) -> None:
    streams: list[Any] = [model.video, model.audio]
    for stream in streams:
        stream.adaln.linear.bias.set_value(jnp.ones_like(stream.adaln.linear.bias[...]))
        stream.proj_out.kernel.set_value(0.3 * normal(9, *stream.proj_out.kernel.shape))


def test_adapters_that_cannot_be_are_refused(transformer, tmp_path):
    model = packed_and_stacked(transformer)
    with pytest.raises(ValueError, match="no adapters"):
        write_adapters(tmp_path / "lora.safetensors", model, NAMES)
    with pytest.raises(ValueError, match="no linear matches 'conv'"):
        add_adapters(model, NAMES, rank=2, targets="conv")
    with pytest.raises(ValueError, match="at least 1"):
        add_adapters(model, NAMES, rank=0)
    add_adapters(model, NAMES, rank=1)
    with pytest.raises(ValueError, match="has adapters already"):
        add_adapters(model, NAMES, rank=1)
