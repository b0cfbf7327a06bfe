"""What a LoRA file holds, and which linears of the model it adapts: read by the rules of `generate.py --lora`."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from convert.files import label
from convert.inventory import PREFIX, Expected
from hlwq_jax import TensorFile
from ltx_jax.checkpoint import Configs
from ltx_jax.lora import find_pairs
from ltx_jax.presets import LTX_2_3, NUM_HIDDEN_STATES

_REFERENCE = ("reference_downscale_factor", "reference_temporal_scale_factor")  # of IC-LoRAs
_NUMBER = re.compile(r"(?<=_blocks\.)\d+(?=\.)")


@dataclass(frozen=True, kw_only=True)
class LoraFacts:
    """A LoRA file, held against a model; plain values."""

    file: str
    num_bytes: int
    num_pairs: int
    ranks: dict[int, int]  # how many pairs have it
    dtypes: dict[str, int]  # how many tensors have it
    model: str
    matched: dict[str, int]  # linears of the model, by name without the block's number
    unmatched: dict[str, int]  # names that the model does not have, likewise
    misfits: tuple[str, ...]  # linears of the model that are of another size
    foreign: tuple[str, ...]  # keys that generate.py does not read
    broken: tuple[str, ...]  # linears without A or B, or with two ranks
    metadata: dict[str, str]

    @property
    def fits(self) -> bool:
        """Whether generate.py can add it to the model."""
        return bool(self.matched) and not (self.unmatched or self.misfits or self.foreign or self.broken)


def describe_loras(loras: Mapping[Path, TensorFile], expected: Expected | None = None) -> tuple[LoraFacts, ...]:
    """Describes LoRA files from their headers, held against a model: that of LTX-2.3, unless another is expected."""
    if not loras:
        return ()
    model = "the model beside it"
    if expected is None:
        model = "LTX-2.3"
        expected = Expected(Configs.from_metadata(LTX_2_3, num_hidden_states=NUM_HIDDEN_STATES))
    linears = {
        name.removeprefix(PREFIX).removesuffix(".weight"): target.shape
        for name, target in expected.targets.items()
        if target.linear and target.component == "transformer"
    }
    return tuple(_describe(path, file, linears, model) for path, file in loras.items())


def _describe(path: Path, file: TensorFile, linears: Mapping[str, tuple[int, ...]], model: str) -> LoraFacts:
    shapes = {key: tensor.shape for key, tensor in file.items()}
    pairs = find_pairs(shapes)
    sizes = {name: (shapes[b][0], shapes[a][1]) for name, (a, b) in pairs.keys.items()}
    known = [name for name in sizes if name in linears]
    return LoraFacts(
        file=label(path),
        num_bytes=file.file_size,
        num_pairs=len(pairs.keys),
        ranks=dict(Counter(shapes[a][0] for a, _ in pairs.keys.values())),
        dtypes=dict(sorted(Counter(str(tensor.dtype) for tensor in file.values()).items())),
        model=model,
        matched=_kinds(known),
        unmatched=_kinds(name for name in sizes if name not in linears),
        misfits=tuple(
            f"{name} is {list(sizes[name])}, that of {model} {list(linears[name])}"
            for name in known
            if sizes[name] != linears[name]
        ),
        foreign=pairs.foreign,
        broken=pairs.broken,
        metadata=file.metadata,
    )


def _kinds(names: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(_NUMBER.sub("*", name) for name in names).items()))


def lora_text(lora: LoraFacts) -> str:
    """The facts for people."""
    ranks = ", ".join(f"{rank} ({count})" for rank, count in sorted(lora.ranks.items()))
    lines = [
        f"LoRA           {lora.file}",
        f"pairs          {lora.num_pairs} of rank {ranks if len(lora.ranks) != 1 else next(iter(lora.ranks))}, "
        f"{', '.join(lora.dtypes)}",
        f"adapts         {sum(lora.matched.values())} linears of {lora.model}",
        *(f"               {kind} ({count})" for kind, count in lora.matched.items()),
    ]
    lines += [f"reference      {key} {lora.metadata[key]}" for key in _REFERENCE if key in lora.metadata]
    lines += [f"metadata       {key}: {_short(text)}" for key, text in lora.metadata.items() if key not in _REFERENCE]
    lines += [f"NOT IN MODEL   {kind} ({count})" for kind, count in lora.unmatched.items()]
    lines += _some("OTHER SIZE", lora.misfits) + _some("NOT READ", lora.foreign) + _some("BROKEN PAIR", lora.broken)
    end = (
        "give it to generate.py, with --lora FILE:STRENGTH" if lora.fits else f"generate.py refuses it for {lora.model}"
    )
    return "\n".join([*lines, f"use            {end}"])


def _some(what: str, found: tuple[str, ...]) -> list[str]:
    more = [f"{'':<15}and {len(found) - 4} more"] if len(found) > 4 else []
    return [f"{what:<15}{text}" for text in found[:4]] + more


def _short(text: str) -> str:
    return text if len(text) <= 80 else text[:77] + "..."
