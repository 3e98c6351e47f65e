"""What is said to people, on any terminal."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest

from vitscale import text as text_module
from vitscale.config.load import dump_config, load_config
from vitscale.text import (
    aligned,
    did_you_mean,
    duration,
    hide,
    listed,
    printable,
    redact,
    secrets_of,
    tolerate_any_text,
)


def test_listed_names_a_few() -> None:
    assert listed(["a", "b"]) == "a, b"
    assert listed(range(12)) == "0, 1, 2, 3, 4, 5 and 6 more"
    assert listed([], 3) == ""


def test_hints_end_a_message_or_are_empty() -> None:
    assert did_you_mean("train.step", ["train.steps", "data.train"]) == "; did you mean train.steps?"
    assert did_you_mean("qwxz", ["train.steps"]) == ""


def test_columns_are_as_wide_as_their_widest_cell() -> None:
    assert aligned([["name", "n"], ["a", "100"]], right=[1]) == "name    n\na     100"


@pytest.mark.parametrize(
    ("seconds", "text"), [(None, "?"), (42, "42s"), (425, "7m05s"), (12000, "3h20m"), (187200, "2d04h")]
)
def test_durations(seconds: float | None, text: str) -> None:
    assert duration(seconds) == text


def test_what_would_move_the_cursor_is_escaped() -> None:
    assert printable("caf\u00e9 \u732b") == "caf\u00e9 \u732b"
    assert printable("a\n\x1b[2J\udce9") == "a\\n\\x1b[2J\\udce9"


def test_output_takes_what_its_encoding_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    tolerate_any_text()
    print("\u732b", flush=True)
    assert written.getvalue() == b"\\u732b\n"


@pytest.mark.parametrize(
    ("text", "safe"),
    [
        ("https://me:pa55@host:5000/x", "https://***@host:5000/x"),
        ("at https://me:p@ss@host/x and postgresql://u:p@db/y!", "at https://***@host/x and postgresql://***@db/y!"),
        ("http://host/a@b", "http://host/a@b"),
        ("sqlite:////tmp/a@b.db", "sqlite:////tmp/a@b.db"),
        ("GET /a.tar?X-Amz-Signature=12ab34cd&part=2 failed", "GET /a.tar?X-Amz-Signature=***&part=2 failed"),
        ("/a?sv=2020&sig=a%2Bb%3D", "/a?sv=2020&sig=***"),
        ("export HF_TOKEN='abc def'x", "export HF_TOKEN=***x"),
        ("AWS_SECRET_ACCESS_KEY=wJalrXUt python", "AWS_SECRET_ACCESS_KEY=*** python"),
        ("Authorization: Bearer abc.def-123", "Authorization: ***"),
        ('api_key: "0123456789"', "api_key: ***"),
        ("key AKIAIOSFODNN7EXAMPLE and hf_abcdefghijklmnopqrstuvwx", "key *** and ***"),
        ("model.num_register_tokens=100: must be", "model.num_register_tokens=100: must be"),
        ("use_cls_token: true\nnum_register_tokens: 4", "use_cls_token: true\nnum_register_tokens: 4"),
        ("sample_keys=train-000/12345678", "sample_keys=train-000/12345678"),
        ("postgresql://me:pa/ss@db/x", "postgresql://***@db/x"),
        ("export AZURE_STORAGE_ACCOUNT_KEY=/abc+def==", "export AZURE_STORAGE_ACCOUNT_KEY=***"),
        ("WANDB_KEY=abcdef GITHUB_PAT=ghijkl", "WANDB_KEY=*** GITHUB_PAT=***"),
        ("GPG_PASSPHRASE=correcthorse DB_PWD=horse", "GPG_PASSPHRASE=*** DB_PWD=***"),
        ('AZURE_STORAGE_CONNECTION_STRING="AccountName=a;AccountKey=b c"', "AZURE_STORAGE_CONNECTION_STRING=***"),
        ("AccountName=abcd;AccountKey=efgh==;x", "AccountName=abcd;AccountKey=***;x"),
        ("password: correcthorse", "password: ***"),
        ("  # token: canaryabcdefgh", "  # token: ***"),
        ("db_password: correct horse battery  # mine", "db_password: ***"),
        ("{'token': 'canaryabc', 'n': 1}", "{'token': ***, 'n': 1}"),
        ('{"apiKey":"abcdef"}', '{"apiKey":***}'),
        ("{token: canaryabc, n: 1}", "{token: ***, n: 1}"),
        ("tool --password hunter --api-key 'a b' --n 4", "tool --password *** --api-key *** --n 4"),
        ("curl -sf -u me:horse https://h/x", "curl -sf -u *** https://h/x"),
        ("curl \\\n  --user 'me:horse' https://h/x", "curl \\\n  --user '***' https://h/x"),
        ("sshpass -p horse ssh me@host", "sshpass -p *** ssh me@host"),
        ("machine h login me password horse", "machine h login me password ***"),
        ("GET /v1?key=abcdefgh&alt=json", "GET /v1?key=***&alt=json"),
        ("with sk-proj-abcdefghijk123456 or glpat-abcdefghijklmnopqrst", "with *** or ***"),
        ("eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.abc-def_1, then", "***, then"),
        (f"at AIza{'b' * 35}.", "at ***."),
        ("-----BEGIN RSA PRIVATE KEY-----\nMIIE\n-----END RSA PRIVATE KEY-----\nrest", "***\nrest"),
        ("-----BEGIN PRIVATE KEY-----\nMIIE\nthat is cut", "***"),
    ],
)
def test_redact(text: str, safe: str) -> None:
    assert redact(text) == safe


@pytest.mark.parametrize(
    "text",
    [
        "num_tokens: 196",
        "num_tokens: 100000000",
        "model.num_register_tokens=12345678",
        "use_cls_token: true",
        "cls_token: learned-8bit-embedding",
        "{'mask_token': 'learned', 'patch_tokens': [1, 2]}",
        "linear probe on the mean of patch tokens: pooling=mean",
        "tokens: mean",
        "tokenizer: bert-base-uncased-1",
        "data.cache_key=imagenet-2012-train",
        "cache_key: imagenet-2012-train",
        "key: value-12345678",
        "sort_key: train-00000001",
        "sample_keys: [train-000/12345678]",
        "CACHE_KEY=imagenet-2012",
        "PWD=/home/me/runs and OLDPWD=/home/me",
        "HF_TOKEN_PATH=/home/me/.cache/token",
        "token_file: /home/me/token-12345678",
        "drop_path_rate: 0.123456789",
        "docker run -u 1000:1000 image",
        "rsync -u /data/a host:/data/b",
        "http://host:5000/a@b",
        "s3://bucket/train-{000000..000099}.tar",
        "disk-0123456789abcdefgh and task-0123456789abcdefgh",
        "model.pooling=cls: must be mean or token",
        "vitscale: error: model.use_mask_token=1: must be true or false",
        "/data/keys/secret/train-000000.tar: no such file",
        "Bearer of news",
        "train.global_batch=4096: must be a multiple of train.micro_batch",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert redact(text) == text


def test_every_config_is_shown_as_it_is() -> None:
    """Those that come with the package, in their files and resolved."""
    for path in sorted(Path(__file__).parents[1].glob("configs/*.yaml")):
        for text in (path.read_text(), dump_config(load_config(path))):
            assert redact(text) == text


def test_secrets_of_an_environment() -> None:
    secret = {
        "AZURE_STORAGE_ACCOUNT_KEY": "canary-a",
        "AZURE_STORAGE_KEY": "canary-b",
        "AZURE_STORAGE_CONNECTION_STRING": "AccountKey=canary-c",
        "GITHUB_PAT": "canary-d",
        "DEPLOY_KEY": "canary-e",
        "GPG_PASSPHRASE": "canary-f",
        "DB_PWD": "canary-g",
        "HF_TOKEN": "canary-h",
    }
    other = {
        "PWD": "/home/me/run",
        "OLDPWD": "/home/me",
        "HF_TOKEN_PATH": "/home/me/token",
        "TOKENIZERS_PARALLELISM": "false",
        "CACHE_KEY": "imagenet-2012",
        "SLURM_JOB_ID": "12345678",
    }
    urls = {"DATABASE_URL": "postgresql://me:canary-i@db/x", "HTTP_PROXY": "http://proxy:3128"}
    assert set(secrets_of(secret | other | urls)) == {*secret.values(), "canary-i"}


def test_what_was_named_a_secret_is_hidden_wherever_it_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_module, "_hidden", set())
    hide(["correct-horse", "short"])
    assert redact("user correct-horse, short") == "user ***, short"
