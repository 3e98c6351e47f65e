"""Objects of S3, Google and Azure from servers on loopback that keep their promises or not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.data.makers import write_tar
from tests.files import web as faults
from tests.files.buckets import ENVIRONMENTS, cloud, refusal
from tests.files.test_http import DATA, fast
from tests.files.web import Web
from vitscale.data.index import ShardIndex
from vitscale.errors import ConfigError, InfrastructureError
from vitscale.files import objects
from vitscale.files.objects import ObjectFiles
from vitscale.files.retry import UnavailableError, retries
from vitscale.files.stores import Stores
from vitscale.files.tar import scan_shard

pytest.importorskip("obstore")
__all__ = ["fast"]  # the fixture
KEYS = ("d/a.tar", "d/b.tar", "d/deep/c.tar", "d/e & f.tar", "d/index.json", "top.tar")
NAME = "/images/d/a.tar"


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objects, "SILENT_S", 0.3)


def filled(web: Web) -> Web:
    web.files |= {f"/images/{key}": DATA[number:] for number, key in enumerate(KEYS)}
    return web


@pytest.fixture(params=["s3", "gs", "az"])
def scheme(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def web(scheme: str) -> Iterator[Web]:
    with cloud(scheme) as server:
        yield filled(server)


@pytest.fixture
def s3() -> Iterator[Web]:
    with cloud("s3") as server:
        yield filled(server)


@pytest.mark.parametrize("cached", [False, True])
def test_every_cloud_is_read_by_ranges(web: Web, scheme: str, tmp_path: Path, cached: bool) -> None:
    store, path = Stores(str(tmp_path / "cache") if cached else None), f"{scheme}://images/d/b.tar"
    assert store.stat(path) == (len(DATA) - 1, 1792567680 * 10**9)
    for start, count in ((0, 10), (1234, 20_000), (len(DATA) - 4, 10), (0, 10**6), (3, 0)):
        assert store.read(path, start, count) == DATA[1:][start : start + count]
    with pytest.raises(FileNotFoundError, match="no such object"):
        store.stat(f"{scheme}://images/none.tar")


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("d/*.tar", ["d/a.tar", "d/b.tar", "d/e & f.tar"]),
        ("**/*.tar", ["d/a.tar", "d/b.tar", "d/deep/c.tar", "d/e & f.tar", "top.tar"]),
        ("d/d*/[a-c].tar", ["d/deep/c.tar"]),
        ("none/*.tar", []),
    ],
)
def test_every_cloud_is_listed_page_by_page(web: Web, scheme: str, pattern: str, found: list[str]) -> None:
    assert Stores().list(f"{scheme}://images/{pattern}") == [f"{scheme}://images/{key}" for key in found]


def test_a_cut_transfer_goes_on_where_it_was_cut(web: Web, scheme: str) -> None:
    store, path = ObjectFiles(), f"{scheme}://images/d/a.tar"
    store.stat(path)
    web.faults[NAME] = [faults.cut_after(150_000)]
    assert store.read(path, 0, 200_000) == DATA[:200_000]
    assert [each for _, each in web.requests[-2:]] == ["bytes=0-199999", "bytes=150000-199999"]


def test_shards_are_found_and_read_though_every_transfer_breaks(web: Web, scheme: str, tmp_path: Path) -> None:
    for number in range(3):
        members = [(f"{number}{i:04d}.jpg", DATA[i:][: 9_000 + i]) for i in range(20)]
        web.files[f"/images/set/{number}.tar"] = write_tar(tmp_path / f"{number}.tar", members).read_bytes()
        web.faults[f"/images/set/{number}.tar"] = [lambda *_: False, faults.cut_after(50_000), faults.status(503)]
    store = Stores(patience_s=60)
    paths, before = store.list(f"{scheme}://images/set/*.tar"), int(retries)
    assert len(paths) == 3
    for path in paths:
        table = scan_shard(path, store)
        for i in range(20):
            start, size = table.members(i)["jpg"]
            assert store.read(path, start, size) == DATA[i:][: 9_000 + i]
    assert int(retries) - before == 6


@pytest.mark.parametrize(
    "sequence",
    [
        [faults.status(503)] * 3,
        [faults.status(code) for code in (408, 429, 500, 507, 529)],
        [refusal(400, "RequestTimeout"), refusal(400, "SlowDown"), refusal(409, "OperationAborted")],
        [faults.cut_after(0), faults.cut_after(1), faults.cut_after(70_000)],
        [faults.stall_after(1000, 2)],
        [faults.drip(2)],
        [faults.hang_up],
    ],
    ids=["503", "busy", "busy by its word", "cut", "stalled", "slow", "closed"],
)
def test_what_passes_is_got_over(web: Web, scheme: str, sequence: list[faults.Misbehave]) -> None:
    store, path = ObjectFiles(patience_s=60), f"{scheme}://images/d/a.tar"
    store.stat(path)
    before = int(retries)
    web.faults[NAME] = list(sequence)
    assert store.read(path, 1000, 200_000) == DATA[1000:201_000]
    assert int(retries) - before == len(sequence)
    assert web.faults[NAME] == []


@pytest.mark.parametrize("sequence", [[refusal(503, "SlowDown")] * 3, [refusal(500, "InternalError"), faults.hang_up]])
def test_a_list_is_asked_for_again(web: Web, scheme: str, sequence: list[faults.Misbehave]) -> None:
    web.faults["/images"] = list(sequence)
    before = int(retries)
    assert len(Stores(patience_s=60).list(f"{scheme}://images/d/*.tar")) == 3
    assert int(retries) - before == len(sequence)


def test_an_object_that_changed_while_it_was_read(web: Web, scheme: str) -> None:
    store, path = ObjectFiles(), f"{scheme}://images/d/a.tar"
    store.stat(path)
    store._etags[path] = len(DATA), '"of before"'
    with pytest.raises(OSError, match="written again while it was in use"):
        store.read(path, 0, 10)


CLOCK = "RequestTimeTooSkewed: the clock of this machine is off"


@pytest.mark.parametrize("call", ["stat", "read", "list"])
@pytest.mark.parametrize(
    ("fault", "kind", "said"),
    [
        (refusal(301, "PermanentRedirect"), ConfigError, r"another region than AWS_REGION says \(redirected\)"),
        (
            refusal(400, "AuthorizationHeaderMalformed", "<Region>eu-west-1</Region>"),
            ConfigError,
            "set AWS_REGION=eu-west-1, and AWS_ENDPOINT_URL where",
        ),
        (refusal(403, "RequestTimeTooSkewed"), InfrastructureError, CLOCK),
        (refusal(400, "ExpiredToken"), ConfigError, "ExpiredToken: the credentials of the environment ran out"),
        (refusal(403, "ExpiredToken"), ConfigError, "ExpiredToken: the credentials of the environment ran out"),
        (refusal(403, "AccessDenied"), PermissionError, "may not be read: AccessDenied"),
        (refusal(401, "Nobody"), PermissionError, "may not be read: Nobody"),
        (refusal(407, "Proxy"), PermissionError, r"the proxy asks for a user and password \(HTTP 407\)"),
        (refusal(400, "InvalidArgument"), OSError, "InvalidArgument"),
        (refusal(501, "NotImplemented"), OSError, "NotImplemented"),
    ],
)
def test_what_does_not_pass_is_an_error_at_once(
    s3: Web, call: str, fault: faults.Misbehave, kind: type[Exception], said: str
) -> None:
    store, path, before = ObjectFiles(), "s3://images/d/a.tar", int(retries)
    if call == "read":
        store.stat(path)
    s3.faults |= {NAME: [fault] * 2, "/images": [fault]}  # HEAD does not say why
    with pytest.raises(kind, match=said) as error:
        {"stat": store.stat, "read": lambda path: store.read(path, 0, 10), "list": store.list}[call](path)
    assert not isinstance(error.value, UnavailableError)
    assert int(retries) == before


@pytest.mark.parametrize(("code", "kind"), [("PermanentRedirect", ConfigError), (CLOCK[:20], InfrastructureError)])
def test_an_index_that_cannot_be_had_is_not_a_wrong_index(s3: Web, code: str, kind: type[Exception]) -> None:
    s3.faults["/images/d/index.json"] = [refusal(403, code)] * 2
    with pytest.raises(kind, match=code):
        ShardIndex.load("s3://images/d/index.json", Stores())


@pytest.mark.parametrize(
    ("scheme", "settings", "said"),
    [
        ("s3", {"AWS_ENDPOINT_URL": "http://mistyped.invalid:9000"}, "mistyped.invalid; correct AWS_ENDPOINT_URL, or"),
        ("gs", {"GOOGLE_BASE_URL": "http://mistyped.invalid"}, "mistyped.invalid; correct GOOGLE_BASE_URL"),
        (
            "az",
            {"AZURE_STORAGE_ENDPOINT": "http://mistyped.invalid"},
            "mistyped.invalid; correct AZURE_STORAGE_ACCOUNT_NAME, or AZURE_STORAGE_ENDPOINT",
        ),
        ("az", {"AZURE_STORAGE_ACCOUNT_NAME": None}, "its account is not known; set AZURE_STORAGE_ACCOUNT_NAME"),
        ("s3", {"AWS_ENDPOINT_URL": "127.0.0.1:9000"}, "AWS_ENDPOINT_URL is no URL: it begins with http"),
        ("az", {"AZURE_STORAGE_ACCOUNT_KEY": "no base64!"}, "az://images: cannot be opened"),
        (
            "s3",
            {"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None, "AWS_METADATA_ENDPOINT": "http://127.0.0.1:1"},
            "no credentials, .*; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_SKIP_SIGNATURE=true",
        ),
    ],
)
def test_settings_that_cannot_work_are_named(
    monkeypatch: pytest.MonkeyPatch, scheme: str, settings: dict[str, str | None], said: str
) -> None:
    with cloud(scheme):
        for name, value in settings.items():
            if value is None:
                monkeypatch.delenv(name)
            else:
                monkeypatch.setenv(name, value)
        before = int(retries)
        with pytest.raises(ConfigError, match=said):
            ObjectFiles(patience_s=600).stat(f"{scheme}://images/d/a.tar")
        assert int(retries) - before <= 3


def test_a_server_that_goes_away_is_waited_for(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in ENVIRONMENTS[scheme].items():
        monkeypatch.setenv(name, value.format("http://127.0.0.1:1"))
    with pytest.raises(UnavailableError, match=r"error sending request \(Connection refused\); 8 attempts in 0 s"):
        ObjectFiles(patience_s=0).stat(f"{scheme}://images/d/a.tar")
