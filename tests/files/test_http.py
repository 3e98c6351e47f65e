"""Files by HTTP, from a real server that keeps its promises or not."""

from __future__ import annotations

import os
import pickle
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from tests.files import web as faults
from tests.files.web import Web, served
from vitscale.files import network, retry
from vitscale.files.http import HttpFiles
from vitscale.files.retry import UnavailableError, retries

DATA = np.random.default_rng(0).bytes(300_000)


@pytest.fixture
def web() -> Iterator[Web]:
    with served() as server:
        server.files["/d/a.tar"] = DATA
        yield server


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """The waits of minutes as hundredths of a second."""
    monkeypatch.setattr(retry, "_FIRST_WAIT_S", 0.005)
    monkeypatch.setattr(retry, "_LONGEST_WAIT_S", 0.02)
    monkeypatch.setattr(network, "SILENT_S", 0.3)
    monkeypatch.setattr(retry, "_SLOW_S", 0.3)
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)


def test_any_range(web: Web) -> None:
    store, url = HttpFiles(), f"{web.url}/d/a.tar"
    assert store.stat(url).bytes == len(DATA)
    assert store.stat(url).modified == 1792567680 * 10**9
    for start, count in ((0, 10), (1000, 100_000), (len(DATA) - 5, 50), (len(DATA), 5), (0, len(DATA) * 2), (7, 0)):
        assert store.read(url, start, count) == DATA[start : start + count]
    again = pickle.loads(pickle.dumps(store))
    assert again.read(url, 5, 5) == DATA[5:10]


def test_connections_are_used_again_by_many_threads(web: Web) -> None:
    store, url = HttpFiles(), f"{web.url}/d/a.tar"
    with ThreadPoolExecutor(8) as pool:
        parts = list(pool.map(lambda at: store.read(url, at, 1000), range(0, len(DATA), 1000)))
    assert b"".join(parts) == DATA


@pytest.mark.parametrize(
    "sequence",
    [
        [faults.status(503)] * 5,
        [faults.status(500), faults.status(429, Retry_After="0"), faults.status(502), faults.status(408)],
        [faults.status(code) for code in (507, 520, 522, 524, 529, 599)],
        [faults.cut_after(0), faults.cut_after(1), faults.cut_after(70_000), faults.cut_after(12_345)],
        [faults.stall_after(1000, 2)],
        [faults.drip(2)],
        [faults.hang_up, faults.hang_up],
        [faults.whole_without_ranges] * 3,
        [faults.with_headers(Content_Range="bytes 5-9/100")],
        [faults.with_headers(Content_Range="bytes 1000-200999/*")],
        [faults.status(429, Retry_After="Wed, 21 Oct 2015 07:28:00 GMT")],
    ],
    ids=[
        "503",
        "busy",
        "other 5xx",
        "cut",
        "stalled",
        "slow",
        "closed",
        "no ranges",
        "other range",
        "no size",
        "a past date",
    ],
)
def test_what_passes_is_got_over(web: Web, sequence: list[faults.Misbehave]) -> None:
    store, url = HttpFiles(patience_s=5), f"{web.url}/d/a.tar"
    store.stat(url)
    before = int(retries)
    web.faults["/d/a.tar"] = list(sequence)
    assert store.read(url, 1000, 200_000) == DATA[1000:201_000]
    assert (int(retries) > before) == (sequence[0] is not faults.whole_without_ranges)
    assert web.faults["/d/a.tar"] == [] or sequence[0] is faults.whole_without_ranges


def test_a_cut_transfer_goes_on_where_it_was_cut(web: Web) -> None:
    store, url = HttpFiles(), f"{web.url}/d/a.tar"
    store.stat(url)
    web.faults["/d/a.tar"] = [faults.cut_after(150_000)]
    assert store.read(url, 0, 200_000) == DATA[:200_000]
    assert [each for _, each in web.requests[1:]] == ["bytes=0-199999", "bytes=150000-199999"]


def test_a_server_that_asks_for_more_than_there_is_patience_for(web: Web) -> None:
    web.faults["/d/a.tar"] = [faults.status(429, Retry_After="100000")] * 20
    with pytest.raises(UnavailableError, match="HTTP 429; 1 attempts in 0 s"):
        HttpFiles(patience_s=5).read(f"{web.url}/d/a.tar", 0, 10)


def test_retry_after_is_waited_for(web: Web) -> None:
    store, url = HttpFiles(), f"{web.url}/d/a.tar"
    web.faults["/d/a.tar"] = [faults.status(503, Retry_After="1")]
    began = time.monotonic()
    store.stat(url)
    assert time.monotonic() - began >= 1


def test_patience_ends(web: Web) -> None:
    store, url = HttpFiles(patience_s=0.05), f"{web.url}/d/a.tar"
    web.faults["/d/a.tar"] = [faults.status(503)] * 100
    with pytest.raises(UnavailableError, match=r"HTTP 503; \d+ attempts in \d+ s") as error:
        store.read(url, 0, 10)
    assert error.value.filename == url
    assert len(web.requests) >= 8


@pytest.mark.parametrize(
    ("fault", "kind", "said"),
    [
        (faults.status(404), FileNotFoundError, "HTTP 404"),
        (faults.status(403), PermissionError, "may not be read"),
        (faults.status(400), OSError, "HTTP 400"),
        (faults.status(501), OSError, "HTTP 501"),
        (faults.status(505), OSError, "HTTP 505"),
        (faults.chunked_without_length, OSError, "tells no length"),
        (faults.with_headers(Content_Encoding="gzip"), OSError, "Content-Encoding gzip"),
        (faults.with_headers(ETag='"two"'), OSError, "written again while it was in use"),
        (faults.redirected_to("https://127.0.0.1/x"), OSError, "another scheme"),
        (faults.redirected_to("file:///etc/passwd"), OSError, "another scheme"),
        (faults.redirected_to("http://169.254.169.254/latest"), OSError, "no data is read from"),
        (faults.redirected_to("http://[fe80::1]/x"), OSError, "no data is read from"),
        (faults.redirected_to("http://localhost/x"), OSError, "no data is read from"),
        (faults.redirected_to("http://[::ffff:127.0.0.1]/x"), OSError, "no data is read from"),
        (faults.redirected_to("http://[::ffff:169.254.169.254]/x"), OSError, "no data is read from"),
        (faults.redirected_to("http://[64:ff9b::a9fe:a9fe]/x"), OSError, "no data is read from"),
        (faults.redirected_to("http://[fd00:ec2::254]/x"), OSError, "no data is read from"),
        (faults.redirected_to("http://0x7f000001/x"), OSError, "no data is read from"),
        (faults.redirected_to("http://[bad"), OSError, "redirected to what is no URL"),
        (faults.redirected_to("http://h:99999/"), OSError, "redirected to what is no URL"),
        (faults.redirected_to("/d/a.tar"), None, ""),
    ],
)
def test_what_does_not_pass_is_an_error_at_once(
    web: Web, fault: faults.Misbehave, kind: type[OSError] | None, said: str
) -> None:
    store, url = HttpFiles(), f"{web.url}/d/a.tar"
    store.stat(url)
    web.faults["/d/a.tar"] = [fault]
    if kind is None:
        assert store.read(url, 0, 10) == DATA[:10]
        return
    with pytest.raises(kind, match=said) as error:
        store.read(url, 0, 10)
    assert error.value.filename == url
    assert not isinstance(error.value, UnavailableError)


def test_redirects_end(web: Web) -> None:
    web.faults["/d/a.tar"] = [faults.redirected_to("/d/a.tar")] * 50
    with pytest.raises(OSError, match="redirected more than 5 times"):
        HttpFiles().read(f"{web.url}/d/a.tar", 0, 10)
    assert len(web.requests) == 6


@pytest.mark.parametrize("host", ["169.254.169.254", "0xa9fea9fe", "[::ffff:169.254.169.254]", "[fd00:ec2::254]"])
def test_a_link_local_address_is_never_read(host: str) -> None:
    with pytest.raises(OSError, match="no data is read from"):
        HttpFiles().read(f"http://{host}/latest/meta-data", 0, 10)


def test_an_empty_file(web: Web) -> None:
    web.files["/empty"] = b""
    assert HttpFiles().stat(f"{web.url}/empty").bytes == 0
    assert HttpFiles().read(f"{web.url}/empty", 0, 10) == b""


def test_passwords_come_from_netrc_and_go_to_their_host_alone(
    web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str | None] = []

    def look(handler: faults.Handler, data: bytes, start: int, end: int) -> bool:
        seen.append(handler.headers.get("Authorization"))
        return False

    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login me password secret\ndefault login a password b\n")
    (tmp_path / ".netrc").chmod(0o600)
    monkeypatch.setenv("HOME", str(tmp_path))
    web.faults["/d/a.tar"] = [look, look]
    HttpFiles().stat(f"{web.url}/d/a.tar")
    HttpFiles().stat(f"{web.url.replace('127.0.0.1', 'localhost')}/d/a.tar")
    assert seen == ["Basic bWU6c2VjcmV0", None]


def test_nothing_is_listed_or_written(web: Web) -> None:
    with pytest.raises(OSError, match="brace range"):
        HttpFiles().list(f"{web.url}/*.tar")
    with pytest.raises(OSError, match="only read"):
        HttpFiles().write(f"{web.url}/a", b"")
