"""What `vitscale pack` makes shards of, beside a plain folder of classes (test_pack.py)."""

from __future__ import annotations

import io
import json
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest
from PIL import Image

from tests.data.makers import encoded, photo, pixels, write_tar
from tests.files.web import served
from tests.prepare.test_pack import contents
from vitscale.config.schema import Source
from vitscale.data.index import ShardIndex
from vitscale.data.labels import LabelReader
from vitscale.errors import DataError
from vitscale.files.classes import class_names
from vitscale.files.header import BadSample
from vitscale.prepare.image_folder import classes_of, pack_folder
from vitscale.prepare.pack import find, pack
from vitscale.prepare.sources import Columns

Samples = dict[str, dict[str, bytes]]


def packed(source: str | Path, out: Path, said: list[str] | None = None, **options: Any) -> Samples:
    said = [] if said is None else said
    return contents(pack(source, out, workers=1, report=said.append, **options)[""].paths)


def labels(samples: Samples) -> dict[str, str]:
    return {key: members["cls"].decode() for key, members in samples.items() if "cls" in members}


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Six photographs in two folders that are no classes."""
    for number in range(6):
        path = tmp_path / "photos" / f"part{number % 2}" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(photo(number))
    return tmp_path / "photos"


def write_list(path: Path, *lines: str, encoding: str = "utf-8") -> Path:
    path.write_text("\n".join(lines) + "\n", encoding=encoding)
    return path


# ---- folders


def test_the_splits_of_a_set_are_no_classes(tmp_path: Path) -> None:
    for path in ("train/cat/1.jpg", "train/dog/1.jpg", "val/cat/2.jpg", "val/dog/2.jpg"):
        (tmp_path / "root" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "root" / path).write_bytes(photo(0))
    root, out = tmp_path / "root", tmp_path / "out"
    with pytest.raises(DataError, match=rf"train, val are the splits.*`vitscale pack {root}/train OUT/train`.*classes"):
        pack(root, out)
    with pytest.raises(DataError, match="train, val are the splits"):
        pack_folder((Source(str(root)),), tmp_path / "run", classes_of((Source(str(root)),)))
    packed(root / "train", out / "train")
    samples = packed(root / "val", out / "val", classes=class_names([out / "train" / "shard-000000.tar"]))
    assert labels(samples) == {"cat/2": "0", "dog/2": "1"}
    assert labels(packed(root, tmp_path / "so", classes=["train", "val"])).keys() == {
        "train/cat/1", "train/dog/1", "val/cat/2", "val/dog/2"
    }  # fmt: skip
    (root / "train").rename(root / "TRAIN")
    (root / "val").rename(tmp_path / "val")
    with pytest.raises(DataError, match="TRAIN are the splits"):
        pack(root, tmp_path / "other")


def test_what_is_left_out_of_a_folder_is_said(photos: Path, tmp_path: Path) -> None:
    for name in ("part0/a.txt", "part0/b.txt", "part1/c.avif"):
        (photos / name).write_bytes(b"no image")
    (photos / "part0" / ".thumbs").mkdir()
    (photos / "part0" / ".thumbs" / "0.jpg").write_bytes(photo(0))
    (photos / "part1" / "gone.jpg").symlink_to("nowhere.jpg")
    (photos / "part1" / "5.jpg").rename(photos / "part1" / "5.jfif")
    said: list[str] = []
    samples = packed(photos, tmp_path / "out", said)
    assert samples["part1/5"]["jpg"] == photo(5)
    assert len(samples) == 6
    for word in ("2 .txt", "1 .avif", ".thumbs", "gone.jpg (is a broken link)"):
        assert word in said[0]
    (photos / "part2").mkdir()
    (photos / "part2" / "x.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(DataError, match=r"part2: is a class folder without images.*1 \.npy"):
        pack(photos, tmp_path / "again")


def test_shards_within_their_folder_and_names_that_are_no_text(tmp_path: Path) -> None:
    folder = os.path.join(os.fsencode(tmp_path), b"flat", b"caf\xe9")
    os.makedirs(folder)
    with open(os.path.join(folder, b"\xe9.jpg"), "wb") as stream:
        stream.write(photo(0))
    samples = packed(tmp_path / "flat", tmp_path / "out")
    assert list(samples) == [r"caf\xe9/\xe9"]
    assert json.loads((tmp_path / "out" / "classes.json").read_text()) == [r"caf\xe9"]
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "1.jpg").write_bytes(photo(1))
    packed(tmp_path / "one", tmp_path / "one" / "shards")
    assert list(packed(tmp_path / "one", tmp_path / "again")) == ["1"]


# ---- lists


def test_a_list_of_paths_and_names_of_classes(photos: Path, tmp_path: Path) -> None:
    lines = [f"part{number % 2}/{number}.jpg,{('dog', 'cat', 'ant')[number % 3]}" for number in range(5)]
    listing = write_list(
        photos / "train.csv", "File Name,Label", *lines, f"{photos}/part1/5.jpg,", encoding="utf-8-sig"
    )
    said: list[str] = []
    samples = packed(listing, tmp_path / "out", said)
    assert samples["part0/4"] == {"jpg": photo(4), "cls": b"1"}
    assert class_names([tmp_path / "out" / "shard-000000.tar"]) == ["ant", "cat", "dog"]
    assert sorted(labels(samples).values()) == ["0", "1", "1", "2", "2"]
    assert said[0] == "labels are those of Label; 1 of 6 images have none"
    moved = packed(listing, tmp_path / "other", classes=["dog", "emu", "cat", "ant"])
    assert labels(moved)["part0/4"] == "2"
    with pytest.raises(DataError, match="the label 'ant' is none of the classes dog, cat"):
        packed(listing, tmp_path / "x", classes=["dog", "cat"])


def test_numbers_stay_as_they_are_written(photos: Path, tmp_path: Path) -> None:
    ages = write_list(photos / "ages.tsv", "image\tage\tid", "part0/0.jpg\t3.5\t9", "part1/1.jpg\t-1\t9")
    samples = packed(ages, tmp_path / "out", columns=Columns(labels=("age",)))
    assert labels(samples) == {"part0/0": "3.5", "part1/1": "-1"}
    assert not (tmp_path / "out" / "classes.json").exists()
    finds = write_list(photos / "finds.csv", "path;Edema;Mass", "part0/0.jpg;1;0", "part1/1.jpg;;1", "part0/2.jpg;;")
    samples = packed(finds, tmp_path / "many", columns=Columns(labels=("Edema", "Mass")))
    assert labels(samples) == {"part0/0": "1 0", "part1/1": "0 1"}
    assert class_names([tmp_path / "many" / "shard-000000.tar"]) == ["Edema", "Mass"]
    said: list[str] = []
    assert not labels(packed(finds, tmp_path / "none", said))
    assert "--label-column names one" in said[0]


def test_names_of_paths_in_any_bytes(tmp_path: Path) -> None:
    for name in (b"\xe9.jpg", b"a, b.jpg", "猫.jpg".encode()):
        with open(os.path.join(os.fsencode(tmp_path), name), "wb") as stream:
            stream.write(photo(len(name)))
    (tmp_path / "list.csv").write_bytes(b'path,label\n\xe9.jpg,caf\xe9\n"a, b.jpg",x\n\n' + "猫.jpg,x\n".encode())
    samples = packed(tmp_path / "list.csv", tmp_path / "out")
    assert labels(samples) == {r"\xe9": "0", "a, b": "1", "猫": "1"}
    assert samples[r"\xe9"]["jpg"] == photo(5)


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["id,diagnosis", "1,2"], r"no column with the images' paths.*id, diagnosis.*--image-column"),
        (["path,file,label", "a,b,1"], r"images' paths may be in path, file; say where by --image-column"),
        (["path,label,class", "a,b,1"], r"labels may be in label, class; say where by --label-column"),
        (["path,label", "gone.jpg,1", "part0/0.jpg,2"], r"of its 2 images 1 are not there, the first as .*/gone\.jpg"),
        (["path,label", "part0,1"], r"1 are not there"),
        (["path,label", "part0/0.jpg"], r"row 2 has 1 columns"),
        ([], r"is empty"),
        (["path,label"], r"names no images"),
    ],
)
def test_a_list_that_is_not_as_it_should_be(lines: list[str], said: str, photos: Path, tmp_path: Path) -> None:
    (photos / "list.csv").write_text("".join(f"{line}\n" for line in lines))
    with pytest.raises(DataError, match=said):
        packed(photos / "list.csv", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_column_that_is_not_there(photos: Path, tmp_path: Path) -> None:
    listing = write_list(photos / "list.csv", "path,label", "part0/0.jpg,1")
    with pytest.raises(DataError, match=r"--label-column labl: .* did you mean label\?; its columns are path, label"):
        packed(listing, tmp_path / "out", columns=Columns(labels=("labl",)))
    with pytest.raises(DataError, match="is nothing that can be packed"):
        packed(photos / "part0" / "0.jpg", tmp_path / "out")


# ---- tables, as the `datasets` library writes them

FEATURES = {
    "image": {"_type": "Image"},
    "label": {"names": ["dog", "cat", "ant"], "_type": "ClassLabel"},
    "id": {"dtype": "int64", "_type": "Value"},
}


def table(numbers: range, names: bool = True, column: str = "image") -> arrow.Table:
    """Rows with photographs, in the order of their classes."""
    images = [{"bytes": photo(number), "path": f"n{number}.jpg" if names else None} for number in numbers]
    columns = {column: images, "label": [number * 3 // 40 for number in numbers], "id": list(numbers)}
    kinds = {column: arrow.struct([("bytes", arrow.binary()), ("path", arrow.string())])}
    arrays = {name: arrow.array(values, kinds.get(name)) for name, values in columns.items()}
    info = json.dumps({"info": {"features": {column if name == "image" else name: f for name, f in FEATURES.items()}}})
    return arrow.table(arrays).replace_schema_metadata({"huggingface": info})


def test_parquet_with_images(tmp_path: Path) -> None:
    for part in range(2):
        path = tmp_path / f"train-0000{part}-of-00002.parquet"
        parquet.write_table(table(range(part * 20, part * 20 + 20)), path, row_group_size=4)
    index = pack(f"{tmp_path}/train-*.parquet", tmp_path / "out", shard_samples=9, workers=2)[""]
    samples = contents(index.paths)
    assert index.samples.tolist() == [9, 9, 9, 9, 4]
    assert samples == {f"n{n}": {"jpg": photo(n), "cls": str(n * 3 // 40).encode()} for n in range(40)}
    assert class_names(index.paths) == ["dog", "cat", "ant"]
    first = list(contents(index.paths[:1]))
    assert len({key[:-1] for key in first}) > 1, "row groups mix"
    mapped = packed(f"{tmp_path}/train-*.parquet", tmp_path / "mapped", classes=["ant", "cat", "dog"])
    assert labels(mapped)["n0"] == "2"
    indexes = pack(f"{tmp_path}/*.parquet", tmp_path / "split", held_out=0.3, workers=1)
    assert sum(index.total for index in indexes.values()) == 40


def test_parquet_without_names_and_with_large_row_groups(tmp_path: Path) -> None:
    """As pandas writes it: bytes in a column, one row group. Rows in many readings of 64."""
    images = [photo(number, 8, 8) for number in range(150)]
    parquet.write_table(
        arrow.table({"picture": images, "target": [n % 2 for n in range(150)]}), tmp_path / "a.b.parquet"
    )
    indexes = pack(tmp_path / "a.b.parquet", tmp_path / "out", shard_samples=40, held_out=0.2, workers=1)
    samples = contents(tuple(path for index in indexes.values() for path in index.paths))
    assert samples == {f"a_b-{n:08d}": {"jpg": images[n], "cls": str(n % 2).encode()} for n in range(150)}


def test_parquet_as_a_list_of_paths(photos: Path, tmp_path: Path) -> None:
    rows = {"path": ["part0/0.jpg", "part1/1.jpg"], "label": [b"dog", None], "id": [1, 2]}
    parquet.write_table(arrow.table(rows), photos / "list.parquet")
    assert packed(photos / "list.parquet", tmp_path / "out") == {
        "part0/0": {"jpg": photo(0), "cls": b"0"}, "part1/1": {"jpg": photo(1)}
    }  # fmt: skip
    parquet.write_table(arrow.table({"a": [1], "b": [2]}), tmp_path / "x.parquet")
    with pytest.raises(DataError, match=r"no column with images.*columns are a, b"):
        packed(tmp_path / "x.parquet", tmp_path / "y")
    with pytest.raises(DataError, match=r"no column with images.*columns are path, label, id"):
        packed(photos / "list.parquet", tmp_path / "y", columns=Columns(image="id"))
    images = [photo(0), photo(1)]
    parquet.write_table(arrow.table({"jpg": images}), tmp_path / "alone.parquet", compression="none")
    assert [members for _, members in sorted(packed(tmp_path / "alone.parquet", tmp_path / "alone").items())] == [
        {"jpg": data} for data in images
    ]
    data = (tmp_path / "alone.parquet").read_bytes()
    (tmp_path / "alone.parquet").write_bytes(data[:4] + b"\xff" * 400 + data[404:])  # pages
    with pytest.raises(DataError, match=r"alone\.parquet: cannot be read"):
        packed(tmp_path / "alone.parquet", tmp_path / "damaged")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(DataError, match=r"bad\.parquet: cannot be read"):
        packed(tmp_path / "bad.parquet", tmp_path / "y")


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("form", ["bytes", "paths", "saved"])
def test_lists_of_numbers_are_labels(photos: Path, tmp_path: Path, form: str, fixed: bool) -> None:
    """fixed: in Arrow's type for lists of one length, of which pyarrow reads no row without a list."""
    vectors = [[0.25, -3.0], [1.0, 0.0], [0.5, None], [None, None] if fixed else None, [float("nan"), 1.0], [0.0, 1.0]]
    kind = arrow.list_(arrow.float64(), 2 if fixed else -1)
    names = [f"part{number % 2}/{number}.jpg" for number in range(6)]
    images = names if form == "paths" else [{"bytes": photo(number), "path": names[number]} for number in range(6)]
    rows, said = arrow.table({"image": images, "labels": arrow.array(vectors, kind)}), list[str]()
    if form == "saved":
        source = save_to_disk(photos / "set", rows, features={"image": {"_type": "Image"}})
    else:
        source = photos / "list.parquet"
        parquet.write_table(rows, source)
    found = labels(packed(source, tmp_path / "out", said))
    assert found == {
        "part0/0": "0.25 -3.0", "part1/1": "1.0 0.0", "part0/2": "0.5 nan", "part0/4": "nan 1.0", "part1/5": "0.0 1.0"
    }  # fmt: skip
    assert "labels are those of labels; 1 of 6 images have none" in said
    assert "warning: of 2 images labels lacks a number: a run takes them for bad samples" in said
    regression = LabelReader(required=True, num_labels=2, kind="regression")
    assert regression.read(found["part0/0"].encode()) == (0.25, -3.0)
    with pytest.raises(BadSample, match="must be finite"):
        regression.read(found["part0/4"].encode())
    several = LabelReader(required=True, num_labels=2, kind="multi_label_classification")
    assert several.read(found["part1/5"].encode()) == (0.0, 1.0)


def test_lists_of_several_lengths_are_told(tmp_path: Path) -> None:
    said: list[str] = []
    rows = {"image": [photo(0), photo(1), photo(2)], "label": [[3, 7], [1], []]}
    parquet.write_table(arrow.table(rows), tmp_path / "a.parquet")
    assert sorted(labels(packed(tmp_path / "a.parquet", tmp_path / "out", said)).values()) == ["1", "3 7"]
    assert any(line.startswith("warning: label has lists of 1, 2 numbers") for line in said)


def save_to_disk(folder: Path, *tables: arrow.Table, features: Any = FEATURES) -> Path:
    """The files of Dataset.save_to_disk (datasets 4.4)."""
    folder.mkdir(parents=True)
    files = [f"data-{number:05d}-of-{len(tables):05d}.arrow" for number in range(len(tables))]
    for name, part in zip(files, tables, strict=True):
        with arrow.OSFile(str(folder / name), "wb") as file, arrow.ipc.new_stream(file, part.schema) as stream:
            stream.write_table(part, max_chunksize=7)
    state = {"_data_files": [{"filename": name} for name in files], "_fingerprint": "0", "_format_type": None}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text(json.dumps({"features": features}))
    return folder


def test_a_data_set_on_disk(tmp_path: Path) -> None:
    folder = save_to_disk(tmp_path / "set", table(range(25)), table(range(25, 40), names=False))
    index = pack(folder, tmp_path / "out", shard_samples=16, workers=2)[""]
    samples = contents(index.paths)
    keys = [f"n{n}" if n < 25 else f"data-00001-of-00002-{n - 25:08d}" for n in range(40)]
    assert samples == {key: {"jpg": photo(n), "cls": str(n * 3 // 40).encode()} for n, key in enumerate(keys)}
    assert class_names(index.paths) == ["dog", "cat", "ant"]
    (tmp_path / "set" / "state.json").write_text("{}")
    with pytest.raises(DataError, match="is no data set of save_to_disk"):
        packed(folder, tmp_path / "x")


def test_splits_and_columns_of_a_data_set(tmp_path: Path) -> None:
    features = {"img": FEATURES["image"], "fine_label": FEATURES["label"], "coarse_label": FEATURES["label"]}
    part = table(range(8), column="img").rename_columns(["img", "fine_label", "coarse_label"])
    save_to_disk(tmp_path / "both" / "train", part, features=features)
    (tmp_path / "both" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(DataError, match=r"train, test are the splits.*both/train OUT/train"):
        packed(tmp_path / "both", tmp_path / "x")
    with pytest.raises(DataError, match="labels may be in fine_label, coarse_label; say where by --label-column"):
        packed(tmp_path / "both" / "train", tmp_path / "x")
    samples = packed(tmp_path / "both" / "train", tmp_path / "out", columns=Columns(labels=("fine_label",)))
    assert set(labels(samples).values()) == {"0"}
    with pytest.raises(DataError, match="the label 3 is none of its 3 classes"):
        packed(tmp_path / "both" / "train", tmp_path / "x", columns=Columns(labels=("coarse_label",)))


def test_lists_of_classes_and_labels_that_are_not_there(tmp_path: Path) -> None:
    features = {**FEATURES, "label": {"feature": FEATURES["label"], "_type": "List"}}
    part = table(range(3)).drop_columns("label").append_column("label", arrow.array([[0, 2], [], [1]]))
    samples = packed(save_to_disk(tmp_path / "many", part, features=features), tmp_path / "out")
    assert labels(samples) == {"n0": "1 0 1", "n1": "0 0 0", "n2": "0 1 0"}
    part = table(range(3)).drop_columns("label").append_column("label", arrow.array([-1, 2, None]))
    said: list[str] = []
    assert labels(packed(save_to_disk(tmp_path / "test", part), tmp_path / "test-out", said)) == {"n1": "2"}
    assert said[0].endswith("2 of 3 images have none")
    images = [{"bytes": None, "path": "n0.jpg"}, {"bytes": None, "path": None}]
    (tmp_path / "paths").mkdir()
    kind = arrow.struct([("bytes", arrow.binary()), ("path", arrow.string())])
    folder = save_to_disk(tmp_path / "paths" / "set", arrow.table({"image": arrow.array(images, kind)}), features={})
    (folder / "n0.jpg").write_bytes(photo(0))
    with pytest.raises(DataError, match=r"row 1 has no image in image"):
        packed(folder, tmp_path / "paths-out")


# ---- shards


def test_shards_packed_again(tmp_path: Path) -> None:
    for shard in range(2):
        members = [("README.md", b"hello")]
        for number in range(6):
            members += [(f"{number:03d}.jpg", photo(10 * shard + number)), (f"{number:03d}.cls", b"1"),
                        (f"{number:03d}.seg.png", encoded(pixels(number), "PNG"))]  # fmt: skip
        write_tar(tmp_path / f"old{shard}.tar", members)
    (tmp_path / "classes.json").write_text('["ant", "bee"]')
    said: list[str] = []
    samples = packed(f"{tmp_path}/old{{0..1}}.tar", tmp_path / "out", said, shard_samples=5)
    index = ShardIndex.load(tmp_path / "out" / "index.json")
    assert index.samples.tolist() == [5, 5, 2]
    assert class_names(index.paths) == ["ant", "bee"]
    assert "2 members that belong to no sample" in said[0]
    assert samples["003"] == {"jpg": photo(3), "cls": b"1", "seg.png": encoded(pixels(3), "PNG")}
    assert samples["003~2"]["jpg"] == photo(13), "the second shard's key of the same name"
    assert len(samples) == 12
    with pytest.raises(DataError, match=r"nosuch\.tar"):
        packed(tmp_path / "nosuch.tar", tmp_path / "x")


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.full)])
def test_shards_of_a_server_packed_again(workers: int, tmp_path: Path) -> None:
    members = [[(f"{shard}{number}.jpg", photo(number)) for number in range(4)] for shard in range(2)]
    with served() as web:
        for shard in range(2):
            web.files[f"/old{shard}.tar"] = write_tar(tmp_path / f"{shard}.tar", members[shard]).read_bytes()
        index = pack(f"{web.url}/old{{0..1}}.tar", tmp_path / "out", shard_samples=3, workers=workers)[""]
    assert index.samples.tolist() == [3, 3, 2]
    assert contents(index.paths) == {name[:2]: {"jpg": data} for name, data in (*members[0], *members[1])}


def test_shards_are_looked_at_side_by_side(tmp_path: Path) -> None:
    """The server answers a read of headers only once another shard is read too."""
    pair = threading.Barrier(2, timeout=20)

    def wait(*_: Any) -> bool:
        pair.wait()
        return False

    with served() as web:
        for shard in range(8):
            path = write_tar(tmp_path / f"{shard}.tar", [(f"{shard}.jpg", photo(shard))])
            web.files[f"/{shard}.tar"] = path.read_bytes()
            web.faults[f"/{shard}.tar"] = [lambda *_: False, wait]  # for its size, then for its headers
        found = find(f"{web.url}/{{0..7}}.tar")
    assert not pair.broken
    assert [sample.key for sample in found.samples] == list("01234567")


# ---- smaller


def size_of(data: bytes) -> tuple[int, int]:
    return Image.open(io.BytesIO(data)).size


def test_larger_images_are_made_smaller_and_the_others_left(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    gradient = np.linspace(0, 255, 200 * 300 * 3).reshape(200, 300, 3).astype(np.uint8)
    files = {
        "small.jpg": photo(0, 24, 32),
        "exact.png": encoded(pixels(0, 50, 70), "PNG"),
        "large.jpeg": encoded(gradient),
        "turned.jpg": encoded(gradient, orientation=6),
        "grey.png": encoded(gradient[..., :1], "PNG"),
        "alpha.png": encoded(pixels(1, 200, 100, 4), "PNG"),
        "deep.png": encoded(Image.fromarray(np.full((80, 90), 40000, np.uint16)), "PNG"),
        "palette.gif": encoded(Image.fromarray(gradient).convert("P"), "GIF"),
        "film.webp": encoded(gradient, "WEBP"),
        "cmyk.jpg": encoded(Image.fromarray(gradient).convert("CMYK")),
        "print.tif": encoded(Image.fromarray(gradient).convert("CMYK"), "TIFF", icc_profile=b"of inks"),
        "broken.jpg": encoded(gradient)[:2000],
        "thin.png": encoded(pixels(2, 51, 5100), "PNG"),
    }
    for name, data in files.items():
        (folder / name).write_bytes(data)
    samples = packed(folder, tmp_path / "out", short_side=50)
    assert samples["small"]["jpg"] == files["small.jpg"]
    assert samples["exact"]["png"] == files["exact.png"]
    assert samples["broken"]["jpg"] == files["broken.jpg"]
    made = {key: (kind, size_of(data)) for key, members in samples.items() if key != "broken"
            for kind, data in members.items()}  # fmt: skip
    assert made == {
        "small": ("jpg", (32, 24)), "exact": ("png", (70, 50)), "large": ("jpeg", (75, 50)),
        "turned": ("jpg", (50, 75)), "grey": ("png", (75, 50)), "alpha": ("png", (50, 100)),
        "deep": ("png", (56, 50)), "palette": ("png", (75, 50)), "film": ("webp", (75, 50)),
        "cmyk": ("jpg", (75, 50)), "thin": ("png", (5000, 50)), "print": ("png", (75, 50)),
    }  # fmt: skip
    assert np.asarray(Image.open(io.BytesIO(samples["deep"]["png"]))).max() == 40000
    assert Image.open(io.BytesIO(samples["alpha"]["png"])).mode == "RGBA"
    large = np.asarray(Image.open(io.BytesIO(samples["large"]["jpeg"])), dtype=float)
    wanted = np.asarray(Image.fromarray(gradient).resize((75, 50), Image.Resampling.BICUBIC), dtype=float)
    assert abs(large - wanted).mean() < 3
    turned = np.asarray(Image.open(io.BytesIO(samples["turned"]["jpg"])), dtype=float)
    assert abs(turned - np.rot90(wanted, -1)).mean() < 3, "as it is to be seen"


def test_the_first_picture_of_two_in_one_jpeg_is_made_smaller(tmp_path: Path) -> None:
    """Which Pillow calls MPO: telephones put a depth map or a second view behind a photograph."""
    first, second = (Image.fromarray(pixels(number, 200, 300)) for number in range(2))
    both = encoded(first, "MPO", save_all=True, append_images=[second], quality=95)
    assert Image.open(io.BytesIO(both)).format == "MPO"
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(both)
    (members,) = packed(tmp_path / "photos", tmp_path / "out", short_side=50).values()
    small = Image.open(io.BytesIO(members["jpg"]))
    assert (small.format, small.size) == ("JPEG", (75, 50))
    wanted = np.asarray(first.resize((75, 50), Image.Resampling.BICUBIC), dtype=float)
    assert abs(np.asarray(small, dtype=float) - wanted).mean() < 3


def test_an_image_that_is_named_twice_stays_on_one_side(photos: Path, tmp_path: Path) -> None:
    names = sorted(str(path.relative_to(photos)) for path in photos.rglob("*.jpg"))
    listed = write_list(photos / "twice.csv", "path,label", *(f"{name},{label}" for label in (0, 1) for name in names))
    said: list[str] = []
    indexes = pack(listed, tmp_path / "out", held_out=0.5, workers=1, report=said.append)
    assert f"{len(names)} images are named more than once ({names[0]})" in "\n".join(said)
    train, test = ({key.partition("~")[0] for key in contents(each.paths)} for each in indexes.values())
    assert len(train) + len(test) == len(names)
    assert not train & test


def test_words_and_numbers_as_labels_are_told(photos: Path, tmp_path: Path) -> None:
    said: list[str] = []
    packed(write_list(photos / "mixed.csv", "path,label", "part0/0.jpg,apple", "part1/1.jpg,3"), tmp_path / "out", said)
    assert "warning: its labels are words and numbers (3): each is taken for a class's name" in said
