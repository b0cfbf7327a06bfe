"""Prior preservation: adapters learn something new and leave alone what the model makes of everything else.

Beside clips of what is new come clips of what is to stay, with captions of their own. Of those nothing is learnt: the
velocity that the model had without adapters is the target, for the same noise. It is exact where clips could only be a
sample, so few of them do, and they may as well be made by the model itself.

    loss = preserving(flow_loss(settings), settings)
    trainer = Trainer(model, loss, schedule, trainable=adapters)
    trainer.train(both(new, kept), folder)

Sources: Ruiz et al., DreamBooth, https://arxiv.org/abs/2208.12242 (prior preservation, by clips of the model itself);
Li & Hoiem, Learning without Forgetting, https://arxiv.org/abs/1606.09282 (the old model's outputs as targets).
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
from jaxtyping import Array

from ltx_jax.abstract import tree_dataclass
from ltx_jax.training.adapters import without_adapters
from ltx_jax.training.flow import DenoisingModel, FlowBatch, FlowSettings, noise_clips, velocity_error, velocity_of
from ltx_jax.training.loop import Loss, Metrics


@tree_dataclass
@dataclass(frozen=True, kw_only=True)
class BothBatches:
    """Clips to learn from, and clips of which the model is to make what it did; they may differ in size."""

    new: FlowBatch
    kept: FlowBatch


def both(new: Callable[[int], FlowBatch], kept: Callable[[int], FlowBatch]) -> Callable[[int], BothBatches]:
    """Batches of both, by the number of the step."""
    return lambda step: BothBatches(new=new(step), kept=kept(step))


def preserving(loss: Loss, settings: FlowSettings, *, weight: float = 5.0) -> Loss:
    """The loss of a `DenoisingModel` with adapters for `BothBatches`: `loss` of the new, and what the kept ones change.

    The kept clips are noised as `settings` say. Raises ValueError for a weight that is not above zero.
    """
    if not weight > 0:
        raise ValueError(f"the weight of what is kept must be above 0, got {weight}")

    def whole(model: DenoisingModel, batch: BothBatches, key: jax.Array) -> tuple[Array, Metrics]:
        new_key, kept_key = jax.random.split(key)
        value, metrics = loss(model, batch.new, new_key)
        clips = noise_clips(batch.kept, kept_key, settings)
        noisy = batch.kept, clips.video, clips.audio, clips.levels
        before = without_adapters(model)
        target = jax.lax.stop_gradient(velocity_of(before, *noisy, before.contexts(batch.kept.text)))
        found = velocity_of(model, *noisy, model.contexts(batch.kept.text))
        change, changes = velocity_error(found, target, clips.levels, settings)
        return value + weight * change, metrics | {f"kept_{name}": error for name, error in changes.items()}

    return whole
