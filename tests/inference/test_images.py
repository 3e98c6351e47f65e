"""What the command line's arguments stand for, and what comes of it."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.data.makers import encoded, photo, pixels, write_tar
from vitscale.errors import DataError
from vitscale.inference.images import ImageBatch, batches, find_images
from vitscale.interop.image_processing import BatchFeature, ViTImageProcessor
from vitscale.prepare.pack import pack

NO_INPUT = io.BytesIO()


def names(arguments: Sequence[str | Path], stdin: bytes = b"") -> list[str]:
    return [one.name for one in find_images(list(map(str, arguments)), io.BytesIO(stdin))]


def in_folder(folder: Path, *expected: str) -> list[str]:
    return [str(folder / name) for name in expected]


def test_files_folders_and_patterns(photos: Path) -> None:
    china, flower = in_folder(photos, "china.jpg", "flower.JPEG")
    (hopper,) = in_folder(photos, "below/deeper/hopper.jpg")
    (photos / "notes.txt").write_text("no image by its name: left out of folders, tried when named")
    (photos / ".thumbnails").mkdir()
    (photos / ".thumbnails" / "small.jpg").write_bytes(photo(0))
    assert names([flower, china]) == [flower, china]
    assert names([photos]) == [china, flower, hopper]
    assert names([photos / "below", china, china]) == [hopper, china, china]
    assert names([photos / "*.jpg"]) == [china]
    assert names([photos / "**" / "*.jpg"]) == [hopper, china]
    assert names([f"{photos}/{{flower.JPEG,china.jpg}}"]) == [flower, china]
    assert names([photos / "notes.txt"]) == in_folder(photos, "notes.txt")


def test_what_a_folder_holds_beside_images(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By the rules of files/folder.py: said on stderr, and bad where it might have been an image."""
    china, flower = in_folder(photos, "china.jpg", "flower.JPEG")
    (hopper,) = in_folder(photos, "below/deeper/hopper.jpg")
    (photos / "china.jpg").rename(photos / "china.jfif")
    (photos / "a.npy").write_bytes(b"no image")
    (photos / "@eaDir").mkdir()
    (photos / "@eaDir" / "thumb.jpg").write_bytes(photo(0))
    (photos / "up").symlink_to(photos)
    assert names([photos]) == [china.replace(".jpg", ".jfif"), flower, hopper]
    said = capsys.readouterr().err
    assert f"{photos}: left out: 1 files that are no images (1 .npy); folders @eaDir, up that links back" in said
    (photos / "gone.jpg").symlink_to("nowhere.jpg")
    *_, gone = find_images([str(photos)], NO_INPUT)
    with pytest.raises(DataError, match="is a broken link"):
        gone.read()
    (photos / "empty").mkdir()
    (photos / "empty" / "a.txt").write_text("no image")
    (empty,) = find_images([str(photos / "empty")], NO_INPUT)
    with pytest.raises(DataError, match=r"holds no images .*; left out: .*1 \.txt"):
        empty.read()


def test_names_with_a_patterns_letters_are_names(tmp_path: Path) -> None:
    for name in ("what?[1].jpg", "{a,b}.jpg", "{.jpg"):
        (tmp_path / name).write_bytes(photo(0))
        assert names([tmp_path / name]) == [str(tmp_path / name)]


def test_shards(photos: Path, tmp_path: Path) -> None:
    """As vitscale pack writes them: alone, in their folder, by pattern."""
    (photos / "below" / "china.png").write_bytes(encoded(pixels(1), "PNG"))
    for name in ("china.jpg", "flower.JPEG"):
        (photos / name).rename(photos / "below" / name)
    pack(photos, tmp_path / "shards", shard_samples=2, workers=1, report=lambda text: None)
    shards = sorted((tmp_path / "shards").glob("*.tar"))
    assert len(shards) == 2
    expected = [name for shard in shards for name in names([shard])]
    assert len(expected) == 4
    assert f"{shards[0]}:below/" in expected[0]
    assert names([tmp_path / "shards"]) == names([tmp_path / "shards" / "*.tar"]) == expected
    read = {one.name.rpartition(":")[2]: one.read() for one in find_images([str(tmp_path / "shards")], NO_INPUT)}
    assert read["below/deeper/hopper"] == (photos / "below/deeper/hopper.jpg").read_bytes()


def test_stdin_is_a_list_or_an_image(photos: Path) -> None:
    china, flower = in_folder(photos, "china.jpg", "flower.JPEG")
    (hopper,) = in_folder(photos, "below/deeper/hopper.jpg")
    assert names(["-"], f"{china}\n\n{photos / 'below'}\r\n{flower}".encode()) == [china, hopper, flower]
    assert names([flower, "-", flower], china.encode() + b"\n") == [flower, china, flower]
    assert names(["-"]) == []
    for kind in ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF"):
        data = encoded(pixels(2), kind)
        (one,) = find_images(["-"], io.BytesIO(data))
        assert (one.name, one.read()) == ("-", data)
    short = ["BMW.jpg", "II.jpg", "GIF89a/cat.jpg", "a"]
    assert names(["-"], "\n".join(short).encode()) == short


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("no/such.jpg", "No such file"),
        ("no/such/*.jpg", "no file is named so"),
        ("empty", "holds no images"),
        ("cut.tar", "the file has 1000"),
        ("text.tar", "is no tar"),
        ("labels.tar", "has no image"),
        ("nul\0.jpg", "cannot be read"),
    ],
)
def test_what_cannot_be_read_says_so_when_it_is(
    argument: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    whole = write_tar(tmp_path / "whole.tar", [("0.jpg", photo(0)), ("1.jpg", photo(1))]).read_bytes()
    Path("cut.tar").write_bytes(whole[:1000])
    Path("text.tar").write_bytes(b"hello\n" * 200)
    write_tar(tmp_path / "labels.tar", [("0.cls", b"1")])
    (one,) = find_images([argument], NO_INPUT)
    with pytest.raises(DataError, match=said):
        one.read()


def test_a_name_that_is_no_text(tmp_path: Path) -> None:
    path = os.fsencode(tmp_path) + b"/caf\xe9.jpg"
    with open(path, "wb") as stream:
        stream.write(photo(0))
    (one,) = find_images([str(tmp_path)], NO_INPUT)
    assert one.name.endswith(r"caf\xe9.jpg")
    one.name.encode()
    assert one.read() == photo(0)


def read(arguments: Sequence[str | Path], size: int, threads: int = 3, channels: int = 3) -> list[ImageBatch]:
    statistics = (0.5,) * channels
    processor = ViTImageProcessor(size=24, image_mean=statistics, image_std=statistics)
    return list(batches(find_images(list(map(str, arguments)), NO_INPUT), processor, channels, size, threads))


def test_batches_keep_the_order_and_skip_what_is_bad(tmp_path: Path) -> None:
    for number in range(11):
        (tmp_path / f"{number:02}.jpg").write_bytes(b"" if number in (0, 3, 4, 10) else photo(number))
    found = read([tmp_path], 3)
    assert [len(batch.names) for batch in found] == [3, 3, 1]
    entries = [entry for batch in found for entry in batch.entries]
    assert [entry.name for entry in entries] == in_folder(tmp_path, *(f"{number:02}.jpg" for number in range(11)))
    assert [bool(entry.bad) for entry in entries] == [number in (0, 3, 4, 10) for number in range(11)]
    alone = [read([name], 1, threads=1)[0] for batch in found for name in batch.names]
    together = torch.cat([batch.pixel_values for batch in found])
    assert torch.equal(together, torch.cat([batch.pixel_values for batch in alone]))
    assert [batch.pixel_values for batch in read([tmp_path / "00.jpg"], 3)] == [None]


def test_pixels_are_the_processors(photos: Path) -> None:
    """Decoded by libjpeg-turbo and turned, as Pillow would."""
    found = read([photos], 8)[0]
    processor = ViTImageProcessor(size=24)
    for name, values in zip(found.names, found.pixel_values, strict=True):
        assert torch.equal(values, processor(name, return_tensors="pt").pixel_values[0])
    with Image.open(photos / "below/deeper/hopper.jpg") as image:
        assert torch.equal(found.pixel_values[2], processor(image, return_tensors="pt").pixel_values[0])
    assert found.pixel_values[1].shape == (3, 24, 24)


def test_not_all_is_read_at_once(tmp_path: Path) -> None:
    """However long the list: what is looked at ahead is bounded by the batch."""
    path = tmp_path / "one.jpg"
    path.write_bytes(photo(0))
    taken = 0

    def endless() -> object:
        nonlocal taken
        while True:
            taken += 1
            yield from find_images([str(path)], NO_INPUT)

    made = batches(endless(), ViTImageProcessor(size=8), 3, size=4, threads=2)  # type: ignore[arg-type]
    assert len(next(made).names) == 4
    assert taken <= 12
    made.close()  # type: ignore[attr-defined]


@pytest.mark.parametrize("channels", [1, 4, 13])
def test_arrays_in_files(channels: int, tmp_path: Path) -> None:
    """Any number of channels as .npy, channels first or last."""
    last = pixels(0, 30, 40, channels)
    np.save(tmp_path / "last.npy", last)
    np.save(tmp_path / "first.npy", np.moveaxis(last, -1, 0).astype(np.float32))
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    np.save(tmp_path / "other.npy", np.zeros((8, 9, 5), np.uint8))
    found = read([tmp_path / f"{name}.npy" for name in ("last", "first", "objects", "other")], 4, channels=channels)
    assert [bool(entry.bad) for entry in found[0].entries] == [False, False, True, True]
    assert found[0].pixel_values.shape == (2, channels, 24, 24)
    assert torch.allclose(found[0].pixel_values[0], found[0].pixel_values[1], atol=1.01 / 127.5)


def test_folders_with_a_patterns_letters_before_a_pattern(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("set [2024] (a)", "a*b", "{x}", "tile?"):
        (photos / folder).mkdir()
        (photos / folder / "one.jpg").write_bytes(photo(0))
    for folder in ("set [2024] (a)", "a*b", "{x}", "tile?"):
        assert names([f"{photos}/{folder}/*.jpg"]) == in_folder(photos, f"{folder}/one.jpg")
        assert names([f"{photos}/{folder}/{{one,two}}.jpg"]) == in_folder(
            photos, f"{folder}/one.jpg", f"{folder}/two.jpg"
        )
    monkeypatch.setenv("HOME", str(photos))
    assert names(["~/china.jpg", "~/{x}/*.jpg"]) == in_folder(photos, "china.jpg", "{x}/one.jpg")


def test_a_url_is_no_file() -> None:
    (one,) = find_images(["https://example.org/cat.jpg"], NO_INPUT)
    with pytest.raises(DataError, match="URLs are not read; download it"):
        one.read()


@pytest.mark.parametrize(
    "error", [MemoryError("no room"), ZeroDivisionError("by\nzero"), OSError(5, "EIO"), KeyError("x")]
)
def test_one_file_whatever_it_raises_ends_nothing(error: Exception, photos: Path) -> None:
    """Of a library as of a bug of ours: the reason has its type, and the others go on."""

    class Failing(ViTImageProcessor):
        def __call__(self, images: object, *arguments: object, **options: object) -> BatchFeature:
            if np.asarray(images).shape[0] < 100:
                raise error
            return super().__call__(images, *arguments, **options)  # type: ignore[arg-type]

    Image.new("RGB", (20, 20)).save(photos / "small.png")
    read = list(batches(find_images([str(photos)], NO_INPUT), Failing(size=8), 3, 8, 2))
    bad = {entry.name: entry.bad for batch in read for entry in batch.entries if entry.bad}
    assert list(bad) == in_folder(photos, "small.png")
    assert type(error).__name__ in next(iter(bad.values()))
    assert "\n" not in next(iter(bad.values()))
    assert sum(len(batch.names) for batch in read) == 3


def test_the_limit_on_pixels_can_be_raised_and_lowered(tmp_path: Path) -> None:
    Image.new("L", (300, 200)).save(tmp_path / "a.png")
    Image.new("L", (20, 20)).save(tmp_path / "b.png")
    for most, good in ((60_000, 2), (59_999, 1), (100, 0)):
        read = list(batches(find_images([str(tmp_path)], NO_INPUT), ViTImageProcessor(size=8), 3, 8, 2, most))
        assert sum(len(batch.names) for batch in read) == good
        reasons = [entry.bad for batch in read for entry in batch.entries if entry.bad]
        assert all(f"more than {most} pixels" in reason and "--max-pixels" in reason for reason in reasons)


def test_what_would_be_waited_for_or_searched_by_mistake_is_bad(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    for named in (tmp_path, tmp_path / "p*.jpg"):
        (pipe,) = find_images([str(named)], NO_INPUT)
        with pytest.raises(DataError, match="is no regular file"):
            pipe.read()
    (unset,) = find_images([""], NO_INPUT)
    with pytest.raises(DataError, match="is a variable unset"):
        unset.read()
