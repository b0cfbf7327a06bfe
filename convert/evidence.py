"""What the codes of a package show of themselves, beside what its sidecar, card and name claim."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from convert.files import Source
from hlwq_jax import StoredWeight
from hlwq_jax.energy import Measurement, measure, measure_tables

_BITS = re.compile(r"(?<![0-9A-Za-z])(?:Q([2-8])(?![0-9A-Za-z])|([2-8])[-_ ]?bits?\b)", re.IGNORECASE)
_CARD = 2**20  # characters that are read of a card
_ENOUGH_BLOCKS = 16  # of a weight, to judge it alone
_CHANCE = 3.0  # times what an energy may be off by chance


@dataclass(frozen=True, kw_only=True)
class Energy:
    """The mean energy of sampled codes under a table, and what it is for codes that were written with it."""

    measured: float
    expected: float

    @property
    def distance(self) -> float:
        return abs(self.measured - self.expected)


def energies(weights: Sequence[StoredWeight]) -> tuple[int, int, dict[str, Energy]]:
    """Of weights of one width and table: sampled blocks, those nearly constant, and the energy under every table."""
    nothing = np.empty((0, weights[0].block_size), np.uint8)
    codes = np.concatenate([nothing, *(weight.sample() for weight in weights if weight.energy is not None)])
    own = measure(codes, weights[0].centroids)
    found = {**measure_tables(codes, weights[0].bits), weights[0].table: own}
    by_table = {str(table): Energy(measured=one.mean, expected=one.expected) for table, one in found.items()}
    return own.num_blocks, own.num_saturated, by_table


def claimed_bits(source: Source) -> dict[str, int]:
    """Bits a weight, by who says so: sidecar, card, name."""
    claims: dict[str, int | None] = {}
    sidecar, card = source.sidecar or {}, source.path / "README.md"
    if isinstance(sidecar.get("format"), str):
        claims["sidecar's format"] = _told(sidecar["format"])
    if type(sidecar.get("bits")) is int:
        claims["sidecar"] = sidecar["bits"]
    if card.is_file():
        with card.open(errors="replace") as text:
            claims["card"] = _told(text.read(_CARD))
    # In the cache of the Hub a repository's name stands two folders above its files.
    named = map(_told, reversed(source.path.absolute().parts[-3:]))
    claims["name"] = next((bits for bits in named if bits is not None), None)
    return {who: bits for who, bits in claims.items() if bits is not None}


def _told(text: str) -> int | None:
    """The number of bits that a text speaks of, if of one more than of all others."""
    numbers = Counter(int(first or second) for first, second in _BITS.findall(text))
    return numbers.most_common(1)[0][0] if numbers and 2 * max(numbers.values()) > numbers.total() else None


def contradictions(weights: Iterable[StoredWeight], claims: Mapping[str, int]) -> Iterator[str]:
    """What speaks against a claim or a decision, with the evidence, one line each."""
    weights = list(weights)
    for bits in sorted({weight.bits for weight in weights}):
        ours = [weight for weight in weights if weight.bits == bits]
        higher = {who: claim for who, claim in claims.items() if claim > bits}
        if higher:
            said = ", ".join(f"{who}: {claim}" for who, claim in higher.items())
            nbytes = sum(weight.code_tensor.nbytes for weight in ours)
            codes = sum(weight.norm_tensor.size * weight.block_size for weight in ours)
            yield (
                f"fewer bits than claimed ({said}): {len(ours)} weights, such as {ours[0].name}, hold {bits} bits a "
                f"code ({nbytes} bytes for {codes} codes); what is claimed of their quality does not apply"
            )
    misfits: dict[tuple[str, str], list[tuple[StoredWeight, Measurement]]] = defaultdict(list)
    for weight in weights:
        better = _better_table(weight)
        if better is not None:
            misfits[weight.table, better[0]].append((weight, better[1]))
    for (table, better), found in misfits.items():
        weight, measured = found[0]
        yield (
            f"wrong table: {len(found)} weights, such as {weight.name}, are decoded with table {table} "
            f"({weight.energy}), but their codes fit table {better} ({measured})"
        )


def _better_table(weight: StoredWeight) -> tuple[str, Measurement] | None:
    """The table that fits a weight's codes where its own does not."""
    own = weight.energy
    if own is None or own.num_blocks < _ENOUGH_BLOCKS or own.distance <= _CHANCE * own.error:
        return None
    table, best = min(measure_tables(weight.sample(), weight.bits).items(), key=lambda item: item[1].distance)
    fits = best.distance <= best.error and _CHANCE * best.distance < own.distance
    return (table, best) if fits and table != weight.table else None
