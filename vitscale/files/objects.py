"""Files in object stores: s3://bucket/key, gs://bucket/key, az://container/key, by obstore (the extra `remote`).

Endpoint, region and credentials are those of the environment and of the machine, as each vendor's own tools read them:
AWS_ENDPOINT_URL, AWS_REGION, AWS_ACCESS_KEY_ID, ..., AWS_SKIP_SIGNATURE=true for public buckets.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import re
from collections.abc import Callable, Generator, Iterator
from datetime import timedelta
from typing import Any

from vitscale.errors import ConfigError, InfrastructureError
from vitscale.files.retry import (
    PATIENCE_S,
    SILENT_S,
    Again,
    Result,
    activity,
    may_pass,
    paced,
    resumed,
    with_retries,
)
from vitscale.files.store import FileStat, Paths

_CONNECT_S, _LONGEST_S = 10.0, 3600.0  # of a transfer: one that is cut there goes on


class ObjectFiles:
    """A Store of object stores' URLs. Nothing is written; transient faults are tried again, as by HttpFiles."""

    def __init__(self, patience_s: float = PATIENCE_S) -> None:
        self._patience_s = patience_s
        self._stores: dict[str, Any] = {}  # by scheme and bucket
        self._answered: set[str] = set()  # of those, they that were read or listed
        self._etags: dict[str, tuple[int, str | None]] = {}  # bytes, and what tells one state of a file from another

    def __reduce__(self) -> tuple[type[ObjectFiles], tuple[float]]:
        return type(self), (self._patience_s,)

    def list(self, pattern: str) -> Paths:
        root, key = _split(pattern)
        fixed = key[: next(match.start() for match in re.finditer(r"[*?[]", key))] if glob.has_magic(key) else key
        prefix, matches = fixed[: fixed.rfind("/") + 1], _matcher(key)

        def listed(obstore: Any, store: Any) -> list[str]:
            if "/" in key[len(prefix) :]:
                objects = (each for some in obstore.list(store, prefix=prefix or None) for each in some)
            else:
                objects = iter(obstore.list_with_delimiter(store, prefix=prefix or None)["objects"])
            return sorted(each["path"] for each in objects if matches(each["path"]))

        return [f"{root}/{each}" for each in self._asked(pattern, listed)]

    def stat(self, path: str) -> FileStat:
        meta = self._asked(path, lambda obstore, store: _head(obstore, store, _split(path)[1]))
        self._etags[path] = meta["size"], meta.get("e_tag")
        return FileStat(meta["size"], int(meta["last_modified"].timestamp() * 1_000_000_000))

    def read(self, path: str, start: int, count: int) -> bytes:
        if path not in self._etags:
            self.stat(path)
        end = min(start + count, self._etags[path][0])
        if end <= start:
            return b""
        return b"".join(resumed(lambda done: self._pieces(path, start + done, end), path, self._patience_s))

    def _pieces(self, path: str, at: int, end: int) -> Generator[bytes, None, None]:
        """Bytes from `at` to `end`, by one request."""
        etag = self._etags[path][1]
        options: dict[str, Any] = {"range": (at, end)} | ({} if etag is None else {"if_match": etag})
        if at < end:
            with self._asking(path) as (obstore, store):
                for piece in paced(obstore.get(store, _split(path)[1], options=options).stream(min_chunk_size=1)):
                    at += len(piece)
                    yield piece
            if at < end:
                raise Again("cut")

    def write(self, path: str, data: bytes) -> None:
        raise OSError(errno.EROFS, "a bucket is only read", path)

    def fetch(self, path: str, sha256: str | None) -> None:
        """See Store.fetch: it has no place for it."""

    def _asked(self, path: str, ask: Callable[[Any, Any], Result]) -> Result:
        """What a request gives, which is made again where its failure may pass."""

        def once() -> Result:
            with self._asking(path) as (obstore, store):
                return ask(obstore, store)

        return with_retries(once, path, self._patience_s)

    @contextlib.contextmanager
    def _asking(self, path: str) -> Iterator[tuple[Any, Any]]:
        """obstore, and the store of a path, for one request. Its errors become Again, or what they are for good."""
        obstore, root = _obstore(), _split(path)[0]
        activity.count += 1
        try:
            if root not in self._stores:
                self._stores[root] = _opened(obstore, root)
            yield obstore, self._stores[root]
            self._answered.add(root)
        except (obstore.exceptions.NotFoundError, FileNotFoundError):
            raise FileNotFoundError(errno.ENOENT, "no such object", path) from None
        except obstore.exceptions.PreconditionError:
            raise OSError(errno.ENODATA, "was written again while it was in use", path) from None
        except obstore.exceptions.BaseError as error:
            refusal = _refusal(path, error)
            if isinstance(refusal, Again) and root in self._answered:
                refusal.at_last = None  # the settings are right
            raise refusal from None
        except BaseException as error:
            if type(error).__name__ != "PanicException":  # obstore's, of Rust: no class that can be imported
                raise
            raise ConfigError(
                f"{path}: {_ENDPOINTS[_scheme(path)]} is no URL: it begins with http:// or https://"
            ) from None


def _obstore() -> Any:
    try:
        import obstore
        import obstore.exceptions
        import obstore.store
    except ImportError as error:
        raise ConfigError(f"s3://, gs:// and az:// need obstore ({error}); pip install 'vitscale[remote]'") from None
    return obstore


def _opened(obstore: Any, root: str) -> Any:
    """The store of a bucket; ConfigError where the environment's settings are not enough for it, or wrong."""
    options = {
        "timeout": timedelta(seconds=_LONGEST_S),
        "read_timeout": timedelta(seconds=SILENT_S),
        "connect_timeout": timedelta(seconds=_CONNECT_S),
        "allow_http": True,
    }
    try:
        return obstore.store.from_url(root, retry_config={"max_retries": 0}, client_options=options)
    except obstore.exceptions.BaseError as error:
        if "Account must be specified" in str(error):
            raise ConfigError(f"{root}: its account is not known; set AZURE_STORAGE_ACCOUNT_NAME") from None
        raise ConfigError(f"{root}: cannot be opened: {_reason(error)}; see docs/data.md for what can be set") from None


def _head(obstore: Any, store: Any, key: str) -> Any:
    """What is known of an object. An answer to HEAD does not say why it is refused: GET's does."""
    try:
        return obstore.head(store, key)
    except obstore.exceptions.BaseError as error:
        status = _status(error)
        if status is None or may_pass(status):
            raise
        return obstore.get(store, key, options={"range": (0, 1)}).meta


def _split(path: str) -> tuple[str, str]:
    """scheme://bucket, and the key in it."""
    scheme, _, rest = path.partition("://")
    bucket, _, key = rest.partition("/")
    return f"{scheme}://{bucket}", key


def _matcher(pattern: str) -> Callable[[str], bool]:
    """Whether a key matches, where as in a shell's ** alone goes through folders."""
    wild = {"**/": "(?:.*/)?", "*": "[^/]*", "?": "[^/]"}

    def translated(part: str) -> str:
        if part[:1] == "[" and part[-1:] == "]":
            return "[^" + part[2:] if part[1] == "!" else part
        return wild.get(part) or re.escape(part)

    matches = re.compile("".join(map(translated, re.split(r"(\*\*/|\*|\?|\[[^\]]+\])", pattern)))).fullmatch
    return lambda key: matches(key) is not None


# What to correct, by scheme.
_ENDPOINTS = {"s3": "AWS_ENDPOINT_URL", "gs": "GOOGLE_BASE_URL", "az": "AZURE_STORAGE_ENDPOINT"}
_HOSTS = {
    "s3": "AWS_ENDPOINT_URL, or AWS_REGION",
    "gs": "GOOGLE_BASE_URL",
    "az": "AZURE_STORAGE_ACCOUNT_NAME, or AZURE_STORAGE_ENDPOINT",
}
_CREDENTIALS = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_SKIP_SIGNATURE=true for a public bucket",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS, or GOOGLE_SKIP_SIGNATURE=true for a public bucket",
    "az": "AZURE_STORAGE_ACCOUNT_KEY or AZURE_STORAGE_SAS_TOKEN, or AZURE_SKIP_SIGNATURE=true for a public container",
}
# What obstore's errors say: the status and the server's own word for it, or what kept it from an answer.
_STATUS = re.compile(r"non-2xx status code: (\d{3})")
_CODE, _REGION = re.compile(r"<Code>(\w+)</Code>"), re.compile(r"<Region>([\w-]+)</Region>")
_NO_NAME = re.compile(r"Name or service not known|No address associated|Name does not resolve|nodename nor servname")
_TOKEN = re.compile(r"performing token request|Error performing (PUT|POST) |/latest/meta-data/|169\.254\.170\.")
_BUSY = {
    "RequestTimeout", "RequestTimeoutException", "SlowDown", "InternalError", "InternalServerError", "ServerBusy",
    "ServiceUnavailable", "OperationTimedOut", "OperationAborted", "Throttling", "ThrottlingException",
    "TooManyRequests", "RequestLimitExceeded", "BandwidthLimitExceeded",
}  # fmt: skip
_ELSEWHERE = ("PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException")
_RAN_OUT = ("ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired")


def _refusal(path: str, error: Exception) -> Exception:
    """What an error of obstore comes to: Again for what may pass."""
    text, status = str(error), _status(error)
    code = found[1] if (found := _CODE.search(text)) else ""
    why = code or (f"HTTP {status}" if status else _reason(error))
    if code in _ELSEWHERE or "redirect without LOCATION" in text:
        return _elsewhere(path, text, why)
    if code == "RequestTimeTooSkewed":
        return InfrastructureError(f"{path}: {why}: the clock of this machine is off; set it, or use another machine")
    if code in _RAN_OUT:
        return ConfigError(f"{path}: {why}: the credentials of the environment ran out; renew them")
    if _TOKEN.search(text.partition("\n")[0]):
        what = f"no credentials, neither in the environment nor from this machine ({why})"
        at_last = ConfigError(f"{path}: {what}; set {_CREDENTIALS[_scheme(path)]}")
        return Again(f"credentials: {why}", at_last=None if status and may_pass(status) else at_last)
    if _NO_NAME.search(text):
        host = found[1] if (found := re.search(r"https?://([^/\s:]+)", text)) else "its server"
        at_last = ConfigError(f"{path}: no host of that name is known here: {host}; correct {_HOSTS[_scheme(path)]}")
        return Again(f"no host {host}", at_last=at_last)
    if code in _BUSY or (status is not None and (status == 409 or may_pass(status))):
        return Again(why)
    return _refusal_for_good(path, text, status, why)


def _refusal_for_good(path: str, text: str, status: int | None, why: str) -> Exception:
    if status == 404:
        return FileNotFoundError(errno.ENOENT, f"no such bucket or object ({why})", path)
    if status in (401, 403):
        return PermissionError(errno.EACCES, f"may not be read: {why}", path)
    if status == 407:
        way = "put a user and a password into http_proxy or https_proxy, whichever names it"
        return PermissionError(errno.EACCES, f"the proxy asks for a user and password (HTTP 407): {way}", path)
    if "InvalidCertificate" in text:
        return OSError(errno.EPROTO, "its certificate is not one that this machine trusts", path)
    if "non-partial response" in text:
        return OSError(errno.EPROTO, "its server ignores ranges", path)
    return Again(why) if status is None else OSError(errno.EPROTO, why, path)


def _elsewhere(path: str, text: str, why: str) -> ConfigError:
    if _scheme(path) != "s3":
        return ConfigError(f"{path}: its server sends to nowhere; correct {_HOSTS[_scheme(path)]}")
    region = f"={found[1]}" if (found := _REGION.search(text)) else ""
    why = why if why in _ELSEWHERE else "redirected"
    return ConfigError(
        f"{path}: its bucket is of another region than AWS_REGION says ({why}); set AWS_REGION{region}, and "
        "AWS_ENDPOINT_URL where it is not Amazon's"
    )


def _scheme(path: str) -> str:
    return path.partition(":")[0].lower()


def _status(error: Exception) -> int | None:
    """The HTTP status that obstore tells of."""
    found = _STATUS.search(str(error))
    return int(found[1]) if found else None


def _reason(error: Exception) -> str:
    """The first line, without what follows it of URLs and bodies, and what the system said."""
    text = re.sub(r"https?://\S+", "its server", str(error).strip())
    system = f" ({found[1]})" if (found := re.search(r'message: "([^"]+)"', text)) else ""
    line = re.sub(r"^Generic \w+ error: |Error performing [A-Z]+ its server in \S+ - ", "", text.partition("\n")[0])
    return f"{line[:200] or type(error).__name__}{system}"
