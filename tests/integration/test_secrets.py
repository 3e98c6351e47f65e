"""Secrets of the environment, of URLs and of a server's answers are found nowhere in what a run leaves or says."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.files.web import Handler, Web, served
from tests.integration.worlds import Launcher, losses
from vitscale.errors import ConfigError
from vitscale.launch.torchrun import Layout, prepare
from vitscale.run_folder import BAD_INPUT

ENVIRONMENT = {
    "AWS_SECRET_ACCESS_KEY": "canary/wJalrXUtnFEMI0aws",
    "HF_TOKEN": "hf_canary1234567890abcdefghijkl",
    "MLFLOW_TRACKING_TOKEN": "canary-3-mlflow",
}
SIGNATURE, PASSWORD, WORD = "canary4fe5d2", "canary-5-password", "canaryhorse"
SECRETS = (*ENVIRONMENT.values(), SIGNATURE, PASSWORD, WORD)


@pytest.fixture
def web(shards: Path) -> Iterator[Web]:
    """Shards at /d, to which the server redirects from /s by URLs that are signed, as a hub does."""

    def redirect(handler: Handler, data: bytes, start: int, end: int) -> bool:
        target = f"/d/{handler.path.rpartition('/')[2]}?X-Amz-Expires=60&X-Amz-Signature={SIGNATURE}"
        handler.answer(302, {"Location": target})
        return True

    with served() as server:
        for path in [*shards.glob("*.tar"), shards / "index.json"]:
            server.files[f"/d/{path.name}"] = path.read_bytes()
            server.files[f"/s/{path.name}"] = b""
            server.faults[f"/s/{path.name}"] = [redirect] * 10_000
        yield server


def found_in(folder: Path, *texts: str) -> list[str]:
    """Where secrets stand: files below the folder, databases too, and texts."""
    files = {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    contents = files | {f"text {number}": text.encode() for number, text in enumerate(texts)}
    return [
        f"{secret} in {where}"
        for secret in SECRETS
        for where, content in contents.items()
        if secret.encode() in content
    ]


def test_none_is_left_or_said(launcher: Launcher, config: Path, tmp_path: Path, web: Web, shards: Path) -> None:
    names = sorted(path.name for path in shards.glob("*.tar"))
    signed = f"{web.url}/s/{names[0][:-5]}{{0..{len(names) - 1}}}.tar"
    argv = ["pretrain", str(config), "train.steps=2", "tracking.mlflow=true", f"data.train={signed}"]
    world = launcher.request(1, argv=argv, environment=ENVIRONMENT)
    assert world.wait() == [0], world.output()
    assert sorted(losses(tmp_path / "runs" / "run")) == [1, 2]

    def forbid(handler: Handler, data: bytes, start: int, end: int) -> bool:
        handler.answer(403, body=f"{SIGNATURE} {PASSWORD}".encode())
        return True

    for name in names:
        web.faults[f"/d/{name}"] = [forbid] * 1000
    failing = launcher.request(1, argv=[*argv, "run.name=failing"], environment=ENVIRONMENT)
    assert failing.wait() == [BAD_INPUT]
    assert "403" in failing.output()
    server = f"tracking.mlflow_uri=https://me:{PASSWORD}@127.0.0.1:9"
    refused = launcher.request(1, argv=[*argv, "run.name=refused", server], environment=ENVIRONMENT)
    assert refused.wait() == [BAD_INPUT]
    assert "MLFLOW_TRACKING_PASSWORD" in refused.output()
    assert not found_in(tmp_path, world.output(), failing.output(), refused.output())


@pytest.mark.parametrize("key", [
    "data.train", "data.validation", "evaluation.test", "data.index", "model.init_from", "checkpoint.resume_from",
    "run.dir", "tracking.experiment",
])  # fmt: skip
def test_a_password_in_any_url_is_refused_before_anything_is_kept(config: Path, tmp_path: Path, key: str) -> None:
    before = sorted(tmp_path.rglob("*"))
    for url in (f"https://me:{PASSWORD}@host/a.tar", f"https://host/a.tar?X-Amz-Signature={SIGNATURE}",
                f"https://host/a.tar?code={SIGNATURE}", f"https://host/a.tar#token={SIGNATURE}"):  # fmt: skip
        with pytest.raises(ConfigError) as caught:
            prepare(["pretrain", str(config), f"{key}={url}"], Layout(), "launch/torchrun.sh")
        assert str(caught.value).startswith(f"{key}=https://host/a.tar: has ")
        assert not found_in(tmp_path, str(caught.value))
    assert sorted(tmp_path.rglob("*")) == before


def test_the_snapshot_of_a_start_has_none(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the environment it keeps names that it knows; of files what is no secret."""
    for name, value in (ENVIRONMENT | {"DATA": f"https://me:{PASSWORD}@host/a.tar"}).items():
        monkeypatch.setitem(os.environ, name, value)
    with config.open("a") as stream:
        stream.write(f"# token={ENVIRONMENT['HF_TOKEN']} and {ENVIRONMENT['MLFLOW_TRACKING_TOKEN']}\n")
        stream.write(f"# password: {WORD}\n")
    script = tmp_path / "bin" / "script"
    script.parent.mkdir()
    script.write_text(
        f"#!/bin/bash\nexport AZURE_STORAGE_ACCOUNT_KEY={WORD} WANDB_KEY='{WORD}'\ncurl -u me:{WORD} https://host/done\n"
        f"tool --password {WORD} --n 4\nlaunch/slurm.sh pretrain $CONFIG model.num_register_tokens=4\n"
    )
    program = script.with_name("scontrol")
    program.write_text(f'#!/bin/sh\nif [ "$1" = write ]; then cat {script}; fi\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=":")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    prepare(["pretrain", str(config), "train.steps=2"], Layout(), "launch/torchrun.sh")
    (kept,) = (tmp_path / "runs" / "run" / "launch").iterdir()
    assert "DATA=https://***@host/a.tar" in (kept / "command.txt").read_text()
    assert "# token=*** and ***" in (kept / "config.yaml").read_text()
    assert "--n 4\nlaunch/slurm.sh pretrain $CONFIG model.num_register_tokens=4" in (kept / "slurm.sh").read_text()
    assert not found_in(kept)
