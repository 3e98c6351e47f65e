"""The store of a run's data: local paths and URLs of several kinds, each by what reads it."""

from __future__ import annotations

import re
from urllib.parse import unquote, urlsplit

from vitscale.errors import ConfigError
from vitscale.files.cache import LruCache
from vitscale.files.disk_cache import DiskCache
from vitscale.files.http import HttpFiles
from vitscale.files.objects import ObjectFiles
from vitscale.files.retry import PATIENCE_S
from vitscale.files.store import FileStat, LocalFiles, Paths, Store, is_remote

REMOTE = ("http", "https", "s3", "gs", "az")
_PIECE = 4 << 20  # bytes of one request
_KEPT_BYTES = 256 << 20  # of pieces in memory
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")  # of a name such as X-Amz-Signature, AWSAccessKeyId, api_key
_SECRET = re.compile(
    r"(api|access|account|auth|client|private|sas|secret|session|shared)?(auth|authorization|code|credentials?|jwt|key|"
    r"passphrase|passwd|password|pat|pwd|secret|sig|signature|token)",
    re.IGNORECASE,
)


class Stores:
    """A Store of whatever data.train may name."""

    def __init__(
        self, cache: str | None = None, cache_bytes: int | None = None, patience_s: float = PATIENCE_S
    ) -> None:
        """cache: a folder of this node for remote files; None: they are read by ranges, and little of them is kept."""
        self._settings = (cache, cache_bytes, patience_s)
        http: Store = Pieces(HttpFiles(patience_s))
        objects: Store = Pieces(ObjectFiles(patience_s))
        if cache is not None:
            http = DiskCache(HttpFiles(patience_s, cached=True), cache, cache_bytes, http)
            objects = DiskCache(ObjectFiles(patience_s), cache, cache_bytes, objects)
        self._stores: dict[str, Store] = {"": LocalFiles(patience_s)}
        self._stores |= {scheme: http if scheme.startswith("http") else objects for scheme in REMOTE}

    def __reduce__(self) -> tuple[type[Stores], tuple[str | None, int | None, float]]:
        return type(self), self._settings

    def _of(self, path: str) -> Store:
        return self._stores[path.partition("://")[0].lower() if is_remote(path) else ""]

    def list(self, pattern: str) -> Paths:
        return self._of(pattern).list(pattern)

    def stat(self, path: str) -> FileStat:
        return self._of(path).stat(path)

    def read(self, path: str, start: int, count: int) -> bytes:
        return self._of(path).read(path, start, count)

    def write(self, path: str, data: bytes) -> None:
        self._of(path).write(path, data)

    def fetch(self, path: str, sha256: str | None) -> None:
        self._of(path).fetch(path, sha256)


class Pieces:
    """Another store, read by large pieces of which the most recent stay in memory: samples are small, requests slow."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._pieces: LruCache[tuple[str, int], bytes] = LruCache(self._piece, _KEPT_BYTES, len)

    def __reduce__(self) -> tuple[type[Pieces], tuple[Store]]:
        return type(self), (self._store,)

    def list(self, pattern: str) -> Paths:
        return self._store.list(pattern)

    def stat(self, path: str) -> FileStat:
        return self._store.stat(path)

    def read(self, path: str, start: int, count: int) -> bytes:
        data = bytearray()
        for number in range(start // _PIECE, -(-(start + count) // _PIECE)):
            piece = self._pieces.get((path, number))
            first = start + len(data) - number * _PIECE
            data += piece[first : first + count - len(data)]
            if len(piece) < _PIECE:
                break
        return bytes(data)

    def write(self, path: str, data: bytes) -> None:
        self._store.write(path, data)

    def fetch(self, path: str, sha256: str | None) -> None:
        """See Store.fetch: there is no room for it."""

    def _piece(self, key: tuple[str, int]) -> bytes:
        path, number = key
        return self._store.read(path, number * _PIECE, _PIECE)


def secret_of_query(url: str) -> str | None:
    """Which part of a URL's query (or of what follows a #) its name says to be a secret, in words; None if none is."""
    names = [unquote(part.partition("=")[0]) for part in re.split(r"[?&;#]", url)[1:]]
    secret = next((name for name in names if any(map(_SECRET.fullmatch, _WORD.findall(name)))), None)
    return None if secret is None else f"the query's {secret}"


def is_url(text: str) -> bool:
    """Whether it has a host, and a port that is none or a number."""
    try:
        parts = urlsplit(text)
        return bool(parts.hostname) and not re.search(r"\s", parts.netloc) and parts.port != 0
    except ValueError:  # of a port, or an address in brackets
        return False


def require_no_secret(url: str, key: str) -> None:
    """ConfigError for a URL that would carry a password into config.yaml, logs and MLflow."""
    if not is_url(url):
        scheme = url.partition(":")[0]
        raise ConfigError(f"{key}={scheme}:...: is no URL: after {scheme}:// come a host (or bucket) and a path")
    parts = urlsplit(url)
    what = "a user or password" if "@" in parts.netloc else secret_of_query(url)
    if what is not None:
        shown = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
        raise ConfigError(
            f"{key}={shown}: has {what} in it, which config.yaml would keep; for "
            "http(s) put user and password into ~/.netrc, for s3, gs and az into the environment"
        )
