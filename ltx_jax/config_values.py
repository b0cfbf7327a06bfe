"""What a configuration file says, looked at before anything is built from it: types, sizes, and what is implemented."""

import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar, get_args, get_origin

_MAX_COUNT = 256  # layers, blocks, levels: building a model takes time for each. LTX-2.3 has 48
_MAX_SIZE = 2**24  # anything else: channels, rows of a vocabulary, hertz
_COUNTS = {"num_layers", "num_blocks_per_stage", "num_res_blocks"}

T = TypeVar("T")


class ConfigError(ValueError):
    """A checkpoint asks for a model that this library does not implement, or does not say what it needs."""


def refuse_unless(section: str, metadata: Any, supported: Mapping[str, Any]) -> None:
    """Raises ConfigError that lists every setting present in `metadata` with a value other than the supported one."""
    need_object(section, metadata)
    wrong = [
        f"{key} = {_short(metadata[key])} (implemented: {value!r})"
        for key, value in supported.items()
        if key in metadata and metadata[key] != value
    ]
    if wrong:
        raise ConfigError(f"the {section} configuration is not LTX-2.3: " + "; ".join(wrong))


def need(section: str, metadata: Any, *keys: str) -> list[Any]:
    """The values of keys that must be there."""
    need_object(section, metadata)
    missing = [key for key in keys if key not in metadata]
    if missing:
        raise ConfigError(f"the {section} configuration lacks {', '.join(missing)}")
    return [metadata[key] for key in keys]


def need_object(section: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"the {section} configuration must be a JSON object, got {_short(value)}")
    return value


def filled(section: str, make: type[T], **values: Any) -> T:
    """`make(**values)` of a dataclass, with lists as tuples and whole numbers as floats where its fields are such.

    Raises ConfigError for values of another type, or out of all proportion.
    """
    types = {field.name: field.type for field in fields(make)}  # type: ignore[arg-type]
    return make(**{name: _value(section, name, types[name], value) for name, value in values.items()})


def _value(section: str, name: str, kind: Any, value: Any) -> Any:
    where = f"the {section} configuration has {name} = {_short(value)}; expected"
    if kind is int:
        lowest, highest = (0, _MAX_COUNT) if name in _COUNTS else (1, _MAX_SIZE)
        if type(value) is not int or not lowest <= value <= highest:
            raise ConfigError(f"{where} a whole number from {lowest} to {highest}")
    elif kind is float:
        if type(value) not in (int, float) or not 0 <= value <= 1e30 or not math.isfinite(value):
            raise ConfigError(f"{where} a number of 0 or more")
        return float(value)
    elif kind is bool:
        if type(value) is not bool:
            raise ConfigError(f"{where} true or false")
    elif get_origin(kind) is tuple:
        if not isinstance(value, list | tuple) or not 1 <= len(value) <= _MAX_COUNT:
            raise ConfigError(f"{where} a list of 1 to {_MAX_COUNT} values")
        return tuple(_value(section, name, get_args(kind)[0], item) for item in value)
    return value


def _short(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 80 else text[:77] + "..."
