"""The training loop: it learns, accumulates as one batch, averages, and goes on after a kill as if there was none."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from ltx_jax.training.loop import MetricsLog, Schedule, Trainer, read_metrics
from ltx_jax.training.plot import plot_metrics

TRUE = np.array([[1.0, -2.0], [0.5, 3.0], [0.0, 1.0]], np.float32)


def loss(model, batch, key):
    x, y = batch
    x = x + 0.01 * jax.random.normal(key, x.shape)
    error = jnp.mean(jnp.square(model(x) - y))
    return error, {"error": error}


def batches(step: int):
    x = np.random.default_rng(step).normal(size=(8, 3)).astype(np.float32)
    return x, x @ TRUE


def trainer(**changes) -> Trainer:
    settings = {"num_steps": 40, "learning_rate": 0.1, "warmup_steps": 5, "save_every": 10, "log_every": 5}
    return Trainer(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), loss, Schedule(**(settings | changes)))


def leaves(tree) -> list[np.ndarray]:
    return [np.asarray(x) for x in jax.tree.leaves(tree)]


def test_a_linear_layer_is_learnt(tmp_path):
    learner = trainer(num_steps=200)
    learner.train(batches, tmp_path)
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert lines[-1]["step"] == 200
    assert lines[-1]["error"] < 0.02 * lines[0]["error"]
    # The average lags behind the weights by design: it is near, not equal.
    np.testing.assert_allclose(learner.model().kernel[...], TRUE, atol=0.2)
    np.testing.assert_allclose(learner.model(averaged=False).kernel[...], TRUE, atol=0.1)


def test_a_run_that_was_stopped_goes_on_bit_for_bit(tmp_path):
    whole, first, second = trainer(), trainer(), trainer()
    whole.train(batches, tmp_path / "whole")

    def until_25(step: int):
        if step == 25:
            raise KeyboardInterrupt
        return batches(step)

    with pytest.raises(KeyboardInterrupt):
        first.train(until_25, tmp_path / "cut")
    second.train(batches, tmp_path / "cut")
    for a, b in zip(leaves(whole.state), leaves(second.state), strict=True):
        np.testing.assert_array_equal(a, b)
    assert read_metrics(tmp_path / "cut/metrics.jsonl") == read_metrics(tmp_path / "whole/metrics.jsonl")


def test_accumulated_parts_are_one_batch(tmp_path):
    """Without noise in the loss; sums in another order differ in the last bits."""
    states = []
    for accumulate in (1, 4):
        schedule = Schedule(num_steps=1, learning_rate=0.1, warmup_steps=0, accumulate=accumulate)

        def exact(model, batch, key):
            x, y = batch
            return jnp.mean(jnp.square(model(x) - y)), {}

        learner = Trainer(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), exact, schedule)
        learner.train(batches, tmp_path / str(accumulate))
        states.append(learner.state.params)
    for a, b in zip(leaves(states[0]), leaves(states[1]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


def test_only_what_is_trainable_changes(tmp_path):
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    before = np.asarray(model.kernel[...])
    learner = Trainer(
        model, loss, Schedule(num_steps=3, learning_rate=0.1, warmup_steps=1),
        trainable=lambda path, value: path[-1] == "bias",
    )  # fmt: skip
    learner.train(batches, tmp_path)
    np.testing.assert_array_equal(learner.model().kernel[...], before)
    assert np.any(np.asarray(learner.model().bias.get_value()))
    assert model.bias is not None
    assert not np.any(np.asarray(model.bias[...]))


def test_snapshots_of_another_model_are_refused(tmp_path):
    trainer(num_steps=10).train(batches, tmp_path)
    other = Trainer(nnx.Linear(4, 2, rngs=nnx.Rngs(0)), loss, Schedule(num_steps=20, learning_rate=0.1))
    with pytest.raises(ValueError, match=r"another model or optimiser: .*kernel"):
        other.train(batches, tmp_path)


def test_a_loss_that_is_not_finite_ends_the_run_and_is_not_saved(tmp_path):
    learner = trainer(learning_rate=0.1)
    spoilt = lambda step: (np.full((8, 3), np.nan, np.float32), batches(step)[1]) if step >= 12 else batches(step)  # noqa: E731
    with pytest.raises(FloatingPointError, match="step 15"):
        learner.train(spoilt, tmp_path)
    again = trainer()
    again.train(batches, tmp_path)
    assert all(np.isfinite(x).all() for x in leaves(again.state))


def test_metrics_behind_the_resumed_step_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 10, "loss": 1.0}\n{"step": 20, "loss": 0.5}\n{"step": 30, "lo')
    MetricsLog(path, 10).write(15, {"loss": 0.25})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [10, 15]


@pytest.mark.parametrize("name", ["num_steps", "accumulate", "save_every", "log_every"])
def test_counts_below_one_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        Schedule(**({"num_steps": 1, "learning_rate": 0.1} | {name: 0}))


def test_a_killed_process_goes_on_bit_for_bit(tmp_path):
    """SIGKILL in the middle of a step, then the same command again."""
    program = (
        "import os, sys; from pathlib import Path; sys.path.insert(0, sys.argv[1])\n"
        "from tests.ltx_jax.test_training_loop import batches, trainer\n"
        "def killed(step):\n"
        "    if step == 17 and sys.argv[3] == 'kill': os.kill(os.getpid(), 9)\n"
        "    return batches(step)\n"
        "trainer(num_steps=30).train(killed, Path(sys.argv[2]))\n"
    )
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", program, str(root), str(tmp_path / "cut")]
    assert subprocess.run([*command, "kill"], cwd=root).returncode == -9
    assert subprocess.run([*command, "go on"], cwd=root).returncode == 0
    whole, resumed = trainer(num_steps=30), trainer(num_steps=30)
    whole.train(batches, tmp_path / "whole")
    resumed.train(batches, tmp_path / "cut")
    for a, b in zip(leaves(whole.state), leaves(resumed.state), strict=True):
        np.testing.assert_array_equal(a, b)


def test_metrics_are_drawn(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl", 0)
    with pytest.raises(ValueError, match="has no metrics yet"):
        plot_metrics(tmp_path / "metrics.jsonl", tmp_path / "metrics.png")
    for step in range(1, 5):
        log.write(step, {"loss": 1 / step, "error": 2.0, "psnr_db": 3.0 * step, "signed": step - 2.0})
    plot_metrics(tmp_path / "metrics.jsonl", tmp_path / "metrics.png")
    with Image.open(tmp_path / "metrics.png") as picture:
        assert picture.size == (1440, 624)  # three panels in a row, two rows
        assert len(np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0)) > 5


def test_muon_learns_kernels_and_adam_the_rest(tmp_path):
    learner = trainer(optimizer="muon", num_steps=60, learning_rate=0.3, adam_learning_rate=0.1)
    learner.train(batches, tmp_path)
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert lines[-1]["error"] < 0.1 * lines[0]["error"]
    state = str(jax.tree.structure(learner.state.optimizer))
    assert "MuonState" in state
    assert "ScaleByAdamState" in state
