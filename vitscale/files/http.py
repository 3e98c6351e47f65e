"""Files on HTTP(S) servers, read by ranges.

What is not taken on trust: that a server knows ranges, that it sends what it promised, that the file stays the same
between two reads, that it goes on sending, and where it redirects to. RFC 9110 has the rules.
"""

from __future__ import annotations

import base64
import email.utils
import errno
import netrc
import re
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from typing import Any
from urllib.parse import urljoin, urlsplit

import urllib3
from urllib3.exceptions import HTTPError, ProxyError, SSLError

from vitscale.errors import ConfigError
from vitscale.files.cache import LruCache
from vitscale.files.network import (
    Barred,
    NoHost,
    Proxy,
    connections,
    host_of,
    is_address,
    is_no_name,
    proxy_of,
    refused_tunnel,
    require_allowed,
)
from vitscale.files.retry import PATIENCE_S, Again, may_pass, paced, resumed
from vitscale.files.store import FileStat, Paths
from vitscale.files.stream import WINDOW, Stream

_PIECE = 256 << 10  # bytes taken from a socket at once
_STREAMS = 32  # that are open at once
_MOST_REDIRECTS = 5
_REDIRECTS = (301, 302, 303, 307, 308)
_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")


@dataclass(frozen=True)
class _Known:
    """What a server said of a file when it was first asked."""

    bytes: int
    modified: int  # nanoseconds, 0 where it does not say
    validator: str | None  # a strong ETag, or the time of the last change: If-Range
    ranges: bool  # whether it sent the part that was asked for; else all of it


_Seen = list[_Known]  # empty, or what a file was at its first answer


class HttpFiles:
    """A Store of http:// and https:// URLs. Proxies and ~/.netrc are as curl has them; nothing is written.

    Transient faults (time-outs, cut or stalled transfers, 429, 5xx) are tried again, going on at the byte reached;
    UnavailableError where they last longer than `patience_s`. A redirect may not leave the scheme, nor lead to an
    address of this machine unless the URL itself names it; what is of the link alone is never read.
    """

    def __init__(self, patience_s: float = PATIENCE_S, cached: bool = False) -> None:
        """cached: each file is read once from its front to its end, not here and there."""
        self._patience_s, self._cached = patience_s, cached
        self._streams = LruCache[str, Stream](self._stream, _STREAMS, lambda _: 1)
        self._known: dict[str, _Known] = {}
        self._pools: dict[tuple[Proxy | None, bool], urllib3.PoolManager] = {}  # bool: of where redirects lead
        self._reachable: set[tuple[str, str]] = set()  # (host that was named, host that it leads to)

    def __reduce__(self) -> tuple[type[HttpFiles], tuple[float, bool]]:
        return type(self), (self._patience_s, self._cached)  # connections do not travel

    def list(self, pattern: str) -> Paths:
        raise OSError(errno.ENOTSUP, "HTTP servers do not list files: name them with a brace range", pattern)

    def stat(self, path: str) -> FileStat:
        """By a read of one byte, which also servers answer that know no HEAD."""
        seen: _Seen = []
        self._read(path, 0, 1, seen)
        self._known[path] = known = seen[0]
        self._streams.forget(path)
        return FileStat(known.bytes, known.modified or _version(known.validator))

    def read(self, path: str, start: int, count: int) -> bytes:
        known = self._known.get(path)
        if known is not None and not known.ranges:
            return self._streams.get(path).read(start, count)
        seen = [] if known is None else [known]
        data = self._read(path, start, count, seen)
        for first in seen:
            self._known.setdefault(path, first)
        return data

    def write(self, path: str, data: bytes) -> None:
        raise OSError(errno.EROFS, "HTTP servers are only read", path)

    def fetch(self, path: str, sha256: str | None) -> None:
        """See Store.fetch: it has no place for it."""

    def _stream(self, path: str) -> Stream:
        known = self._known[path]
        return Stream(lambda at: self._transfer(path, at, known.bytes, [known]), known.bytes)

    def _read(self, path: str, start: int, count: int, seen: _Seen) -> bytes:
        return b"".join(self._transfer(path, start, start + count, seen))

    def _transfer(self, path: str, start: int, end: int, seen: _Seen) -> Generator[bytes, None, None]:
        """Bytes as they come. seen: what the file was at its first answer, once there was one."""

        def pieces(done: int) -> Generator[bytes, None, None]:
            try:
                yield from self._pieces(path, start + done, end, seen, may_skip=self._cached or done > 0)
            except (HTTPError, OSError, Again) as error:
                raise self._failure(path, error) from None

        return resumed(pieces, path, self._patience_s)

    def _failure(self, path: str, error: Exception) -> Exception:
        """What comes of a request that broke: Again, or an OSError for good."""
        if isinstance(error, OSError) and error.filename is not None:
            return error  # ours
        if isinstance(error, NoHost) and error.unknown:
            why = f"no host of that name is known here: {error.host}"
            error.at_last = FileNotFoundError(errno.ENOENT, why, path)
        if isinstance(error, SSLError) and "CERTIFICATE" in str(error):
            return OSError(errno.EPROTO, "its certificate is not one that this machine trusts", path)
        again = error if isinstance(error, Again) else Again(_reason(error))
        if again.at_last is not None and any(host_of(known) == host_of(path) for known in self._known):
            again.at_last = None  # it was there
        return again

    def _pieces(self, path: str, at: int, end: int, seen: _Seen, may_skip: bool) -> Iterator[bytes]:
        """Bytes from `at` to `end`, by one request. may_skip: also where much comes before them that nobody wants."""
        if at >= end or (seen and at >= seen[0].bytes):
            return
        headers = {"Range": f"bytes={at}-{end - 1}", "Accept-Encoding": "identity"}
        if seen and seen[0].validator:
            headers["If-Range"] = seen[0].validator
        response = self._answer(path, headers)
        try:
            if response.status == 416:
                _note_end(path, response, at, seen)
                return
            skip = _skip(path, response, at, seen)
            if skip > WINDOW and not may_skip and not seen[0].ranges:
                raise ConfigError(
                    f"{path}: its server sends whole files alone (no ranges), so all before byte {at} again for each "
                    "part; set data.cache=FOLDER, into which it comes once, in one stream"
                )
            end, received = min(end, seen[0].bytes), 0
            for piece in paced(iter(partial(response.read1, _PIECE, decode_content=False), b"")):
                received += len(piece)
                wanted = piece[skip : skip + end - at]
                skip, at = max(0, skip - len(piece)), at + len(wanted)
                if wanted:
                    yield wanted
                if at >= end:
                    return
            if at < end:
                raise Again(f"cut after {received} bytes")
        finally:
            # A connection with bytes left is of no more use.
            response.release_conn() if response.length_remaining == 0 else response.close()

    def _answer(self, path: str, headers: dict[str, str]) -> Any:
        """The response of status 200, 206 or 416 (no such range), behind redirects."""
        url = path
        for _ in range(_MOST_REDIRECTS + 1):
            response = self._asked(path, url, headers)
            if response.status in (200, 206, 416):
                return response
            try:
                target = response.headers.get("Location")
                if response.status not in _REDIRECTS or not target:
                    raise _refusal(path, response)
                url = _joined(path, url, target)
            finally:
                response.close()
        raise OSError(errno.ELOOP, f"is redirected more than {_MOST_REDIRECTS} times", path)

    def _asked(self, path: str, url: str, headers: dict[str, str]) -> Any:
        """The response of `url`, to which `path` leads. OSError for another scheme, and where no data set lies."""
        scheme, host, asked, proxy = urlsplit(url).scheme, host_of(url), host_of(path), proxy_of(url)
        if scheme != urlsplit(path).scheme:
            raise OSError(errno.EPERM, f"is redirected to {scheme}:, another scheme; name that URL", path)
        own = headers | (_authorization(url) if host == asked else {})
        try:
            if (asked, host) not in self._reachable and (proxy is None or is_address(host)):
                require_allowed(host, host != asked)
                self._reachable.add((asked, host))
            pool = self._pool(proxy, host != asked)
            response = pool.request("GET", url, headers=own, redirect=False, preload_content=False)
        except Barred as error:
            raise OSError(errno.EPERM, f"leads to {error}, where no data is read from", path) from None
        except HTTPError as error:
            raise (_of_proxy(path, proxy, error) or error) from None
        if proxy is not None and response.status == 407:
            response.close()
            raise _asked_for_password(path, proxy)
        return response

    def _pool(self, proxy: Proxy | None, redirected: bool) -> urllib3.PoolManager:
        key = proxy, redirected
        if key not in self._pools:
            self._pools.setdefault(key, connections(proxy, redirected))
        return self._pools[key]


def _of_proxy(path: str, proxy: Proxy | None, error: HTTPError) -> Exception | None:
    """What an error comes to that is a proxy's, not the server's."""
    if proxy is None:
        return None
    status = refused_tunnel(error)
    if status == 407:
        return _asked_for_password(path, proxy)
    if status is not None and not may_pass(status):
        return PermissionError(errno.EACCES, f"{proxy} does not connect to its server: HTTP {status}", path)
    if status is None and not isinstance(error, ProxyError):
        return None
    cause = error.original_error if isinstance(error, ProxyError) else error
    again = Again(f"{proxy}: {f'HTTP {status}' if status else type(cause).__name__}")
    if is_no_name(cause.__cause__):
        again.at_last = ConfigError(f"{path}: no host of that name is known here: {proxy}; correct {proxy.variable}")
    return again


def _asked_for_password(path: str, proxy: Proxy) -> OSError:
    what = "another user and password" if proxy.user else "a user and password"
    way = f"put them into {proxy.variable} (http://user:password@host:port)"
    return PermissionError(errno.EACCES, f"{proxy} asks for {what} (HTTP 407): {way}", path)


def _skip(path: str, response: Any, at: int, seen: _Seen) -> int:
    """How many bytes of an answer come before byte `at`; takes note of the file at its first answer."""
    found = _RANGE.fullmatch(response.headers.get("Content-Range", ""))
    if response.headers.get("Content-Encoding", "identity") != "identity":
        encoding = response.headers["Content-Encoding"]
        raise OSError(errno.EPROTO, f"is sent with Content-Encoding {encoding}, so its bytes are others", path)
    if response.status == 206:
        if found is None or int(found[1]) != at or found[3] == "*":
            raise Again(f"another range than asked for: {response.headers.get('Content-Range')}")
        size = int(found[3])
    else:
        length = response.headers.get("Content-Length", "")
        if not length.isdigit():
            raise OSError(errno.EPROTO, "its server tells no length", path)
        size = int(length)
    _note(path, size, response.headers, seen, ranges=response.status == 206)
    return at if response.status == 200 else 0


def _note(path: str, size: int, headers: Any, seen: _Seen, ranges: bool = True) -> None:
    """What a file is, told by its first answer; all others must say the same."""
    known = _Known(size, _time(headers.get("Last-Modified")), _validator(headers), ranges)
    if not seen:
        seen.append(known)
    if (known.bytes, known.validator) != (seen[0].bytes, seen[0].validator):
        raise OSError(errno.ENODATA, "was written again while it was in use", path)


def _note_end(path: str, response: Any, at: int, seen: _Seen) -> None:
    """An answer that there is nothing from byte `at` on."""
    size = response.headers.get("Content-Range", "").removeprefix("bytes */")
    if not size.isdigit() or int(size) > at:
        raise Again(f"HTTP 416 for byte {at}")
    _note(path, int(size), response.headers, seen)


def _joined(path: str, url: str, target: str) -> str:
    """Where `url` redirects to. OSError for what is no URL."""
    try:
        joined = urljoin(url, target)
        _ = urlsplit(joined).port
    except ValueError:
        raise OSError(errno.EPROTO, "is redirected to what is no URL", path) from None
    return joined


def _authorization(url: str) -> dict[str, str]:
    """For a host that ~/.netrc names; its `default` is for none."""
    try:
        found = netrc.netrc().hosts.get(host_of(url))
    except (OSError, netrc.NetrcParseError):
        return {}
    if not found:
        return {}
    return {"Authorization": "Basic " + base64.b64encode(f"{found[0]}:{found[2]}".encode()).decode()}


def _refusal(path: str, response: Any) -> Exception:
    """What an answer without the file comes to."""
    status = response.status
    if may_pass(status):
        return Again(f"HTTP {status}", _seconds(response.headers.get("Retry-After")))
    if status in (404, 410):
        return FileNotFoundError(errno.ENOENT, f"HTTP {status}", path)
    if status in (401, 403):
        return PermissionError(
            errno.EACCES, f"HTTP {status}: may not be read; credentials are taken from ~/.netrc", path
        )
    return OSError(errno.EPROTO, f"HTTP {status}", path)


def _version(validator: str | None) -> int:
    """For a server that tells no time: a number below 0 that stands for its ETag; 0 for none."""
    digest = blake2b((validator or "").encode(), digest_size=7).digest()
    return -1 - int.from_bytes(digest, "big") if validator else 0


def _validator(headers: Any) -> str | None:
    etag = headers.get("ETag")
    return headers.get("Last-Modified") if etag is None or etag.startswith("W/") else etag


def _time(text: str | None) -> int:
    """An HTTP date in nanoseconds, 0 for none."""
    try:
        return int(email.utils.parsedate_to_datetime(text or "").timestamp()) * 1_000_000_000
    except (ValueError, TypeError):
        return 0


def _seconds(text: str | None) -> float:
    """Of Retry-After: a number, or a date."""
    if text is None:
        return 0.0
    if text.strip().isdigit():
        return float(text)
    return max(0.0, _time(text) / 1e9 - time.time())


def _reason(error: Exception) -> str:
    """One line, without the URL that urllib3 puts into it."""
    cause = getattr(error, "reason", None)
    return f"{type(error).__name__}: {cause}" if isinstance(cause, str) else type(error).__name__
