"""The model folder as MLflow's python_function, and the server of `mlflow models serve` over it."""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pandas
import pytest

from tests.inference.conftest import LABELS, save
from tests.tracking.conftest import free_port
from vitscale.cli import main
from vitscale.errors import DataError
from vitscale.inference.pyfunc import _load_pyfunc
from vitscale.models.vit import ViTModel
from vitscale.tracking.models import describe


def test_labels_are_those_of_predict(classifier: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = sorted(photos.rglob("*.[jJ]*"))
    served = _load_pyfunc(str(classifier))
    answers = served.predict(pandas.DataFrame({"image": [path.read_bytes() for path in paths]}))
    main(["predict", str(classifier), *map(str, paths), "--format", "jsonl"])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == len(paths) == 3
    for row, answer in zip(rows, answers, strict=True):
        assert [each["label"] for each in answer] == [each["label"] for each in row["predictions"]]
        expected = [each["probability"] for each in row["predictions"]]
        assert [each["probability"] for each in answer] == pytest.approx(expected, abs=1e-5)
    as_text = pandas.DataFrame({"image": [base64.b64encode(path.read_bytes()).decode() for path in paths]})
    assert served.predict(as_text) == answers


def test_an_encoder_gives_features(tmp_path: Path, photos: Path) -> None:
    served = _load_pyfunc(str(save(tmp_path / "encoder", ViTModel)))
    (answer,) = served.predict(pandas.DataFrame({"image": [(photos / "china.jpg").read_bytes()]}))
    assert len(answer["features"]) == served._loaded.model.config.hidden_size


@pytest.mark.parametrize("image", [b"no image", "no base64!", base64.b64encode(b"text").decode()])
def test_what_is_no_image_is_named(classifier: Path, image: bytes | str) -> None:
    with pytest.raises(DataError, match="image 0: "):
        _load_pyfunc(str(classifier)).predict(pandas.DataFrame({"image": [image]}))


@pytest.mark.full
def test_mlflow_serves_it(classifier: Path, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "served").mkdir()
    describe(tmp_path / "served", list(classifier.iterdir()))
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "models", "serve", "--env-manager", "local", "-m", f"{tmp_path}/served"]
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}  # where uvicorn is
    with open(tmp_path / "log", "wb") as log:
        command += ["-h", "127.0.0.1", "-p", str(port)]
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
    try:
        answer = asked(port, {"image": base64.b64encode((photos / "china.jpg").read_bytes()).decode()}, process)
        assert {each["label"] for each in answer["predictions"][0]} == set(LABELS.values())
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(timeout=30)


def asked(port: int, row: dict[str, str], process: subprocess.Popen[bytes]) -> dict[str, list[list[dict[str, str]]]]:
    content = json.dumps({"dataframe_records": [row]}).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/invocations", content, {"Content-Type": "application/json"}
    )
    deadline = time.monotonic() + 120
    while True:
        try:
            return json.loads(urllib.request.urlopen(request, timeout=60).read())
        except urllib.error.URLError:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.2)
