from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.data.makers import encoded, photo, pixels
from vitscale.files.folder import LeftOut, class_folders, images_in, walk


def put(folder: Path, *names: str, data: bytes | None = None) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(photo(0) if data is None else data)


def walked(folder: Path, left_out: LeftOut | None = None) -> list[str]:
    left_out = LeftOut() if left_out is None else left_out
    return [path.relative_to(folder).as_posix() for path in walk(folder, left_out)]


def test_content_tells_an_image_where_the_extension_does_not(tmp_path: Path) -> None:
    put(tmp_path, "a.jfif", "b.JPE", "c.jpg_large", "d", "e.original", "f.JPEG")
    for number, (kind, extension) in enumerate(
        [("PNG", "png"), ("WEBP", "webp"), ("TIFF", "tif"), ("BMP", "bmp"), ("GIF", "gif")]
    ):
        put(tmp_path, f"x{number}.{extension}_", data=encoded(pixels(0), kind))
    put(tmp_path, "empty.jpg", data=b"")
    put(tmp_path, "empty", "y.data", data=b"")
    put(tmp_path, "y.npy", "y.avif", "y.txt")
    left_out = LeftOut()
    assert walked(tmp_path, left_out) == [
        "a.jfif", "b.JPE", "c.jpg_large", "d", "e.original", "empty.jpg", "f.JPEG",
        "x0.png_", "x1.webp_", "x2.tif_", "x3.bmp_", "x4.gif_",
    ]  # fmt: skip
    assert left_out.files == {".avif": 1, ".npy": 1, ".txt": 1, ".data": 1, "without an extension": 1}
    assert "5 files that are no images (1 " in str(left_out)
    assert [path.name for path in images_in(tmp_path, LeftOut())] == walked(tmp_path)


def test_what_no_user_put_there_is_left_out(tmp_path: Path) -> None:
    junk = [".ipynb_checkpoints", ".thumbs", "@eaDir/1.jpg", "__MACOSX", "$RECYCLE.BIN", "#recycle", "lost+found"]
    put(tmp_path, "c/1.jpg", "d/2.jpg", "c/._1.jpg", *[f"{where}{name}/1.jpg" for name in junk for where in ("", "c/")])
    left_out = LeftOut()
    assert walked(tmp_path, left_out) == ["c/1.jpg", "d/2.jpg"]
    assert left_out.folders[".ipynb_checkpoints"] == left_out.folders["@eaDir"] == 2
    assert left_out.files == {"hidden": 1}
    assert "@eaDir (2)" in str(left_out)
    beside = LeftOut()
    assert [path.name for path in class_folders(tmp_path, beside)] == ["c", "d"]
    assert beside.folders.total() == len(junk)
    assert str(LeftOut()) == ""


def test_links_are_followed_but_in_no_circle(tmp_path: Path) -> None:
    put(tmp_path, "set/cats/1.jpg", "set/dogs/1.jpg", "set/2.jpg", "elsewhere/deep/3.jpg", "elsewhere/4.jpg")
    for link, target in {
        "set/cats/one.jpg": "elsewhere/4.jpg",
        "set/cats/more": "elsewhere/deep",
        "set/cats/again": "elsewhere/deep",
        "set/cats/up": "set",
        "set/cats/self": "set/cats",
        "elsewhere/deep/back": "elsewhere",
        "elsewhere/deep/home": "set/cats",
        "set/loop": "set/loop",
        "set/gone.jpg": "nowhere.jpg",
    }.items():
        (tmp_path / link).symlink_to(tmp_path / target)
    os.mkfifo(tmp_path / "set" / "pipe.jpg")
    left_out = LeftOut()
    assert walked(tmp_path / "set", left_out) == [
        "2.jpg", "cats/1.jpg", "cats/one.jpg", "cats/again/3.jpg", "dogs/1.jpg"
    ]  # fmt: skip
    reasons = {path.name: reason for path, reason in left_out.bad}
    assert reasons.keys() == {"loop", "gone.jpg", "pipe.jpg"}
    assert (reasons["gone.jpg"], reasons["pipe.jpg"]) == ("is a broken link", "is no regular file")
    assert left_out.folders == {"up that links back": 1, "self that links back": 1, "back that links back": 1}
    assert walked(tmp_path / "set" / "cats") == ["1.jpg", "one.jpg", "again/3.jpg"]
    (tmp_path / "set" / "dogs" / "all").symlink_to(tmp_path)
    assert walked(tmp_path / "set" / "dogs") == ["1.jpg"], "a folder above the walk is not walked into"


def test_many_folders_that_link_to_each_other_are_walked_once(tmp_path: Path) -> None:
    names = [f"{number:02}" for number in range(12)]  # by every path: 12! of them
    for name in names:
        put(tmp_path, f"{name}/{name}.jpg")
        for other in names:
            if other != name:
                (tmp_path / name / f"to{other}").symlink_to(tmp_path / other)
    assert len(walked(tmp_path)) == 12


def test_names_that_are_no_text(tmp_path: Path) -> None:
    folder = os.path.join(os.fsencode(tmp_path), b"caf\xe9")
    os.makedirs(folder)
    for name, data in ((b"\xe9.jpg", photo(0)), (b"\xe9", photo(0)), (b"x.\xe9", b"")):
        with open(os.path.join(folder, name), "wb") as stream:
            stream.write(data)
    left_out = LeftOut()
    assert len(walked(tmp_path, left_out)) == 2
    str(left_out).encode()
    assert r".\xe9" in str(left_out)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    put(tmp_path, "a.jpg", "shut/b.jpg", "shut.data")
    (tmp_path / "shut").chmod(0)
    (tmp_path / "shut.data").chmod(0)
    left_out = LeftOut()
    assert walked(tmp_path, left_out) == ["a.jpg"]
    assert {path.name for path, _ in left_out.bad} == {"shut", "shut.data"}
    (tmp_path / "shut").chmod(0o700)
