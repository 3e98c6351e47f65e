"""The verb `vitscale index`: an index of many shards, made at once or in parts, or held against its shards."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from vitscale.config.schema import Source
from vitscale.data.index import ShardIndex, build_index
from vitscale.data.index_builder import IndexBuilder
from vitscale.data.parallel import on_shards
from vitscale.data.patterns import expand
from vitscale.data.sidecar import Shard, Sidecar
from vitscale.errors import ConfigError, DataError
from vitscale.files.atomic import draft_of
from vitscale.files.store import FileStat, absolute
from vitscale.files.stores import Stores
from vitscale.text import listed


def make_index(
    patterns: Sequence[str],
    out: Path,
    *,
    label: str,
    image: str | None = None,
    workers: int | None = None,
    part: tuple[int, int] | None = None,
) -> str:
    """Write the index of the shards that `patterns` name to `out`; what was done, in a line.

    part: (i, n) for the i-th of n calls, counted from 1, on as many machines or one after the other: it reads every
    n-th shard and leaves a file in OUT.parts, and whichever call finds all n of these there puts them together. What
    an earlier call has read is not read again, whatever its part was. Raises ConfigError or DataError.
    """
    if not out.parent.is_dir():  # an error now, not after all shards were read
        raise ConfigError(f"--out {out}: there is no folder {out.parent}; make it or name another")
    paths = expand(tuple(Source(os.path.expanduser(pattern)) for pattern in patterns))
    number, count = part or (1, 1)
    folders = (os.path.abspath(out.parent),)
    index = build_index(paths[number - 1 :: count], label=label, image=image, fallback_folders=folders, workers=workers)
    whole: ShardIndex | None = index
    if part is not None:
        _save(index, _part(out, number, count))
        whole, missing = _joined(out, paths, count)
        if missing:
            return (
                f"{_part(out, number, count)}: {index.total} samples in {len(index.paths)} shards; parts "
                f"that are missing, or of shards that changed since: {listed(missing, 20)} of {count}"
            )
    if whole is None:
        return f"{out}: another call has put its {count} parts together"
    _save(whole, out)
    with contextlib.suppress(FileNotFoundError):  # by a name that no other call looks for, so that none finds a half
        gone = _parts(out).rename(draft_of(out))
        shutil.rmtree(gone, ignore_errors=True)
    return f"{out}: {whole.total} samples in {len(whole.paths)} shards"


def differences(
    path: str, *, label: str, image: str | None = None, workers: int | None = None
) -> tuple[int, list[str]]:
    """How many shards an index names, and a line with the reason for each that is not what it says. All is read again:
    sizes, headers, every byte for the sha256, tables; nothing is written."""
    index = ShardIndex.load(path, Stores())
    sidecar = Sidecar(index.store, label, index.fallback_folders, image)
    rows = zip(index.paths, index.samples.tolist(), index.bytes.tolist(), index.sha256, strict=True)
    shards = [Shard(path, FileStat(size, 0), samples, sha256) for path, samples, size, sha256 in rows]
    found = on_shards(sidecar.difference, shards, "check", workers=workers)
    return len(shards), [why for why in found if why is not None]


def _joined(out: Path, paths: Sequence[str], count: int) -> tuple[ShardIndex | None, list[int]]:
    """The index that the parts come to, or which of them are missing; neither where another call was first."""
    missing = [number for number in range(1, count + 1) if not _part(out, number, count).exists()]
    if not missing:
        builder = IndexBuilder(paths, Stores())
        for number in range(1, count + 1):
            share = slice(number - 1, None, count)
            try:
                part = ShardIndex.load(_part(out, number, count))
            except DataError:
                missing.append(number)
                continue
            same = part.paths == tuple(absolute(path) for path in paths[share])
            if same and (part.bytes == builder.bytes[share]).all() and (part.modified == builder.modified[share]).all():
                builder.samples[share], builder.sha256[share] = part.samples, part.sha256
            else:
                missing.append(number)
    if missing:
        return None, missing if _parts(out).exists() else []
    return ShardIndex.of(builder.rows, builder.store), []


def _parts(out: Path) -> Path:
    return out.with_name(f"{out.name}.parts")


def _part(out: Path, number: int, count: int) -> Path:
    return _parts(out) / f"{number}-of-{count}.json"


def _save(index: ShardIndex, path: Path) -> None:
    try:
        index.save(path)
    except OSError as error:
        raise ConfigError(f"--out: {path} cannot be written ({error.strerror}); name another file") from None
