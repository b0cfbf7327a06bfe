"""Layers streamed from host memory: the same bits as resident ones, two of them on the device at most."""

import json
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hlwq_jax import quantize_linears
from ltx_jax import offload
from ltx_jax.abstract import abstract
from ltx_jax.config import GemmaConfig, TransformerConfig
from ltx_jax.models.gemma import Gemma
from ltx_jax.models.transformer import Keep, StreamInput, Transformer
from ltx_jax.offload import HostLayers, Layout, run_layer
from ltx_jax.stack import stack_layers
from tests.conftest import DATA

# ------------------------------------------------------------------ models


def randomize(model: Any, dtype: Any) -> Any:
    """Random values of a trained model's size in a model of shapes."""
    generator = np.random.default_rng(0)
    for _, variable in nnx.iter_graph(model):
        if isinstance(variable, nnx.Variable):
            shape = variable.get_value().shape
            scale = shape[0] ** -0.5 if len(shape) > 1 else 0.3
            variable.set_value(jnp.asarray(scale * generator.standard_normal(shape), dtype))
    return model


def transformer(heads: int, head_dim: int, audio_head_dim: int, *, dtype: Any, bits: tuple[int | None, ...]):
    """A transformer with as many blocks as `bits` has numbers, each packed in so many bits (None: plain)."""
    config = TransformerConfig.from_metadata(json.loads((DATA / "ltx/config.json").read_text())["transformer"])
    config = replace(
        config,
        num_layers=len(bits),
        video=replace(config.video, num_heads=heads, head_dim=head_dim, context_dim=heads * head_dim),
        audio=replace(config.audio, num_heads=heads, head_dim=audio_head_dim, context_dim=heads * audio_head_dim),
    )
    model = randomize(abstract(lambda rngs: Transformer(config, rngs=rngs)), dtype)
    pack_layers(model.blocks, bits)
    return model


def transformer_inputs(config: TransformerConfig, dtype: Any):
    generator = np.random.default_rng(1)

    def stream(of, tokens: int) -> StreamInput:
        return StreamInput(
            tokens=jnp.asarray(generator.standard_normal((2, tokens, of.in_channels)), dtype),
            timesteps=jnp.asarray(generator.random((2, 3)), jnp.float32),
            level=jnp.asarray(generator.integers(0, 3, tokens)),
            sigma=jnp.asarray(generator.random(2), jnp.float32),
            positions=jnp.asarray(generator.random((1, tokens, len(of.max_pos), 2)), jnp.float32),
            context=jnp.asarray(generator.standard_normal((2, 5, of.context_dim)), dtype),
        )

    keep = Keep(*(jnp.asarray(generator.integers(0, 2, (config.num_layers, 2)), jnp.float32) for _ in range(4)))
    return stream(config.video, 24), stream(config.audio, 7), keep


@jax.jit
def predict(model, video, audio, keep):
    return model(video, audio, keep=keep)


@jax.jit
def enter(model, video, audio, keep):
    return model.enter(video, audio, keep=keep)


GEMMA = GemmaConfig(
    vocab_size=50,
    hidden_dim=48,
    intermediate_dim=80,
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


@partial(jax.jit, static_argnames="dtype")
def read(model, token_ids, mask, *, dtype):
    return model(token_ids, mask, dtype=dtype)


@partial(jax.jit, static_argnames="dtype")
def enter_gemma(model, token_ids, mask, *, dtype):
    return model.enter(token_ids, mask, dtype=dtype)


@jax.jit
def leave(model, carry, outs, rest):
    return model.leave(carry, outs, rest)


@partial(jax.jit, static_argnames="step")
def one(layer, carry, shared, x, *, step):
    return step(layer, carry, shared, x)


def assert_same_bits(ours, theirs):
    for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        x, y = np.asarray(x), np.asarray(y)
        assert x.dtype == y.dtype
        assert np.isfinite(x.astype(np.float32)).all()
        assert x.tobytes() == y.tobytes()


def three_forms(model, layers, step, enter, scanned) -> None:
    """Each layer a program of its own, all in one program under scan, and streamed: all the same bits."""
    entered = enter()
    carry, outs = entered.carry, []
    for index, layer in enumerate(layers):
        x = jax.tree.map(lambda a, i=index: a[i], entered.per_layer)
        carry, out = one(layer, carry, entered.shared, x, step=step)
        outs.append(out)
    outs = jax.tree.map(lambda *parts: jnp.stack(parts), *outs)
    single = leave(model, carry, outs, entered.rest)
    assert_same_bits(scanned(), single)
    entered = enter()
    host = HostLayers(layers)
    carry, outs = host.run(step, entered.carry, entered.shared, entered.per_layer)
    assert_same_bits(leave(model, carry, outs, entered.rest), single)


def check_transformer(*sizes: int, dtype: Any, bits: tuple[int | None, ...], num_runs: int, sound: bool = True):
    model = transformer(*sizes, dtype=dtype, bits=bits)
    video, audio, keep = transformer_inputs(model.config, dtype)
    inputs = video, audio if sound else None, keep
    layers, model.blocks = list(model.blocks), stack_layers(model.blocks)
    assert len(model.blocks) == num_runs
    scanned = partial(predict, model, *inputs)
    three_forms(model, layers, Transformer.step, partial(enter, model, *inputs), scanned)


def pack_layers(layers, bits: tuple[int | None, ...]) -> None:
    """Packs each layer in so many bits; None leaves it plain."""
    for layer, width in zip(layers, bits, strict=True):
        if width is not None:
            quantize_linears(layer, select=lambda path, _, width=width: path[-1] != "to_gate_logits" and width)


def check_gemma(dtype: Any, weights: Any, bits: tuple[int | None, ...], num_runs: int):
    model = randomize(abstract(lambda rngs: Gemma(GEMMA, rngs=rngs)), weights)
    pack_layers(model.layers, bits)
    inputs = jnp.arange(24).reshape(2, 12), jnp.arange(12)[None] >= jnp.array([[4], [0]])
    layers, model.layers = list(model.layers), stack_layers(model.layers)
    assert len(model.layers) == num_runs
    enter = partial(enter_gemma, model, *inputs, dtype=dtype)
    three_forms(model, layers, Gemma.step, enter, partial(read, model, *inputs, dtype=dtype))


def test_streamed_scanned_and_single_blocks_agree_bit_for_bit():
    # Without sound, to be quick: half the layers, and the same boundaries between blocks.
    check_transformer(3, 24, 8, dtype=jnp.float32, bits=(5, 5), num_runs=1, sound=False)


def test_streamed_scanned_and_single_gemma_layers_agree_bit_for_bit():
    check_gemma(jnp.float32, jnp.bfloat16, (5, 5, None, None), 2)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    ("sizes", "bits", "num_runs"),
    [
        ((4, 8, 8), (None,) * 4, 1),
        ((4, 32, 16), (5,) * 4, 1),
        ((4, 64, 32), (5, 4, 4, 5), 3),
        ((6, 24, 16), (5, None, None, 6, 6), 3),
    ],
)
def test_blocks_of_other_widths_agree_bit_for_bit(sizes, bits, num_runs, dtype):
    check_transformer(*sizes, dtype=dtype, bits=bits, num_runs=num_runs)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [None, 5])
@pytest.mark.parametrize("weights", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_gemma_layers_in_other_precisions_agree_bit_for_bit(dtype, weights, bits):
    check_gemma(dtype, weights, (bits,) * 4, 1)


# ------------------------------------------------------------------ buffers


class Odd(nnx.Module):
    """Sizes that fill no whole word, an empty variable, and all widths of values."""

    def __init__(self):
        generator = np.random.default_rng(2)
        self.half = nnx.Param(jnp.asarray(generator.standard_normal((3, 5)), jnp.float16))
        self.brain = nnx.Param(jnp.asarray(generator.standard_normal(7), jnp.bfloat16))
        self.bytes = nnx.Variable(jnp.arange(250, 255, dtype=jnp.uint8))
        self.empty = nnx.Param(jnp.zeros((0, 4), jnp.bfloat16))
        self.number = nnx.Param(jnp.asarray(np.nan, jnp.float32))
        self.words = nnx.Variable(jnp.asarray(generator.integers(0, 2**32, (2, 3), np.uint32)))


def test_a_buffer_gives_its_layer_back_bit_for_bit():
    layer = Odd()
    layout = Layout.of(layer)
    assert layout.num_words == 8 + 4 + 2 + 0 + 1 + 6
    words = layout.pack(layer)
    back = jax.jit(layout.unpack)(words)
    assert nnx.split(back)[0] == nnx.split(layer)[0]
    for ours, theirs in zip(jax.tree.leaves(nnx.state(back)), jax.tree.leaves(nnx.state(layer)), strict=True):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
        assert np.asarray(ours).tobytes() == np.asarray(theirs).tobytes()


def test_a_layout_needs_no_arrays():
    assert Layout.of(nnx.eval_shape(Odd)) == Layout.of(Odd())


class Square(nnx.Module):
    def __init__(self, index: int, dim: int = 16):
        self.kernel = nnx.Param(jnp.full((dim, dim), index + 1.0) / dim)

    @staticmethod
    def step(layer, carry, shared, x):
        y = jnp.tanh(carry @ layer.kernel.get_value() + shared)
        return y, None if x is None else y.sum() * x


def squares(count: int, dim: int = 16):
    return (Square(index, dim) for index in range(count))


def test_buffers_lie_in_pinned_host_memory():
    host = HostLayers(squares(3))
    assert [buffer.sharding.memory_kind for buffer in host.buffers] == ["pinned_host"] * 3
    assert (len(host), host.nbytes) == (3, 3 * 16 * 16 * 4)
    np.testing.assert_array_equal(np.asarray(host.buffers[1]).view(np.float32), np.full(16 * 16, 2 / 16))


def test_never_more_than_two_layers_are_on_the_device(monkeypatch):
    num_layers, dim = 6, 512  # large enough for the device to be behind the loop that feeds it
    host = HostLayers(squares(num_layers, dim))
    events: list[tuple[str, int]] = []

    def on_device() -> int:
        arrays = [array for array in jax.live_arrays() if array.dtype == jnp.uint32 and array.shape == (dim * dim,)]
        return sum(array.sharding.memory_kind != "pinned_host" for array in arrays)

    put = HostLayers._put

    def counted_put(self, index):
        words = put(self, index)
        events.append(("put", index))
        assert on_device() <= 2
        return words

    def counted_run(words, carry, shared, per_layer, index, **static):
        events.append(("run", index))
        assert carry.is_ready()  # what the layer before gives: nothing still reads its buffer
        assert on_device() == (2 if index + 1 < num_layers else 1)
        return run_layer(words, carry, shared, per_layer, index, **static)

    monkeypatch.setattr(HostLayers, "_put", counted_put)
    monkeypatch.setattr(offload, "run_layer", counted_run)
    host.run(Square.step, jnp.ones((2048, dim)), jnp.zeros(()))
    # Each layer is on its way before the layer in front of it runs.
    expected = [("put", 0)]
    for index in range(num_layers):
        expected += [("put", index + 1)] * (index + 1 < num_layers) + [("run", index)]
    assert events == expected
    assert on_device() == 0


# ------------------------------------------------------------------ running


def compilations(caplog, function) -> tuple[int, Any]:
    """How often `run_layer` is compiled while `function` runs."""
    caplog.clear()
    with jax.log_compiles():
        result = function()
    messages = [record.getMessage() for record in caplog.records]
    return sum("Finished XLA compilation of jit(run_layer)" in message for message in messages), result


def test_one_program_a_structure(caplog):
    carry, scales = jnp.ones((2, 24)), jnp.arange(4.0)
    host, again = HostLayers(squares(4, 24)), HostLayers(squares(4, 24))
    count, (first, _) = compilations(caplog, lambda: host.run(Square.step, carry + 0, jnp.zeros(()), scales))
    assert count == 1
    # Other layers of the structure, other arguments, the carry of an earlier run.
    count, (second, _) = compilations(caplog, lambda: again.run(Square.step, first, jnp.ones(()), scales + 1))
    assert count == 0
    assert not np.array_equal(second, carry)

    class Wide(nnx.Module):
        def __init__(self):
            self.kernel = nnx.Param(jnp.ones((24, 24), jnp.bfloat16))

    mixed = HostLayers([*squares(2, 24), Wide(), Wide(), *squares(1, 24)])
    assert [layout is mixed.layouts[0] for layout in mixed.layouts] == [True, True, False, False, True]
    count, _ = compilations(caplog, lambda: mixed.run(Square.step, carry + 0, jnp.zeros(()), jnp.arange(5.0)))
    assert count == 2  # scales of another shape, two structures


def test_outputs_are_stacked_over_all_layers():
    host = HostLayers(squares(3))
    carry, outs = host.run(Square.step, jnp.ones((2, 16)), jnp.zeros(()), jnp.array([1.0, 10.0, 0.0]))
    y = np.ones((2, 16))
    expected = []
    for index, scale in enumerate((1.0, 10.0, 0.0)):
        y = np.tanh(y * (index + 1))
        expected.append(y.sum() * scale)
    np.testing.assert_allclose(outs, expected, rtol=1e-6)  # one float32 sum
    np.testing.assert_allclose(carry, y, rtol=1e-6)


def test_without_layers_nothing_happens():
    carry, outs = HostLayers([]).run(Square.step, jnp.ones(3), None)
    np.testing.assert_array_equal(carry, np.ones(3))
    assert outs is None


def test_the_carry_is_used_up():
    carry = jnp.ones((2, 16)) + 0
    HostLayers(squares(2)).run(Square.step, carry, jnp.zeros(()))
    assert carry.is_deleted()


def test_a_layer_program_holds_no_weights():
    host = HostLayers(squares(2))
    arguments = jnp.zeros(256, jnp.uint32), jnp.ones((2, 16)), jnp.zeros(()), None, 0
    lowered = run_layer.lower(*arguments, layout=host.layouts[0], step=Square.step)
    memory: Any = lowered.compile().memory_analysis()
    assert memory.argument_size_in_bytes == 256 * 4 + 2 * 16 * 4 + 4
    assert memory.alias_size_in_bytes == 2 * 16 * 4  # the carry's memory is used again
