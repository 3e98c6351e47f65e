"""One strict scan of a shard's tar headers: where every member of every sample lies.

Python's tarfile, and so webdataset, takes a damaged header, a cut file or a block of zeros for the
end of the archive and says nothing. Here only the end marker (two blocks of zeros, and nothing but
zeros after it) ends a shard; whatever else is a DataError with the shard's name and the byte.
Read are ustar, pax and GNU long names. Directories are passed over; links, devices and sparse files
are refused, since what they stand for is not in the shard.
"""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass, field

import numpy as np

from vitscale.errors import DataError
from vitscale.files.header import IMAGE_KINDS, image_kind
from vitscale.files.retry import unreadable
from vitscale.files.store import FileStat, LocalFiles, Readable
from vitscale.text import listed

BLOCK = 512
_ZEROS = bytes(BLOCK)
_LARGEST_EXTENDED_HEADER = 1 << 20
_MOST_DIGITS = 20  # of a size
LARGEST_MEMBER = 256 << 20  # bytes; a larger image is a bad sample, not read
_NO_IMAGE = 2
SMALL = 64  # bytes; a label of at most so many comes with its header, in one read
# webdataset's rule (tariterators.py) for what is no sample.
_META = re.compile(r"__[^/]*__($|/)")


@dataclass(frozen=True, eq=False)
class OffsetTable:
    """The samples of one shard in their order: sample i has the members first[i] to first[i + 1]."""

    keys: list[str]
    first: np.ndarray  # int64 [samples + 1]
    kinds: list[str]  # the distinct extensions, in lower case
    kind: np.ndarray  # int32 [members], places in `kinds`
    offsets: np.ndarray  # int64 [members], of the data in the file
    sizes: np.ndarray  # int64 [members], bytes
    labels: dict[int, bytes]  # sample -> the bytes of its member with the label's extension, if at most SMALL
    image: np.ndarray  # int64 [samples], which member is the image; -1: none
    passed_over: int = 0  # members that belong to no sample
    example: str = ""  # the name of one of these
    further: int = 0  # images of samples that have one before them, where no extension says which is meant
    further_example: str = ""

    def __len__(self) -> int:
        return len(self.keys)

    def members(self, i: int) -> dict[str, tuple[int, int]]:
        """extension -> (offset, bytes) of sample i's members, in the shard's order."""
        chosen = slice(int(self.first[i]), int(self.first[i + 1]))
        places = zip(self.offsets[chosen].tolist(), self.sizes[chosen].tolist(), strict=True)
        return {self.kinds[kind]: place for kind, place in zip(self.kind[chosen].tolist(), places, strict=True)}

    def image_of(self, i: int) -> tuple[int, int] | None:
        """(offset, bytes) of sample i's image."""
        member = int(self.image[i])
        return None if member < 0 else (int(self.offsets[member]), int(self.sizes[member]))


def scan_shard(
    path: str,
    store: Readable | None = None,
    label: str | None = None,
    stat: FileStat | None = None,
    image: str | None = None,
) -> OffsetTable:
    """Read all headers of a tar file, each once. DataError when it is not whole, not a tar, or holds no sample.

    Members of one key are a sample, wherever they lie, if one is an image or a label; of several images the first is
    meant. label: the extension of the members whose bytes are wanted with their headers; stat: what the store says of
    the file, where it is known; image: the extension of the images (default: of IMAGE_KINDS, else what their content
    says).
    """
    store = store or LocalFiles()
    try:
        return _Scan(path, store, label, image, (stat or store.stat(path)).bytes).run()
    except OSError as error:
        raise unreadable(path, error) from None


@dataclass
class _Scan:
    """The state of one walk from header to header."""

    path: str
    store: Readable
    label: str | None
    image: str | None
    length: int  # bytes of the file
    position: int = 0  # of the next header
    block: bytes = b""  # what lies after the header read last
    long_name: bytes | None = None  # from an extended header, for the member that follows
    long_size: int | None = None
    samples: dict[str, int] = field(default_factory=dict)  # key -> which sample, in the order of their first members
    sample: list[int] = field(default_factory=list)  # of each member, as the lists below
    kind_of: dict[str, int] = field(default_factory=dict)
    kind: list[int] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    is_image: list[bool] = field(default_factory=list)  # by its content
    labels: dict[int, bytes] = field(default_factory=dict)  # by member
    passed_over: int = 0
    example: str = ""

    def run(self) -> OffsetTable:
        while (header := self._next_header()) != _ZEROS:
            self._take(header)
        self._check_end()
        table = self._table()
        if not len(table):
            if self.image is not None and self.image not in self.kind_of:
                raise DataError(
                    f"{self.path}: no member has the extension data.image={self.image!r} (it has "
                    f"{listed(sorted(self.kind_of))}): set data.image to the extension of the images"
                )
            names = f", as {table.example!r}" if table.example else ""
            self._fail(
                f"holds no sample: members need a base name and an extension, and one of a sample to be an image or a "
                f"label ({table.passed_over} are passed over{names})"
            )
        return table

    def _table(self) -> OffsetTable:
        """The members by sample, those of no sample left out."""
        sample, kind, offsets, sizes = (
            np.array(values, dtype=np.int64) for values in (self.sample, self.kind, self.offsets, self.sizes)
        )
        kinds, keys = list(self.kind_of), list(self.samples)
        self._require_once(sample, kind, offsets, kinds, keys)
        label = -1 if self.label is None else self.kind_of.get(self.label, -1)
        score = self._image_score(kind, kinds)
        good = np.zeros(len(keys), dtype=bool)
        good[sample[(score < _NO_IMAGE) | (kind == label) | (kind == self.kind_of.get("cls", -1))]] = True
        dropped = np.flatnonzero(~good)
        passed_over = self.passed_over + int((~good[sample]).sum())
        example = self.example or (keys[dropped[0]] if len(dropped) else "")
        order = np.argsort(sample, kind="stable")
        order = order[good[sample[order]]]
        number = np.cumsum(good) - 1  # of each sample that stays
        sample = number[sample[order]]
        first = np.append(np.flatnonzero(np.diff(sample, prepend=-1)), len(sample))
        image = np.full(len(first) - 1, -1, dtype=np.int64)
        if len(image):
            ranked = np.minimum.reduceat(score[order] * len(order) + np.arange(len(order)), first[:-1])
            image = np.where(ranked < _NO_IMAGE * len(order), ranked % len(order), -1)
        further = (score[order] < _NO_IMAGE) & (kind[order] != label)
        further[image[image >= 0]] = False
        keys = [key for key, stays in zip(keys, good.tolist(), strict=True) if stays]
        second = [f"{keys[sample[at]]}.{kinds[kind[order[at]]]}" for at in np.flatnonzero(further)[:1]]
        labels = {int(number[self.sample[member]]): text for member, text in self.labels.items()
                  if good[self.sample[member]]}  # fmt: skip
        return OffsetTable(
            keys, first, kinds, kind[order].astype(np.int32), offsets[order], sizes[order], labels, image, passed_over,
            example, int(further.sum()), "".join(second),
        )  # fmt: skip

    def _image_score(self, kind: np.ndarray, kinds: list[str]) -> np.ndarray:
        """int64 [members]: of a sample's members the one with the least is its image; _NO_IMAGE: it is none."""
        if self.image is not None:
            return np.where(kind == self.kind_of.get(self.image, -1), 0, _NO_IMAGE)
        named = np.array([each in IMAGE_KINDS for each in kinds] or [False])
        by_content = np.where(np.array(self.is_image, dtype=bool), 1, _NO_IMAGE)
        return np.where(named[kind], 0, by_content) if len(kind) else by_content

    def _require_once(
        self, sample: np.ndarray, kind: np.ndarray, offsets: np.ndarray, kinds: list[str], keys: list[str]
    ) -> None:
        """DataError for a name that comes twice."""
        order = np.lexsort((kind, sample))
        same = np.flatnonzero((np.diff(sample[order]) == 0) & (np.diff(kind[order]) == 0))
        if len(same):
            one, other = order[same[0]], order[same[0] + 1]
            name = f"{keys[sample[one]]}.{kinds[kind[one]]}"
            places = f"its bytes from {offsets[one]} and from {offsets[other]} on"
            self._fail(f"member {name!r} comes twice in one sample, {places} (a key ends at the first dot of the name)")

    def _fail(self, what: str) -> None:
        raise DataError(f"{self.path}: {what}; write the shard again or take it out of the data")

    def _read(self, position: int, count: int) -> bytes:
        return self.store.read(self.path, position, count)

    def _next_header(self) -> bytes:
        both = self._read(self.position, 2 * BLOCK)
        header, self.block = both[:BLOCK], both[BLOCK:]
        if len(header) < BLOCK:
            self._fail(f"ends at byte {self.length} without tar's end marker: it is cut, or still being written")
        if header == _ZEROS:
            return header
        # adler32's low half is 1 + the sum of all bytes, modulo 65521, at C's speed; tar's checksum
        # is that sum with its own field taken as spaces.
        total = (zlib.adler32(header) & 0xFFFF) - 1 - sum(header[148:156]) + 8 * 32
        if (total - self._number(header[148:156], "checksum")) % 65521:
            if self.position == 0:
                gzipped = header[:2] == b"\x1f\x8b"
                self._fail("is gzip-compressed, but shards are read by position: gunzip it" if gzipped else "is no tar")
            self._fail(f"the header at byte {self.position} has a wrong checksum: the shard is damaged")
        return header

    def _number(self, text: bytes, what: str) -> int:
        """A header's number: octal digits, or base 256 where the first bit is set."""
        if text[0] == 0x80:
            return int.from_bytes(text[1:], "big")
        digits = text.strip(b" \0")
        if digits.isdigit() and not (b"8" in digits or b"9" in digits):
            return int(digits, 8)
        if self.position == 0 and what == "checksum":
            return -1  # no tar at all: the caller says so
        self._fail(f"the header at byte {self.position} has no valid {what}: {text!r}")
        raise AssertionError

    def _take(self, header: bytes) -> None:
        """One header and the data that follow it."""
        kind = header[156:157]
        size = self._number(header[124:136], "size")
        extended = kind in b"xgLK"
        if not extended and self.long_size is not None:
            size = self.long_size
        name = self._name(header)
        is_folder = kind == b"5" or (kind == b"\0" and name.endswith("/"))
        if not extended and not is_folder and kind not in b"0\x007":
            self._fail(
                f"member {name!r} at byte {self.position} is a link, a device or a sparse file (type {kind!r}): "
                "pack the files themselves (tar --dereference --hard-dereference)"
            )
        start = self.position + BLOCK
        end = start if is_folder else start + size
        if end > self.length:
            self._fail(
                f"member {name!r} at byte {self.position} should reach to byte {end}, the file has {self.length}"
            )
        self.position = start + -(-(end - start) // BLOCK) * BLOCK
        if extended:
            self._take_extended(kind, self._extended_data(start, size))
            return
        self.long_name = self.long_size = None
        if not is_folder:
            self._add(name, start, size)

    def _name(self, header: bytes) -> str:
        if self.long_name is not None:
            name = self.long_name
        else:
            name = header[:100].split(b"\0", 1)[0]
            prefix = header[345:500].split(b"\0", 1)[0]
            if prefix and header[257:263] == b"ustar\0":
                name = prefix + b"/" + name
        return name.decode("utf-8", "backslashreplace")

    def _extended_data(self, start: int, size: int) -> bytes:
        if size > _LARGEST_EXTENDED_HEADER:
            self._fail(f"the extended header at byte {start - BLOCK} claims {size} bytes")
        return self._read(start, size)

    def _take_extended(self, kind: bytes, data: bytes) -> None:
        """A pax header (x: for the next member, g: for all) or a GNU long name (L; K is a link's)."""
        if kind == b"L":
            self.long_name = self._without_nul(data.rstrip(b"\0"))
        if kind not in b"xg":
            return
        records = self._pax_records(data)
        if any(name.startswith(b"GNU.sparse") for name in records):
            self._fail(f"holds a sparse file before byte {self.position}: pack without --sparse")
        if kind == b"g":
            if b"path" in records or b"size" in records:
                self._fail("a global header gives every member the same path or size")
            return
        if b"path" in records:
            self.long_name = self._without_nul(records[b"path"])
        if b"size" in records:
            text = records[b"size"]
            if not text.isdigit() or len(text) > _MOST_DIGITS:
                self._fail(f"an extended header before byte {self.position} has no valid size: {text[:80]!r}")
            self.long_size = int(text)

    def _without_nul(self, name: bytes) -> bytes:
        if b"\0" in name or not name:
            self._fail(f"an extended header before byte {self.position} gives a name with a NUL or none: {name[:80]!r}")
        return name

    def _pax_records(self, data: bytes) -> dict[bytes, bytes]:
        """`LENGTH NAME=VALUE\\n` records, LENGTH counting the whole record."""
        records, at = {}, 0
        while at < len(data):
            digits, space, _ = data[at : at + 20].partition(b" ")
            length = int(digits) if space and digits.isdigit() else 0
            record = data[at : at + length]
            name, equals, value = record[len(digits) + 1 : -1].partition(b"=")
            if not equals or len(record) != length or not record.endswith(b"\n"):
                self._fail(f"the extended header before byte {self.position} is damaged")
            records[name] = value
            at += length
        return records

    def _add(self, name: str, offset: int, size: int) -> None:
        """A regular member: its key is all up to the first dot of the file's name, as in webdataset; a number between
        dots (scan.0001.jpg), of which no extension consists, is of the key too."""
        folder, slash, base = name.rpartition("/")
        stem, dot, extension = base.partition(".")
        while stem and "." in extension and extension.partition(".")[0].isdecimal():
            number, _, extension = extension.partition(".")
            stem = f"{stem}.{number}"
        if not stem or not dot or _META.match(name):  # .DS_Store, ._1.jpg of a Mac, README
            self.passed_over += 1
            self.example = self.example or name
            return
        sample = self.samples.setdefault(folder + slash + stem, len(self.samples))
        extension = extension.lower()
        if extension == self.label and size <= SMALL:
            self.labels[len(self.sample)] = self.block[:size]
        self.sample.append(sample)
        self.kind.append(self.kind_of.setdefault(extension, len(self.kind_of)))
        self.offsets.append(offset)
        self.sizes.append(size)
        self.is_image.append(image_kind(self.block[: min(size, 32)]) is not None)

    def _check_end(self) -> None:
        """After the first block of zeros: a second one, and zeros to the end of the file."""
        marker = self.position
        if self.long_name is not None or self.long_size is not None:
            self._fail(f"the last extended header, before byte {marker}, has no member after it")
        if self.length - marker < 2 * BLOCK:
            self._fail(f"ends at byte {self.length} inside tar's end marker: it is cut")
        while marker < self.length and (piece := self._read(marker, 1 << 20)):
            if piece.count(0) != len(piece):
                self._fail(
                    f"has data after the block of zeros at byte {self.position}: a damaged header, "
                    "or two archives in one file"
                )
            marker += len(piece)
