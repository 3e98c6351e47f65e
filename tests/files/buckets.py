"""As much of the protocols of S3, Google and Azure as reading needs, on loopback: get by ranges, head, list; faults."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import parse_qs, urlsplit
from xml.sax.saxutils import escape

import pytest

from tests.files.web import CHANGED, ETAG, Handler, Misbehave, Web, running

PAGE = 2  # entries of a list's page: few, so that lists have several


class Bucket(Handler):
    """Buckets are the first part of a path; Google's lists are those of S3."""

    def do_GET(self) -> None:
        asked = {name: values[0] for name, values in parse_qs(urlsplit(self.path).query).items()}
        path = self.path.partition("?")[0]
        if self.headers.get("If-Match", ETAG) != ETAG:
            self.range = None
            self.answer(412)
        elif "list-type" in asked or asked.get("comp") == "list":
            self.range, faults = None, self.server.faults.get(path)
            if not (faults and faults.pop(0)(self, b"", 0, 0)):
                self.list(path, asked)
        else:
            super().do_GET()

    do_HEAD = do_GET

    def list(self, path: str, asked: dict[str, str]) -> None:
        bucket, prefix, delimiter = f"{path}/", asked.get("prefix", ""), asked.get("delimiter")
        keys = [name.removeprefix(bucket) for name in sorted(self.server.files) if name.startswith(bucket + prefix)]
        below = [key.removeprefix(prefix).partition(delimiter) if delimiter else (key, "", "") for key in keys]
        cut = [prefix + front + mark if mark else key for key, (front, mark, _) in zip(keys, below, strict=True)]
        names = list(dict.fromkeys(cut))
        first = int(asked.get("continuation-token", asked.get("marker", 0)))
        page, more = names[first : first + PAGE], first + PAGE < len(names)
        entries = "".join(self.entry(bucket, name, name in keys, "comp" in asked) for name in page)
        following = str(first + PAGE) if more else ""
        if "comp" in asked:
            kind, text = "EnumerationResults", f"<Blobs>{entries}</Blobs><NextMarker>{following}</NextMarker>"
        else:
            token = f"<NextContinuationToken>{following}</NextContinuationToken>" if more else ""
            kind, text = "ListBucketResult", f"<IsTruncated>{str(more).lower()}</IsTruncated>{token}{entries}"
        self.answer(200, {"Content-Type": "application/xml"}, f"<{kind}>{text}</{kind}>".encode())

    def entry(self, bucket: str, name: str, is_object: bool, azure: bool) -> str:
        shown = escape(name)
        if not is_object:
            kind, tag = ("BlobPrefix", "Name") if azure else ("CommonPrefixes", "Prefix")
            return f"<{kind}><{tag}>{shown}</{tag}></{kind}>"
        size = len(self.server.files[bucket + name])
        if azure:
            about = (
                f"<Last-Modified>{CHANGED}</Last-Modified><Content-Length>{size}</Content-Length><Etag>{ETAG}</Etag>"
            )
            return f"<Blob><Name>{shown}</Name><Properties>{about}<Content-Type>a/b</Content-Type></Properties></Blob>"
        about = f"<Size>{size}</Size><LastModified>2026-10-21T07:28:00Z</LastModified><ETag>{ETAG}</ETag>"
        return f"<Contents><Key>{shown}</Key>{about}</Contents>"


# The environment of a scheme, with the server's URL for {}.
ENVIRONMENTS = {
    "s3": {
        "AWS_ENDPOINT_URL": "{}",
        "AWS_ACCESS_KEY_ID": "me",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_REGION": "us-east-1",
    },
    "gs": {"GOOGLE_BASE_URL": "{}", "GOOGLE_SKIP_SIGNATURE": "true"},
    "az": {
        "AZURE_STORAGE_ENDPOINT": "{}",
        "AZURE_STORAGE_ACCOUNT_NAME": "me",
        "AZURE_STORAGE_ACCOUNT_KEY": "c2VjcmV0",
    },
}


@contextmanager
def cloud(scheme: str) -> Iterator[Web]:
    """A server of this scheme, which the environment names."""
    with running(Web(Bucket)) as web, pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENTS[scheme].items():
            patch.setenv(name, value.format(web.url))
        yield web


def refusal(status: int, code: str, more: str = "") -> Misbehave:
    """An error as S3 puts it; HEAD has no body."""

    def fault(handler: Handler, data: bytes, start: int, end: int) -> bool:
        body = f'<?xml version="1.0"?><Error><Code>{code}</Code><Message>m</Message>{more}</Error>'.encode()
        handler.answer(status, {"Content-Type": "application/xml"}, body)
        return True

    return fault
