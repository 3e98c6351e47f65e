"""YAML + `extends` + dotted overrides -> RunConfig, strictly.

Later layers win: schema defaults < the keys of model.preset and augment.preset < the file that `extends` names <
the file < overrides. Every layer is flattened to dotted keys and typed by the schema on its own, so an error
can say where the value stands.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from dataclasses import MISSING, fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml

from vitscale.config import augmentation
from vitscale.config.augmentation import Step
from vitscale.config.presets import PRESET_KEYS, preset
from vitscale.config.schema import RunConfig, Source, as_dict
from vitscale.config.typed import NULL, Plain, as_type, kind_of, options_of, type_name
from vitscale.errors import ConfigError
from vitscale.files.stores import REMOTE, require_no_secret
from vitscale.text import did_you_mean

Flat = dict[str, Any]
# What lists hold beside texts and numbers: an item is a mapping, or a text, which is its first field.
_RECORDS = {
    Source: "a list of patterns or {pattern, weight, repeat}",
    Step: "a list of names or {name, probability, low, high}",
}
# Beside the patterns of a Source.
_PATHS = ("run.dir", "data.index", "data.cache", "model.init_from", "checkpoint.resume_from")
# What can only be meant as a list or a mapping, not as a pattern such as [0-9].tar or {a,b}.tar.
_LISTED = re.compile(r"\s*(\[([^\]]*,|.*\]\s*$)|\{.*: )", re.DOTALL)
_NO_YAML = (ValueError, RecursionError, yaml.YAMLError)  # bytes that are no text; [[[[[...


def load_config(
    path: str | Path, overrides: Iterable[str] = (), complete: Callable[[Flat], Flat] | None = None
) -> RunConfig:
    """Read a config file and `dotted.key=value` overrides.

    complete: from the keys that are written, further ones, which stand below them.
    Raises ConfigError for a missing file, broken YAML, an unknown key or a value of the wrong type.
    """
    return _resolved([*_file_layers(Path(path), ()), _override_layer(overrides)], complete)


def config_of(keys: Flat, overrides: Iterable[str] = ()) -> RunConfig:
    """A config of keys that no file says, and overrides. Raises ConfigError as load_config does."""
    return _resolved([keys, _override_layer(overrides)])


def _resolved(layers: Iterable[Flat], complete: Callable[[Flat], Flat] | None = None) -> RunConfig:
    merged: Flat = {}
    for layer in layers:
        _overlay(merged, layer)
    if merged.get("model.preset") is not None:
        sizes = preset(merged["model.preset"])
        merged = {f"model.{name}": value for name, value in sizes.items()} | merged
    if merged.get("augment.preset") in augmentation.PRESETS:  # the schema refuses another one
        keys = augmentation.PRESETS[merged["augment.preset"]]
        merged = {f"augment.{name}": value for name, value in keys.items()} | merged
    if complete is not None:
        merged = complete(merged) | merged
    if merged.get("model.id2label") is not None:
        merged.setdefault("model.num_labels", len(merged["model.id2label"]))
    return _build(RunConfig, merged, "")


def dump_config(config: RunConfig) -> str:
    """The resolved config as YAML that `load_config` reads back to the same config."""
    return yaml.dump(as_dict(config), Dumper=_ExactDumper, sort_keys=False, allow_unicode=True, width=100)


class _ExactDumper(yaml.SafeDumper):
    """SafeDumper that escapes line ends and control characters in texts, some of which PyYAML would fold to a space."""


def _text(dumper: _ExactDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if text.isprintable() else '"')


_ExactDumper.add_representer(str, _text)


def _overlay(merged: Flat, layer: Flat) -> None:
    """Lay `layer` over `merged`; what a key stands instead of is cleared from below."""
    steps, epochs = layer.get("train.steps"), layer.get("train.epochs")
    if steps is not None and epochs is not None:
        raise ConfigError(f"train.steps={steps} and train.epochs={epochs}: set one; the other follows from the data")
    if steps is not None:
        merged.pop("train.epochs", None)
    if epochs is not None:
        merged.pop("train.steps", None)
    if "model.preset" in layer:
        for name in PRESET_KEYS:
            merged.pop(f"model.{name}", None)
    if "augment.preset" in layer:
        for name in {name for keys in augmentation.PRESETS.values() for name in keys}:
            merged.pop(f"augment.{name}", None)
    if layer.get("model.id2label") is not None:
        merged.pop("model.num_labels", None)
    merged.update(layer)


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key written twice in a mapping, and leaves to the schema what a plain scalar means."""


def _scalar(loader: _StrictLoader, node: yaml.ScalarNode) -> str:
    return Plain(node.value) if node.style is None else node.value


for _tag in ("null", "bool", "int", "float", "timestamp", "str", "value"):
    _StrictLoader.add_constructor(f"tag:yaml.org,2002:{_tag}", _scalar)


def _unique_mapping(loader: _StrictLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        line = key_node.start_mark.line + 1
        if isinstance(key, (list, dict)):
            raise ConfigError(f"{loader.name}:{line}: key {key!r}: must be one word")
        if key in seen:
            raise ConfigError(f"{loader.name}:{line}: key {key!r} is written twice; keep one")
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


_StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _unique_mapping)


def _file_layers(path: Path, below: tuple[Path, ...]) -> list[Flat]:
    """The layers of a file: those of the file it extends first, then its own."""
    if path.resolve() in below:
        raise ConfigError(f"{path}: 'extends' comes back to this file; break the circle")
    try:
        with open(path, encoding="utf-8") as stream:
            content = yaml.load(stream, Loader=_StrictLoader)  # noqa: S506 - a SafeLoader
    except FileNotFoundError:
        if "=" in str(path):
            raise ConfigError(f"{path}: no such config file; name the file first, then what is laid over it") from None
        raise ConfigError(f"{path}: no such config file; see configs/ for those that come with vitscale") from None
    except ConfigError:  # which is a ValueError
        raise
    except (OSError, *_NO_YAML) as error:
        raise ConfigError(f"{path}: cannot be read as YAML: {' '.join(str(error).split())}") from None
    if content is None:
        content = {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: holds a {type(content).__name__}; a config is a mapping of sections")
    parent = content.pop("extends", None)
    layers: list[Flat] = []
    if parent is not None:
        if not isinstance(parent, str):
            raise ConfigError(f"{path}: extends={parent!r}: must be one file's path, relative to this file")
        layers = _file_layers(path.parent / parent, (*below, path.resolve()))
    return [*layers, _flatten(RunConfig, content, "", str(path))]


def _override_layer(overrides: Iterable[str]) -> Flat:
    """`a.b=value` strings as a layer."""
    layer: Flat = {}
    for text in overrides:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise ConfigError(f"override {text!r}: must be dotted.key=value, in one word, say train.steps=100")
        parts = name.strip().split(".")
        content = _override_value(_hint(parts), value, text)
        for part in reversed(parts):
            content = {part: content}
        layer.update(_flatten(RunConfig, content, "", "command line"))
    return layer


def _override_value(hint: Any, value: str, text: str) -> Any:
    """What an override says. A single text, number, true, false or null stands as it is; a list or a mapping is YAML,
    which is asked for by its first character, [ or {, where the key takes one."""
    if _is_section(hint) and not value.strip():
        raise ConfigError(f"override {text!r}: is a section; write its keys, say {text.strip()[:-1]}.KEY=VALUE")
    takes_many = any(get_origin(option) is tuple for option in options_of(hint)) or hint is None or _is_section(hint)
    one_text = any(option is str or _item(option) in (str, *_RECORDS) for option in options_of(hint))
    if not takes_many or not value.lstrip().startswith(("[", "{")):
        return Plain(value if one_text else value.strip())
    try:
        content = yaml.load(value, Loader=_StrictLoader)  # noqa: S506 - a SafeLoader
    except ConfigError:  # which is a ValueError
        raise
    except _NO_YAML as error:
        if _item(hint) is Source and not _LISTED.match(value):
            return Plain(value)
        raise ConfigError(
            f"override {text!r}: the value is no YAML: {' '.join(str(error).split())}; in a list, texts with special "
            "characters go in quotes: ['a #1', 'b']"
        ) from None
    is_pattern = _item(hint) is Source and isinstance(content, dict) and "pattern" not in content
    return Plain(value) if is_pattern else content


def _item(hint: Any) -> Any:
    """What a list of this type holds; None for another type."""
    return get_args(hint)[0] if get_origin(hint) is tuple else None


def _is_section(hint: Any) -> bool:
    return is_dataclass(hint)


@cache
def _hints(section: type) -> dict[str, Any]:
    return get_type_hints(section)


def _hint(parts: list[str]) -> Any:
    """The type of a dotted key, None where the schema has no such key."""
    hint: Any = RunConfig
    for part in parts:
        hint = _hints(hint).get(part) if _is_section(hint) else None
    return hint


def _flatten(section: type, content: dict[Any, Any], prefix: str, where: str) -> Flat:
    """Nested mappings as {dotted key: typed value}; refuses what the schema does not have."""
    flat: Flat = {}
    for name, value in content.items():
        key = f"{prefix}{name}"
        if name not in _hints(section):
            raise ConfigError(f"{where}: unknown key {key!r}{_nearest(key)}")
        hint = _hints(section)[name]
        if not _is_section(hint):
            flat[key] = _with_home(_typed(hint, value, key, where), key)
            _require_no_secret(flat[key], key)
        elif isinstance(value, dict):
            flat.update(_flatten(hint, value, f"{key}.", where))
        elif value != "" and value is not None:  # an empty section in YAML: it says nothing
            raise ConfigError(f"{where}: {key}={value!r}: is a section; write its keys below it")
    return flat


def _nearest(key: str) -> str:
    names = list(_all_keys(RunConfig, ""))
    leaf = [name for name in names if name.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]]  # in the wrong section
    return did_you_mean(key, names) or did_you_mean(key, leaf, 0.0) or "; `vitscale config CONFIG` prints every key"


def _all_keys(section: type, prefix: str) -> Iterable[str]:
    for name, hint in _hints(section).items():
        yield f"{prefix}{name}"
        if _is_section(hint):
            yield from _all_keys(hint, f"{prefix}{name}.")


def _typed(hint: Any, value: Any, key: str, where: str) -> Any:
    """`value` as the schema's type, or ConfigError."""
    try:
        record = next((_item(option) for option in options_of(hint) if _item(option) in _RECORDS), None)
        if record is not None:
            items = value if isinstance(value, list) else [value]
            return tuple(_record(record, item, key, where) for item in items)
        if any(_item(option) is str for option in options_of(hint)):
            value = _as_list(value)
        return as_type(hint, value)
    except TypeError:
        rule = _RECORDS.get(_item(hint)) or type_name(hint)
        raise ConfigError(f"{where}: {key}={value!r}: must be {rule}, not {kind_of(value)}") from None


def _with_home(value: Any, key: str) -> Any:
    """Paths with ~ written out, which the shell does only where a word starts with it."""
    if isinstance(value, tuple):
        return tuple(_with_home(each, key) for each in value)
    if isinstance(value, Source):
        return replace(value, pattern=os.path.expanduser(value.pattern))
    return os.path.expanduser(value) if key in _PATHS and value is not None else value


def _require_no_secret(value: Any, key: str) -> None:
    """ConfigError for a URL that carries a password; tracking.mlflow_uri has a rule of its own."""
    for each in value if isinstance(value, tuple) else (value,):
        url = each.pattern if isinstance(each, Source) else each
        remote = isinstance(url, str) and url.lower().startswith(tuple(f"{scheme}://" for scheme in REMOTE))
        if remote and key != "tracking.mlflow_uri":
            require_no_secret(url, key)


def _as_list(value: Any) -> Any:
    """A mapping {0: name, 1: name} as the list of its names."""
    if not isinstance(value, dict):
        return value
    names = {as_type(int, number): name for number, name in value.items()}
    if names.keys() != set(range(len(names))):
        raise TypeError
    return [names[number] for number in range(len(names))]


def _record(kind: Any, value: Any, key: str, where: str) -> Any:
    """An item of a list of `kind`: a mapping of its fields, or a text that stands for the first of them."""
    hints = _hints(kind)
    first = next(iter(hints))
    if not isinstance(value, dict):
        if isinstance(value, Plain) and value.lower() in NULL:  # in quotes it is a text
            raise TypeError
        return kind(as_type(hints[first], value))
    for name in value.keys() - hints.keys():
        raise ConfigError(
            f"{where}: {key}: unknown key {name!r}{did_you_mean(str(name), hints)}; it has {', '.join(hints)}"
        )
    if first not in value:
        raise ConfigError(f"{where}: {key}={value!r}: has no {first}")
    return kind(**{name: _typed(hints[name], part, f"{key}.{name}", where) for name, part in value.items()})


def _build(section: type, flat: Flat, prefix: str) -> Any:
    """The dataclass of a section from dotted keys; what is not there has its default."""
    values: dict[str, Any] = {}
    for item in fields(section):
        key, hint = f"{prefix}{item.name}", _hints(section)[item.name]
        if _is_section(hint):
            values[item.name] = _build(hint, flat, f"{key}.")
        elif key in flat:
            values[item.name] = flat[key]
        elif item.default is MISSING and item.default_factory is MISSING:
            raise ConfigError(f"{key}: must be set")
    return section(**values)
