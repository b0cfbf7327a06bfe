"""What becomes of every published tensor: by which rule, at what size, and where it goes."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

from convert.inventory import Inventory
from convert.quantizing import Quantizing, packed_bytes, shape_of
from convert.tables import table_of
from hlwq_jax import LazyTensor, Recipe, StoredWeight
from ltx_jax.checkpoint import QuantizedShape, part_of

_ARRAY_BYTES = 3 * 2**12  # of an empty array, in blocks of a file system
KEPT, PACKED, QUANTISED, UNPACKED, SKIPPED = "kept", "packed as it came", "quantised", "unpacked", "skipped"
FILLED = "filled from base"  # what the inventory calls the rule of a tensor that the package lacked


@dataclass(frozen=True, kw_only=True)
class Task:
    """One planned tensor."""

    component: str
    name: str  # as published; of the text encoder, below its prefix
    full_name: str
    target: str  # our parameter
    pattern: str
    shape: tuple[int, ...]  # as published
    rule: str
    stored: LazyTensor | StoredWeight
    group: str | None = None  # that it is quantised with
    recipe: Recipe | None = None

    @property
    def part(self) -> str:
        return f"{self.component}/{part_of(self.component, self.target)}"

    @property
    def path(self) -> str:
        """Of the linear, where it is one's kernel."""
        return self.target.removesuffix(".kernel")

    @property
    def nbytes(self) -> int:
        """Of its arrays in the checkpoint."""
        if self.rule == KEPT:
            return self.stored.nbytes
        if self.rule == UNPACKED:
            return 2 * prod(self.shape)
        if self.rule == QUANTISED:
            assert self.recipe is not None
            return packed_bytes(shape_of(self.recipe, *self.shape))
        return packed_bytes(self.packed_shape)

    @property
    def disk_bytes(self) -> int:
        """About what its arrays take on a disk: each has a folder, and two files or more."""
        return self.nbytes + (1 if self.rule in (KEPT, UNPACKED) else 4) * _ARRAY_BYTES

    @property
    def packed_shape(self) -> QuantizedShape:
        """Of a weight that stays packed as it came."""
        weight = self.stored
        assert isinstance(weight, StoredWeight)
        assert weight.in_features is not None
        assert weight.out_features is not None
        return QuantizedShape(
            in_features=weight.in_features,
            out_features=weight.out_features,
            bits=weight.bits,
            block_size=weight.block_size,
        )


def all_tasks(inventory: Inventory, quantizing: Quantizing) -> Iterator[Task]:
    """Every planned tensor of a source, component by component."""
    for component, plan in inventory.plans.items():
        for step in plan.steps:
            name, full_name, stored = _stored(inventory, component, step.source)
            plain = isinstance(stored, LazyTensor)
            group = quantizing.group(component, step.target) if plain else None
            recipe = None if group is None else quantizing.recipe_of(group, component, step.target)
            if inventory.filled.get(full_name) is not None:  # packed as the package does with its like
                group, recipe = "base", inventory.filled[full_name]
            if isinstance(stored, LazyTensor):
                rule, shape = KEPT if group is None else QUANTISED, stored.shape
            else:
                shape = inventory.expected.targets[name].shape
                rule = PACKED if inventory.expected.targets[name].linear and _holds_as_planes(stored) else UNPACKED
            yield Task(
                component=component,
                name=name,
                full_name=full_name,
                target=step.target,
                pattern=step.pattern,
                shape=shape,
                rule=rule,
                stored=stored,
                group=group,
                recipe=recipe,
            )


def _stored(inventory: Inventory, component: str, source: str) -> tuple[str, str, LazyTensor | StoredWeight]:
    gemma, upscalers = inventory.source.gemma, inventory.source.upscalers
    if component == "gemma":
        assert gemma is not None
        tensor = gemma.tensors[source]
        return source, tensor.name, tensor
    if component in upscalers:  # the names of one are those of another
        return source, f"{component}:{source}", upscalers[component].tensors[source]
    name = table_of(component, {})[0] + source
    return name, name, inventory.weights[name] if name in inventory.weights else inventory.plain[name]


def _holds_as_planes(weight: StoredWeight) -> bool:
    """Whether blocks stay within rows, as the device layout needs, and its lookup is wide enough."""
    return not weight.flattened and 2 <= weight.bits <= 8


def tensor_facts(inventory: Inventory, tasks: list[Task]) -> dict[str, dict[str, Any]]:
    """What the inventory of a checkpoint says of every published tensor."""
    facts = {task.full_name: _facts(task, filled=task.full_name in inventory.filled) for task in tasks}
    gemma = inventory.source.gemma
    for name in (*inventory.skipped, *(() if gemma is None else gemma.skipped)):
        found = inventory.plain.get(name)
        origin = None if found is None or found.path is None else str(found.path)
        facts[name] = {"from": origin, "rule": SKIPPED, "to": None, "why": "no model reads it"}
    return dict(sorted(facts.items()))


def _facts(task: Task, *, filled: bool) -> dict[str, Any]:
    tensor = task.stored if isinstance(task.stored, LazyTensor) else task.stored.code_tensor
    to = task.target if task.rule in (KEPT, UNPACKED) else task.path
    if isinstance(task.stored, StoredWeight):
        packed = f"{task.stored.bits} bits in layout {task.stored.layout}, codebook {task.stored.table}"
        why = {PACKED: packed, UNPACKED: f"{packed}: held by what is no packed linear"}[task.rule]
    else:
        why = f"{tensor.dtype}, not quantised"
        if task.recipe is not None:
            why = f"{task.group} at {task.recipe.bits} bits"
    rule = FILLED if filled else task.rule
    return {"from": str(tensor.path), "rule": rule, "to": f"{task.component}/{to}", "why": why}
