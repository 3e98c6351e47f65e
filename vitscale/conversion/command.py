"""The verb `convert`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_type_hints

from vitscale.config.typed import Plain, as_type, type_name
from vitscale.errors import ConfigError
from vitscale.run_folder import DONE
from vitscale.text import did_you_mean, printable

_WRITES = """what to write: hf: a folder that transformers opens; timm: a folder that
timm.create_model('local-dir:TO') opens; mae: a .pth for facebookresearch/mae; vitscale: a folder for this
library alone, for what transformers' ViT has not (registers, rotary positions, ...)"""
_FROM = "a folder of ours, of transformers or of timm, a run's folder, a hub name, or a file of weights (.pth, ...)"
_TAKE = "which set of weights of a file that has several, such as teacher or student"
_OPEN = "for a file of weights, what it does not say: num_attention_heads=6 or image_size=224,192"
_CHECK = "TO is there only if it gives, read again, the outputs of FROM on random images."


def register(verb: Callable[..., argparse.ArgumentParser]) -> None:
    added = verb("convert", _convert, "a model's weights into transformers', timm's or MAE's files, and back")
    added.epilog = _CHECK
    added.add_argument("source", metavar="FROM", help=_FROM)
    added.add_argument("to", metavar="TO", help="a new folder, or for --to mae a new file")
    added.add_argument("--to", dest="target", required=True, choices=("hf", "timm", "mae", "vitscale"), help=_WRITES)
    added.add_argument("--take", metavar="NAME", default=None, help=_TAKE)
    added.add_argument("overrides", metavar="KEY=VALUE", nargs="*", default=[], help=_OPEN)


def _convert(arguments: argparse.Namespace) -> int:
    from vitscale.conversion.convert import convert

    options = _options(arguments.overrides)
    report = convert(arguments.source, Path(arguments.to), arguments.target, options, arguments.take)
    for line in (*report.lines(), f"done: {arguments.to}"):
        print(printable(line))
    return DONE


def _options(words: Sequence[str]) -> dict[str, Any]:
    """KEY=VALUE of what a file of weights leaves open, of the type that a config has; a size may be H,W."""
    from vitscale.interop.bare import KEYS
    from vitscale.models.configuration_mae import ViTMAEConfig

    options, hints = {}, get_type_hints(ViTMAEConfig)
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or key not in KEYS:
            raise ConfigError(f"{word}: must be KEY=VALUE, of {', '.join(KEYS)}{did_you_mean(key, KEYS)}")
        parts = [Plain(part.strip()) for part in text.split(",")]
        try:
            options[key] = as_type(hints[key], parts[0] if len(parts) == 1 else parts)
        except TypeError:
            raise ConfigError(f"{word}: must be {type_name(hints[key])}") from None
    return options
