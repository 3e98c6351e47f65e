"""Samples -> tar shards: in parallel processes, each shard there whole or not at all, the same bytes every time."""

from __future__ import annotations

import errno
import hashlib
import io
import os
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from vitscale.data.index import ShardIndex, build_index
from vitscale.data.parallel import leave_with_parent
from vitscale.errors import DataError
from vitscale.files.atomic import replaced
from vitscale.files.header import IMAGE_KINDS, image_kind
from vitscale.files.store import is_remote, sha256_of
from vitscale.prepare.progress import Progress
from vitscale.prepare.resize import resized
from vitscale.text import as_text
from vitscale.world import World

_OVERHEAD = 3 << 10  # bytes of a sample in a tar beside its members': headers, padding, the label
MAKE_ROOM = "make room (the same command then goes on), or name a folder on another disk"
Members = dict[str, bytes]  # by their extensions


class Origin(Protocol):
    """Where a sample's bytes are. It travels to the process that writes them."""

    def read(self) -> tuple[str, Members]:
        """The extension of the image ("": there is none), and the members. DataError where they cannot be had."""
        ...


@dataclass(frozen=True, slots=True)
class ImageFile:
    """An image in a file, whose bytes stay as they are."""

    path: str

    def read(self) -> tuple[str, Members]:
        try:
            with open(self.path, "rb") as stream:
                data = stream.read()
        except OSError as error:
            raise DataError(f"{as_text(self.path)}: cannot be read: {error.strerror}; take it away") from None
        kind = image_extension(self.path, data)
        return kind, {kind: data}


def image_extension(name: str, data: bytes) -> str:
    """That of an image's member: its own where it is an image's, else by its content."""
    own = os.path.splitext(name)[1][1:].lower()
    return own if own in IMAGE_KINDS else image_kind(data) or IMAGE_KINDS[0]


@dataclass(frozen=True, slots=True)
class ImageBytes:
    """An image in memory."""

    kind: str
    data: bytes

    def read(self) -> tuple[str, Members]:
        return self.kind, {self.kind: self.data}


@dataclass(frozen=True, slots=True)
class PackedSample:
    """One sample to be."""

    key: str
    origin: Origin
    bytes: int  # of its members; where it lies in a Parquet file, about as many
    label: str | None = None
    group: str = ""  # samples of one group are read together, in their order; "": it is read for itself

    @property
    def room(self) -> int:
        """Bytes that it takes in a shard, unless it is made smaller."""
        return self.bytes + _OVERHEAD


def write_shards(
    shards: Sequence[Sequence[PackedSample]],
    out: Path,
    name: str,
    workers: int | None = None,
    short_side: int | None = None,
    check: Callable[[float], None] = lambda share: None,
) -> ShardIndex:
    """Write out/NAME-000000.tar and so on, and their index.json with sha256. Shards that are there already are kept.

    short_side: see resize.py. check: called after 1, 2, 4, 8, ... shards with what they take on the disk as a share of
    their samples' `room`; it may raise. stderr gets a line of how far it is.
    """
    out.mkdir(parents=True, exist_ok=True)
    paths = [out / f"{name}-{number:06d}.tar" for number in range(len(shards))]
    for draft in out.glob(f".{name}-*.tar.*.tmp"):  # of a process that was killed
        draft.unlink(missing_ok=True)
    work = [(path, shard, short_side) for path, shard in zip(paths, shards, strict=True)]
    workers = min(workers or World().cores_per_rank, len(shards))
    digests: dict[Path, str] = {}
    taken = planned = 0
    with Progress("pack", "images", sum(map(len, shards))) as progress, closing(_written(work, workers)) as written:
        for (path, shard, _), digest in written:
            digests[path] = digest
            progress.add(len(shard))
            taken += path.stat().st_size
            planned += sum(sample.room for sample in shard)
            if len(digests).bit_count() == 1:
                check(taken / planned)
    index = build_index([str(path) for path in paths], [digests[path] for path in paths])
    wrong = [path for path, count, shard in zip(paths, index.samples, shards, strict=True) if count != len(shard)]
    assert not wrong, f"{wrong} do not hold what was written"
    index.save(out / "index.json")
    return index


_Work = tuple[Path, Sequence[PackedSample], int | None]


def _written(work: Sequence[_Work], workers: int) -> Generator[tuple[_Work, str]]:
    """Each shard with its sha256, once it is there; the first error ends all."""
    if workers == 1:
        yield from ((shard, _write_shard(shard)) for shard in work)
        return
    _tar_writer(io.BytesIO())  # imports webdataset before the fork, once
    with ProcessPoolExecutor(workers, _context(work[0][1][0]), leave_with_parent) as pool:
        futures = {pool.submit(_write_shard, shard): shard for shard in work}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BrokenProcessPool:
            raise DataError("a process was killed, by want of memory maybe; fewer --workers go on from here") from None
        finally:
            pool.shutdown(cancel_futures=True)


def _context(sample: PackedSample) -> BaseContext:
    """How processes start that read such samples: obstore's threads do not survive a fork."""
    return get_context("spawn" if is_remote(getattr(sample.origin, "path", "")) else "fork")


def _write_shard(work: _Work) -> str:
    """Write one shard, unless it is there; its sha256 in hex. It appears under its name only when whole."""
    path, samples, short_side = work
    if path.exists():
        return sha256_of(path)
    try:
        with replaced(path) as draft, open(draft, "wb") as file:
            hashed = _Hashed(file)
            with _tar_writer(hashed) as writer:
                for sample in samples:
                    writer.write(_members(sample, short_side))
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DataError(f"{path}: cannot be written: {error.strerror}; {MAKE_ROOM}") from None
        raise OSError(error.errno, error.strerror, error.filename or str(path)) from None
    return hashed.digest.hexdigest()


def _members(sample: PackedSample, short_side: int | None) -> dict[str, str | bytes]:
    """As webdataset's TarWriter takes it."""
    kind, members = sample.origin.read()
    if short_side is not None and kind:
        new_kind, data = resized(members[kind], kind, short_side)
        if new_kind == kind or new_kind not in members:
            del members[kind]
            members[new_kind] = data
    label = {} if sample.label is None else {"cls": sample.label.encode()}
    return {"__key__": sample.key, **members, **label}


class _Hashed(io.RawIOBase):
    """A file to write to that hashes what passes."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.digest = file, hashlib.sha256()

    def writable(self) -> bool:
        return True

    def write(self, data: bytes) -> int:  # type: ignore[override]
        self.digest.update(data)
        return self._file.write(data)


def _tar_writer(stream: BinaryIO | io.RawIOBase) -> Any:
    """webdataset's TarWriter; imported late, since it brings torch."""
    from webdataset.writer import TarWriter

    return TarWriter(stream, encoder=False, mtime=0, user="", group="", compress=False)
