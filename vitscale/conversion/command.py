"""The verb `convert`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vitscale import world
from vitscale.run_folder import DONE

TARGETS = ("hf", "timm", "mae", "vitscale")
_WRITES = """what to write: hf: a folder that transformers opens; timm: a folder that
timm.create_model('local-dir:TO') opens; mae: a .pth for facebookresearch/mae; vitscale: a folder for this
library alone, for what transformers' ViT has not (registers, rotary positions, ...)"""
_FROM = "a folder of ours, of transformers or of timm, a run's folder, a hub name, or a MAE .pth"
_OPEN = "for a MAE .pth, what it does not say, say num_attention_heads=6 or image_size=224,192"
_CODES = """The outputs of FROM, of TO and of the model here are compared on random images, by transformers and
timm where they are installed; TO is there only if they agree."""
Verb = Callable[[str, Callable[[argparse.Namespace], int], str], argparse.ArgumentParser]


def register(verb: Verb) -> None:
    added = verb("convert", _convert, "a model's weights into transformers', timm's or MAE's files, and back")
    added.epilog = _CODES
    added.add_argument("source", metavar="FROM", help=_FROM)
    added.add_argument("to", metavar="TO", help="a new folder, or for --to mae a new file")
    added.add_argument("--to", dest="target", required=True, choices=TARGETS, help=_WRITES)
    added.add_argument("overrides", metavar="KEY=VALUE", nargs="*", help=_OPEN)


def _convert(arguments: argparse.Namespace) -> int:
    world.enter()
    from vitscale.conversion.convert import convert

    report = convert(arguments.source, Path(arguments.to), arguments.target, _given(arguments.overrides))
    for line in report.lines():
        print(line)
    print(f"done: {arguments.to}")
    return DONE


def _given(words: list[str]) -> dict[str, Any]:
    """KEY=VALUE pairs; H,W is a pair of numbers."""
    import yaml

    from vitscale.errors import ConfigError

    given = {}
    for word in words:
        key, separator, text = word.partition("=")
        try:
            value = yaml.safe_load(f"[{text}]" if "," in text else text)
        except (ValueError, yaml.YAMLError):  # ValueError: the date 2026-99-99
            separator = ""
        if not separator:
            raise ConfigError(f"{word}: must be KEY=VALUE, of a number, true or false, or H,W")
        given[key] = tuple(value) if isinstance(value, list) else value
    return given
