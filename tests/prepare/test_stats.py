"""`vitscale stats` against NumPy over the decoded images."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests.data.makers import encoded, photo, pixels, write_tar
from vitscale.cli import main
from vitscale.config.schema import Data, Source
from vitscale.prepare.samples import chosen, open_samples
from vitscale.prepare.stats import count, summary


@pytest.fixture
def mixed(tmp_path: Path) -> tuple[str, list[bytes]]:
    """Two shards: a pattern, and the images of theirs that can be read."""
    files = {f"{n:03d}.jpg": photo(n, 20 + n, 30 + 2 * n) for n in range(40)}
    files["turned.jpg"] = encoded(pixels(50, 24, 80), quality=90, orientation=6)
    files["palette.png"] = encoded(Image.fromarray(pixels(51)).quantize(16), "PNG")
    files["grey.png"] = encoded(pixels(52, channels=1), "PNG")
    good = list(files.values())
    files |= {"cut.jpg": photo(53)[:400], "text.png": b"no image", "bomb.jpg": photo(54, 400, 400)}
    members = [(name, data) for name, data in files.items()]
    members += [(name.replace(".jpg", ".cls"), str(n % 3).encode()) for n, name in enumerate(files) if ".jpg" in name]
    members += [("grey.cls", b"a word"), ("lonely.cls", b"1")]
    for shard in range(2):
        write_tar(tmp_path / f"s{shard}.tar", [member for member in members if (member[0] < "02") == (shard == 0)])
    return f"{tmp_path}/s*.tar", good


def told_of(pattern: str, images: int | None = None, threads: int = 2) -> dict:
    data = Data(train=(Source(pattern),), max_pixels=100_000)
    samples = open_samples(data, Path("/nowhere"))
    return summary(count(samples, data, images, 0, threads), samples)


def test_moments_are_those_of_all_pixels(mixed: tuple[str, list[bytes]]) -> None:
    pattern, good = mixed
    told = told_of(pattern)
    flat = np.concatenate([np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).reshape(-1, 3) for data in good])
    assert told["pixels"] == len(flat)
    np.testing.assert_allclose(told["mean"], (flat / 255).mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(told["std"], (flat / 255).std(axis=0), rtol=1e-12)


def test_what_is_counted(mixed: tuple[str, list[bytes]]) -> None:
    pattern, good = mixed
    told = told_of(pattern)
    assert told["samples"] == told["looked_at"] == 47
    assert told["images"] == len(good) == 43
    assert told["bytes"] == sum(map(len, good))
    assert told["broken"] == {"no_image": 1, "too_large": 1, "undecodable": 2}
    assert {each["name"].partition("/")[2] for each in told["examples"]} == {"cut", "text", "bomb", "lonely"}
    assert told["formats"] == {"JPEG": 41, "PNG": 2}
    assert told["channels"] == {"3": 42, "1": 1}
    assert told["height"]["100"] == 80, "as it is to be seen: EXIF turns it"
    sizes = sorted(Image.open(io.BytesIO(data)).height for data in good[:40])
    assert sizes[0] == told["height"]["0"]
    assert (told["odd_labels"], told["unlabelled"]) == (1, 2)
    assert sum(told["classes"].values()) == 44
    assert told["classes"].keys() == {"0", "1", "2"}


def test_percentiles_are_values_that_so_many_do_not_exceed(tmp_path: Path) -> None:
    heights = [10] * 50 + [20] * 49 + [300]
    write_tar(tmp_path / "s.tar", [(f"{n:03d}.png", encoded(np.zeros((height, 4, 3), np.uint8), "PNG"))
                                   for n, height in enumerate(heights)])  # fmt: skip
    height = told_of(str(tmp_path / "s.tar"))["height"]
    assert [height[name] for name in ("0", "50", "75", "99", "100")] == [10, 10, 20, 20, 300]


def test_threads_change_nothing(mixed: tuple[str, list[bytes]]) -> None:
    pattern, _ = mixed
    assert json.dumps(told_of(pattern, threads=1)) == json.dumps(told_of(pattern, threads=5))
    some = told_of(pattern, 20, threads=3)
    assert some == told_of(pattern, 20, threads=1)
    assert some["looked_at"] == 20


@given(st.integers(1, 500), st.integers(1, 600), st.integers(0, 2**31))
def test_a_sample_is_spread_over_all_and_names_none_twice(total: int, count: int, seed: int) -> None:
    numbers = chosen(total, count, seed)
    assert len(set(numbers)) == len(numbers) == min(total, count)
    assert 0 <= numbers[0] <= numbers[-1] < total
    assert (np.diff(numbers) > 0).all()
    assert (np.diff(numbers) <= 2 * -(-total // len(numbers))).all()


def test_the_seed_chooses() -> None:
    assert chosen(10_000, 50, 1) != chosen(10_000, 50, 2)


def test_the_verb_prints_lines_for_a_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("ant", "bee"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for n in range(3):
            path = tmp_path / "images" / name / f"{n}.png"
            path.write_bytes(encoded(np.full((4, 5, 1), 51 * n, np.uint8), "PNG"))
    out = tmp_path / "stats.json"
    assert main(["stats", str(tmp_path / "images"), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "3 of 0 ant, 3 of 1 bee" in printed
    assert printed.endswith("model:\n  num_channels: 1\naugment:\n  mean: [0.2000]\n  std: [0.1633]\n")
    told = json.loads(out.read_text())
    assert (told["samples"], told["mean"]) == (6, [0.2])
    assert main(["stats", str(tmp_path / "images"), "--out", str(out / "below.json")]) == 2
    assert "--out" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert main(["stats", str(tmp_path / "empty")]) == 2
    assert "holds neither shards" in capsys.readouterr().err


def test_several_patterns_are_one_set(
    mixed: tuple[str, list[bytes]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pattern, _ = mixed
    said = []
    for data in ([pattern], [f"{tmp_path}/s0.tar", f"{tmp_path}/s{{1..1}}.tar"]):
        assert main(["stats", *data, "data.max_pixels=100000", "run.seed=3"]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]
    assert said[0].startswith("47 samples in 2 shards")
    assert "1 too_large" in said[0]
    assert main(["stats", "data.max_pixels=100000"]) == 2
    assert "is a key, and no data are named" in capsys.readouterr().err


def test_a_set_without_an_image(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tar(tmp_path / "s.tar", [("a.jpg", b"none"), ("b.cls", b"1")])
    assert main(["stats", str(tmp_path / "s.tar")]) == 0
    printed = capsys.readouterr().out
    assert "broken: 1 no_image, 1 undecodable" in printed
    assert "for a config" not in printed


def test_labels_of_several_numbers_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    members = [(f"{n}.jpg", photo(n)) for n in range(5)] + [(f"{n}.cls", f"{n % 2} 1".encode()) for n in range(5)]
    members += [("5.jpg", b"nothing")]
    write_tar(tmp_path / "a.tar", members)
    (tmp_path / "classes.json").write_text('["Edema", "Mass"]')
    main(["stats", str(tmp_path / "a.tar")])
    said = capsys.readouterr().out
    assert "labels: 5 of 2 numbers each (above 0: 2 of Edema, 5 of Mass)" in said
    assert (
        "broken: 1 undecodable, more than data.max_bad_fraction=0.001: a run would end at the fourth that it reads"
        in said
    )
