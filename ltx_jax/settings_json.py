"""Settings as JSON has them: the .json beside a clip, and files of many prompts."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from ltx_jax.settings import Settings

KINDS: dict[str, Any] = get_type_hints(Settings)
PATHS = tuple(name for name, kind in KINDS.items() if Path in get_args(kind))  # settings that name a file


def settings_from(values: Mapping[str, Any], base: Settings) -> Settings:
    """`base` with other values: lists become tuples, texts paths, whole numbers floats, where the settings are such.

    Raises ValueError for a name that is no setting, and for a value of another type.
    """
    unknown = sorted(set(values) - set(KINDS))
    if unknown:
        raise ValueError(f"there is no setting {', '.join(unknown)}; the settings are the flags of generate.py --help")
    found = {}
    for name, value in values.items():
        try:
            found[name] = _value(KINDS[name], value)
        except TypeError:
            raise ValueError(f"{name} must be {_described(KINDS[name])}, got {value!r}") from None
    return replace(base, **found)


def _value(kind: Any, value: Any) -> Any:
    """A value of JSON as the type asks for it. Raises TypeError where it is not such."""
    origin, arms = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        if value is None and NoneType in arms:
            return None
        (kind,) = [arm for arm in arms if arm is not NoneType]
        return _value(kind, value)
    if origin is Literal and value in arms:
        return value
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(_value(arms[0], item) for item in value)
    if kind is Path and isinstance(value, str | Path):
        return Path(value)
    if kind is float and type(value) in (int, float):
        return float(value)
    if kind in (int, str, bool) and type(value) is kind:
        return value
    raise TypeError


def _described(kind: Any) -> str:
    origin, arms = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return " or ".join(_described(arm) for arm in arms)
    if origin is Literal:
        return "one of " + ", ".join(arms)
    if origin is tuple:
        return f"a list, each {_described(arms[0])}"
    names = {Path: "a path", float: "a number", int: "a whole number", str: "a text", bool: "true or false"}
    return names.get(kind, "null")
