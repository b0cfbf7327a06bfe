"""Stems of quantized weights to the model's parameter names.

Writers replace every `.` of a name by `__`, which cannot be undone where a name has a `__` or an underscore next to a
dot. So nothing is undone: the model's own names are mangled in every known way, and stems are looked up there.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from hlwq_jax.tensors import FormatError

# What checkpoints put before a model's own names, and packages sometimes leave out.
PREFIXES = ("model.diffusion_model.", "diffusion_model.", "model.", "transformer.")


@dataclass(frozen=True, kw_only=True)
class ResolvedStems:
    names: Mapping[str, str]  # stem: parameter name
    unknown: tuple[str, ...] = field(default=())  # stems the model does not have; their names are plain replacements


def mangle(name: str) -> str:
    return name.replace(".", "__")


def resolve_stems(
    stems: Iterable[str], model_names: Iterable[str], *, prefixes: tuple[str, ...] = PREFIXES
) -> ResolvedStems:
    """Finds the parameter each stem stands for, with or without `.weight`, with or without a checkpoint prefix.

    A name as it stands goes before a name that needs a prefix added or removed. Raises `FormatError` where a stem fits
    two parameters, or two stems one parameter.
    """
    tiers = _lookup_tables(list(model_names), prefixes)
    names: dict[str, str] = {}
    unknown = []
    for stem in stems:
        fits = next((table[key] for table, key in _keys(stem, tiers) if key in table), None)
        if fits is None:
            unknown.append(stem)
            names[stem] = stem if "." in stem else stem.replace("__", ".")
        elif len(fits) > 1:
            raise FormatError(
                f"{stem}: ambiguous, it could be any of {', '.join(sorted(fits))}: rename the parameter in the package"
            )
        else:
            names[stem] = next(iter(fits))
    owners: dict[str, str] = {}
    for stem, name in names.items():
        if name in owners:
            raise FormatError(f"{owners[name]} and {stem} both stand for {name}: a package may hold a weight only once")
        owners[name] = stem
    return ResolvedStems(names=names, unknown=tuple(unknown))


def _lookup_tables(model_names: list[str], prefixes: tuple[str, ...]) -> list[dict[str, set[str]]]:
    """Four tables, spelling to the parameters it may mean: own names dotted and mangled, then with prefixes changed."""
    tables: list[dict[str, set[str]]] = [{}, {}, {}, {}]
    for name in model_names:
        bare = [name[len(p) :] for p in prefixes if name.startswith(p)]
        for tier, spellings in ((0, [name]), (2, bare + [p + name for p in prefixes])):
            for spelling in spellings:
                for variant in {spelling, spelling.removesuffix(".weight")}:
                    tables[tier].setdefault(variant, set()).add(name)
                    tables[tier + 1].setdefault(mangle(variant), set()).add(name)
    return tables


def _keys(stem: str, tables: list[dict[str, set[str]]]) -> list[tuple[dict[str, set[str]], str]]:
    """Where to look a stem up, in order. The dots of a stem count: its exact form comes first."""
    dotted, mangled, dotted_prefix, mangled_prefix = tables
    if "." in stem:
        return [(dotted, stem), (dotted_prefix, stem), (mangled, mangle(stem)), (mangled_prefix, mangle(stem))]
    # Without dots the stem may also be the name of a parameter that has none; both spellings are in the mangled table.
    return [(mangled, stem), (mangled_prefix, stem)]
