"""Distillation: a student that learns in one step what its teacher does in several guided ones."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ltx_jax.models.connector import TextConnectors
from ltx_jax.models.transformer import Transformer
from ltx_jax.sampling import DISTILLED_SIGMAS
from ltx_jax.training import distillation, flow
from ltx_jax.training.adapters import adapters, add_adapters
from ltx_jax.training.loop import Schedule, Trainer, read_metrics
from tests.ltx_jax.test_training_flow import CONFIG, CONNECTORS, NAMES, batch, copied, normal

SETTINGS = distillation.DistilSettings(substeps=2, image=0.5, video_cfg_scale=3.0, audio_cfg_scale=3.0)


def text(count: int) -> flow.TextStates:
    return flow.TextStates(normal(7, count, 2, 4, 8), jnp.ones((count, 4), bool))


def batch_of_text(count: int = 8) -> flow.FlowBatch:
    made = batch(count)
    return flow.FlowBatch(
        video=made.video,
        audio=made.audio,
        video_positions=made.video_positions,
        audio_positions=made.audio_positions,
        text=text(count),
    )


@pytest.fixture(scope="module")
def distilled() -> distillation.Distilled:
    teacher = jax.jit(lambda: Transformer(CONFIG, rngs=nnx.Rngs(0)))()
    student: Any = copied(teacher)
    add_adapters(student, NAMES, rank=2, targets=".*")
    connectors = jax.jit(lambda: TextConnectors(CONNECTORS, rngs=nnx.Rngs(1)))()
    return distillation.Distilled(
        flow.DenoisingModel(student), flow.DenoisingModel(teacher), connectors, normal(8, 2, 4, 8), jnp.ones(4, bool)
    )


def test_adapters_learn_and_all_else_stays(distilled, tmp_path):
    schedule = Schedule(num_steps=60, learning_rate=2e-2, warmup_steps=2, log_every=15, average_decay=0.5)
    trainer = Trainer(distilled, distillation.distillation_loss(SETTINGS), schedule, trainable=adapters)
    trainer.train(lambda step: batch_of_text(), tmp_path)
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert lines[-1]["loss"] < 0.8 * lines[0]["loss"]
    before, after = nnx.state(distilled, nnx.Param), nnx.state(trainer.model(), nnx.Param)
    for one, other in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(one, other)


def test_without_guidance_and_in_one_step_a_new_student_has_nothing_to_learn(distilled):
    """Its velocity is its teacher's then: adapters begin at zero."""
    settings = distillation.DistilSettings(substeps=1, video_cfg_scale=1.0, audio_cfg_scale=1.0, image=0.5)
    loss, metrics = jax.jit(distillation.distillation_loss(settings))(distilled, batch_of_text(), jax.random.key(0))
    # Rounding of float32 in x - (x + gap v), divided by the smallest gap, 0.006.
    assert float(loss) < 1e-6
    assert float(metrics["video"]) >= 0
    guided, _ = jax.jit(distillation.distillation_loss(SETTINGS))(distilled, batch_of_text(), jax.random.key(0))
    assert float(guided) > 1e-4


def test_steps_across_little_are_trained_less():
    shares = distillation.step_shares(DISTILLED_SIGMAS, near=0.02)
    assert sum(shares) == pytest.approx(1)
    assert shares[:4] == pytest.approx([0.05] * 4)
    assert shares[4:] == pytest.approx([0.2] * 4)


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"sigmas": (0.5, 0.7)}, "must fall"), ({"substeps": 0}, "at least 1"), ({"image": 1.5}, "expected 0 to 1")],
)
def test_settings_that_make_no_sense_are_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        distillation.DistilSettings(**changes)
