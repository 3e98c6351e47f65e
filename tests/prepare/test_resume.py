"""A pack that is killed, goes on, and leaves what one without a stop leaves."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from tests.data.makers import encoded, photo
from tests.prepare.test_pack import contents
from vitscale.data.index import ShardIndex
from vitscale.errors import DataError
from vitscale.prepare.pack import pack

COMMAND = [sys.executable, "-m", "vitscale", "pack"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    photos = [photo(number, 1200, 1600) for number in range(3)]
    for number in range(120):
        path = tmp_path / "images" / ("ant", "bee")[number % 2] / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(photos[number % 3])
    return tmp_path / "images"


def shards(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*.tar"))}


def kill_midway(folder: Path, out: Path) -> list[psutil.Process]:
    """Start a pack, kill it when a few shards are there; the processes that it had."""
    options = ["--shard-samples", "2", "--resize", "32", "--held-out", "0.2", "--workers", "2"]
    process = subprocess.Popen([*COMMAND, str(folder), str(out), *options], start_new_session=True)
    while process.poll() is None and len(shards(out)) < 5:
        time.sleep(0.002)
    children = psutil.Process(process.pid).children()
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it was done before it could be killed"
    return children


def test_what_was_killed_goes_on(folder: Path, tmp_path: Path) -> None:
    """Finished shards stay, the rest is made, and all is as in one go; nothing of the killed is left."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    options = {"shard_samples": 2, "short_side": 32, "held_out": 0.2}
    pack(folder, whole, workers=1, **options)
    workers = kill_midway(folder, out)
    assert len(workers) == 2
    assert not psutil.wait_procs(workers, timeout=10)[1], "they end with their parent"
    (out / "train" / ".train-000007.tar.0123456789ab.tmp").write_bytes(b"a draft of one that was killed")
    written = {path: path.stat().st_mtime_ns for path in out.rglob("*.tar")}
    assert 5 <= len(written) < 60
    assert not (out / "test" / "index.json").exists()
    with pytest.raises(DataError, match="begun of other images or with other options"):
        pack(folder, out, workers=1, **{**options, "short_side": 64})
    pack(folder, out, workers=2, **options)
    assert {path: path.stat().st_mtime_ns for path in written} == written
    assert shards(out) == shards(whole)
    for split in ("train", "test"):
        ours, theirs = (ShardIndex.load(each / split / "index.json") for each in (out, whole))
        assert (ours.digest, ours.sha256) == (theirs.digest, theirs.sha256)
    assert {path.name for path in out.rglob(".*")} == {".packed"}
    said: list[str] = []
    again = pack(folder, out, workers=2, report=said.append, **options)
    assert said == [f"{out}: holds these shards already, by the names and sizes of their images"]
    assert again["test"].digest == ours.digest
    with pytest.raises(DataError, match="holds shards of other images or by other options"):
        pack(folder, out, workers=1, **{**options, "short_side": 64})


def test_shards_that_were_taken_away_are_written_again(folder: Path, tmp_path: Path) -> None:
    out, options = tmp_path / "out", {"shard_samples": 100, "held_out": 0.2, "workers": 1}
    pack(folder, out, **options)
    written = shards(out)
    (out / "train" / "train-000000.tar").unlink()
    pack(folder, out, **options)
    assert shards(out) == written
    subprocess.run(f"rm -r {out}/*", shell=True, check=True)
    assert [path.name for path in out.iterdir()] == [".packed"], "a shell's * means nothing hidden"
    pack(folder, out, **options)
    assert shards(out) == written
    subprocess.run(f"rm -r {out}/*", shell=True, check=True)
    pack(folder, out, **{**options, "held_out": 0.5})
    assert shards(out) != written


def test_two_at_once_do_not_meet(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with subprocess.Popen([*COMMAND, str(folder), str(out), "--shard-samples", "2", "--resize", "32"]) as process:
        while process.poll() is None and len(shards(out)) < 2:
            time.sleep(0.002)
        with pytest.raises(DataError, match="is being packed by another process"):
            pack(folder, out, shard_samples=2, short_side=32, workers=1)
        process.kill()


def test_a_disk_without_room_is_told_before_the_first_byte(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for number in range(3):
        (tmp_path / "images" / f"{number}.jpg").touch()
        os.truncate(tmp_path / "images" / f"{number}.jpg", 1 << 42)  # sparse: takes no room itself
    with pytest.raises(DataError, match=r"the shards need 13194\.1 GB, its disk has .* GB free; make room"):
        pack(tmp_path / "images", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_disk_without_room_for_what_is_made_smaller_is_told_by_the_first_shards(tmp_path: Path) -> None:
    """What they come to is not known before; and what is done stays."""
    (tmp_path / "images").mkdir()
    for number in range(9):
        (tmp_path / "images" / f"{number}.jpg").write_bytes(photo(number, 200, 300))
    options = {"shard_samples": 1, "short_side": 190, "workers": 1}
    pack(tmp_path / "images", tmp_path / "all", **options)
    last = ShardIndex.load(tmp_path / "all" / "index.json").paths[-1]
    (name,) = contents((last,))
    os.truncate(tmp_path / "images" / f"{name}.jpg", 1 << 42)  # sparse: takes no room itself
    with pytest.raises(DataError, match=r"the shards need .* GB, its disk has .* GB free; make room .*--resize"):
        pack(tmp_path / "images", tmp_path / "out", **options)
    assert list(shards(tmp_path / "out")) == ["shard-000000.tar"]


def test_a_full_disk_says_how_to_go_on(tmp_path: Path) -> None:
    """A real one, of 1 MB, in a namespace of its own: the first shard does not fit."""
    disk, folder = tmp_path / "disk", tmp_path / "images"
    namespace = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    mount = f"mount -t tmpfs -o size=1m none {disk}"
    for each in (disk, folder):
        each.mkdir()
    if shutil.which("unshare") is None or subprocess.run([*namespace, mount], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    noise = np.random.default_rng(0).integers(0, 256, (300, 300, 3), dtype=np.uint8)
    for number in range(40):
        (folder / f"{number}.jpg").write_bytes(encoded(noise, quality=95))
    pack_it = shlex.join([*COMMAND, str(folder), f"{disk}/out", "--resize", "290", "--workers", "2"])
    script = f"{mount}; {pack_it}; echo $?; ls -A {disk}/out; mount -o remount,size=64m {disk}; {pack_it}; echo $?"
    done = subprocess.run([*namespace, script], capture_output=True, text=True)
    assert [line for line in done.stderr.splitlines() if not line.startswith("pack: ")] == [
        f"vitscale: error: {disk}/out/shard-000000.tar: cannot be written: No space left on device; make room (the "
        "same command then goes on), or name a folder on another disk"
    ]
    assert done.stdout.splitlines() == ["2", ".packing", f"{disk}/out: 40 images in 1 shards", "0"], "no draft is left"


def test_a_file_that_went_away_is_named(tmp_path: Path) -> None:
    """In a process of the pool: one line, and the shards that are done stay."""
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(6):
        (folder / f"{number}.jpg").write_bytes(photo(number))
    (folder / "list.csv").write_text("path,label\n" + "".join(f"{n}.jpg,{n or ''}\n" for n in range(6)))

    def remove(line: str) -> None:
        """Once the list has been read, which this first line tells."""
        (folder / "3.jpg").unlink(missing_ok=True)

    with pytest.raises(DataError, match=r"3\.jpg: cannot be read: No such file"):
        pack(folder / "list.csv", tmp_path / "out", shard_samples=1, workers=2, report=remove)
    (folder / "3.jpg").write_bytes(photo(3))
    assert pack(folder / "list.csv", tmp_path / "out", shard_samples=1, workers=2)[""].total == 6
