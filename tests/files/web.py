"""A real HTTP server on loopback that misbehaves as it is told."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, TypeVar
from urllib.parse import unquote

import urllib3

ETAG, CHANGED = '"one"', "Wed, 21 Oct 2026 07:28:00 GMT"
Misbehave = Callable[["Handler", bytes, int, int], bool]  # (handler, file, first byte, byte after the last) -> done


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Web

    def do_GET(self) -> None:
        web, name = self.server, unquote(self.path.partition("?")[0])
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

    def do_CONNECT(self) -> None:
        """As a proxy that connects to nobody."""
        self.range = None
        faults = self.server.faults.get(self.path, [])
        if not (faults and faults.pop(0)(self, b"", 0, 0)):
            self.answer(502)

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
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


class Web(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, handler: type[Handler] = Handler) -> None:
        super().__init__(("127.0.0.1", 0), handler)
        self.files: dict[str, bytes] = {}
        self.faults: dict[str, list[Misbehave]] = {}  # of a file's next requests, in order
        self.requests: list[tuple[str, str | None]] = []  # (path, Range)
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, *_: Any) -> None:
        """Clients that break off are no errors here."""


class Between(BaseHTTPRequestHandler):
    """Passes requests on to another server, and of each path's GETs every third transfer in halves, or not at all."""

    protocol_version = "HTTP/1.1"
    server: Proxy

    def do_GET(self) -> None:
        proxy, name = self.server, self.path.partition("?")[0]
        with proxy.lock:
            number = proxy.asked[name] = proxy.asked.get(name, -1) + 1
        headers = {key: value for key, value in self.headers.items() if key.lower() != "connection"}
        answer = proxy.pool.request(
            self.command, proxy.target + self.path, headers=headers, retries=False, redirect=False, decode_content=False
        )
        whole = self.command == "GET" and answer.status in (200, 206) and len(answer.data) > 1000
        if whole and number % 3 == 1:
            proxy.faults += 1
            self.send_error(503, "Slow Down")
            return
        self.send_response(answer.status)
        for key, value in answer.headers.items():
            if key.lower() not in ("connection", "transfer-encoding", "content-length", "date", "server"):
                self.send_header(key, value)
        self.send_header("Content-Length", answer.headers.get("Content-Length", str(len(answer.data))))
        self.end_headers()
        if whole and number % 3 == 2:
            proxy.faults += 1
            self.wfile.write(answer.data[: len(answer.data) // 2])
            self.close_connection = True
            return
        self.wfile.write(answer.data)

    do_HEAD = do_GET

    def log_message(self, *_: Any) -> None:
        pass


class Proxy(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, target: str) -> None:
        super().__init__(("127.0.0.1", 0), Between)
        self.target, self.pool, self.lock = target, urllib3.PoolManager(), threading.Lock()
        self.asked: dict[str, int] = {}
        self.faults = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, *_: Any) -> None:
        """Clients that break off are no errors here."""


S = TypeVar("S", bound=ThreadingHTTPServer)


@contextmanager
def running(web: S) -> Iterator[S]:
    thread = threading.Thread(target=web.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield web
    finally:
        web.shutdown()
        thread.join()
        web.server_close()


def served() -> AbstractContextManager[Web]:
    return running(Web())


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
