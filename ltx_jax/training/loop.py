"""The training loop: one jitted step for any model and loss, exact resume, metrics.

    loss(model, batch, key) -> (scalar, {name: scalar})
    batches(step) -> batch

A batch is a function of the number of its step, and random keys are folded from it: a run that was killed and resumed
computes to the bit what it would have computed without.

Sources: the optimisers are optax's: AdamW (https://arxiv.org/abs/1711.05101) and Muon
(https://kellerjordan.github.io/posts/muon, https://arxiv.org/abs/2502.16982); the average of the weights follows Karras
et al., https://arxiv.org/abs/2206.00364 (with the warm-up of TensorFlow's `ExponentialMovingAverage`).
"""

import json
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
from flax import nnx
from jax.typing import DTypeLike

from ltx_jax.abstract import tree_dataclass
from ltx_jax.progress import Progress, Silent
from ltx_jax.training.snapshots import Snapshots

Metrics = dict[str, jax.Array]
Loss = Callable[[Any, Any, jax.Array], tuple[jax.Array, Metrics]]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How long to train, how fast, and what to keep.

    Raises ValueError for counts below one and unknown optimisers.
    """

    num_steps: int
    learning_rate: float
    optimizer: Literal["adamw", "muon"] = "adamw"
    # Muon's rate is for kernels, about ten times what AdamW takes; this one is for all else.
    adam_learning_rate: float = 1e-3
    warmup_steps: int = 100
    final_fraction: float = 0.02  # of the learning rate, where the cosine ends
    weight_decay: float = 0.0
    beta2: float = 0.99
    clip_norm: float = 1.0
    accumulate: int = 1  # parts that a batch is computed in, one after the other
    average_decay: float = 0.999
    precision: DTypeLike = jnp.float32  # of the weights that the loss sees; masters are float32
    save_every: int = 500
    log_every: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("num_steps", "accumulate", "save_every", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.optimizer not in ("adamw", "muon"):
            raise ValueError(f"optimizer must be adamw or muon, got {self.optimizer!r}")

    def rate(self, peak: float) -> optax.Schedule:
        """Rises linearly from zero to `peak`, and falls as a cosine to the end of training."""
        warmup = min(self.warmup_steps, self.num_steps)
        last = max(self.num_steps, self.warmup_steps + 1)
        return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, last, peak * self.final_fraction)

    def transform(self) -> optax.GradientTransformation:
        """The optimiser behind a clipped gradient. Weights decay where they have more than one axis."""
        decaying = partial(jax.tree.map, lambda x: x.ndim > 1)
        if self.optimizer == "muon":
            steps = optax.contrib.muon(
                self.rate(self.learning_rate), adam_learning_rate=self.rate(self.adam_learning_rate),
                adam_b2=self.beta2, weight_decay=self.weight_decay, weight_decay_mask=decaying,
                muon_weight_dimension_numbers=_matrices,
            )  # fmt: skip
        else:
            steps = optax.adamw(
                self.rate(self.learning_rate), b2=self.beta2, weight_decay=self.weight_decay, mask=decaying
            )
        return optax.chain(optax.clip_by_global_norm(self.clip_norm), steps)


def _matrices(params: Any) -> Any:
    """Which axes of each array Muon takes as a matrix: a kernel's last against all before; None for what is none."""

    def of(path: Any, x: Any) -> optax.contrib.MuonDimensionNumbers | None:
        kernel = any("kernel" in str(key) for key in path) and x.ndim > 1
        return optax.contrib.MuonDimensionNumbers(tuple(range(x.ndim - 1)), x.ndim - 1) if kernel else None

    return jax.tree_util.tree_map_with_path(of, params)


@tree_dataclass
@dataclass(frozen=True)
class TrainState:
    """What changes from step to step; all of it is in a snapshot."""

    step: jax.Array  # steps done
    params: nnx.State  # float32
    average: nnx.State  # exponential moving average of them
    optimizer: Any


class Trainer:
    """A model in training: `trainable` of its variables change, the others stay.

    `model` is left as it is. Frozen variables keep their dtype and packing; they are arguments of the step, not
    constants of the program.
    """

    def __init__(self, model: nnx.Module, loss: Loss, schedule: Schedule, *, trainable: Any = nnx.Param):
        self.schedule = schedule
        self.loss = loss
        self.graphdef, params, self.frozen = nnx.split(model, trainable, ...)
        params = jax.tree.map(lambda x: jnp.array(x, jnp.float32), params)  # copies: steps reuse their memory
        self.transform = schedule.transform()
        self.state = TrainState(
            jnp.zeros((), jnp.int32), params, jax.tree.map(jnp.copy, params), self.transform.init(params)
        )
        self._step = jax.jit(self._advance, donate_argnums=0)

    @property
    def step(self) -> int:
        return int(self.state.step)

    def model(self, *, averaged: bool = True) -> Any:
        """The model with the averaged weights, or those of the last step, in float32."""
        params = self.state.average if averaged else self.state.params
        return nnx.merge(self.graphdef, params, self.frozen, copy=True)

    def train(
        self,
        batches: Callable[[int], Any],
        folder: Path,
        *,
        progress: Progress | None = None,
        name: str = "training",
    ) -> None:
        """Trains to the end of the schedule, from the newest snapshot in `folder` if there is one.

        `folder` gets `metrics.jsonl`, a line for every `log_every` steps with the means over them, and snapshots.
        Raises ValueError for snapshots of another model, FloatingPointError when the loss is no longer finite: the last
        snapshot is from before that.
        """
        schedule = self.schedule
        progress = progress or Silent()
        snapshots = Snapshots(folder / "snapshots")
        self.state = snapshots.newest(self.state)
        log = MetricsLog(folder / "metrics.jsonl", self.step)
        with progress.stage(name, schedule.num_steps) as advance:
            for _ in range(self.step):
                advance()
            pending: list[Metrics] = []
            for batch in _ahead(batches, self.step, schedule.num_steps):
                self.state, metrics = self._step(self.state, self.frozen, batch)
                pending.append(metrics)
                advance()
                done = self.step
                saves = done % schedule.save_every == 0 or done == schedule.num_steps
                if done % schedule.log_every == 0 or saves:
                    means = {key: float(np.mean([float(each[key]) for each in pending])) for key in metrics}
                    pending = []
                    if not np.isfinite(means["loss"]):
                        raise FloatingPointError(
                            f"the loss is {means['loss']} at step {done}; the newest snapshot in {folder} is from "
                            "before that: resume with a lower learning rate"
                        )
                    if saves:
                        snapshots.save(done, self.state)
                    log.write(done, means)
        snapshots.close()

    def _advance(self, state: TrainState, frozen: nnx.State, batch: Any) -> tuple[TrainState, Metrics]:
        schedule = self.schedule
        key = jax.random.fold_in(jax.random.key(schedule.seed), state.step)

        def loss_of(params: nnx.State, part: Any, number: Any) -> tuple[jax.Array, Metrics]:
            cast = jax.tree.map(lambda x: x.astype(schedule.precision), params)
            value, metrics = self.loss(
                nnx.merge(self.graphdef, cast, frozen, copy=True), part, jax.random.fold_in(key, number)
            )
            return value.astype(jnp.float32), {"loss": value, **metrics}

        gradient = jax.grad(loss_of, has_aux=True)
        if schedule.accumulate == 1:  # a CPU computes on one core what is in a loop
            grads, metrics = gradient(state.params, batch, 0)
        else:
            grads, metrics = _accumulated(partial(gradient, state.params), batch, schedule.accumulate)
        updates, optimizer = self.transform.update(grads, state.optimizer, state.params)
        params: Any = optax.apply_updates(state.params, updates)  # type: ignore[arg-type]
        decay = jnp.minimum(schedule.average_decay, (1 + state.step) / (10 + state.step))
        average = jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, state.average, params)
        return TrainState(state.step + 1, params, average, optimizer), metrics | {
            "gradient_norm": optax.global_norm(grads)
        }


def _accumulated(gradient: Callable[[Any, Any], Any], batch: Any, count: int) -> Any:
    """The mean of what `gradient(part, number)` gives for `count` equal parts of a batch."""
    parts = jax.tree.map(lambda x: x.reshape(count, -1, *x.shape[1:]), batch)

    def add(total: Any, numbered: tuple[Any, jax.Array]) -> tuple[Any, None]:
        return jax.tree.map(lambda old, new: old + new / count, total, gradient(*numbered)), None

    shapes = jax.eval_shape(gradient, jax.tree.map(lambda x: x[0], parts), 0)
    none = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return jax.lax.scan(add, none, (parts, jnp.arange(count)))[0]


def _ahead(batches: Callable[[int], Any], start: int, stop: int) -> Iterator[Any]:
    """Batches in order, the next one made while the last one is used."""
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(batches, start) if start < stop else None
        for step in range(start, stop):
            assert coming is not None
            batch = coming.result()
            coming = pool.submit(batches, step + 1) if step + 1 < stop else None
            yield batch


class MetricsLog:
    """Metrics as lines of JSON, `{"step": 50, "loss": 0.1, ...}`. Lines behind the step resumed from are dropped."""

    def __init__(self, path: Path, step: int):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [line for line in read_metrics(path) if line["step"] <= step]
        path.write_text("".join(json.dumps(line) + "\n" for line in kept))

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        with open(self.path, "a") as file:
            file.write(json.dumps({"step": step} | {key: float(f"{x:.6g}") for key, x in metrics.items()}) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file; a last line that was cut off is left out."""
    lines = path.read_text().splitlines() if path.exists() else []
    found = []
    for line in lines:
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return found
