"""The recipes on top of docs/data.md print what they say, but for the training itself."""

from __future__ import annotations

import glob
import re
import shlex
from pathlib import Path

import pytest
from sklearn.datasets import load_digits

from tests.data.makers import encoded
from tests.files.test_stores import boto3, s3
from tests.test_docs import ROOT, blocks
from vitscale.cli import main
from vitscale.prepare.pack import pack

__all__ = ["s3"]  # the fixture
HERE = re.compile(r"^cat > (\S+) <<'END'\n(.*?)^END\n", re.MULTILINE | re.DOTALL)
TEXT = (ROOT / "docs" / "data.md").read_text(encoding="utf-8").partition("\n## What can be packed\n")[0]
OF_A_FOLDER, OF_A_BUCKET = TEXT.split("\n## ")[1:]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the commands are typed: with my_images, scikit-learn's digits, and the recipes of a clone's root."""
    digits = load_digits()
    for number, (image, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        path = tmp_path / "my_images" / str(label) / f"{number:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded((image * 255 / 16).astype("uint8"), "PNG"))
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def require_as_told(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Type the blocks of a recipe, each of which is followed by what it prints: `...` stands for lines left out."""
    each = iter(blocks(text))
    for block, told in zip(each, each, strict=True):
        assert (block.language, told.language) == ("bash", "text")
        if not block.runs:
            continue
        for path, content in HERE.findall(block.code):
            Path(path).write_text(content)
        for line in HERE.sub("", block.code).splitlines():
            program, *words = shlex.split(line)
            assert program == "vitscale"
            assert main([path for word in words for path in sorted(glob.glob(word)) or [word]]) == 0, line
        said = capsys.readouterr().out
        printed = iter(said.splitlines())
        missing = [line for line in told.code.splitlines() if line != "..." and line not in printed]
        assert not missing, f"{block.code}\nprinted\n{said}"


@pytest.fixture
def bucket(folder: Path, s3: str) -> None:
    """my-bucket, with the digits in six shards."""
    client = boto3.client("s3", endpoint_url=s3, region_name="us-east-1")
    client.create_bucket(Bucket="my-bucket")
    index = pack(folder / "my_images", folder / "packed", shard_samples=300, workers=1)[""]
    for number, path in enumerate(index.paths):
        client.upload_file(path, "my-bucket", f"set/train-{number:06d}.tar")


def test_from_a_folder_of_images_to_a_job(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    require_as_told(OF_A_FOLDER, capsys)
    assert all((folder / name).read_bytes().startswith(b"\x89PNG") for name in ("samples.png", "step.png"))


@pytest.mark.usefixtures("bucket")
def test_from_a_bucket_to_a_job(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    require_as_told(OF_A_BUCKET, capsys)
    assert (folder / "samples.png").read_bytes().startswith(b"\x89PNG")
