"""Published names to ours: a nested table is read as rules; a plan uses every tensor and fills every parameter once.

A table maps a published name to `(our name, what lies below)`; a leaf is an einops pattern from the published axes to
ours. `{n}` and `{m}` stand for numbers and are the same on both sides. Order never matters.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Union

Table = Mapping[str, tuple[str, Union[str, "Table"]]]

LINEAR: Table = {"weight": ("kernel", "o i -> i o"), "bias": ("bias", "o -> o")}
NORM: Table = {"weight": ("scale", "d -> d")}
CONV1D: Table = {"weight": ("kernel", "o i t -> t i o"), "bias": ("bias", "o -> o")}
CONV2D: Table = {"weight": ("kernel", "o i h w -> h w i o"), "bias": ("bias", "o -> o")}
CONV3D: Table = {"weight": ("kernel", "o i t h w -> t h w i o"), "bias": ("bias", "o -> o")}
GROUP_NORM: Table = {"weight": ("scale", "d -> d"), "bias": ("bias", "d -> d")}


@cache
def _regex(source: str) -> re.Pattern[str]:
    parts = re.split(r"\{(\w+)\}", source)
    return re.compile("".join(rf"(?P<{p}>\d+)" if i % 2 else re.escape(p) for i, p in enumerate(parts)))


@dataclass(frozen=True)
class Rule:
    """One flattened row of a table: `source` and `target` may hold `{n}`, `{m}`."""

    source: str
    target: str
    pattern: str

    def match(self, name: str) -> str | None:
        """Our name for the published `name`, or None if this rule does not speak of it."""
        found = _regex(self.source).fullmatch(name)
        return self.target.format(**found.groupdict()) if found else None

    def shape(self, source_shape: tuple[int, ...]) -> tuple[int, ...] | None:
        """The shape of our array for a published shape, or None where the number of axes does not fit."""
        left, right = (side.split() for side in self.pattern.split("->"))
        if len(left) != len(source_shape):
            return None
        sizes = dict(zip(left, source_shape, strict=True))
        return tuple(sizes[axis] for axis in right)


def flatten(table: Table, source: str = "", target: str = "") -> Iterator[Rule]:
    """The rules of a nested table, each with its full names below the given prefixes."""
    for name, (ours, below) in table.items():
        names = ".".join(filter(None, (source, name))), ".".join(filter(None, (target, ours)))
        if isinstance(below, str):
            yield Rule(*names, below)
        else:
            yield from flatten(below, *names)


@dataclass(frozen=True, kw_only=True)
class Step:
    """One planned tensor: where it comes from, where it goes, how its axes move."""

    source: str
    target: str
    pattern: str


@dataclass(kw_only=True)
class Plan:
    """What goes where, and everything that does not fit, found before any payload is read."""

    steps: list[Step] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)  # published tensors that no rule speaks of
    missing: list[str] = field(default_factory=list)  # published names that would fill unfilled parameters
    doubled: list[str] = field(default_factory=list)
    misshaped: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not (self.unknown or self.missing or self.doubled or self.misshaped)


def plan(table: Table, source: Mapping[str, tuple[int, ...]], target: Mapping[str, tuple[int, ...]]) -> Plan:
    """Compares a table, the published shapes and the model's shapes; reports every misfit at once.

    `source` holds the tensors that belong to this model (name to shape), `target` the model's parameters.
    """
    rules = list(flatten(table))
    result = Plan()
    filled: dict[str, str] = {}
    for name, shape in source.items():
        matches = [(rule, ours) for rule in rules if (ours := rule.match(name)) is not None]
        if not matches or not any(ours in target for _, ours in matches):
            result.unknown.append(name)
            continue
        if len(matches) > 1:
            result.doubled.append(f"{name} matches {len(matches)} rules")
            continue
        rule, ours = matches[0]
        if ours in filled:
            result.doubled.append(f"{ours} is filled by both {filled[ours]} and {name}")
            continue
        filled[ours] = name
        if rule.shape(shape) != target[ours]:
            result.misshaped.append(f"{name} {list(shape)} -> {ours}, which needs {list(target[ours])}")
            continue
        result.steps.append(Step(source=name, target=ours, pattern=rule.pattern))
    result.missing = [source_name(rules, ours) for ours in target if ours not in filled]
    return result


def source_name(rules: list[Rule], ours: str) -> str:
    """The published name that would fill our parameter, or our name marked as such if no rule reaches it."""
    for rule in rules:
        inverse = Rule(rule.target, rule.source, rule.pattern).match(ours)
        if inverse is not None:
            return inverse
    return f"(no rule for) {ours}"


def rule_of(rules: list[Rule], ours: str) -> tuple[str, Rule]:
    """The published name of our parameter, and the rule that moves its axes. Raises ValueError where no rule does."""
    name = source_name(rules, ours)
    rule = next((rule for rule in rules if rule.match(name) == ours), None)
    if rule is None:
        raise ValueError(f"{ours} has no published name; models are published with their layers unstacked")
    return name, rule
