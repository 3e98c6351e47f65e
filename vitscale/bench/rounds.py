"""How the benchmarks compare: measurements taken in turns, ratios round by round, one way to print them."""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from string import Formatter
from typing import Any, TypeVar

from vitscale.errors import ConfigError
from vitscale.inference.command import above_zero
from vitscale.text import aligned

Measured = TypeVar("Measured")
RATIO = "{ratio:.3f} ({ratio_spread[0]:.2f} to {ratio_spread[1]:.2f})"


def benchmark_parser(name: str, description: str, rounds: int = 5) -> argparse.ArgumentParser:
    """The parser of `vitscale bench NAME`, with the option that all benchmarks have."""
    parser = argparse.ArgumentParser(prog=f"vitscale bench {name}", description=description.splitlines()[0])
    parser.add_argument("--rounds", type=above_zero, default=rounds, help="turns of each (default: %(default)s)")
    return parser


def check_file(option: str, file: Path | None) -> None:
    """ConfigError, before anything is measured, where the file that an option names could not be written."""
    if file is not None and not file.absolute().parent.is_dir():
        raise ConfigError(f"{option} {file}: must be a file in a folder that is there")


def in_turns(measurements: Mapping[str, Callable[[], Measured]], rounds: int) -> dict[str, list[Measured]]:
    """Take every measurement once a round; what each gave, by name.

    The order is reversed from round to round, and after both ways another begins: other load of the machine falls on
    all, none always follows another, and none is always at an end.
    """
    results: dict[str, list[Measured]] = {name: [] for name in measurements}
    order = list(measurements)
    for number in range(rounds):
        for name in reversed(order) if number % 2 else order:
            results[name].append(measurements[name]())
        if number % 2:
            order = order[1:] + order[:1]
    return results


def fastest(seconds: Mapping[str, Sequence[float]], names: Collection[str]) -> str | None:
    """The one of these names with the smallest median; None if none of them was measured."""
    measured = [name for name in seconds if name in names]
    return min(measured, key=lambda name: statistics.median(seconds[name]), default=None)


def figures(seconds: Mapping[str, Sequence[float]], peer: str | None) -> dict[str, dict[str, Any]]:
    """By name: the seconds of each round, their median, and the ratio: the peer's time over its own.

    The ratio is the median over the rounds (`ratio_spread`: smallest, largest), None without a peer.
    """
    result: dict[str, dict[str, Any]] = {}
    for name, times in seconds.items():
        result[name] = {"seconds": list(times), "median_ms": statistics.median(times) * 1000, "ratio": None}
        if peer is not None:
            ratios = [others / own for others, own in zip(seconds[peer], times, strict=True)]
            result[name] |= {"ratio": statistics.median(ratios), "ratio_spread": [min(ratios), max(ratios)]}
    return result


def report(title: str, columns: Mapping[str, str], result: Mapping[str, Any]) -> None:
    """Print a table, who was left out and why, and the result as a last line of JSON."""
    show(title, columns, result)
    print(json.dumps(result))


def report_sections(about: Mapping[str, Any], sections: Mapping[str, Mapping[str, Any]]) -> None:
    """Print what a benchmark of several tables gave, each of which was shown, as its last line of JSON: the `sections`
    by name, and who was `left_out` of any of them."""
    left_out = {name: why for each in sections.values() for name, why in each.get("left_out", {}).items()}
    print(json.dumps({**about, "sections": sections, "left_out": left_out}))


def show(title: str, columns: Mapping[str, str], result: Mapping[str, Any]) -> None:
    """Print a table, and who was left out and why.

    columns: header -> format of a contender's figures, empty where one of these is None. The ratio is the last column.
    """
    rows = [["", *columns, "ratio"]]
    for name, figure in result["contenders"].items():
        ratio = "" if figure["ratio"] is None else RATIO.format(**figure)
        rows.append([name, *(_cell(cell, figure) for cell in columns.values()), ratio])
    print(title)
    print(aligned(rows, right=range(1, len(columns) + 2)))
    for name, reason in result.get("left_out", {}).items():
        print(f"{name} is left out: {reason}")


def _cell(text: str, figure: Mapping[str, Any]) -> str:
    fields = Formatter()
    named = [name for _, name, _, _ in fields.parse(text) if name]
    return "" if any(fields.get_field(name, (), figure)[0] is None for name in named) else text.format(**figure)


def first_line(error: Exception) -> str:
    """An error's class and the first line of its text, at most 400 characters."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:400]}"
