"""Values as type annotations say, since YAML, the command line, JSON and Python callers give what they like."""

from __future__ import annotations

import numbers
import re
import sys
from collections.abc import Iterable
from dataclasses import fields
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from vitscale.errors import ConfigError

_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text", NoneType: "null"}
_NAMES |= {list: "a list", dict: "a mapping", tuple: "a list"}
_BOOLS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
NULL = ("null", "~", "")
_WHOLE = re.compile(r"[+-]?\d+(_\d+)*", re.ASCII)


class Plain(str):
    """A scalar as it was written in YAML without quotes, or on the command line: what it means follows from the type
    that is wanted, so that text stays as it is (`no`, 0123, 2026-01-02, exp #3) and 0123 is 123, never octal."""

    def __repr__(self) -> str:
        """As it was written; in quotes if it is text."""
        return str(self) if self and kind_of(self) != type_name(str) else str.__repr__(self)


def typed_fields(instance: Any) -> None:
    """Make every field what its annotation says (a whole number becomes a float where one is wanted).

    Raises ConfigError naming the key, its value and what it must be.
    """
    hints = get_type_hints(type(instance))
    for item in fields(instance):
        name, hint, value = item.name, hints[item.name], getattr(instance, item.name)
        try:
            setattr(instance, name, as_type(hint, value))
        except TypeError:
            raise ConfigError(f"{name}={value!r}: must be {type_name(hint)}") from None


def options_of(hint: Any) -> tuple[Any, ...]:
    """The types that a hint allows, null first: the word null is no text if null is allowed."""
    options = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    return tuple(sorted(options, key=lambda option: option is not NoneType))


def as_type(hint: Any, value: Any) -> Any:
    """A value as one of the hint's type; TypeError if it is none."""
    options = options_of(hint)
    if len(options) > 1:
        return _first(options, value)
    origin, items = get_origin(hint), get_args(hint)
    if origin is Literal and isinstance(value, str) and value in items:
        return str(value)
    if origin is tuple and isinstance(value, (list, tuple)):
        items = (items[0],) * len(value) if items[1:] == (Ellipsis,) else items
        if len(items) != len(value):
            raise TypeError
        return tuple(as_type(item, part) for item, part in zip(items, value, strict=True))
    if origin is dict and isinstance(value, dict):
        return {_entry(items[0], key): _entry(items[1], part) for key, part in value.items()}
    if isinstance(value, Plain):
        return _of_plain(hint, value)
    if isinstance(value, (bool, str, NoneType)):  # bool before numbers: to Python it is one
        if hint in (bool, str, NoneType) and isinstance(value, hint):
            return value
    elif hint is int and isinstance(value, numbers.Integral):
        return int(value)
    elif hint is float and is_finite(value):
        return float(value)
    raise TypeError


def _of_plain(hint: Any, text: Plain) -> Any:
    if hint is str and text:
        return str(text)
    if hint is NoneType and text.lower() in NULL:
        return None
    if hint is bool and text.lower() in _BOOLS:
        return _BOOLS[text.lower()]
    if hint is int and _WHOLE.fullmatch(text) and len(text) < 4000:  # Python reads no longer ones
        return int(str(text))
    if hint is float:
        try:
            number = float(str(text))  # its error would ask for the text's repr
        except ValueError:
            raise TypeError from None
        if is_finite(number):
            return number
    raise TypeError


def is_finite(value: Any) -> bool:
    """Whether this is a number, NumPy's too, that a float can hold: not NaN, infinite, 10**400, or a bool."""
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return number and bool(abs(value) <= sys.float_info.max)


def _first(options: Iterable[Any], value: Any) -> Any:
    for option in options:
        try:
            return as_type(option, value)
        except TypeError:
            continue
    raise TypeError


def _entry(hint: Any, value: Any) -> Any:
    """A key or value of a mapping; JSON writes a number that is a key as text."""
    return as_type(hint, int(value) if hint is int and isinstance(value, str) and value.isdecimal() else value)


def type_name(hint: Any) -> str:
    """What a value of this type is called in messages."""
    options, items = options_of(hint), get_args(hint)
    if len(options) > 1:
        return " or ".join(type_name(option) for option in sorted(options, key=lambda option: option is NoneType))
    if get_origin(hint) is Literal:
        return " or ".join(items)
    if get_origin(hint) is tuple and items[-1] is Ellipsis:
        return f"a list of {'texts or a mapping {0: text, 1: text, ...}' if items[0] is str else 'numbers'}"
    if get_origin(hint) is tuple:
        return f"a list of {len(items)} {'whole numbers' if items[0] is int else 'numbers'}"
    if get_origin(hint) is dict:
        return f"a mapping of {type_name(items[0])} to {type_name(items[1])}"
    return _NAMES.get(hint, str(hint))


def kind_of(value: Any) -> str:
    """What a value that was written is, for messages."""
    for hint in (NoneType, bool, int, float):
        try:
            as_type(hint, value)
        except TypeError:
            continue
        return type_name(hint)
    return type_name(next((kind for kind in (str, list, dict) if isinstance(value, kind)), type(value)))


def require(holds: bool, key: str, value: Any, rule: str) -> None:
    """ConfigError where a rule of a key does not hold."""
    if not holds:
        raise ConfigError(f"{key}={value!r}: must be {rule}")


def one_of(key: str, value: str, choices: tuple[str, ...]) -> None:
    """ConfigError where a value is none of those that there are."""
    require(value in choices, key, value, "one of " + ", ".join(choices))
