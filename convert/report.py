"""What `inspect` tells of a source: from headers and a sample of codes."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from convert.evidence import Energy, claimed_bits, contradictions, energies
from convert.files import Fetched, Shelf, label, open_source
from convert.inventory import PREFIX, Inventory, take_inventory
from convert.loras import LoraFacts, describe_loras, lora_text
from hlwq_jax import StoredWeight

_BLOCK = re.compile(re.escape(PREFIX) + r"transformer_blocks\.(\d+)\.(.*)")


@dataclass(frozen=True, kw_only=True)
class QuantizedGroup:
    """Weights that were packed alike."""

    layout: str
    packing: str
    bits: int
    block_size: int
    codebook: str
    decided_by: str
    num_weights: int
    num_sampled: int  # of them
    num_bytes: int
    bits_per_weight: float  # norms, meta and padding included
    num_blocks: int  # that were sampled for the energy
    num_saturated: int  # of them nearly constant before they were packed
    energies: dict[str, Energy]  # by table; that of the codebook is the nearest to what it should be


@dataclass(frozen=True, kw_only=True)
class Report:
    """All facts of a source; plain values."""

    source: str
    kind: str
    model_version: str | None
    configuration: str
    files: dict[str, int]  # bytes
    num_tensors: int
    num_bytes: int
    quantized: tuple[QuantizedGroup, ...]
    claimed_bits: dict[str, int]  # by who says so
    num_blocks: int
    linears_per_block: int
    quantized_block_linears: int
    plain_block_linears: int
    quantized_elsewhere: tuple[str, ...]
    text_encoder: str | None
    upscalers: dict[str, str]
    skipped: tuple[str, ...]
    ignored: dict[str, str]
    warnings: tuple[str, ...]
    missing: tuple[str, ...]  # grouped, one line each
    num_missing: int
    base: str | None
    filled: tuple[str, ...]  # from the base; grouped, one line each
    num_filled: int
    num_filled_packed: int  # of them packed, as the package packs its like
    problems: tuple[str, ...]
    loras: tuple[LoraFacts, ...]  # that lie beside the model
    fetched: Fetched | None = None  # by HTTP

    @property
    def complete(self) -> bool:
        return not (self.missing or self.problems)


def inspect(
    source: str | Path,
    *,
    gemma: str | Path | None = None,
    upscalers: Iterable[str | Path] = (),
    base: str | Path | None = None,
    shelf: Shelf | None = None,
) -> Report:
    """Reads headers and a sample of codes of a source; never a whole payload. Raises as `convert` does."""
    shelf = shelf or Shelf()
    opened = open_source(
        Path(source), gemma=None if gemma is None else Path(gemma), upscalers=tuple(map(Path, upscalers)), shelf=shelf
    )
    report = make_report(take_inventory(opened, None if base is None else open_source(Path(base), shelf=shelf)))
    return replace(report, fetched=shelf.fetched)


def make_report(inventory: Inventory) -> Report:
    source, expected = inventory.source, inventory.expected
    linears = [name for name, target in expected.targets.items() if target.linear and _is_big_linear(name)]
    found = set(inventory.plain) | set(inventory.weights)
    missing, claims = inventory.missing, claimed_bits(source)
    linears_per_block = len(linears) // max(expected.configs.transformer.num_layers, 1)
    warnings = () if inventory.package is None else inventory.package.warnings
    return Report(
        source=label(source.path),
        kind="HLWQ package" if inventory.weights else "plain checkpoint",
        model_version=source.model_version,
        configuration=inventory.config_origin,
        files={label(path): size for path, size in source.file_sizes.items()},
        num_tensors=len(found) + sum(len(upscaler.tensors) for upscaler in source.upscalers.values()),
        num_bytes=source.nbytes,
        quantized=_groups(inventory.weights.values()),
        claimed_bits=claims,
        num_blocks=expected.configs.transformer.num_layers,
        linears_per_block=linears_per_block,
        quantized_block_linears=sum(name in inventory.weights for name in linears),
        plain_block_linears=sum(name in inventory.plain for name in linears),
        quantized_elsewhere=tuple(sorted(set(inventory.weights) - set(linears))),
        text_encoder=None if source.gemma is None else label(source.gemma.path),
        upscalers={name: label(upscaler.path) for name, upscaler in source.upscalers.items()},
        skipped=inventory.skipped,
        ignored=source.ignored,
        warnings=(*_together(warnings), *contradictions(inventory.weights.values(), claims)),
        missing=tuple(group_missing(missing, linears_per_block=linears_per_block)),
        num_missing=len(missing),
        base=None if inventory.base is None else label(inventory.base.path),
        filled=tuple(group_missing(inventory.filled, linears_per_block=linears_per_block)),
        num_filled=len(inventory.filled),
        num_filled_packed=sum(recipe is not None for recipe in inventory.filled.values()),
        problems=tuple(inventory.problems),
        loras=describe_loras(source.loras, expected),
    )


def _is_big_linear(name: str) -> bool:
    """One of the 28 linears of a block that packages quantise: those of attention and feed-forward, not the gates."""
    return bool(_BLOCK.fullmatch(name)) and "to_gate_logits" not in name


def _groups(weights: Iterable[StoredWeight]) -> tuple[QuantizedGroup, ...]:
    by_kind: dict[tuple[Any, ...], list[StoredWeight]] = defaultdict(list)
    for weight in weights:
        by_kind[weight.layout, weight.packing, weight.bits, weight.block_size, weight.table].append(weight)
    groups = []
    for (layout, packing, bits, block_size, table), members in by_kind.items():
        reasons = Counter(member.table_reason for member in members)
        values = sum((member.out_features or 0) * (member.in_features or 0) for member in members)
        stored = sum(member.nbytes for member in members)
        num_blocks, num_saturated, measured = energies(members)
        groups.append(
            QuantizedGroup(
                layout=layout,
                packing=packing,
                bits=bits,
                block_size=block_size,
                codebook=table,
                decided_by=reasons.most_common(1)[0][0],
                num_weights=len(members),
                num_sampled=sum(member.energy is not None for member in members),
                num_bytes=stored,
                bits_per_weight=8 * stored / max(values, 1),
                num_blocks=num_blocks,
                num_saturated=num_saturated,
                energies=measured,
            )
        )
    return tuple(sorted(groups, key=lambda group: -group.num_bytes))


def _together(warnings: Iterable[str]) -> list[str]:
    """Warnings, one line for those that say the same of many weights."""
    same: dict[str, list[str]] = defaultdict(list)
    for text in warnings:
        name, _, what = text.partition(": ")
        same[what or text].append(name if what else "")
    return [
        f"{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}: {what}" if names[0] else what
        for what, names in same.items()
    ]


def group_missing(names: Iterable[str], *, linears_per_block: int) -> list[str]:
    """Missing names as a few lines: ranges of blocks that lack the same, then one line a group of other names."""
    blocks: dict[int, set[str]] = defaultdict(set)
    others: dict[str, list[str]] = defaultdict(list)
    for name in names:
        found = _BLOCK.fullmatch(name)
        if found:
            blocks[int(found[1])].add(found[2])
        else:
            others[_group_of(name)].append(name)
    lines = []
    runs: list[tuple[int, int, set[str]]] = []
    for number in sorted(blocks):
        if runs and runs[-1][1] == number - 1 and runs[-1][2] == blocks[number]:
            runs[-1] = runs[-1][0], number, runs[-1][2]
        else:
            runs.append((number, number, blocks[number]))
    for first, last, lacking in runs:
        where = f"transformer_blocks {first}" + (f"-{last}" if last > first else "")
        linears = sorted(
            name
            for name in lacking
            if name.endswith(".weight")
            and _is_big_linear(f"{PREFIX}transformer_blocks.0.{name}")
            and "norm" not in name
        )
        rest = sorted(lacking - set(linears))
        what = []
        if linears:
            what.append(f"all {len(linears)} linears" if len(linears) == linears_per_block else _some(linears))
        if rest:
            what.append(_some(rest))
        count = (last - first + 1) * len(lacking)
        lines.append(f"{where}: {' and '.join(what)} ({last - first + 1} blocks, {count} tensors)")
    lines += [f"{group}: {_some(sorted(members))}" for group, members in others.items()]
    return lines


def _group_of(name: str) -> str:
    """What a name outside the blocks is listed under."""
    short = name.removeprefix(PREFIX)
    return ("model.diffusion_model." if short != name else "") + short.partition(".")[0]


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return f"{len(names)} tensors: {', '.join(names[:4])}{more}" if len(names) > 1 else names[0]


def to_text(report: Report) -> str:
    """The report for people."""
    lines = [
        f"source         {report.source}",
        f"kind           {report.kind}, {report.num_tensors} tensors, {size_text(report.num_bytes)}",
        f"version        {report.model_version or 'not stated'}",
        f"configuration  {report.configuration}",
    ]
    lines += [f"file           {path} ({size_text(size)})" for path, size in report.files.items()]
    for group in report.quantized:
        lines.append(
            f"quantised      {group.num_weights} matrices, layout {group.layout}, packing {group.packing}, "
            f"{group.bits} bits in blocks of {group.block_size}: {group.bits_per_weight:.3f} bits a weight, "
            f"{size_text(group.num_bytes)}"
        )
        lines.append(f"codebook       {group.codebook}: {group.decided_by}")
        tables = ", ".join(f"{t} {e.measured:.4f} ({e.expected:.4f})" for t, e in group.energies.items())
        saturated = f", {group.num_saturated} nearly constant" if group.num_saturated else ""
        few = f" of {group.num_sampled} matrices" if group.num_sampled < group.num_weights else ""
        lines.append(f"energy         of {group.num_blocks} blocks{few} by table (expected): {tables}{saturated}")
    if report.claimed_bits:
        claims = ", ".join(f"{who} says {bits}" for who, bits in report.claimed_bits.items())
        lines.append(f"claimed bits   {claims}")
    total = report.num_blocks * report.linears_per_block
    lines.append(
        f"coverage       {report.quantized_block_linears} of {total} block linears quantised "
        f"({report.num_blocks} blocks of {report.linears_per_block}), {report.plain_block_linears} plain"
    )
    if report.quantized_elsewhere:
        lines.append(f"also quantised {_some([name.removeprefix(PREFIX) for name in report.quantized_elsewhere])}")
    lines += [f"upscaler       {name}: {path}" for name, path in report.upscalers.items()]
    lines.append(f"text encoder   {report.text_encoder or 'none here; give --gemma to convert with one'}")
    lines += [f"skipped        {name} (nothing reads it)" for name in report.skipped]
    lines += [f"ignored        {label(Path(path))}: {why}" for path, why in report.ignored.items()]
    lines += [f"warning        {text}" for text in report.warnings]
    lines += [f"problem        {text}" for text in report.problems[:20]]
    if len(report.problems) > 20:
        lines.append(f"problem        and {len(report.problems) - 20} more")
    if report.base is not None:
        what = f"{report.num_filled} tensors, {report.num_filled_packed} of them to be packed"
        lines.append(f"filled         {what}, from {report.base}")
        lines += [f"               {line}" for line in report.filled]
    if report.missing:
        lines.append(f"MISSING        {report.num_missing} tensors; this package cannot be converted as it is")
        lines += [f"               {line}" for line in report.missing]
    elif not report.problems:
        lines.append("complete       every parameter of every model is here, once")
    lines += [lora_text(lora) for lora in report.loras]
    if report.fetched is not None:
        lines.append(fetched_text(report.fetched))
    return "\n".join(lines)


def fetched_text(fetched: Fetched) -> str:
    """What was read over the network, for people."""
    return (
        f"fetched        {size_text(fetched.num_bytes)} of {size_text(fetched.of_bytes)}, in {fetched.num_requests} "
        "requests; a conversion reads all of it"
    )


def size_text(count: float) -> str:
    """Bytes, for people."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.4g} {unit}"
        count /= 1000
    return f"{count:.4g} GB"
