"""Labels as people write them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.data.makers import photo, write_shards, write_tar
from vitscale.config.load import load_config
from vitscale.config.schema import Data
from vitscale.data.batch import Batch
from vitscale.data.crop import RandomCrop
from vitscale.data.index import build_index
from vitscale.data.labels import LabelReader, count_labels
from vitscale.data.loader import Loader
from vitscale.data.order import Order, SequentialOrder
from vitscale.data.subset import split
from vitscale.errors import DataError
from vitscale.files.header import BadSample
from vitscale.world import World

CLASSES = LabelReader(required=True, num_labels=3, names=("cat", "dog", "2"))
SHARES = LabelReader(required=True, num_labels=3, kind="multi_label_classification")
PAIR = LabelReader(required=True, num_labels=2, kind="regression")


@pytest.mark.parametrize(
    ("reader", "data", "label"),
    [
        (CLASSES, b"1", 1),
        (CLASSES, b" 1\r\n", 1),
        (CLASSES, b"\xef\xbb\xbf1", 1),
        (CLASSES, b"1.0", 1),
        (CLASSES, b"+1.", 1),
        (CLASSES, b"0001", 1),
        (CLASSES, b"dog", 1),
        (CLASSES, b"2", 2),
        (LabelReader(required=True, num_labels=2, names=("1", "0")), b"0", 0),
        (LabelReader(required=True, num_labels=3, names=("1", "2", "3")), b"2", 2),
        (LabelReader(), b"-1", -1),
        (LabelReader(), b"-7", -1),
        (LabelReader(), b"word", -1),
        (LabelReader(), b"\xff\xfe", -1),
        (LabelReader(), None, -1),
        (LabelReader(), b"1000", 1000),
        (SHARES, b"0 1 0.5", (0, 1, 0.5)),
        (SHARES, b"0,1, 1", (0, 1, 1)),
        (SHARES, b"[0, 1, 1]", (0, 1, 1)),
        (PAIR, b"-3.5e2;7", (-350, 7)),
        (LabelReader(required=True, num_labels=1, kind="regression"), b"2.25", (2.25,)),
        (LabelReader(required=True, num_labels=3, path=("a", "b")), b'{"a": {"b": 2}}', 2),
        (LabelReader(required=True, num_labels=3, path=("a", "1")), b'{"a": [0, 1.0]}', 1),
        (LabelReader(required=True, num_labels=2, names=("x", "y"), path=("c",)), b'{"c": "y", "d": "x"}', 1),
        (LabelReader(required=True, num_labels=2, kind="regression", path=("c",)), b'{"c": [1, 2.5]}', (1, 2.5)),
        (LabelReader(required=True, num_labels=1, kind="regression", path=("c",)), b'{"c": 3}', (3,)),
    ],
)
def test_read(reader: LabelReader, data: bytes | None, label: Any) -> None:
    assert reader.read(data) == label


@pytest.mark.parametrize(
    ("reader", "data", "says"),
    [
        (CLASSES, None, "it has no member with one"),
        (CLASSES, b"", "'' is no whole number, nor one of cat, dog"),
        (CLASSES, b"cow", "'cow' is no whole number, nor one of cat, dog"),
        (CLASSES, b"1.5", "'1.5' is no whole number"),
        (CLASSES, b"3", "3, with model.num_labels=3"),
        (CLASSES, b"-1", "-1, which stands for none"),
        (CLASSES, b"\xff1", "is no text"),
        (SHARES, b"0 1", r"2 number\(s\), with model.num_labels=3"),
        (SHARES, b"0 1 2", r"each in \[0, 1\]"),
        (SHARES, b"a b c", r"is not 3 number\(s\)"),
        (PAIR, b"1 nan", "must be finite"),
        (LabelReader(required=True, path=("a",)), b'{"b": 1}', "its JSON has no a"),
        (LabelReader(required=True, path=("a",)), b'{"a": ', "is no JSON"),
        (LabelReader(required=True, path=("a",)), b'{"a": ' * 9999, "is no JSON"),
        (SHARES, b"[0, 1", "is no JSON"),
        (SHARES, b"[" * 9999, "is no JSON"),
        (LabelReader(required=True, num_labels=3, path=("a",)), b'{"a": null}', "'null' is no whole number"),
        (LabelReader(required=True, num_labels=3, path=("a",)), b'{"a": true}', "'true' is no whole number"),
    ],
)
def test_refused_with_the_reason(reader: LabelReader, data: bytes | None, says: str) -> None:
    with pytest.raises(BadSample, match=says):
        reader.read(data)


def test_a_run_reads_what_its_objective_needs(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("train: {steps: 1}\nobjective: {name: classification}\ndata: {label: json.class.id}")
    config = load_config(path, ["model.id2label=[a, b]"])
    reader = LabelReader.of(config)
    assert (config.data.label_extension, config.data.label_path) == ("json", ("class", "id"))
    assert reader == LabelReader(True, 2, names=("a", "b"), path=("class", "id"))
    assert LabelReader.of(load_config(path, ["objective.name=mae"])) == LabelReader(path=("class", "id"))
    many = load_config(path, ["model.problem_type=multi_label_classification", "model.num_labels=7", "data.label=tags"])
    assert LabelReader.of(many) == LabelReader(True, 7, kind="multi_label_classification")
    assert many.data.label_extension == "tags"


def test_counted_from_the_tables(tmp_path: Path) -> None:
    index = write_shards(tmp_path, [12, 13])
    counts = count_labels(index, "cls", LabelReader(required=True, num_labels=9))
    assert dict(counts.classes) == {**dict.fromkeys(range(9), 2), **dict.fromkeys(range(5), 3)}
    assert (counts.good, counts.bad) == (23, 2)
    assert counts.first_bad == "s000/000009: 9, with model.num_labels=9; labels count from 0"
    training, validation = split(index, Data(validation_fraction=0.4), 0)
    parts = [count_labels(index, "cls", LabelReader(), part) for part in (training, validation)]
    assert sum(part.good for part in parts) == 25
    assert parts[1].good == validation.total


def first_batch(folder: Path, member: str, text: str, reader: LabelReader) -> Batch:
    """Two of four samples that have this member, as training reads them."""
    members = [(f"{i}.{kind}", data) for i in range(4) for kind, data in (("jpg", photo(i)), (member, text.encode()))]
    index = build_index([str(write_tar(folder / "a.tar", members))], label=member)
    data = Data(lanes=1, window=4, label=".".join([member, *reader.path]), threads=1, decode="pillow")
    loader = Loader(
        index=index, order=Order(index.samples, 0, 2, 1, 4), crop=RandomCrop((1.0, 1.0), (1.0, 1.0)), data=data,
        num_channels=3, seed=0, world=World(), global_batch=2, micro_batch=2, start=0, labels=reader,
    )  # fmt: skip
    with loader:
        return next(loader)


DIGITS = [i % 2 for i in range(80)]


@pytest.mark.parametrize(
    ("member", "text", "keys", "expected"),
    [
        ("json", json.dumps({"caption": "x" * 500, "class": {"id": 2}}), {"path": ("class", "id")}, 2),
        ("cls", " ".join(map(str, DIGITS)), {"kind": "multi_label_classification", "num_labels": 80}, DIGITS),
        ("json", json.dumps({"caption": "x" * 500, "y": [0.5, -2]}),
         {"path": ("y",), "kind": "regression", "num_labels": 2}, [0.5, -2]),
    ],
    ids=["within JSON", "of 80 labels", "numbers"],
)  # fmt: skip
def test_labels_of_any_length_are_read(
    tmp_path: Path, member: str, text: str, keys: dict[str, Any], expected: object
) -> None:
    """Those of more bytes than a table keeps too, as real images' JSON has."""
    batch = first_batch(tmp_path, member, text, LabelReader(required=True, **keys))
    assert batch.labels.tolist() == [expected] * 2
    assert batch.replaced == ()


def test_vectors_of_which_none_can_be_read_are_a_line(tmp_path: Path) -> None:
    reader = LabelReader(kind="multi_label_classification", num_labels=3, required=True)
    with pytest.raises(DataError, match=r"2 number\(s\), with model.num_labels=3; nor is any"):
        first_batch(tmp_path, "cls", "1 0", reader)


def test_what_stands_for_a_bad_sample_does_not_change_whose_turn_it_is(tmp_path: Path) -> None:
    """The last image of an evaluation is bad: its place still counts, that of the filling behind it does not."""
    members = [
        (f"{i}.{kind}", data) for i in range(3) for kind, data in (("jpg", photo(i)), ("cls", b"019"[i : i + 1]))
    ]
    index = build_index([str(write_tar(tmp_path / "a.tar", members))])
    loader = Loader(
        index=index, order=SequentialOrder(index.samples, 2), crop=RandomCrop((1.0, 1.0), (1.0, 1.0)),
        data=Data(threads=1, decode="pillow"), num_channels=3, seed=0, world=World(), global_batch=2, micro_batch=2,
        start=0, labels=LabelReader(required=True, num_labels=3),
    )  # fmt: skip
    with loader:
        first, last = next(loader), next(loader)
        assert (first.repeats.tolist(), first.replaced) == ([0, 0], ())
        assert (last.repeats.tolist(), [each.key for each in last.replaced]) == ([0, 1], ["2"])


def test_long_labels_are_not_in_the_tables(tmp_path: Path) -> None:
    text = json.dumps({"class": 1, "caption": "x" * 5000}).encode()
    path = write_tar(
        tmp_path / "a.tar", [("1.jpg", photo(1)), ("1.json", text), ("2.jpg", photo(2)), ("2.json", b"{}")]
    )
    index = build_index([str(path)], label="json")
    counts = count_labels(index, "json", LabelReader(required=True, num_labels=3, path=("class",)))
    assert (counts.too_long, counts.good, counts.bad) == (1, 1, 1)
    assert counts.classes == {}, "of long ones only some are read"
