"""Whom HTTP requests may reach, and through which proxy.

Addresses are judged when a name is looked up, and once more on the connection: a name may stand for another by then.
"""

from __future__ import annotations

import ipaddress
import re
import socket
import urllib.request
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool

from vitscale.errors import ConfigError
from vitscale.files.retry import SILENT_S, Again

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
_CONNECT_S = 10.0
_TRANSLATED = ipaddress.IPv6Network("64:ff9b::/96")  # of IPv4 addresses, RFC 6052
_CLOUD = ipaddress.ip_address("fd00:ec2::254")  # where a cloud's machine asks for its own secrets
_NO_NAME = (socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME))


class Barred(Exception):
    """An address that no data set lies at."""


class NoHost(Again):
    """A host whose name stands for no address. unknown: that is what the look-up says, not that it failed."""

    def __init__(self, host: str, error: OSError | UnicodeError) -> None:
        why = error.strerror if isinstance(error, OSError) else "no name of a host"
        super().__init__(f"{host}: {why}")
        self.host, self.unknown = host, is_no_name(error)


def is_no_name(error: BaseException | None) -> bool:
    """Whether a look-up found that there is no such name."""
    return isinstance(error, UnicodeError) or (isinstance(error, socket.gaierror) and error.errno in _NO_NAME)


def host_of(url: str) -> str:
    return urlsplit(url).hostname or ""


def is_address(host: str) -> bool:
    try:
        socket.getaddrinfo(host, None, flags=socket.AI_NUMERICHOST)
    except (socket.gaierror, UnicodeError):
        return False
    return True


def require_allowed(host: str, redirected: bool) -> None:
    """Barred where a host's name stands for an address that may not be reached, NoHost where it stands for none."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (socket.gaierror, UnicodeError) as error:
        raise NoHost(host, error) from None
    for each in found:
        _require(host, str(each[4][0]), redirected)


def _require(host: str, text: str, redirected: bool) -> None:
    """redirected: a server, not the user, named this host, which must then not be this machine."""
    address = _plain(ipaddress.ip_address(text.partition("%")[0]))
    of_link = address.is_link_local or address == _CLOUD
    if of_link or (redirected and (address.is_loopback or address.is_unspecified)):
        raise Barred(f"{host} ({address})")


def _plain(address: Address) -> Address:
    """An IPv4 address in the dress of IPv6 as itself."""
    if isinstance(address, ipaddress.IPv4Address):
        return address
    translated = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF) if address in _TRANSLATED else None
    return address.ipv4_mapped or address.sixtofour or translated or address


class Proxy(NamedTuple):
    """What the environment names for a URL."""

    url: str  # without user and password
    user: str | None  # user:password
    variable: str

    def __str__(self) -> str:
        return f"the proxy {self.url} of the environment's {self.variable}"


def proxy_of(url: str) -> Proxy | None:
    """ConfigError for one that cannot be used."""
    if urllib.request.proxy_bypass(host_of(url)):
        return None
    found, scheme = urllib.request.getproxies(), urlsplit(url).scheme
    name = scheme if scheme in found else "all"
    if not found.get(name):
        return None
    variable, value = f"{name}_proxy", found[name]
    try:
        parts = urlsplit(value if "://" in value else f"http://{value}")
        host, port = parts.hostname, parts.port
    except ValueError:  # of a port, or an address in brackets
        host, port = None, None
    if not host or parts.scheme not in ("http", "https"):
        kind = value.partition("://")[0] if "://" in value else "..."
        raise ConfigError(
            f"{variable}={kind}://...: http and https proxies are used, as http://host:port; name one of these, or the "
            "hosts that need none in no_proxy"
        )
    user = None if parts.username is None else f"{unquote(parts.username)}:{unquote(parts.password or '')}"
    where = f"[{host}]" if ":" in host else host
    return Proxy(f"{parts.scheme}://{where}" + (f":{port}" if port else ""), user, variable)


def connections(proxy: Proxy | None, redirected: bool) -> urllib3.PoolManager:
    """Connections to servers, each kept for further requests; Barred where one is made to what may not be reached.

    A proxy looks names up itself: what it may reach is in its own hands.
    """
    timeout = urllib3.Timeout(connect=_CONNECT_S, read=SILENT_S)
    options: dict[str, Any] = {"timeout": timeout, "retries": False, "maxsize": 64}
    if proxy is not None:
        headers = urllib3.make_headers(proxy_basic_auth=proxy.user) if proxy.user else None
        return urllib3.ProxyManager(proxy.url, proxy_headers=headers, **options)
    pool = urllib3.PoolManager(**options)
    pool.pool_classes_by_scheme = {
        "http": _judging(HTTPConnectionPool, HTTPConnection, redirected),
        "https": _judging(HTTPSConnectionPool, HTTPSConnection, redirected),
    }
    return pool


def _judging(pool: type, connection: type[HTTPConnection], redirected: bool) -> type:
    """A class of pools whose connections look at whom they reached before anything is sent."""

    def new_conn(self: HTTPConnection) -> socket.socket:
        reached = connection._new_conn(self)
        try:
            _require(self.host, reached.getpeername()[0], redirected)
        except BaseException:
            reached.close()
            raise
        return reached

    return type(
        pool.__name__, (pool,), {"ConnectionCls": type(connection.__name__, (connection,), {"_new_conn": new_conn})}
    )


_TUNNEL = re.compile(r"Tunnel connection failed: (\d{3})")


def refused_tunnel(error: Exception) -> int | None:
    """The status with which a proxy refused to connect to a server."""
    found = _TUNNEL.search(str(error))
    return int(found[1]) if found else None
