"""What is known of each sample of a shard without reading the shard: where its image lies, its label, its key.

As bytes, a table is its magic, its length, a JSON header, the columns compressed, and a digest of all these.
"""

from __future__ import annotations

import json
import struct
import zlib
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np

from vitscale.files.store import FileStat
from vitscale.files.tar import OffsetTable

_MAGIC = b"vitscale-table-2\n"
_LENGTHS = struct.Struct("<QI")  # bytes of the whole, bytes of the header
_DIGEST_BYTES = 16
_COLUMNS = ("key_hash", "key_end", "image_kind", "image_offset", "image_bytes", "label_offset", "label_bytes",
            "label_end")  # fmt: skip
_ASCENDING = ("key_end", "image_offset", "label_offset", "label_end")  # kept as differences
HEAD_BYTES = len(_MAGIC) + _LENGTHS.size


@dataclass(frozen=True, eq=False)
class SampleTable:
    """The samples of one shard in their order. Columns are [samples], each in the smallest signed type that holds it:
    a rank of a thousand lanes keeps tens of millions of rows."""

    shard: FileStat  # of the file that it was made from
    label: str  # the extension of the members with labels
    image: str | None  # the extension of those with images; None: told by extension or content
    extensions: tuple[str, ...]  # all that the shard has
    key_hash: np.ndarray  # int64, blake2b of the key in UTF-8, 8 bytes, little-endian
    key_end: np.ndarray  # where each key ends in `keys`
    image_kind: np.ndarray  # place in `extensions`; -1: no image
    image_offset: np.ndarray  # of the bytes in the shard, 0 where there is no image
    image_bytes: np.ndarray
    label_offset: np.ndarray
    label_bytes: np.ndarray  # -1: no label
    label_end: np.ndarray  # where each label ends in `labels`, which has those of at most tar.SMALL bytes
    keys: bytes
    labels: bytes
    sha256: str | None = None  # of the shard, where it was read whole

    def __len__(self) -> int:
        return len(self.key_hash)

    def key(self, i: int) -> str:
        return self.keys[_start(self.key_end, i) : self.key_end[i]].decode()

    def label_text(self, i: int) -> bytes | None:
        """Sample i's label as it lies in the shard; None where it has none, or one of more than tar.SMALL bytes."""
        text = self.labels[_start(self.label_end, i) : self.label_end[i]]
        return text if len(text) == self.label_bytes[i] else None


def _start(ends: np.ndarray, i: int) -> int:
    return int(ends[i - 1]) if i else 0


def make_table(scanned: OffsetTable, shard: FileStat, label: str, image: str | None = None) -> SampleTable:
    """The table of a shard that was scanned for `label` and `image`."""
    has_image, member = scanned.image >= 0, np.maximum(scanned.image, 0)
    image_kind = np.where(has_image, scanned.kind[member], -1)
    image_offset, image_bytes = (np.where(has_image, each[member], 0) for each in (scanned.offsets, scanned.sizes))
    is_label = np.array([0 if kind == label else -1 for kind in scanned.kinds])
    has_label, label_offset, label_bytes = _first_of(scanned, is_label)
    keys = [key.encode() for key in scanned.keys]
    labels = [scanned.labels.get(i, b"") for i in range(len(keys))]
    hashes = b"".join(blake2b(key, digest_size=8).digest() for key in keys)
    return SampleTable(
        shard=shard,
        label=label,
        image=image,
        extensions=tuple(scanned.kinds),
        key_hash=np.frombuffer(hashes, dtype="<i8"),
        key_end=_narrow(np.cumsum([len(key) for key in keys])),
        image_kind=_narrow(image_kind),
        image_offset=_narrow(image_offset),
        image_bytes=_narrow(image_bytes),
        label_offset=_narrow(label_offset),
        label_bytes=_narrow(np.where(has_label < 0, -1, label_bytes)),
        label_end=_narrow(np.cumsum([len(text) for text in labels])),
        keys=b"".join(keys),
        labels=b"".join(labels),
    )


def _narrow(column: np.ndarray) -> np.ndarray:
    """A column of -1 and more, in the smallest signed type that holds it."""
    return column.astype(np.min_scalar_type(-2 - int(column.max())))


def _first_of(scanned: OffsetTable, number: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each sample's first member whose kind has a number of 0 or more: that number (else -1), offset, bytes."""
    member = np.flatnonzero(number[scanned.kind] >= 0)
    sample, at = np.unique(np.searchsorted(scanned.first, member, side="right") - 1, return_index=True)
    member = member[at]
    columns = np.zeros((3, len(scanned)), dtype=np.int64)
    columns[0] = -1
    columns[:, sample] = number[scanned.kind[member]], scanned.offsets[member], scanned.sizes[member]
    return columns[0], columns[1], columns[2]


def to_bytes(table: SampleTable) -> bytes:
    """The table as a file's content."""
    header = {
        "shard_bytes": table.shard.bytes,
        "shard_modified": table.shard.modified,
        "samples": len(table),
        "label": table.label,
        "extensions": table.extensions,
        "image": table.image,
        "sha256": table.sha256,
    }
    columns = []
    for name in _COLUMNS:
        column = getattr(table, name)
        if name in _ASCENDING:
            column = np.diff(column, prepend=0)
        columns.append(column.astype("<i8").view(np.uint8).reshape(-1, 8).T)  # alike bytes side by side
    body = zlib.compress(b"".join([*(column.tobytes() for column in columns), table.keys, table.labels]), 1)
    head = json.dumps(header).encode()
    lengths = _LENGTHS.pack(HEAD_BYTES + len(head) + len(body) + _DIGEST_BYTES, len(head))
    content = _MAGIC + lengths + head + body
    return content + _digest(content)


def whole_length(head: bytes) -> int:
    """The bytes of a table's file by its first HEAD_BYTES. ValueError where it is none."""
    if not head.startswith(_MAGIC) or len(head) < HEAD_BYTES:
        raise ValueError("is no table of this version")
    return int(_LENGTHS.unpack_from(head, len(_MAGIC))[0])


def from_bytes(data: bytes) -> SampleTable:
    """ValueError says what is wrong with the bytes."""
    if whole_length(data[:HEAD_BYTES]) != len(data):
        raise ValueError(f"has {len(data)} bytes, not {whole_length(data[:HEAD_BYTES])}")
    if _digest(data[:-_DIGEST_BYTES]) != data[-_DIGEST_BYTES:]:
        raise ValueError("does not have the digest that it names")
    body = HEAD_BYTES + _LENGTHS.unpack_from(data, len(_MAGIC))[1]
    header = json.loads(data[HEAD_BYTES:body])
    content, samples = zlib.decompress(memoryview(data)[body:-_DIGEST_BYTES]), header["samples"]
    columns, at = {}, 0
    for name in _COLUMNS:
        planes = np.frombuffer(content, np.uint8, samples * 8, at).reshape(8, samples)
        column = np.ascontiguousarray(planes.T).view("<i8")[:, 0]
        columns[name] = column if name == "key_hash" else _narrow(np.cumsum(column) if name in _ASCENDING else column)
        at += samples * 8
    keys_end = at + int(columns["key_end"][-1])
    return SampleTable(
        shard=FileStat(header["shard_bytes"], header["shard_modified"]),
        label=header["label"],
        image=header["image"],
        extensions=tuple(header["extensions"]),
        keys=content[at:keys_end],
        labels=content[keys_end:],
        sha256=header.get("sha256"),
        **columns,
    )


def _digest(content: bytes) -> bytes:
    return blake2b(content, digest_size=_DIGEST_BYTES).digest()
