"""Files on HTTP(S) servers, read by ranges.

What is not taken on trust: that a server knows ranges, that it sends what it promised, that the file stays the same
between two reads, that it goes on sending, and where it redirects to. RFC 9110 has the rules.
"""

from __future__ import annotations

import base64
import email.utils
import errno
import ipaddress
import netrc
import re
import socket
import time
import urllib.request
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from typing import Any
from urllib.parse import urljoin, urlsplit

import urllib3
from urllib3.exceptions import HTTPError, NameResolutionError, SSLError

from vitscale.files.retry import PATIENCE_S, SILENT_S, Again, paced, resumed
from vitscale.files.store import FileStat, Paths

_CONNECT_S = 10.0
_PIECE = 256 << 10  # bytes taken from a socket at once
_MOST_REDIRECTS = 5
_REDIRECTS = (301, 302, 303, 307, 308)
_BUSY, _NEVER = (408, 425, 429), (501, 505)  # beside 5xx, and of 5xx: what a server cannot do it will not do later
_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")


class _NoHost(Again):
    """A host whose name stands for no address."""


@dataclass(frozen=True)
class _Known:
    """What a server said of a file when it was first asked."""

    bytes: int
    modified: int  # nanoseconds, 0 where it does not say
    validator: str | None  # a strong ETag, or the time of the last change: If-Range


_Seen = list[_Known]  # empty, or what a file was at its first answer


class HttpFiles:
    """A Store of http:// and https:// URLs. Proxies and ~/.netrc are as curl has them; nothing is written.

    Transient faults (time-outs, cut or stalled transfers, 429, 5xx) are tried again, going on at the byte reached;
    UnavailableError where they last longer than `patience_s`. A redirect may not leave the scheme, nor lead to an
    address of this machine unless the URL itself names it; what is of the link alone is never read.
    """

    def __init__(self, patience_s: float = PATIENCE_S) -> None:
        self._patience_s = patience_s
        self._known: dict[str, _Known] = {}
        self._pools: dict[str, urllib3.PoolManager] = {}
        self._reachable: set[tuple[str, str]] = set()  # (host that was named, host that it leads to)

    def __reduce__(self) -> tuple[type[HttpFiles], tuple[float]]:
        return type(self), (self._patience_s,)  # connections do not travel

    def list(self, pattern: str) -> Paths:
        raise OSError(errno.ENOTSUP, "HTTP servers do not list files: name them with a brace range", pattern)

    def stat(self, path: str) -> FileStat:
        """By a read of one byte, which also servers answer that know no HEAD."""
        seen: _Seen = []
        self._read(path, 0, 1, seen)
        self._known[path] = known = seen[0]
        return FileStat(known.bytes, known.modified or _version(known.validator))

    def read(self, path: str, start: int, count: int) -> bytes:
        known = self._known.get(path)
        seen = [] if known is None else [known]
        data = self._read(path, start, count, seen)
        for first in seen:
            self._known.setdefault(path, first)
        return data

    def write(self, path: str, data: bytes) -> None:
        raise OSError(errno.EROFS, "HTTP servers are only read", path)

    def fetch(self, path: str, sha256: str | None) -> None:
        """See Store.fetch: it has no place for it."""

    def _read(self, path: str, start: int, count: int, seen: _Seen) -> bytes:
        """seen: what the file was at its first answer, once there was one."""

        def pieces(done: int) -> Generator[bytes, None, None]:
            try:
                yield from self._pieces(path, start + done, start + count, seen)
            except (HTTPError, OSError, _NoHost) as error:
                raise self._failure(path, error, seen) from None

        return b"".join(resumed(pieces, path, self._patience_s))

    def _failure(self, path: str, error: Exception, seen: _Seen) -> Exception:
        """What comes of a request that broke: Again, or an OSError for good."""
        if isinstance(error, OSError) and error.filename is not None:
            return error  # ours
        if isinstance(error, NameResolutionError | _NoHost) and not seen and not self._known:
            host = urlsplit(path).hostname
            return FileNotFoundError(errno.ENOENT, f"no host of that name is known here: {host}", path)
        if isinstance(error, SSLError) and "CERTIFICATE" in str(error):
            return OSError(errno.EPROTO, "its certificate is not one that this machine trusts", path)
        return error if isinstance(error, Again) else Again(_reason(error))

    def _pieces(self, path: str, at: int, end: int, seen: _Seen) -> Iterator[bytes]:
        """Bytes from `at` to `end`, by one request."""
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
            end, received = min(end, seen[0].bytes), 0
            for piece in paced(iter(partial(response.read1, _PIECE, decode_content=False), b"")):
                received += len(piece)
                wanted = piece[skip : skip + end - at]
                skip, at = max(0, skip - len(piece)), at + len(wanted)
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
            self._require_reachable(path, url)
            own = headers | (_authorization(url) if _host(url) == _host(path) else {})
            response = self._pool(url).request("GET", url, headers=own, redirect=False, preload_content=False)
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

    def _require_reachable(self, path: str, url: str) -> None:
        """OSError for a redirect to another scheme, and for addresses that no data set lies at."""
        scheme, host, asked = urlsplit(url).scheme, _host(url), _host(path)
        if scheme != urlsplit(path).scheme:
            raise OSError(errno.EPERM, f"is redirected to {scheme}:, another scheme; name that URL", path)
        if (asked, host) in self._reachable or (_proxy(url) and not _is_address(host)):  # a proxy resolves names
            return
        for address in _addresses(host, path):
            if _is_of_link(address) or (host != asked and (address.is_loopback or address.is_unspecified)):
                raise OSError(errno.EPERM, f"leads to {host} ({address}), where no data is read from", path)
        self._reachable.add((asked, host))

    def _pool(self, url: str) -> urllib3.PoolManager:
        """The connections for a URL, through the proxy that the environment names for it."""
        proxy = _proxy(url)
        if proxy not in self._pools:
            timeout = urllib3.Timeout(connect=_CONNECT_S, read=SILENT_S)
            options: dict[str, Any] = {"timeout": timeout, "retries": False, "maxsize": 64}
            pool = urllib3.ProxyManager(proxy, **options) if proxy else urllib3.PoolManager(**options)
            self._pools.setdefault(proxy, pool)
        return self._pools[proxy]


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
    _note(path, size, response.headers, seen)
    return at if response.status == 200 else 0


def _note(path: str, size: int, headers: Any, seen: _Seen) -> None:
    """What a file is, told by its first answer; all others must say the same."""
    known = _Known(size, _time(headers.get("Last-Modified")), _validator(headers))
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


Address = ipaddress.IPv4Address | ipaddress.IPv6Address
_TRANSLATED = ipaddress.IPv6Network("64:ff9b::/96")  # of IPv4 addresses, RFC 6052
_CLOUD = ipaddress.ip_address("fd00:ec2::254")  # where a cloud's machine asks for its own secrets


def _host(url: str) -> str:
    return urlsplit(url).hostname or ""


def _proxy(url: str) -> str:
    """The proxy that the environment names for a URL; empty: none."""
    if urllib.request.proxy_bypass(_host(url)):
        return ""
    return urllib.request.getproxies().get(urlsplit(url).scheme, "")


def _joined(path: str, url: str, target: str) -> str:
    """Where `url` redirects to. OSError for what is no URL."""
    try:
        joined = urljoin(url, target)
        _ = urlsplit(joined).port
    except ValueError:
        raise OSError(errno.EPROTO, "is redirected to what is no URL", path) from None
    return joined


def _addresses(host: str, path: str) -> list[Address]:
    """What a host's name stands for, IPv4 addresses in the dress of IPv6 as themselves."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (socket.gaierror, UnicodeError) as error:
        raise _NoHost(f"{host}: {getattr(error, 'strerror', None) or 'no name of a host'}") from None
    return [_plain(ipaddress.ip_address(str(each[4][0]).partition("%")[0])) for each in found]


def _plain(address: Address) -> Address:
    if isinstance(address, ipaddress.IPv4Address):
        return address
    translated = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF) if address in _TRANSLATED else None
    return address.ipv4_mapped or address.sixtofour or translated or address


def _is_of_link(address: Address) -> bool:
    return address.is_link_local or address == _CLOUD


def _is_address(host: str) -> bool:
    try:
        socket.getaddrinfo(host, None, flags=socket.AI_NUMERICHOST)
    except (socket.gaierror, UnicodeError):
        return False
    return True


def _authorization(url: str) -> dict[str, str]:
    """For a host that ~/.netrc names; its `default` is for none."""
    try:
        found = netrc.netrc().hosts.get(_host(url))
    except (OSError, netrc.NetrcParseError):
        return {}
    if not found:
        return {}
    return {"Authorization": "Basic " + base64.b64encode(f"{found[0]}:{found[2]}".encode()).decode()}


def _refusal(path: str, response: Any) -> Exception:
    """What an answer without the file comes to."""
    status = response.status
    if status in _BUSY or (status >= 500 and status not in _NEVER):
        return Again(f"HTTP {status}", _seconds(response.headers.get("Retry-After")))
    if status in (404, 410):
        return FileNotFoundError(errno.ENOENT, f"HTTP {status}", path)
    if status in (401, 403, 407):
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
