"""A real HTTP server on loopback that misbehaves as it is told."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

ETAG, CHANGED = '"one"', "Wed, 21 Oct 2026 07:28:00 GMT"
Misbehave = Callable[["Handler", bytes, int, int], bool]  # (handler, file, first byte, byte after the last) -> done


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Web

    def do_GET(self) -> None:
        web, name = self.server, self.path.partition("?")[0]
        self.range = self.headers.get("Range")
        with web.lock:
            web.requests.append((name, self.range))
            faults = web.faults.get(name, [])
            fault = faults.pop(0) if faults else None
        data = web.files.get(name)
        if data is None:
            self.answer(404)
            return
        start, end = 0, len(data)
        if self.range:
            first, _, last = self.range.removeprefix("bytes=").partition("-")
            start, end = int(first), min(int(last) + 1, len(data)) if last else len(data)
        if fault is not None and fault(self, data, start, end):
            return
        if start >= len(data):
            self.answer(416, {"Content-Range": f"bytes */{len(data)}"})
            return
        self.send(data, start, end)

    def send(self, data: bytes, start: int, end: int, **headers: str) -> None:
        """The bytes that were asked for, as a server should."""
        usual = {"ETag": ETAG, "Last-Modified": CHANGED}
        if self.range:
            usual["Content-Range"] = f"bytes {start}-{end - 1}/{len(data)}"
        self.answer(206 if self.range else 200, usual | headers, data[start:end])

    def answer(
        self, status: int, headers: dict[str, str] | None = None, body: bytes = b"", length: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


class Web(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.faults: dict[str, list[Misbehave]] = {}  # of a file's next requests, in order
        self.requests: list[tuple[str, str | None]] = []  # (path, Range)
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, *_: Any) -> None:
        """Clients that break off are no errors here."""


@contextmanager
def served() -> Iterator[Web]:
    web = Web()
    thread = threading.Thread(target=web.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield web
    finally:
        web.shutdown()
        thread.join()
        web.server_close()


def status(code: int, **headers: str) -> Misbehave:
    def fault(handler: Handler, data: bytes, start: int, end: int) -> bool:
        handler.answer(code, headers)
        return True

    return fault


def cut_after(count: int) -> Misbehave:
    """Promises all, sends `count` bytes, closes."""

    def fault(handler: Handler, data: bytes, start: int, end: int) -> bool:
        headers = {"ETag": ETAG, "Last-Modified": CHANGED, "Content-Range": f"bytes {start}-{end - 1}/{len(data)}"}
        handler.answer(206, headers, data[start : start + count], length=end - start)
        handler.close_connection = True
        return True

    return fault


def stall_after(count: int, seconds: float) -> Misbehave:
    """Sends `count` bytes, then nothing."""

    def fault(handler: Handler, data: bytes, start: int, end: int) -> bool:
        headers = {"ETag": ETAG, "Last-Modified": CHANGED, "Content-Range": f"bytes {start}-{end - 1}/{len(data)}"}
        handler.answer(206, headers, data[start : start + count], length=end - start)
        handler.wfile.flush()
        time.sleep(seconds)
        handler.close_connection = True
        return True

    return fault


def drip(seconds: float) -> Misbehave:
    """A byte now and then."""

    def fault(handler: Handler, data: bytes, start: int, end: int) -> bool:
        headers = {"ETag": ETAG, "Last-Modified": CHANGED, "Content-Range": f"bytes {start}-{end - 1}/{len(data)}"}
        handler.answer(206, headers, b"", length=end - start)
        until = time.monotonic() + seconds
        while time.monotonic() < until and start < end:
            handler.wfile.write(data[start : start + 1])
            start += 1
            time.sleep(0.05)
        handler.close_connection = True
        return True

    return fault


def whole_without_ranges(handler: Handler, data: bytes, start: int, end: int) -> bool:
    handler.answer(200, {"ETag": ETAG, "Last-Modified": CHANGED}, data)
    return True


def chunked_without_length(handler: Handler, data: bytes, start: int, end: int) -> bool:
    handler.send_response(200)
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    handler.wfile.write(b"%x\r\n%s\r\n0\r\n\r\n" % (len(data), data))
    return True


def redirected_to(url: str) -> Misbehave:
    return status(302, Location=url)


def with_headers(**headers: str) -> Misbehave:
    """The bytes, with other headers than they should have."""

    def fault(handler: Handler, data: bytes, start: int, end: int) -> bool:
        handler.send(data, start, end, **{name.replace("_", "-"): value for name, value in headers.items()})
        return True

    return fault


def hang_up(handler: Handler, data: bytes, start: int, end: int) -> bool:
    handler.close_connection = True
    return True
