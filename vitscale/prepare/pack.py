"""`vitscale pack`: images -> WebDataset shards with an index; the same source and options give the same bytes."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from vitscale.config.schema import Source
from vitscale.data.index import ShardIndex
from vitscale.data.patterns import expand
from vitscale.errors import DataError
from vitscale.files.atomic import write_atomically
from vitscale.files.classes import CLASSES
from vitscale.prepare.shards import from_shards, shard_store
from vitscale.prepare.sources import Columns, Found, from_folder, from_list, splits_error
from vitscale.prepare.tables import from_parquet, from_saved, saved_splits
from vitscale.prepare.writer import MAKE_ROOM, PackedSample, write_shards

_PLAN, _DONE = ".packing", ".packed"  # in OUT until all is there, and then: a digest of what is packed
_FURTHER = re.compile(r"(~\d+)+$")  # of the keys of further images of a name: they stay on its side of a split
_SURE = 0.9  # of an estimate of what shards will take
_Splits = dict[str, list[list[PackedSample]]]  # by their names: shards
Report = Callable[[str], None]


def pack(
    source: str | Path,
    out: Path,
    *,
    shard_samples: int = 5000,
    shard_bytes: int = 512 << 20,
    held_out: float = 0.0,
    workers: int | None = None,
    seed: int = 0,
    classes: Sequence[str] | None = None,
    short_side: int | None = None,
    columns: Columns | None = None,
    report: Report = print,
) -> dict[str, ShardIndex]:
    """Write the images of `source` as shards; the indexes by split.

    source: a folder of one folder a class (labels are the sorted folders' places, kept in classes.json) or of images
    side by side; a list (CSV, TSV, Parquet); a data set that `datasets` saved to disk; shards. out: must not exist or
    be empty, or be of the same call, whose shards stay; holds the shards and index.json, or with held_out > 0 train/
    and test/ of them, an image's split being a hash of its name: adding images moves none. Samples are shuffled by
    hash, those of Parquet files by row groups, so that classes mix. A shard ends at shard_samples images or
    shard_bytes. classes: names by label where they are not the source's own, as of images that a model of more classes
    is to be scored on. short_side: pixels; larger images are made so small (resize.py).
    """
    _require_values(held_out, shard_samples=shard_samples, shard_bytes=shard_bytes, resize=short_side)
    if not ((out := Path(out)) / _DONE).exists():
        require_new(out, begun=True)
    found = find(str(source), classes, columns)
    if not found.samples:
        raise DataError(f"{source}: names no images")
    splits = {name: sorted(chosen, key=lambda sample: _draw(sample.group or sample.key, "order", seed))
              for name, chosen in _split(found.samples, held_out, seed).items()}  # fmt: skip
    shards = {name: _cut(chosen, shard_samples, shard_bytes) for name, chosen in splits.items()}
    plan = _digest(shards, found.classes, short_side)
    if _is_done(out, plan, list(shards)):
        report(f"{out}: holds these shards already, by the names and sizes of their images")
        return {name: ShardIndex.load(out / name / "index.json") for name in shards}
    require_new(out, begun=True)
    if found.classes and Path(source).is_dir() and Path(source).resolve() in out.resolve().parents:
        raise DataError(f"{out}: lies in {source}, whose folders are looked through; name a folder beside it")
    for note in found.notes:
        report(note)
    needed = sum(sample.room for sample in found.samples)
    if short_side is None:
        _require_room(out, needed)
    with _claimed(out, plan):
        if found.classes:
            write_atomically(out / CLASSES, json.dumps(list(found.classes), ensure_ascii=False, indent=1) + "\n")
        indexes = {}
        for name, each in shards.items():
            indexes[name] = write_shards(each, out / name, name or "shard", workers, short_side,
                                         lambda share: _require_room(out, needed * share * _SURE))  # fmt: skip
            report(f"{out / name}: {indexes[name].total} images in {len(each)} shards")
    if found.classes:
        count = len(found.classes)
        many = any(sample.label is not None and " " in sample.label for sample in found.samples)
        kind = " model.problem_type=multi_label_classification" if many else ""
        report(f"{out / CLASSES}: {count} classes; to train by labels: model.num_labels={count}{kind}")
    return indexes


def _require_values(held_out: float, **above_zero: int | None) -> None:
    if not 0 <= held_out < 1:
        raise DataError(f"held_out={held_out}: must be in [0, 1), the share of images set apart for testing")
    for name, value in above_zero.items():
        if value is not None and value < 1:
            raise DataError(f"{name}={value}: must be above 0")


def find(source: str, classes: Sequence[str] | None = None, columns: Columns | None = None) -> Found:
    """The samples that a source names: see `pack`. DataError where it is none, or not as it should be."""
    columns, path = columns or Columns(), Path(source).expanduser()
    if path.is_dir():
        if not (path / "state.json").exists():
            _require_no_columns(source, columns)
        if (path / "dataset_dict.json").exists():
            raise splits_error(source, saved_splits(path))
        if (path / "state.json").exists():
            return from_saved(path, classes, columns)
        return from_folder(path, classes)
    paths = [str(path)] if path.exists() else expand([Source(source)], shard_store())
    kinds = {os.path.splitext(each)[1].lower() for each in paths}
    if kinds == {".tar"}:
        _require_no_columns(source, columns)
        return from_shards(paths, classes)
    if missing := [each for each in paths if not os.path.exists(each)]:
        raise DataError(f"{missing[0]}: no such folder or file; name a folder of images, a list, a data set or shards")
    if kinds == {".parquet"}:
        return from_parquet([Path(each) for each in paths], classes, columns)
    if kinds in ({".csv"}, {".tsv"}) and len(paths) == 1:
        return from_list(Path(paths[0]), classes, columns)
    raise DataError(
        f"{source}: is nothing that can be packed; name a folder of images (or of one folder a class), a list (.csv, "
        ".tsv, .parquet), a Hugging Face data set on disk (save_to_disk), or shards ('FOLDER/*.tar')"
    )


def _require_no_columns(source: str, columns: Columns) -> None:
    if columns.image or columns.labels:
        raise DataError(f"{source}: has no columns; --image-column and --label-column are for lists: leave them out")


def require_new(out: Path, begun: bool = False) -> None:
    """DataError where a folder has something in it, other than what a call before has `begun`, or `rm OUT/*` left."""
    try:
        names = {path.name for path in out.iterdir()}
        if names == {_DONE}:
            return
    except FileNotFoundError:
        return
    except OSError:
        names = {""}
    if names and not (begun and _PLAN in names):
        held = "holds shards of other images or by other options" if _DONE in names else "is not an empty folder"
        raise DataError(f"{out}: exists and {held}; name a new one or empty it")


def _is_done(out: Path, plan: str, splits: Sequence[str]) -> bool:
    """Whether an earlier call has made these shards and all are there. Where some were taken away, they are begun."""
    if not (out / _DONE).exists() or (out / _DONE).read_text(encoding="ascii") != plan:
        return False
    if all(is_whole(out / name) for name in splits):
        return True
    (out / _DONE).rename(out / _PLAN)
    return False


def is_whole(folder: Path) -> bool:
    """Whether a folder has all shards of its index.json."""
    try:
        index = ShardIndex.load(folder / "index.json")
    except DataError:
        return False
    sizes = [Path(path).stat().st_size if Path(path).exists() else -1 for path in index.paths]
    return sizes == index.bytes.tolist()


@contextlib.contextmanager
def _claimed(out: Path, plan: str) -> Iterator[None]:
    """A folder that only this process fills, with what `plan` is the digest of; what was begun is gone on with."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        stream = open(out / _PLAN, "a+", encoding="ascii")  # noqa: SIM115
    except OSError as error:
        raise DataError(f"{out}: cannot be made: {error.strerror}; name a folder of your own") from None
    with stream:
        with contextlib.suppress(OSError):  # a file system without locks
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise DataError(f"{out}: is being packed by another process; wait, or name another folder") from None
        stream.seek(0)
        begun = stream.read()
        if begun not in ("", plan):
            raise DataError(
                f"{out}: holds shards that were begun of other images or with other options; name another folder, or "
                "remove it"
            )
        if not begun:
            stream.write(plan)
            stream.flush()
        yield
        (out / _PLAN).rename(out / _DONE)


def _digest(shards: _Splits, classes: Sequence[str], short_side: int | None) -> str:
    digest = hashlib.sha256(json.dumps([list(classes), short_side]).encode())
    for name, each in shards.items():
        for shard in each:
            digest.update(f"{name} {len(shard)}\n".encode())
            for sample in shard:
                digest.update(f"{sample.key} {sample.label} {sample.bytes}\n".encode())
    return digest.hexdigest()


def _require_room(out: Path, needed: float) -> None:
    """DataError where the disk has no room for shards of `needed` bytes, of which some may be there."""
    more = needed - _bytes_of_shards(out)
    above = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.exists())
    free = shutil.disk_usage(above).free
    if more > free:
        raise DataError(
            f"{out}: the shards need {more / 1e9:.1f} GB, its disk has {free / 1e9:.1f} GB free; {MAKE_ROOM}, or make "
            "the images smaller (--resize)"
        )


def _bytes_of_shards(out: Path) -> int:
    """Of those that are done or begun."""
    total = 0
    for path in out.rglob("*.tar*"):
        with contextlib.suppress(FileNotFoundError):  # a draft gets its name
            total += path.stat().st_size
    return total


def _split(samples: list[PackedSample], held_out: float, seed: int) -> dict[str, list[PackedSample]]:
    if held_out == 0:
        return {"": samples}
    splits: dict[str, list[PackedSample]] = {"train": [], "test": []}
    for sample in samples:
        is_test = _draw(_FURTHER.sub("", sample.key), "split", seed) < held_out * 2**64
        splits["test" if is_test else "train"].append(sample)
    if empty := [name for name, chosen in splits.items() if not chosen]:
        raise DataError(f"held_out={held_out}: of {len(samples)} images none falls into {empty[0]}/; change it")
    return splits


def _draw(key: str, purpose: str, seed: int) -> int:
    """64 bits hashed from a sample's name: they stay when other images are added."""
    return int.from_bytes(hashlib.blake2b(f"{purpose} {seed} {key}".encode(), digest_size=8).digest(), "big")


def _cut(samples: list[PackedSample], most_samples: int, most_bytes: int) -> list[list[PackedSample]]:
    """Samples in runs of at most so many and so many bytes (one at least)."""
    shards: list[list[PackedSample]] = []
    held = 0
    for sample in samples:
        if not shards or len(shards[-1]) >= most_samples or held + sample.bytes > most_bytes:
            shards.append([])
            held = 0
        shards[-1].append(sample)
        held += sample.bytes
    return shards
