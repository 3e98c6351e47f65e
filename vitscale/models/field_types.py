"""Values as a dataclass's annotations say, since JSON, YAML and Python callers give what they like."""

from __future__ import annotations

import numbers
import sys
from collections.abc import Iterable
from dataclasses import fields
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from vitscale.errors import ConfigError

_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text", NoneType: "none"}


def typed_fields(instance: Any) -> None:
    """Make every field what its annotation says (a whole number becomes a float where one is wanted).

    Raises ConfigError naming the key, its value and what it must be.
    """
    hints = get_type_hints(type(instance))
    for item in fields(instance):
        name, hint, value = item.name, hints[item.name], getattr(instance, item.name)
        try:
            setattr(instance, name, _as_type(hint, value))
        except TypeError:
            raise ConfigError(f"{name}={value!r}: must be {_name(hint)}") from None


def _as_type(hint: Any, value: Any) -> Any:
    origin, options = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return _first(options, value)
    if origin is tuple and isinstance(value, (list, tuple)) and len(value) == len(options):
        return tuple(_as_type(option, part) for option, part in zip(options, value, strict=True))
    if origin is dict and isinstance(value, dict):
        return {_entry(options[0], key): _entry(options[1], part) for key, part in value.items()}
    if isinstance(value, (bool, str, NoneType)):  # bool before numbers: to Python it is one
        if hint in (bool, str, NoneType) and isinstance(value, hint):
            return value
    elif hint is int and isinstance(value, numbers.Integral):
        return int(value)
    elif hint is float and is_finite(value):
        return float(value)
    raise TypeError


def is_finite(value: Any) -> bool:
    """Whether this is a number, NumPy's too, that a float can hold: not NaN, infinite, 10**400, or a bool."""
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return number and bool(abs(value) <= sys.float_info.max)


def _first(options: Iterable[Any], value: Any) -> Any:
    for option in options:
        try:
            return _as_type(option, value)
        except TypeError:
            continue
    raise TypeError


def _entry(hint: Any, value: Any) -> Any:
    """A key or value of a mapping; JSON writes a number that is a key as text."""
    return _as_type(hint, int(value) if hint is int and isinstance(value, str) and value.isdecimal() else value)


def _name(hint: Any) -> str:
    origin, options = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join(_name(option) for option in options)
    if origin is tuple:
        return f"{len(options)} whole numbers"
    if origin is dict:
        return f"a mapping of {_name(options[0])} to {_name(options[1])}"
    return _NAMES[hint]
