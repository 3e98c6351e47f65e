from __future__ import annotations

import tempfile
from hashlib import blake2b
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.makers import write_tar
from vitscale.data.table import SampleTable, from_bytes, make_table, to_bytes, whole_length
from vitscale.files.store import FileStat, LocalFiles
from vitscale.files.tar import OffsetTable, scan_shard

MEMBERS = [
    ("a/ü.jpg", b"image 1"), ("a/ü.cls", b"7"),
    ("b.cls", b"12\n"), ("b.seg.png", b"no image"), ("b.PNG", b"image 2"), ("b.jpg", b"a second image"),
    ("c.json", b"{}"), ("c.cls", b""),
    ("d.jpg", b""), ("d.cls", b""),
    ("e.jpg", b"image 5"), ("e.cls", b"9" * 65),
    ("f.jpg", b"image 6"), ("f.cls", b"9" * 64),
]  # fmt: skip


def table_of(path: Path, label: str = "cls") -> SampleTable:
    stat = LocalFiles().stat(str(path))
    return make_table(scan_shard(str(path), label=label), stat, label)


def test_keys_images_and_labels(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", MEMBERS)
    table, data = table_of(path), path.read_bytes()
    assert [table.key(i) for i in range(len(table))] == ["a/ü", "b", "c", "d", "e", "f"]
    hashes = [blake2b(table.key(i).encode(), digest_size=8).digest() for i in range(6)]
    assert table.key_hash.tolist() == [int.from_bytes(each, "little", signed=True) for each in hashes]
    images = zip(table.image_offset.tolist(), table.image_bytes.tolist(), strict=True)
    assert [data[at : at + count] for at, count in images] == [b"image 1", b"image 2", b"", b"", b"image 5", b"image 6"]
    assert [table.extensions[kind] if kind >= 0 else None for kind in table.image_kind] == [
        "jpg", "png", None, "jpg", "jpg", "jpg",
    ]  # fmt: skip
    assert [table.label_text(i) for i in range(6)] == [b"7", b"12\n", b"", b"", None, b"9" * 64]
    at, count = int(table.label_offset[4]), int(table.label_bytes[4])
    assert data[at : at + count] == b"9" * 65, "of a long label, its place"
    assert set(table.extensions) == {"jpg", "cls", "seg.png", "png", "json"}


def test_of_another_label(tmp_path: Path) -> None:
    table = table_of(write_tar(tmp_path / "a.tar", MEMBERS), "json")
    assert [table.label_text(i) for i in range(6)] == [None, None, b"{}", None, None, None]


def same(a: SampleTable, b: SampleTable) -> bool:
    columns = [name for name, value in vars(a).items() if isinstance(value, np.ndarray)]
    assert len(columns) == 8
    rest = [name for name in vars(a) if name not in columns]
    arrays = all(np.array_equal(getattr(a, name), getattr(b, name)) for name in columns)
    return arrays and all(getattr(a, name) == getattr(b, name) for name in rest)


samples = st.dictionaries(
    st.text(st.characters(exclude_characters="./\0", codec="utf-8"), min_size=1, max_size=8).filter(
        lambda key: not key.startswith("__")
    ),
    st.dictionaries(st.sampled_from(["jpg", "png", "cls", "txt"]), st.binary(max_size=70), min_size=1).filter(
        lambda kinds: kinds.keys() != {"txt"}
    ),
    min_size=1,
    max_size=6,
)


@settings(max_examples=40)
@given(samples)
def test_bytes_and_back(content: dict[str, dict[str, bytes]]) -> None:
    members = [(f"{key}.{kind}", data) for key, kinds in content.items() for kind, data in kinds.items()]
    with tempfile.TemporaryDirectory() as folder:
        table = table_of(write_tar(Path(folder) / "a.tar", members))
    assert same(from_bytes(to_bytes(table)), table)
    for i, (key, kinds) in enumerate(content.items()):
        label = kinds.get("cls")
        assert table.key(i) == key
        assert table.label_text(i) == (label if label is not None and len(label) <= 64 else None)


def test_a_table_is_small(tmp_path: Path) -> None:
    numbers = [i * 7919 % 1000 for i in range(2000)]
    members = [
        (f"n0144{i:06d}.{kind}", data)
        for i, number in enumerate(numbers)
        for kind, data in (("jpg", bytes(300 + number)), ("cls", b"%d" % number))
    ]
    table = table_of(write_tar(tmp_path / "a.tar", members))
    assert len(to_bytes(table)) < 20 * len(table), "of which 8 bytes are hash"
    for each in (table, from_bytes(to_bytes(table))):
        columns = [value for value in vars(each).values() if isinstance(value, np.ndarray)]
        assert sum(column.nbytes for column in columns) + len(each.keys) + len(each.labels) <= 45 * len(table)


@pytest.mark.parametrize("size", [1, 1 << 7, 1 << 31, 1 << 40])
def test_columns_hold_what_they_must(size: int) -> None:
    """A shard of no images and no labels but one of each, behind it or of that size."""
    scanned = OffsetTable(
        keys=["a", "b", "c"], first=np.array([0, 1, 3, 4]), kinds=["txt", "jpg", "cls"],
        kind=np.array([0, 1, 2, 0], dtype=np.int32), offsets=np.array([512, 1024, size, 1536]),
        sizes=np.array([1, size, size, 1]), labels={}, image=np.array([-1, 1, -1]),
    )  # fmt: skip
    table = make_table(scanned, FileStat(1 << 41, 0), "cls")
    for each in (table, from_bytes(to_bytes(table))):
        assert each.image_kind.tolist() == [-1, 1, -1]
        assert each.image_offset.tolist() == [0, 1024, 0]
        assert each.image_bytes.tolist() == [0, size, 0]
        assert each.label_offset.tolist() == [0, size, 0]
        assert each.label_bytes.tolist() == [-1, size, -1]
        assert each.key_hash.dtype == np.int64
    nothing = make_table(scanned, FileStat(1 << 41, 0), "none")
    assert from_bytes(to_bytes(nothing)).label_bytes.tolist() == [-1, -1, -1]


def test_every_flipped_byte_and_every_cut_is_seen(tmp_path: Path) -> None:
    data = to_bytes(table_of(write_tar(tmp_path / "a.tar", MEMBERS)))
    assert whole_length(data) == len(data)
    for at in range(len(data)):
        damaged = bytearray(data)
        damaged[at] ^= 1 << at % 8
        with pytest.raises(ValueError, match=r"version|bytes|digest"):
            from_bytes(bytes(damaged))
        with pytest.raises(ValueError, match=r"version|bytes"):
            from_bytes(data[:at])
    with pytest.raises(ValueError, match="bytes"):
        from_bytes(data + b"\0")


def test_a_table_names_its_shard(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", MEMBERS)
    table = from_bytes(to_bytes(table_of(path)))
    assert table.shard == FileStat(path.stat().st_size, path.stat().st_mtime_ns)
    assert (table.label, len(table)) == ("cls", 6)
