"""Tables beside their shards: a shard's headers are read once, by whoever needs them first.

The table of FOLDER/NAME.tar for labels in .cls members is FOLDER/index.tables/NAME.tar.cls.table; another label
has a file of its own, so that runs with different labels do not undo each other's. Where FOLDER cannot be written
it lies in a folder that the index names (that of data.index, the run's). A table holds as long as the shard has the
size and the time of its scan; one that does not, or that is damaged, is reported and made again.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import socket
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple
from urllib.parse import quote

from vitscale.data import table as tables
from vitscale.data.declared import declared_count
from vitscale.data.parallel import Report, on_shards, report
from vitscale.data.table import SampleTable
from vitscale.errors import DataError
from vitscale.files.retry import unreadable
from vitscale.files.store import FileStat, LocalFiles, OnePass, Store, absolute, is_remote, same_file
from vitscale.files.tar import scan_shard

FOLDER = "index.tables"
_FIRST_READ = 1 << 18  # bytes; most tables are smaller
_NEXT_READ = 1 << 22
_TICK_NS = 20_000_000  # no kernel's file times are coarser,
_WHOLE_SECONDS_NS = 2_000_000_000  # but those of some file systems are: they keep whole seconds, or every other one
_MOST_REPORTS = 20
_reports = itertools.count()


@dataclass(frozen=True)
class Shard:
    """A shard whose table is wanted."""

    path: str
    stat: FileStat
    samples: int | None = None  # that it must hold, where an index says so
    sha256: str | None = None  # that it has, where that is known


class Counted(NamedTuple):
    """What a shard holds."""

    samples: int
    sha256: str | None


@dataclass(frozen=True)
class Sidecar:
    """The tables of shards for one label."""

    store: Store
    label: str
    fallback_folders: tuple[str, ...]  # local, for tables that cannot lie beside their shards; the first is preferred
    image: str | None = None  # the extension of the members with images; None: told by extension or content
    with_sha256: bool = False  # whether a table must also have its shard's, which is read whole then

    def table(self, shard: Shard) -> SampleTable:
        """From its file where that holds, else by a scan that leaves one.

        DataError where the shard is damaged, or does not hold the samples that it must.
        """
        wrong = []
        for store, path in self._places(shard.path):
            try:
                table = self._load(store, path, shard)
            except (FileNotFoundError, NotADirectoryError, PermissionError):  # a bucket may hide what it does not have
                continue
            except OSError as error:
                wrong.append(f"{path}: cannot be read ({error.strerror})")
            except ValueError as error:
                wrong.append(f"{path}: {error}")
            else:
                is_complete = table.sha256 is not None or not self.with_sha256
                if is_complete and shard.samples in (None, len(table)):
                    return table
        for what in wrong:
            _report_few(f"{what}; the table is made again from {shard.path}")
        _wait_for_next_tick(shard.stat)
        made = self._scanned(shard.path, shard.stat, self.with_sha256 and shard.sha256 is None)
        if shard.samples not in (None, len(made)):
            raise self._miscounted(shard, len(made))
        made = replace(made, sha256=made.sha256 or shard.sha256)
        self._save(shard.path, made)
        return made

    def count(self, shard: Shard) -> Counted:
        """What a shard holds; its table is made where there is none."""
        table = self.table(shard)
        return Counted(len(table), table.sha256)

    def difference(self, row: Shard) -> str | None:
        """Why a shard is not what its row of an index says, or its table not what the shard says, in a line; None where
        all is well. The shard is read whole, and nothing is written."""
        try:
            self._require(row)
        except DataError as error:
            return str(error)
        return None

    def _require(self, row: Shard) -> None:
        try:
            stat = self.store.stat(row.path)
        except OSError as error:
            raise unreadable(row.path, error) from None
        if stat.bytes != row.stat.bytes:
            raise DataError(f"{row.path}: has {stat.bytes} bytes, the index says {row.stat.bytes}")
        made = self._scanned(row.path, stat, with_sha256=True)
        if len(made) != row.samples:
            raise DataError(f"{row.path}: holds {len(made)} samples, the index says {row.samples}")
        if row.sha256 not in (None, made.sha256):
            raise DataError(f"{row.path}: has sha256 {made.sha256}, the index says {row.sha256}")
        for store, path in self._places(row.path):
            try:
                table = _read_table(store, path)
            except OSError:
                continue
            except ValueError as error:
                raise DataError(f"{row.path}: its table {path} {error}; delete that file") from None
            sha256 = table.sha256 or made.sha256  # which a table need not have
            if same_file(row.path, table.shard, stat) and tables.to_bytes(
                replace(table, sha256=sha256, shard=stat)
            ) != tables.to_bytes(made):
                raise DataError(f"{row.path}: its table {path} says other things than its headers; delete that file")

    def _miscounted(self, shard: Shard, samples: int) -> DataError:
        by, way_out = "the index", "make a new index (vitscale index) for a new run"
        claim = declared_count(self.store, shard.path)
        if claim is not None and claim.samples == shard.samples:
            by, way_out = claim.file, "delete that file if it is out of date, or count all shards by `vitscale index`"
        return DataError(
            f"{shard.path}: holds {samples} samples, {by} says {shard.samples}; {way_out}, or bring the old shard back"
        )

    def _scanned(self, path: str, stat: FileStat, with_sha256: bool) -> SampleTable:
        """The table of a shard by its headers, or, where its sha256 is wanted too, by one pass through its bytes."""
        passing = OnePass(self.store, path)
        scanned = scan_shard(path, passing if with_sha256 else self.store, self.label, stat, self.image)
        if scanned.passed_over:
            what = f"{scanned.passed_over} members belong to no sample, as {scanned.example}"
            _report_few(f"{path}: {what}: they are passed over")
        if scanned.further:
            what = f"{scanned.further} further images in samples that have one, as {scanned.further_example}"
            _report_few(f"{path}: {what}: they are passed over; data.image names the extension of those that are meant")
        made = tables.make_table(scanned, stat, self.label, self.image)
        return replace(made, sha256=passing.sha256()) if with_sha256 else made

    def _places(self, path: str) -> Iterator[tuple[Store, str]]:
        folder, name = os.path.split(path)
        kinds = self.label if self.image is None else f"{self.label}.{self.image}"
        name = f"{name}.{quote(kinds, safe='')}.table"
        yield self.store, os.path.join(folder, FOLDER, name)
        for fallback in self.fallback_folders:
            yield LocalFiles(), os.path.join(fallback, fallback_name(folder, ".tables"), name)

    def _load(self, store: Store, path: str, shard: Shard) -> SampleTable:
        """The table in a file. OSError or ValueError where there is none, or none of the shard as it is."""
        table = _read_table(store, path)
        same = same_file(shard.path, table.shard, shard.stat)
        if same and is_remote(shard.path) and None not in (table.sha256, shard.sha256):
            same = table.sha256 == shard.sha256
        if (table.label, table.image) != (self.label, self.image) or not same:
            raise ValueError("is of another state of the shard")
        return replace(table, shard=shard.stat)

    def _save(self, path: str, made: SampleTable) -> None:
        data = tables.to_bytes(made)
        for store, place in self._places(path):
            try:
                store.write(place, data)
                return
            except OSError as error:
                why = error
        _report_few(f"{path}: its table cannot be kept ({why}), so its headers are read again at the next start")


def _read_table(store: Store, path: str) -> SampleTable:
    """OSError or ValueError where there is none."""
    data = store.read(path, 0, _FIRST_READ)
    whole = tables.whole_length(data)
    while len(data) < whole and (more := store.read(path, len(data), _NEXT_READ)):
        data += more
    return tables.from_bytes(data)


def _wait_for_next_tick(stat: FileStat) -> None:
    """Wait until a file that is written to from now on gets another time than it has, or no one would see it.

    By this machine's clock: where a file server's differs, what is written as soon may stay unseen.
    """
    tick = _TICK_NS if stat.modified % 1_000_000_000 else _WHOLE_SECONDS_NS
    age = time.time_ns() - stat.modified
    if 0 <= age < tick:
        time.sleep((tick - age) / 1e9)


def _report_few(line: str) -> None:
    """Report a line of which there may be one a shard: the first ones of this process."""
    number = next(_reports)
    if number < _MOST_REPORTS:
        report(line)
    elif number == _MOST_REPORTS:
        report("tables: more of them are made again or not kept, for reasons as above")


def fallback_name(folder: str, ending: str) -> str:
    """What stands for a folder of shards in the run's folder."""
    return f"index-{hashlib.sha256(os.fsencode(absolute(folder))).hexdigest()[:8]}{ending}"


def count_samples(
    sidecar: Sidecar, shards: Sequence[Shard], say: Report = report, workers: int | None = None
) -> list[Counted]:
    """What each shard holds, their tables made in parallel, with a line every few seconds; workers: see on_shards.

    Nodes that start at once begin at different shards, so that each finds tables that others have made.
    """
    first = zlib.crc32(socket.gethostname().encode()) % max(1, len(shards))
    counted = on_shards(sidecar.count, [*shards[first:], *shards[:first]], "tables", say, workers)
    return counted[len(counted) - first :] + counted[: len(counted) - first]
