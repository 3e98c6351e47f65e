"""URLs of several kinds as one store; object stores by a real S3 server on loopback."""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.files.web import Web, served
from vitscale.errors import ConfigError
from vitscale.files import stores
from vitscale.files.stores import Pieces, Stores, require_no_secret

boto3, moto_server = pytest.importorskip("boto3"), pytest.importorskip("moto.server")
pytest.importorskip("obstore")
DATA = np.random.default_rng(0).bytes(50_000)
KEYS = ("d/train-000.tar", "d/train-001.tar", "d/deep/train-002.tar", "d/index.json", "train-003.tar")


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """The URL of a server with the bucket `images`."""
    environment = {"AWS_ACCESS_KEY_ID": "me", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_REGION": "us-east-1"}
    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (environment | {"AWS_ENDPOINT_URL": url, "AWS_ALLOW_HTTP": "true"}).items():
            patch.setenv(name, value)
        client = boto3.client("s3", endpoint_url=url, region_name="us-east-1")
        client.create_bucket(Bucket="images")
        for number, key in enumerate(KEYS):
            client.put_object(Bucket="images", Key=key, Body=DATA[number:])
        yield url
    server.stop()


@pytest.fixture
def web() -> Iterator[Web]:
    with served() as server:
        server.files["/a.tar"] = DATA
        yield server


@pytest.mark.parametrize("cached", [False, True])
def test_objects_are_read_by_ranges(s3: str, tmp_path: Path, cached: bool) -> None:
    store = pickle.loads(pickle.dumps(Stores(str(tmp_path / "cache") if cached else None)))
    path = "s3://images/d/train-001.tar"
    stat = store.stat(path)
    assert stat.bytes == len(DATA) - 1
    assert stat.modified > 0
    for start, count in ((0, 10), (1234, 20_000), (len(DATA) - 4, 10), (0, 10**6), (3, 0)):
        assert store.read(path, start, count) == DATA[1:][start : start + count]
    with pytest.raises(FileNotFoundError):
        store.stat("s3://images/none.tar")
    with pytest.raises(OSError, match="only read"):
        store.write(path, b"")


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("d/*.tar", ["d/train-000.tar", "d/train-001.tar"]),
        ("d/train-00[!0].tar", ["d/train-001.tar"]),
        ("*.tar", ["train-003.tar"]),
        ("d/*/*.tar", ["d/deep/train-002.tar"]),
        ("**/*.tar", ["d/deep/train-002.tar", "d/train-000.tar", "d/train-001.tar", "train-003.tar"]),
        ("d/train-0?1.tar", ["d/train-001.tar"]),
        ("e/*.tar", []),
    ],
)
def test_buckets_are_listed_as_folders_are(s3: str, pattern: str, found: list[str]) -> None:
    assert Stores().list(f"s3://images/{pattern}") == [f"s3://images/{key}" for key in found]


def test_an_object_that_changed_while_it_was_read(s3: str) -> None:
    client = boto3.client("s3", endpoint_url=s3, region_name="us-east-1")
    client.put_object(Bucket="images", Key="changes", Body=b"before")
    store = Stores()
    store.stat("s3://images/changes")
    client.put_object(Bucket="images", Key="changes", Body=b"behind")
    with pytest.raises(OSError, match="written again while it was in use"):
        store.read("s3://images/changes", 0, 6)


def test_a_bucket_that_is_not_there_is_an_error_at_once(s3: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(FileNotFoundError, match=r"no such bucket or object \(NoSuchBucket\)"):
        Stores().list("s3://imagse/*.tar")
    assert "attempt" not in capfd.readouterr().err


def test_wrong_keys_are_no_transient_fault(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"{s3}/nothing-here")
    with pytest.raises(OSError, match=r"."):
        Stores(patience_s=0.1).stat("s3://other-bucket/none.tar")


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:99999/x", "http://host:abc/x", "http:///x", "http://a b/x", "http://[::1/x", "s3:///x"]
)
def test_what_is_no_url_is_a_line_at_once(url: str) -> None:
    with pytest.raises(ConfigError, match=r"data\.train=\w+:\.\.\.: is no URL"):
        require_no_secret(url, "data.train")
    require_no_secret("s3://bucket/my set/*.tar", "data.train")


def test_local_paths_and_urls_side_by_side(web: Web, tmp_path: Path) -> None:
    (tmp_path / "b.tar").write_bytes(b"here")
    store = Stores()
    assert store.read(str(tmp_path / "b.tar"), 1, 2) == b"er"
    assert store.read(f"{web.url}/a.tar", 1, 2) == DATA[1:3]
    assert store.stat(str(tmp_path / "b.tar")).bytes == 4


def test_small_reads_become_large_requests(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "_PIECE", 8_192)
    store = Stores()
    whole = b"".join(store.read(f"{web.url}/a.tar", at, 700) for at in range(0, 50_000, 700))
    assert whole == DATA
    assert len(web.requests) == -(-50_000 // 8_192)
    assert store.read(f"{web.url}/a.tar", 49_000, 5_000) == DATA[49_000:]
    assert isinstance(pickle.loads(pickle.dumps(store))._of("http://x/y"), Pieces)


@pytest.mark.parametrize(
    "url",
    [
        "https://me:pw@host/a.tar",
        "https://host/a.tar?X-Amz-Signature=12",
        "https://h/a.tar?sv=1&sig=2",
        "s3://key:pw@b/a",
    ],
)
def test_passwords_in_urls_are_refused_and_not_shown(url: str) -> None:
    with pytest.raises(ConfigError, match=r"has .* in it, which config.yaml would keep") as error:
        require_no_secret(url, "data.train")
    assert not any(secret in str(error.value) for secret in ("pw", "=12", "=2"))


@pytest.mark.parametrize(
    ("name", "is_secret"),
    [(name, True) for name in ("sig", "X-Amz-Signature", "AWSAccessKeyId", "Key-Pair-Id", "access_token", "apikey")]
    + [(name, True) for name in ("X-Goog-Credential", "x.auth", "clientSecret", "PASSWORD", "token2")]
    + [(name, False) for name in ("design", "version", "author", "monkey", "keyframe", "tokenizer", "signal", "se")],
)
def test_a_secret_is_known_by_whole_words_of_its_name(name: str, is_secret: bool) -> None:
    with pytest.raises(ConfigError, match=name) if is_secret else contextlib.nullcontext():
        require_no_secret(f"https://host/a.tar?v=1&{name}=3", "data.train")
