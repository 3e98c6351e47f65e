"""Names that stand for no address, or for others than before; proxies."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.files import web as faults
from tests.files.test_http import DATA, fast
from tests.files.web import Handler, Web, served
from vitscale.errors import ConfigError
from vitscale.files.http import HttpFiles
from vitscale.files.retry import UnavailableError

__all__ = ["fast"]  # the fixture
ELSEWHERE = "203.0.113.7"
BASIC = "Basic bWU6cEBzcw=="  # me:p@ss


@pytest.fixture
def web() -> Iterator[Web]:
    with served() as server:
        server.files["/d/a.tar"] = DATA
        yield server


def answers(monkeypatch: pytest.MonkeyPatch, host: str, sequence: list[int | str]) -> list[int | str]:
    """What look-ups of a name give, in turn: an error, or an address; the last one for ever."""
    exact = socket.getaddrinfo

    def look_up(name: Any, *arguments: Any, **named: Any) -> Any:
        if name != host or named.get("flags"):
            return exact(name, *arguments, **named)
        answer = sequence.pop(0) if len(sequence) > 1 else sequence[0]
        if isinstance(answer, int):
            raise socket.gaierror(answer, "what the resolver says")
        return exact(answer, *arguments, **named)

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    return sequence


def test_a_name_server_that_is_busy_is_waited_for(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    answers(monkeypatch, "data.example", [socket.EAI_AGAIN] * 6 + [socket.EAI_FAIL, socket.EAI_NONAME, "127.0.0.1"])
    url = f"http://data.example:{web.server_port}/d/a.tar"
    assert HttpFiles(patience_s=60).read(url, 5, 100) == DATA[5:105]
    answers(monkeypatch, "data.example", [socket.EAI_AGAIN])
    with pytest.raises(UnavailableError, match=r"data\.example: what the resolver says; \d+ attempts"):
        HttpFiles(patience_s=0.1).stat(url)


@pytest.mark.parametrize("code", [socket.EAI_NONAME, socket.EAI_NODATA])
def test_a_name_that_nobody_knows_is_an_error_after_a_few_attempts(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    left = answers(monkeypatch, "data.example", [code] * 50)
    began = time.monotonic()
    with pytest.raises(FileNotFoundError, match=r"no host of that name is known here: data\.example"):
        HttpFiles(patience_s=60).stat("http://data.example/a.tar")
    assert len(left) == 46
    assert time.monotonic() - began < 5


def test_a_name_that_was_known_may_come_back(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    here, gone = "127.0.0.1", socket.EAI_NONAME
    left = answers(monkeypatch, "data.example", [here, here, *[gone] * 6, here])
    store, url = HttpFiles(patience_s=60), f"http://data.example:{web.server_port}/d/a.tar"
    store.stat(url)
    web.faults["/d/a.tar"] = [faults.hang_up]
    assert store.read(url, 5, 100) == DATA[5:105]
    assert left == [here]


def test_a_host_that_redirects_to_one_that_is_gone_for_a_while(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both are of one data set; where the first was read from before, it is no mistyped name."""
    store, url = HttpFiles(patience_s=60), f"{web.url}/d/a.tar"
    store.stat(url)
    answers(monkeypatch, "cdn.example", [socket.EAI_NONAME])
    web.faults["/d/a.tar"] = [faults.redirected_to("http://cdn.example/a.tar")] * 6
    assert store.read(url, 5, 100) == DATA[5:105]
    web.faults["/d/a.tar"] = [faults.redirected_to("http://cdn.example/a.tar")] * 4
    with pytest.raises(FileNotFoundError, match=r"no host of that name is known here: cdn\.example"):
        HttpFiles(patience_s=60).stat(url)


@pytest.mark.parametrize("here", ["127.0.0.1", "::ffff:127.0.0.1"])
def test_a_name_that_stands_for_this_machine_by_the_time_of_the_connection(
    web: Web, monkeypatch: pytest.MonkeyPatch, here: str
) -> None:
    """The first look-up is the judge's, the second the connection's."""
    answers(monkeypatch, "rebinds.example", [ELSEWHERE, here])
    web.files["/secret"] = b"of this machine"
    web.faults["/d/a.tar"] = [faults.redirected_to(f"http://rebinds.example:{web.server_port}/secret")]
    with pytest.raises(PermissionError, match=r"leads to rebinds\.example \(127\.0\.0\.1\), where no data"):
        HttpFiles(patience_s=5).read(f"{web.url}/d/a.tar", 0, 10)
    assert [name for name, _ in web.requests] == ["/d/a.tar"], "nothing was asked of it"


def test_a_name_that_stands_for_its_link_by_the_time_of_the_connection(
    web: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The peer is taken to be of the link: no test can listen there."""
    reached = socket.socket.getpeername
    monkeypatch.setattr("socket.socket.getpeername", lambda self: ("169.254.169.254", *reached(self)[1:]))
    with pytest.raises(PermissionError, match=r"leads to 127\.0\.0\.1 \(169\.254\.169\.254\)"):
        HttpFiles().read(f"{web.url}/d/a.tar", 0, 10)
    assert web.requests == []


def proxied(web: Web, monkeypatch: pytest.MonkeyPatch, variable: str, form: str) -> None:
    web.files["http://data.example/d/a.tar"] = DATA
    monkeypatch.setenv(variable, form.format(f"127.0.0.1:{web.server_port}"))


@pytest.mark.parametrize("variable", ["http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"])
@pytest.mark.parametrize(
    ("form", "said"),
    [
        ("http://{}", None),
        ("{}", None),
        ("http://me:p%40ss@{}/", "Basic bWU6cEBzcw=="),
        ("me:p%40ss@{}", "Basic bWU6cEBzcw=="),
    ],
)
def test_proxies_as_curl_has_them(
    web: Web, monkeypatch: pytest.MonkeyPatch, variable: str, form: str, said: str | None
) -> None:
    proxied(web, monkeypatch, variable, form)
    seen: list[str | None] = []

    def look(handler: Handler, data: bytes, start: int, end: int) -> bool:
        seen.append(handler.headers.get("Proxy-Authorization"))
        return False

    web.faults["http://data.example/d/a.tar"] = [look]
    assert HttpFiles().read("http://data.example/d/a.tar", 5, 100) == DATA[5:105]
    assert seen == [said]
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert HttpFiles().read(f"{web.url}/d/a.tar", 5, 100) == DATA[5:105]


@pytest.mark.parametrize(
    ("form", "asks"),
    [("http://{}", "for a user and password"), ("me:hidden@{}", "for another user and password")],
)
@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_proxy_that_asks_for_a_password(
    web: Web, monkeypatch: pytest.MonkeyPatch, scheme: str, form: str, asks: str
) -> None:
    proxied(web, monkeypatch, f"{scheme}_proxy", form)
    seen: list[str | None] = []

    def refuse(handler: Handler, *range_: Any) -> bool:
        seen.append(handler.headers.get("Proxy-Authorization"))
        return faults.status(407)(handler, *range_)

    for asked in ("http://data.example/d/a.tar", "data.example:443"):
        web.faults[asked] = [refuse]
    where = rf"the proxy http://127\.0\.0\.1:\d+ of the environment's {scheme}_proxy"
    with pytest.raises(PermissionError, match=rf"{where} asks {asks} \(HTTP 407\): put them into") as error:
        HttpFiles().stat(f"{scheme}://data.example/d/a.tar")
    assert "hidden" not in str(error.value)
    assert seen == ["Basic bWU6aGlkZGVu" if "hidden" in form else None]


def answer(code: int) -> Callable[[Web, pytest.MonkeyPatch], None]:
    def prepare(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
        proxied(web, monkeypatch, "https_proxy", "{}")
        web.faults["data.example:443"] = [faults.status(code)] * 100

    return prepare


def unknown(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", "http://me:hidden@proxy.example:3128")
    answers(monkeypatch, "proxy.example", [socket.EAI_NONAME])


def named(value: str) -> Callable[[Web, pytest.MonkeyPatch], None]:
    return lambda web, monkeypatch: monkeypatch.setenv("https_proxy", value)


@pytest.mark.parametrize(
    ("prepare", "kind", "said"),
    [
        (answer(403), PermissionError, "https_proxy does not connect to its server: HTTP 403"),
        (answer(503), UnavailableError, "of the environment's https_proxy: HTTP 503; 8 attempts"),
        (unknown, ConfigError, "known here: the proxy http://proxy.example:3128 .*; correct https_proxy"),
        (named("127.0.0.1:1"), UnavailableError, "proxy http://127.0.0.1:1 of .* https_proxy: NewConnectionError"),
        (named("socks5://me:hidden@h:1"), ConfigError, r"https_proxy=socks5://\.\.\.: http and https proxies are"),
        (named("http://me:hidden@h:99999"), ConfigError, r"https_proxy=http://\.\.\.: http and https proxies are"),
        (named("http://[me:hidden@h"), ConfigError, r"https_proxy=http://\.\.\.: http and https proxies are"),
    ],
)  # fmt: skip
def test_a_proxy_that_does_not_help_is_named(
    web: Web,
    monkeypatch: pytest.MonkeyPatch,
    prepare: Callable[[Web, pytest.MonkeyPatch], None],
    kind: type[Exception],
    said: str,
) -> None:
    prepare(web, monkeypatch)
    with pytest.raises(kind, match=said) as error:
        HttpFiles(patience_s=0.05).stat("https://data.example/d/a.tar")
    assert "hidden" not in str(error.value)
