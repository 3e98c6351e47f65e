"""Files in object stores: s3://bucket/key, gs://bucket/key, az://container/key, by obstore (the extra `remote`).

Endpoint, region and credentials are those of the environment and of the machine, as each vendor's own tools read them:
AWS_ENDPOINT_URL, AWS_REGION, AWS_ACCESS_KEY_ID, ..., AWS_SKIP_SIGNATURE=true for public buckets.
"""

from __future__ import annotations

import errno
import glob
import re
from collections.abc import Callable
from typing import Any, TypeVar

from vitscale.errors import ConfigError
from vitscale.files.retry import PATIENCE_S, UnavailableError, activity, with_retries
from vitscale.files.store import FileStat, Paths

Result = TypeVar("Result")

_TIMEOUT, _CONNECT_TIMEOUT = "60s", "10s"  # of one request: its bytes are at most those of a piece


class ObjectFiles:
    """A Store of object stores' URLs. Nothing is written; transient faults are tried again, as by HttpFiles."""

    def __init__(self, patience_s: float = PATIENCE_S) -> None:
        self._patience_s = patience_s
        self._stores: dict[str, Any] = {}  # by scheme and bucket
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
        meta = self._asked(path, lambda obstore, store: obstore.head(store, _split(path)[1]))
        self._etags[path] = meta["size"], meta.get("e_tag")
        return FileStat(meta["size"], int(meta["last_modified"].timestamp() * 1_000_000_000))

    def read(self, path: str, start: int, count: int) -> bytes:
        if path not in self._etags:
            self.stat(path)
        size, etag = self._etags[path]
        end = min(start + count, size)
        if end <= start:
            return b""
        options: dict[str, Any] = {"range": (start, end)} | ({} if etag is None else {"if_match": etag})
        data: bytes = self._asked(
            path, lambda obstore, store: bytes(obstore.get(store, _split(path)[1], options=options).bytes())
        )
        return data

    def write(self, path: str, data: bytes) -> None:
        raise OSError(errno.EROFS, "a bucket is only read", path)

    def fetch(self, path: str, sha256: str | None) -> None:
        """See Store.fetch: it has no place for it."""

    def _asked(self, path: str, ask: Callable[[Any, Any], Result]) -> Result:
        """What a request gives; its errors as OSErrors of this path, those that may pass tried again."""
        obstore = _obstore()
        errors = obstore.exceptions
        root = _split(path)[0]

        def once() -> Result:
            activity.count += 1
            try:
                if root not in self._stores:
                    self._stores[root] = obstore.store.from_url(
                        root, retry_config={"max_retries": 0},
                        client_options={"timeout": _TIMEOUT, "connect_timeout": _CONNECT_TIMEOUT, "allow_http": True},
                    )  # fmt: skip
                return ask(obstore, self._stores[root])
            except (errors.NotFoundError, FileNotFoundError):
                raise FileNotFoundError(errno.ENOENT, "no such object", path) from None
            except (errors.PermissionDeniedError, errors.UnauthenticatedError) as error:
                raise PermissionError(errno.EACCES, f"may not be read: {_reason(error)}", path) from None
            except errors.PreconditionError:
                raise OSError(errno.ENODATA, "was written again while it was in use", path) from None
            except errors.BaseError as error:
                raise _refusal(path, error) from None

        try:
            return with_retries(once, path, self._patience_s)
        except UnavailableError:
            raise
        except OSError as error:
            error.filename = error.filename or path
            raise


def _obstore() -> Any:
    try:
        import obstore
        import obstore.exceptions
        import obstore.store
    except ImportError as error:
        raise ConfigError(f"s3://, gs:// and az:// need obstore ({error}); pip install 'vitscale[remote]'") from None
    return obstore


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


_STATUS = re.compile(r"\b(4\d\d) [A-Z][a-z]")
_MAY_PASS = ("408", "409", "425", "429")


def _refusal(path: str, error: Exception) -> OSError:
    """What another answer comes to: EIO for what may pass. A server's own word for it stands in its XML."""
    status, code = _STATUS.search(str(error)), re.search(r"<Code>(\w+)</Code>", str(error))
    why = code[1] if code else _reason(error)
    if status is None or status[1] in _MAY_PASS:
        return OSError(errno.EIO, why, path)
    if status[1] == "404":
        return FileNotFoundError(errno.ENOENT, f"no such bucket or object ({why})", path)
    if status[1] in ("401", "403"):
        return PermissionError(errno.EACCES, f"may not be read: {why}", path)
    return OSError(errno.EPROTO, why, path)


def _reason(error: Exception) -> str:
    """The first line, without what follows it of URLs and bodies."""
    text = re.sub(r"https?://\S+", "its server", str(error).strip())
    return text.partition("\n")[0][:200] or type(error).__name__
