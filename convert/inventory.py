"""What a source must hold and what it does hold: every tensor planned to its place before any payload is read."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import cached_property, lru_cache
from math import prod
from typing import Any

import ml_dtypes
import numpy as np
from flax import nnx

from convert.base import Wanted, check_configs, fill, refuse_packed
from convert.files import ConvertError, Source, naming
from convert.mapping import Plan, flatten, plan, rule_of
from convert.tables import MAIN, SKIP, component_of, table_of
from hlwq_jax import FormatError, LazyTensor, Package, Recipe, StoredWeight, read_package
from hlwq_jax.format import refuse_look_alikes
from ltx_jax.abstract import abstract
from ltx_jax.checkpoint import MODELS, Configs, parameter_shapes
from ltx_jax.config import ConfigError
from ltx_jax.models.upscaler import LatentUpscaler
from ltx_jax.presets import LTX_2_3, NUM_HIDDEN_STATES

PREFIX = "model.diffusion_model."
_PROJECTION = "text_embedding_projection.video_aggregate_embed.weight"
_SAMPLED_REMOTELY = 8  # weights of a kind: some 500 blocks, where 200 decide
_DTYPES = tuple(np.dtype(kind) for kind in (ml_dtypes.bfloat16, np.float16, np.float32))  # of plain weights


@dataclass(frozen=True)
class Target:
    """Where a published tensor goes."""

    component: str
    path: str
    pattern: str
    shape: tuple[int, ...]  # as published
    linear: bool  # the kernel of a plain linear: it may stay packed


class Expected:
    """Every tensor that models of a configuration are made from, by published name."""

    def __init__(self, configs: Configs):
        self.configs = configs
        self.shapes: dict[str, dict[str, tuple[int, ...]]] = {}  # component -> our parameters
        self.targets: dict[str, Target] = {}  # of the main file
        for component in configs.components:
            try:
                self.shapes[component], linears = _trace(component, configs.of(component))
            except (ArithmeticError, AssertionError, LookupError, TypeError, ValueError) as error:
                raise ConfigError(f"the {component} configuration makes no model: {error}") from error
            if component in MAIN:
                self.targets |= self._targets(component, linears)

    def _targets(self, component: str, linears: frozenset[str]) -> Iterable[tuple[str, Target]]:
        prefix, table = MAIN[component]
        rules = list(flatten(table))
        for path, shape in self.shapes[component].items():
            name, rule = rule_of(rules, path)
            left, right = (side.split() for side in rule.pattern.split("->"))
            sizes = dict(zip(right, shape, strict=True))
            published = tuple(sizes[axis] for axis in left)
            linear = path.removesuffix(".kernel") in linears and path.endswith(".kernel")
            yield prefix + name, Target(component, path, rule.pattern, published, linear)

    @cached_property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """Every tensor as the matrix that a packer makes of it: rows of the first axis, the others joined."""
        return {
            name: (target.shape[0], prod(target.shape[1:])) for name, target in self.targets.items() if target.shape
        }

    @property
    def linear_names(self) -> dict[str, str]:
        return {
            name.removesuffix(".weight"): f"{target.component}/{target.path.removesuffix('.kernel')}"
            for name, target in self.targets.items()
            if target.linear
        }


@lru_cache(maxsize=32)
def _trace(component: str, config: Any) -> tuple[dict[str, tuple[int, ...]], frozenset[str]]:
    """The parameters of a model by path, and the paths of its plain linears. Kept: tracing takes seconds."""
    make = MODELS.get(component, LatentUpscaler)
    model = abstract(lambda rngs: make(config, rngs=rngs))
    linears = (".".join(map(str, path)) for path, module in nnx.iter_modules(model) if type(module) is nnx.Linear)
    return parameter_shapes(model), frozenset(linears)


@dataclass(frozen=True, kw_only=True)
class Inventory:
    """A source held against what its configuration expects."""

    source: Source
    expected: Expected
    metadata: dict[str, Any]  # as it will be saved
    config_origin: str
    num_hidden_states: int
    package: Package | None  # None: nothing is quantised
    weights: Mapping[str, StoredWeight]  # quantised, by published name
    plain: Mapping[str, LazyTensor]
    plans: Mapping[str, Plan]
    skipped: tuple[str, ...]
    strangers: tuple[str, ...]  # names of no model
    doubled: tuple[str, ...]  # there twice, by name and files
    base: Source | None = None  # that fills what the source lacks
    filled: Mapping[str, Recipe | None] = field(default_factory=dict)  # of `plain`, from the base: None stays plain

    @property
    def missing(self) -> list[str]:
        """Published names that are in neither form, main file first."""
        names = []
        for component, found in self.plans.items():
            prefix = table_of(component, self.expected.configs.upscalers)[0]
            names += [prefix + name for name in found.missing]
        return names

    @property
    def problems(self) -> list[str]:
        """Everything besides missing tensors that stands in the way, one line each."""
        lines = [f"unknown tensor: {name}" for name in self.strangers]
        lines += [f"twice: {text}" for text in self.doubled]
        for component, found in self.plans.items():
            prefix = table_of(component, self.expected.configs.upscalers)[0]
            lines += [f"unknown tensor of {component}: {prefix}{name}" for name in found.unknown]
            lines += [f"twice: {text}" for text in found.doubled]
            lines += [f"wrong shape: {prefix}{text}" for text in found.misshaped]
        groups = [self.plain, *(upscaler.tensors for upscaler in self.source.upscalers.values())]
        groups += [] if self.source.gemma is None else [self.source.gemma.tensors]
        lines += [
            f"wrong type: {name} is {tensor.dtype}, weights must be {', '.join(map(str, _DTYPES))}"
            for tensors in groups
            for name, tensor in tensors.items()
            if tensor.dtype not in _DTYPES and name not in self.strangers
        ]
        return lines


def take_inventory(source: Source, base: Source | None = None) -> Inventory:
    """Plans every tensor of a source; what it lacks comes from `base`, the official checkpoint it was made from.

    Raises ConvertError where its configuration cannot be found out, or the base does not belong to it.
    """
    lenders = [source] if base is None else [source, base]
    if base is not None:
        refuse_packed(base)
    num_hidden_states = _num_hidden_states(lenders)
    if source.metadata is not None:
        metadata, origin = source.metadata, "metadata of the checkpoint"
    elif base is not None and base.metadata is not None:
        metadata, origin = base.metadata, "metadata of the base (the files have lost their configuration)"
    else:
        metadata, origin = LTX_2_3, "built-in LTX-2.3 (the files have lost their configuration)"
    metadata = _with_registers(metadata, lenders)
    with naming(source.config_file or source.path):
        configs = Configs.from_metadata(
            metadata,
            None if source.gemma is None else source.gemma.metadata,
            {name: upscaler.metadata for name, upscaler in source.upscalers.items()},
            num_hidden_states=num_hidden_states,
        )
    with naming(source.path):
        expected = Expected(configs)
    if source.metadata is None:
        _refuse_misfits(source, expected)
    if base is not None and base.metadata is not None:
        with naming(base.config_file or base.path):
            settings = _with_registers(base.metadata, lenders)
            theirs = Configs.from_metadata(settings, num_hidden_states=num_hidden_states)
        check_configs(configs, theirs, base.path)
    _check_text_encoder(configs, num_hidden_states, source)
    _check_upscalers(configs, source)

    refuse_look_alikes(source.tensors)
    package, weights, found = None, {}, source.tensors
    if any(tensor.dtype in (np.uint8, np.int8) for tensor in source.tensors.values()):
        with _telling_what_was_assumed(lenders, num_hidden_states):
            package = read_package(
                source.tensors,
                sidecar=source.sidecar,
                model_shapes=expected.matrices,
                max_sampled=_SAMPLED_REMOTELY if source.remote else None,
            )
        weights, found = package.weights, package.plain
    doubled, plain = list(source.doubled), {}
    for name, tensor in found.items():
        full = _full_name(name, expected)
        if full in weights or full in plain:
            doubled.append(f"{full}, once as {name}")
        plain[full] = tensor
    filled: dict[str, Recipe | None] = {}
    if base is not None:
        offered = {_full_name(name, expected): tensor for name, tensor in base.tensors.items()}
        wanted = {
            name: Wanted(component=target.component, path=target.path, shape=target.shape, linear=target.linear)
            for name, target in expected.targets.items()
            if name not in weights and name not in plain
        }
        filled = fill(wanted, offered, plain, weights, path=base.path)
        plain |= {name: offered[name] for name in filled}
    shapes = {name: tensor.shape for name, tensor in plain.items()}
    for name, weight in weights.items():
        shapes[name] = (weight.out_features or 0, weight.in_features or 0)
        target = expected.targets.get(name)
        if target is not None and shapes[name] == expected.matrices[name]:
            shapes[name] = target.shape  # a convolution packed as a matrix is unpacked to its own shape

    by_component: dict[str, dict[str, tuple[int, ...]]] = defaultdict(dict)
    strangers, skipped = [], []
    for name, shape in shapes.items():
        component = component_of(name)
        if name not in expected.targets and _is_skipped(name):
            skipped.append(name)
        elif component is None:
            strangers.append(name)
        else:
            by_component[component][name.removeprefix(MAIN[component][0])] = shape
    if source.gemma is not None:
        by_component["gemma"] = {name: tensor.shape for name, tensor in source.gemma.tensors.items()}
    for name, upscaler in source.upscalers.items():
        by_component[name] = {key: tensor.shape for key, tensor in upscaler.tensors.items()}
    plans = {
        component: plan(table_of(component, configs.upscalers)[1], by_component[component], expected.shapes[component])
        for component in configs.components
    }
    return Inventory(
        source=source,
        expected=expected,
        metadata=metadata,
        config_origin=origin,
        num_hidden_states=num_hidden_states,
        package=package,
        weights=weights,
        plain=plain,
        plans=plans,
        skipped=tuple(skipped),
        strangers=tuple(strangers),
        doubled=tuple(doubled),
        base=base,
        filled=filled,
    )


def _is_skipped(name: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in SKIP)


def _full_name(name: str, expected: Expected) -> str:
    """The published name of a plain tensor, also where a package left the prefix, or a part of it, out."""
    if name in expected.targets:
        return name
    return next((p + name for p in (PREFIX, "model.") if p + name in expected.targets), name)


def _find(sources: Iterable[Source], name: str) -> LazyTensor | None:
    """A plain tensor of the first source that has it, also where a package left the prefix out."""
    found = (source.tensors.get(name) or source.tensors.get(name.removeprefix(PREFIX)) for source in sources)
    return next((tensor for tensor in found if tensor is not None), None)


def _num_hidden_states(sources: Sequence[Source]) -> int:
    """How many states of the text encoder the projection reads: from its width, else from the text encoder."""
    projection = _find(sources, _PROJECTION)
    metadata = next((source.metadata for source in sources if source.metadata is not None), LTX_2_3)
    caption = metadata.get("transformer", {}).get("caption_channels")
    if projection is not None and len(projection.shape) == 2 and type(caption) is int and caption > 0:
        states, rest = divmod(projection.shape[1], caption)
        if states and not rest:
            return states
    gemma = sources[0].gemma
    if gemma is not None:
        text = gemma.metadata.get("text_config", gemma.metadata)
        return int(text.get("num_hidden_layers", NUM_HIDDEN_STATES - 1)) + 1
    return NUM_HIDDEN_STATES


@contextmanager
def _telling_what_was_assumed(sources: Sequence[Source], num_hidden_states: int) -> Iterator[None]:
    """Says with a misfit of the projection that the width it should have was a guess, where it was one."""
    try:
        yield
    except FormatError as error:
        guessed = sources[0].gemma is None and _find(sources, _PROJECTION) is None
        if guessed and "text_embedding_projection" in str(error):
            raise ConvertError(
                f"{error}; without a text encoder it was taken to read {num_hidden_states} hidden states, as LTX-2.3 "
                "does: give the text encoder that belongs to it (--gemma)"
            ) from error
        raise


def _with_registers(metadata: dict[str, Any], sources: Iterable[Source]) -> dict[str, Any]:
    """The metadata with the number of registers that the tensors have: not every file says it, none is believed."""
    registers = _find(sources, PREFIX + "video_embeddings_connector.learnable_registers")
    if registers is None or len(registers.shape) != 2 or "transformer" not in metadata:
        return metadata
    transformer = metadata["transformer"] | {"connector_num_learnable_registers": registers.shape[0]}
    return metadata | {"transformer": transformer}


def _check_text_encoder(configs: Configs, num_hidden_states: int, source: Source) -> None:
    gemma = configs.gemma
    if gemma is None or source.gemma is None:
        return
    gives = gemma.num_layers + 1, gemma.hidden_dim
    takes = num_hidden_states, configs.connectors.hidden_dim
    if gives != takes:
        raise ConvertError(
            f"the text encoder in {source.gemma.path} gives {gives[0]} hidden states of width {gives[1]}, but the "
            f"checkpoint reads {takes[0]} of width {takes[1]}; give the Gemma 3 that belongs to it (LTX-2.3: the 12 B "
            "instruction-tuned model)"
        )


def _check_upscalers(configs: Configs, source: Source) -> None:
    for name, upscaler in configs.upscalers.items():
        if upscaler.in_channels != configs.video_vae.latent_channels:
            raise ConvertError(
                f"{name} is for latents of {upscaler.in_channels} channels, this checkpoint's have "
                f"{configs.video_vae.latent_channels}; take {source.upscalers[name].path} out, or give the one that "
                "belongs to it"
            )


def _refuse_misfits(source: Source, expected: Expected) -> None:
    """Raises ConfigError if plain tensors do not have the shapes of the built-in configuration."""
    named = [(_full_name(name, expected), tensor) for name, tensor in source.tensors.items()]
    misfits = [
        f"{name} is {list(tensor.shape)}, LTX-2.3 has {list(expected.targets[name].shape)}"
        for name, tensor in named
        if name in expected.targets and tensor.shape != expected.targets[name].shape
    ]
    if misfits:
        listed = "\n  ".join(misfits[:8])
        raise ConfigError(
            "the files have lost their configuration, and the built-in one of LTX-2.3 does not fit: "
            f"{len(misfits)} misfits, first\n  {listed}\nGive files whose metadata has the `config` entry"
        )
