"""Labels as people write them: whole numbers, class names, several numbers, alone in a member or inside JSON."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from dataclasses import dataclass, field

from vitscale.config.check import problem_type
from vitscale.config.schema import RunConfig
from vitscale.data.index import ShardIndex
from vitscale.data.subset import Subset
from vitscale.data.table import SampleTable
from vitscale.files.header import BadSample
from vitscale.files.retry import unreadable
from vitscale.text import listed

Label = int | tuple[float, ...]
CLASSES = "single_label_classification"
_LONG_READ = 512  # labels that are too long for a table, of all shards
_WHOLE = re.compile(r"[+-]?\d{1,18}(\.0*)?")
_SEPARATORS = re.compile(r"[\s,;]+")


class NoClass(BadSample):
    """A label that stands for no class: a whole number above the last one's, or a word."""

    def __init__(self, label: int | str, reason: str) -> None:
        super().__init__("label", reason)
        self.label = label


@dataclass(frozen=True)
class LabelReader:
    """What a sample's label is, read from the bytes of its member."""

    required: bool = False  # a sample without one, or with another than here, is a bad sample; else its label is -1
    num_labels: int | None = None  # the number of classes or of numbers in a label; None: any
    kind: str = CLASSES  # transformers' problem_type
    names: tuple[str, ...] = ()  # of the classes, by their numbers
    path: tuple[str, ...] = ()  # keys to the label inside a JSON document

    @classmethod
    def of(cls, config: RunConfig) -> LabelReader:
        """For what a run trains on."""
        kind, data = problem_type(config), config.data
        if kind is None:
            return cls(path=data.label_path)
        return cls(
            required=True,
            num_labels=config.model.num_labels,
            kind=kind,
            names=config.model.id2label or (),
            path=data.label_path,
        )

    @property
    def width(self) -> int | None:
        """How many numbers a label has; None for a class."""
        return None if self.kind == CLASSES else self.num_labels

    def read(self, data: bytes | None) -> Label:
        """A class's number, -1 for none where none is needed, or numbers. BadSample with the reason."""
        try:
            return self._read(data)
        except BadSample:
            if self.required:
                raise
            return -1

    def _read(self, data: bytes | None) -> Label:
        if data is None:
            raise BadSample("label", "it has no member with one")
        try:
            text = data.decode("utf-8-sig").strip()  # a byte order mark is no part of it
            value = self._inside(text) if self.path else text
            if self.kind != CLASSES and isinstance(value, str) and value.startswith("["):
                value = json.loads(value, parse_int=str, parse_float=str)
        except (ValueError, RecursionError):  # RecursionError: [[[[[...
            raise BadSample("label", f"{data[:40]!r} is no {'JSON' if self.path or b'[' in data else 'text'}") from None
        return self._class(value) if self.kind == CLASSES else self._numbers(value)

    def _inside(self, text: str) -> object:
        """What the path leads to; numbers as they are written."""
        value = json.loads(text, parse_int=str, parse_float=str)
        for key in self.path:
            if isinstance(value, list) and key.isdecimal() and int(key) < len(value):
                value = value[int(key)]
            elif isinstance(value, dict) and key in value:
                value = value[key]
            else:
                raise BadSample("label", f"its JSON has no {'.'.join(self.path)}")
        return value

    def _class(self, value: object) -> int:
        text = value if isinstance(value, str) else json.dumps(value)
        if not _WHOLE.fullmatch(text):  # a number is never a name: folders 1, 2, 3 have the labels 0, 1, 2
            if text in self.names:
                return self.names.index(text)
            way = "is no whole number" if not self.names else f"is no whole number, nor one of {listed(self.names)}"
            reason = f"{text[:40]!r} {way}"
            is_word = isinstance(value, str) and text[:1].isalpha()
            raise NoClass(text[:40], reason) if is_word else BadSample("label", reason)
        number = int(text.partition(".")[0])
        if self.required and number < 0:
            raise BadSample("label", f"{number}, which stands for none")
        if self.required and self.num_labels is not None and number >= self.num_labels:
            counted = "; labels count from 0" if number == self.num_labels else ""
            raise NoClass(number, f"{number}, with model.num_labels={self.num_labels}{counted}")
        return max(-1, number)

    def _numbers(self, value: object) -> tuple[float, ...]:
        words = _SEPARATORS.split(value) if isinstance(value, str) else value if isinstance(value, list) else [value]
        try:
            numbers = tuple(float(word) for word in words)  # type: ignore[arg-type]
        except (TypeError, ValueError):
            raise BadSample("label", f"{str(value)[:40]!r} is not {self.num_labels or 'some'} number(s)") from None
        if self.num_labels not in (None, len(numbers)):
            raise BadSample("label", f"{len(numbers)} number(s), with model.num_labels={self.num_labels}")
        is_shares = self.kind == "multi_label_classification"
        if not all(map(math.isfinite, numbers)) or (is_shares and not all(0 <= each <= 1 for each in numbers)):
            rule = "each in [0, 1], say 1 for a label that is there" if is_shares else "finite"
            raise BadSample("label", f"{str(value)[:40]!r}: its numbers must be {rule}")
        return numbers


@dataclass
class LabelCounts:
    """What the labels of some samples are."""

    classes: Counter[int] = field(default_factory=Counter)
    good: int = 0
    bad: int = 0
    first_bad: str = ""
    strangers: Counter[int | str] = field(default_factory=Counter)  # of the bad: numbers above the last class's, words
    zeros: int = 0  # of the good
    too_long: int = 0  # labels that are not in the tables; of each shard only some were looked at

    def count_from_one(self, num_labels: int) -> bool:
        """Whether the number behind the last class's is there, none above it, and the first class has no image."""
        return self.strangers.keys() - self.words == {num_labels} and not self.zeros

    @property
    def words(self) -> set[str]:
        """Those that are no class's name."""
        return {each for each in self.strangers if isinstance(each, str)}


def _read(index: ShardIndex, shard: int, table: SampleTable, place: int) -> bytes:
    path = index.paths[shard]
    try:
        return index.store.read(path, int(table.label_offset[place]), int(table.label_bytes[place]))
    except OSError as error:
        raise unreadable(path, error) from None


def count_labels(index: ShardIndex, extension: str, reader: LabelReader, chosen: Subset | None = None) -> LabelCounts:
    """From the shards' tables, of all samples or of those that are chosen; of labels that are too long for a table some
    hundreds are read."""
    counts, most = LabelCounts(), -(-_LONG_READ // len(index.paths))
    known: dict[bytes, Label | BadSample] = {}
    for shard in range(len(index.paths)):
        table, long_ones = index.table(shard, extension), 0
        for place in range(len(table)) if chosen is None else chosen.of_shard(shard).tolist():
            text, is_long = table.label_text(place), False
            if text is None and table.label_bytes[place] >= 0:
                counts.too_long += 1
                if long_ones == most:
                    continue
                long_ones += 1
                text, is_long = _read(index, shard, table, place), True
            label = known.get(text or b"")
            if label is None or text is None:
                try:
                    label = reader.read(text)
                except BadSample as bad:
                    label = bad
                if text is not None and len(known) < 1 << 20:
                    known[text] = label
            if isinstance(label, BadSample):
                counts.bad += 1
                counts.first_bad = counts.first_bad or f"{index.names[shard]}/{table.key(place)}: {label.reason}"
                if isinstance(label, NoClass):
                    counts.strangers[label.label] += 1
                continue
            counts.good += 1
            counts.zeros += label == 0
            if isinstance(label, int) and not is_long:  # else only some would be counted
                counts.classes[label] += 1
    return counts
