from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest

from tests.data import zoo_tars
from tests.data.makers import encoded, pixels, write_tar
from vitscale.errors import DataError
from vitscale.files.tar import scan_shard

PNG, JPEG = encoded(pixels(0), "PNG"), encoded(pixels(0), "JPEG")
MEMBERS = [(f"{i:04d}.{kind}", bytes([65 + i]) * size) for i in range(6) for kind, size in (("jpg", 700), ("cls", 1))]


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    return write_tar(tmp_path / "a.tar", MEMBERS)


def read_back(path: Path) -> dict[str, bytes]:
    """All members' bytes by the offset table."""
    table, data = scan_shard(str(path)), path.read_bytes()
    found = {}
    for i, key in enumerate(table.keys):
        for kind, (offset, size) in table.members(i).items():
            found[f"{key}.{kind}"] = data[offset : offset + size]
    return found


def test_table_finds_every_member(shard: Path) -> None:
    assert read_back(shard) == dict(MEMBERS)
    assert scan_shard(str(shard)).keys == [f"{i:04d}" for i in range(6)]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_tar_format_and_long_names(tmp_path: Path, form: int) -> None:
    folder = "/".join(["some folder"] * 9)
    members = [(f"{folder}/image {i:03d}.jpg", bytes([i])) for i in range(3)]
    if form != tarfile.USTAR_FORMAT:
        members += [("n" * 300 + ".jpg", b"x"), ("naïve/bild-ü.jpg", b"y")]
    assert read_back(write_tar(tmp_path / "a.tar", members, form)) == dict(members)


def test_names_group_as_in_webdataset(tmp_path: Path) -> None:
    names = ["a/b.c/d.jpg", "a/b.c/d.seg.PNG", "./e.cls", ".hidden.jpg", "README", "__meta__.json", "__x__/f.jpg",
             "e.jpg", "g.tar.gz"]  # fmt: skip
    path = write_tar(tmp_path / "a.tar", [(name, name.encode()) for name in names])
    import webdataset

    theirs = {}
    for sample in webdataset.WebDataset(str(path), shardshuffle=False, nodesplitter=None):
        theirs |= {f"{sample['__key__']}.{kind}": data for kind, data in sample.items() if not kind.startswith("__")}
    left_out = ("__meta__.json", "g.tar.gz")  # samples of no image and no label
    assert read_back(path) == {name: data for name, data in theirs.items() if name not in left_out}
    assert list(theirs) == ["a/b.c/d.jpg", "a/b.c/d.seg.png", "./e.cls", "__meta__.json", "e.jpg", "g.tar.gz"]


def header_start(data: bytes, name: str) -> int:
    return data.index(name.encode() + b"\0")


def refused(path: Path, *words: str) -> None:
    with pytest.raises(DataError) as caught:
        scan_shard(str(path))
    for word in (str(path), *words):
        assert word in str(caught.value)


def test_cut_anywhere_is_refused(shard: Path) -> None:
    """tarfile's stream mode takes most of these for the end of the archive."""
    data = shard.read_bytes()
    member = header_start(data, "0003.jpg")
    end = data.rindex(b"F") // 512 * 512 + 512  # after the last member
    for length in (0, 1, 100, 512, 700, member, member + 1, member + 300, member + 512, member + 900, end, end + 512):
        shard.write_bytes(data[:length])
        refused(shard)


def test_whole_but_for_the_padding_is_taken(shard: Path) -> None:
    """tar pads to 10 KiB; two blocks of zeros are the end marker."""
    data = shard.read_bytes()
    end = data.rindex(b"F") // 512 * 512 + 512
    shard.write_bytes(data[: end + 1024])
    assert len(scan_shard(str(shard))) == 6


def test_a_flipped_bit_in_a_header_is_refused(shard: Path) -> None:
    data = bytearray(shard.read_bytes())
    start = header_start(data, "0003.cls")
    for byte in range(512):
        if 148 <= byte < 156:  # the checksum itself: a space for a leading zero or for the NUL means the same
            continue
        data[start + byte] ^= 1 << byte % 8
        shard.write_bytes(data)
        refused(shard, "byte")
        data[start + byte] ^= 1 << byte % 8


def test_a_wrong_checksum_is_refused(shard: Path) -> None:
    data = bytearray(shard.read_bytes())
    data[header_start(data, "0003.cls") + 151] ^= 1
    shard.write_bytes(data)
    refused(shard, "byte")


def test_zeros_instead_of_a_header_are_refused(shard: Path) -> None:
    data = bytearray(shard.read_bytes())
    at = header_start(data, "0003.jpg")
    data[at : at + 512] = bytes(512)
    shard.write_bytes(data)
    refused(shard, "after the block of zeros")


def test_two_archives_in_one_file_are_refused(shard: Path) -> None:
    shard.write_bytes(shard.read_bytes() * 2)
    refused(shard, "two archives")


def test_empty_archives_are_refused(tmp_path: Path) -> None:
    refused(write_tar(tmp_path / "a.tar", []), "holds no sample")
    refused(write_tar(tmp_path / "b.tar", [("README", b"x"), (".hidden.jpg", b"y")]), "holds no sample")


def test_what_is_no_tar_is_told(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(b"<html>not found</html>" * 60)
    refused(path, "is no tar")
    with tarfile.open(path, "w:gz") as tar:
        info = tarfile.TarInfo("a.jpg")
        info.size = 2000
        tar.addfile(info, io.BytesIO(bytes(range(250)) * 8))
    path.write_bytes(path.read_bytes() + bytes(512))
    refused(path, "gzip")


def with_header(path: Path, **fields: bytes) -> Path:
    """The shard with bytes of its third member's header set, and a right checksum."""
    places = {"size": (124, 12), "kind": (156, 1), "name": (0, 100)}
    data = bytearray(path.read_bytes())
    at = header_start(data, "0001.jpg")
    for name, value in fields.items():
        start, length = places[name]
        data[at + start : at + start + length] = value.ljust(length, b"\0")
    data[at + 148 : at + 156] = b" " * 8
    data[at + 148 : at + 156] = f"{sum(data[at : at + 512]):06o}\0 ".encode()
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    "size",
    [b"\xff" * 12, b"-0000000010", b"77777777777", b"\x80" + b"\x7f" * 11, b"0_1", b"0000000128", b"", b"0x10"],
)
def test_impossible_sizes_are_refused(shard: Path, size: bytes) -> None:
    refused(with_header(shard, size=size))


@pytest.mark.parametrize("kind", [b"1", b"2", b"3", b"S"])
def test_links_devices_and_sparse_files_are_refused(shard: Path, kind: bytes) -> None:
    refused(with_header(shard, kind=kind), "0001.jpg", "dereference")


def test_folders_are_passed_over(tmp_path: Path) -> None:
    for i in range(3):
        (tmp_path / "images").mkdir(exist_ok=True)
        (tmp_path / "images" / f"{i}.jpg").write_bytes(bytes(i))
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(tmp_path / "images", "images")
    assert sorted(scan_shard(str(tmp_path / "a.tar")).keys) == ["images/0", "images/1", "images/2"]


def test_a_name_with_nul_is_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("a.jpg")
        info.pax_headers = {"path": "a\0.jpg"}
        tar.addfile(info, io.BytesIO())
    refused(tmp_path / "a.tar", "NUL")


def test_members_of_a_sample_may_lie_anywhere(tmp_path: Path) -> None:
    """As GNU tar packs a folder, or images first and labels behind them."""
    members = [("b.jpg", b"B"), ("a.jpg", b"A"), ("c.cls", b"2"), ("a.cls", b"0"), ("b.cls", b"1"), ("c.jpg", b"C")]
    path = write_tar(tmp_path / "a.tar", members)
    assert read_back(path) == dict(members)
    table = scan_shard(str(path), label="cls")
    assert (table.keys, table.labels) == (["b", "a", "c"], {0: b"1", 1: b"0", 2: b"2"})
    data = path.read_bytes()
    assert [data[at : at + count] for at, count in map(table.image_of, range(3))] == [b"B", b"A", b"C"]  # type: ignore[misc]


def test_a_number_between_dots_is_of_the_key(tmp_path: Path) -> None:
    names = ["scan.0001.jpg", "scan.0002.jpg", "scan.0002.cls", "a.1.5.jpg", "v1.0/x.jpg", "1.5x_3.jpg", "b.7"]
    table = scan_shard(str(write_tar(tmp_path / "a.tar", [(name, JPEG) for name in names])))
    assert table.keys == ["scan.0001", "scan.0002", "a.1.5", "v1.0/x", "1", "b"]


@pytest.mark.parametrize("between", [[], [("b.jpg", b"")]])
def test_a_name_that_comes_twice_is_refused_with_both_places(tmp_path: Path, between: list[tuple[str, bytes]]) -> None:
    path = write_tar(tmp_path / "b.tar", [("a.jpg", b""), *between, ("a.JPG", b"")])
    refused(path, "'a.jpg' comes twice", f"its bytes from 512 and from {1024 + 512 * len(between)} on")


def test_what_belongs_to_no_sample_is_passed_over_and_counted(tmp_path: Path) -> None:
    junk = [
        "._1.jpg",
        ".DS_Store",
        "d/.gitkeep",
        "d/._2.jpg",
        "README",
        "README.md",
        "__MACOSX/d/._1.jpg",
        "notes.json",
    ]
    members = [("d/1.jpg", JPEG), ("d/1.cls", b"3"), *((name, b"junk") for name in junk), ("d/2.cls", b"4")]
    table = scan_shard(str(write_tar(tmp_path / "a.tar", members)), label="cls")
    assert table.keys == ["d/1", "d/2"], "what has a label should have had an image"
    assert (table.passed_over, table.example) == (len(junk), "._1.jpg")
    assert table.labels == {0: b"3", 1: b"4"}
    assert table.image_of(1) is None


def test_further_images_of_a_sample_are_passed_over_and_counted(tmp_path: Path) -> None:
    members = [("1.cls", b"3"), ("1.jpg", JPEG), ("1.mask.png", JPEG), ("2.webp", JPEG), ("2.cls", b"4"), ("x.md", b"")]
    path = str(write_tar(tmp_path / "a.tar", [*members, ("1.jpeg", JPEG), ("2.txt", b"a cat")]))
    table = scan_shard(path, label="cls")
    assert (table.keys, table.further, table.further_example) == (["1", "2"], 2, "1.mask.png")
    assert table.image_of(0) == table.members(0)["jpg"]
    chosen = scan_shard(path, label="cls", image="mask.png")
    assert (chosen.further, chosen.image_of(0)) == (0, table.members(0)["mask.png"])
    assert scan_shard(path, label="mask.png").further == 1, "the label is no further image"


def test_content_tells_what_is_an_image(tmp_path: Path) -> None:
    members = [
        ("1.jfif", JPEG), ("2.jpg_large", JPEG), ("3.input.png", PNG), ("3.txt", b"x"), ("4.img", b"none"),
        ("4.cls", b"1"), ("5.mask.png", PNG), ("5.jpg", b"a bad one"), ("6.jpe", JPEG),
    ]  # fmt: skip
    path = write_tar(tmp_path / "a.tar", members)
    table, data = scan_shard(str(path)), path.read_bytes()
    images = [place and data[place[0] : sum(place)] for place in map(table.image_of, range(len(table)))]
    assert images == [JPEG, JPEG, PNG, None, b"a bad one", JPEG]
    named = scan_shard(str(path), image="mask.png")
    assert [key for i, key in enumerate(named.keys) if named.image_of(i)] == ["5"]
    unlabelled = write_tar(tmp_path / "b.tar", [("1.jpg", JPEG), ("1.mask.png", PNG)])
    with pytest.raises(DataError, match=r"no member has the extension data\.image='msk' \(it has jpg, mask\.png\)"):
        scan_shard(str(unlabelled), image="msk")


def test_pax_size_counts(tmp_path: Path) -> None:
    """A member of 8 GiB or more has its size in a pax header; here a small one has."""
    info = tarfile.TarInfo("a.jpg")
    info.size = 5
    info.pax_headers = {"size": "5"}
    head = info.create_pax_header(info.get_info() | {"size": 0}, "utf-8")
    (tmp_path / "a.tar").write_bytes(head + b"hello".ljust(512, b"\0") + bytes(1024))
    assert read_back(tmp_path / "a.tar") == {"a.jpg": b"hello"}


@pytest.mark.parametrize("size", [b"9" * 5000, b"-1", b"1e3", "\u0663".encode(), b""])
def test_impossible_pax_sizes_are_refused(tmp_path: Path, size: bytes) -> None:
    """Python makes no number of more than 4300 digits, and says so by a ValueError."""
    tar = zoo_tars.extended(b"x", zoo_tars.pax(size=size)) + zoo_tars.header(b"a.jpg", 5) + b"hello".ljust(512, b"\0")
    (tmp_path / "a.tar").write_bytes(tar + bytes(1024))
    refused(tmp_path / "a.tar", "no valid size")
