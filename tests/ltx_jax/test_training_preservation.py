"""Prior preservation: adapters learn what is new, and what is kept stays as the model made it."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ltx_jax.models.transformer import Transformer
from ltx_jax.training import flow
from ltx_jax.training.adapters import adapters, add_adapters, without_adapters
from ltx_jax.training.loop import Schedule, Trainer, read_metrics
from ltx_jax.training.preservation import BothBatches, both, preserving
from tests.ltx_jax.test_training_flow import CONFIG, EVERYTHING, NAMES, batch, normal, open_gates, packed_and_stacked

KEPT_WEIGHT = 20.0


@pytest.fixture(scope="module")
def base() -> Any:
    made = jax.jit(lambda: Transformer(CONFIG, rngs=nnx.Rngs(0)))()
    open_gates(made)  # they are zero in a new transformer, and hide blocks and their adapters
    return packed_and_stacked(made)


def adapted(base: Any, *, filled: bool) -> flow.DenoisingModel:
    """A copy with adapters, which `filled` makes change something."""
    model = nnx.merge(*nnx.split(base), copy=True)
    add_adapters(model, NAMES, rank=2)
    if filled:
        state = nnx.state(model, adapters)
        nnx.update(model, jax.tree.map(lambda x: 0.3 * normal(x.size, *x.shape), state))
    return flow.DenoisingModel(model)


def other_batch(count: int = 4) -> flow.FlowBatch:
    """Clips and captions that are not those of `batch`, and fewer."""
    made = batch(count)
    text = flow.Contexts(-normal(30, count, 4, 32), -normal(31, count, 4, 16))
    return replace(made, video=normal(32, *made.video.shape), audio=normal(33, *made.audio.shape), text=text)


BATCH = BothBatches(new=batch(), kept=other_batch())


def loss_of(model: flow.DenoisingModel, *, weight: float = 1.0) -> tuple[jax.Array, dict[str, jax.Array]]:
    loss = preserving(flow.flow_loss(EVERYTHING), EVERYTHING, weight=weight)
    return jax.jit(loss)(model, BATCH, jax.random.key(5))


def test_without_adapters_a_model_is_its_base(base):
    """Packed linears as well: each adapter is there, and adds nothing."""
    model = adapted(base, filled=True)
    clips = flow.noise_clips(BATCH.kept, jax.random.key(0), EVERYTHING)

    @jax.jit
    def velocity(model: flow.DenoisingModel) -> flow.BothVelocities:
        contexts = model.contexts(BATCH.kept.text)
        return flow.velocity_of(model, BATCH.kept, clips.video, clips.audio, clips.levels, contexts)

    expected = velocity(flow.DenoisingModel(base))
    np.testing.assert_allclose(
        velocity(without_adapters(model)).video, expected.video, atol=1e-5
    )  # other order of sums
    assert float(jnp.abs(velocity(model).video - expected.video).max()) > 1e-2  # `model` has its adapters still


def test_new_adapters_change_nothing_that_is_kept(base):
    model = adapted(base, filled=False)
    value, metrics = loss_of(model)
    # What both velocities are computed by is compiled apart: rounding of float32, squared.
    assert float(metrics["kept_video"]) < 1e-10
    assert float(metrics["kept_audio"]) < 1e-10
    new_key, _ = jax.random.split(jax.random.key(5))
    expected, _ = jax.jit(flow.flow_loss(EVERYTHING))(model, BATCH.new, new_key)
    np.testing.assert_allclose(value, expected, rtol=1e-5)


def test_changes_count_by_their_weight(base):
    model = adapted(base, filled=True)
    one, metrics = loss_of(model)
    assert float(metrics["kept_video"]) > 1e-4
    assert float(metrics["kept_audio"]) > 1e-4
    three, _ = loss_of(model, weight=3.0)
    change = metrics["kept_video"] + EVERYTHING.audio_weight * metrics["kept_audio"]
    np.testing.assert_allclose(three - one, 2 * change, rtol=1e-3)


def test_the_target_is_held_still(base):
    """The gradient of what is kept is that of the adapted model alone, towards a constant."""
    model = adapted(base, filled=True)
    clips = flow.noise_clips(BATCH.kept, jax.random.split(jax.random.key(5))[1], EVERYTHING)
    noisy = BATCH.kept, clips.video, clips.audio, clips.levels

    def velocity(model: flow.DenoisingModel) -> flow.BothVelocities:
        return flow.velocity_of(model, *noisy, model.contexts(BATCH.kept.text))

    target = jax.jit(velocity)(flow.DenoisingModel(base))
    graphdef, learnt, rest = nnx.split(model, adapters, ...)

    def nothing(model: Any, batch: Any, key: Any) -> Any:
        return jnp.zeros(()), {}

    def by_hand(learnt: nnx.State) -> jax.Array:
        found = velocity(nnx.merge(graphdef, learnt, rest, copy=True))
        return flow.velocity_error(found, target, clips.levels, EVERYTHING)[0]

    def as_trained(learnt: nnx.State) -> jax.Array:
        whole = nnx.merge(graphdef, learnt, rest, copy=True)
        return preserving(nothing, EVERYTHING, weight=1.0)(whole, BATCH, jax.random.key(5))[0]

    expected, found = jax.jit(jax.grad(by_hand))(learnt), jax.jit(jax.grad(as_trained))(learnt)
    for one, other in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        # `LoraLinear` rounds to bfloat16, gradients too: values at the edge may fall to either side, 2^-7 apart.
        np.testing.assert_allclose(other, one, rtol=2**-7, atol=1e-5 * float(jnp.abs(one).max()))


def test_what_is_kept_changes_less_and_what_is_new_is_learnt(base, tmp_path):
    schedule = Schedule(num_steps=40, learning_rate=1e-2, warmup_steps=2, log_every=10, average_decay=0.5)
    changes, learnt = {}, {}
    for name, weight in (("hardly", 1e-6), ("held", KEPT_WEIGHT)):
        loss = preserving(flow.flow_loss(EVERYTHING), EVERYTHING, weight=weight)
        trainer = Trainer(adapted(base, filled=False), loss, schedule, trainable=adapters)
        trainer.train(both(lambda step: BATCH.new, lambda step: BATCH.kept), tmp_path / name)
        lines = read_metrics(tmp_path / name / "metrics.jsonl")
        changes[name] = lines[-1]["kept_video"] + lines[-1]["kept_audio"]
        learnt[name] = (lines[-1]["video"] + lines[-1]["audio"]) / (lines[0]["video"] + lines[0]["audio"])
    assert changes["held"] < 0.2 * changes["hardly"]
    assert learnt["held"] < 0.95


def test_a_weight_that_holds_nothing_is_refused():
    with pytest.raises(ValueError, match="must be above 0, got 0"):
        preserving(flow.flow_loss(EVERYTHING), EVERYTHING, weight=0.0)
