"""A small Hugging Face hub on this machine: what huggingface_hub asks of the real one, over HTTP.

Repositories live in memory, with branches, commits, gated and private ones, tokens, LFS uploads and
`resolve` with its headers. Clients find it by HF_ENDPOINT, which they read when they are imported, so
they run in processes of their own (`Client`).
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_of_the_owner"
Files = dict[str, bytes]


@dataclass
class Repo:
    private: bool = False
    gated: bool = False
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Files] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, files: Files, branch: str = "main", message: str = "") -> str:
        content = repr((len(self.commits), branch, sorted(files.items())))
        sha = hashlib.sha1(content.encode()).hexdigest()
        self.commits[sha], self.branches[branch] = dict(files), sha
        self.messages.append(message)
        return sha


class Hub:
    """The server, in a thread; `requests` is what it was asked, `METHOD path`."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.broken = False  # every answer is 503
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, self))
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True)

    def __enter__(self) -> Self:
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def add(self, name: str, folder: Path, **options: Any) -> Repo:
        repo = self.repos[name] = Repo(**options)
        repo.commit({path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.*")})
        return repo


class _Refused(Exception):
    def __init__(self, status: int, code: str = "", message: str = "") -> None:
        self.status, self.headers = status, {"X-Error-Code": code, "X-Error-Message": message}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, hub: Hub, *args: Any) -> None:
        self.hub = hub
        super().__init__(*args)

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        split = urlsplit(self.path)
        path, self.query = unquote(split.path), parse_qs(split.query)
        self.hub.requests.append(f"{self.command} {path}")
        try:
            if self.hub.broken:
                raise _Refused(503)
            for pattern, handle in _ROUTES:
                found = re.fullmatch(pattern, f"{self.command} {path}")
                if found:
                    handle(self, body, *found.groups())
                    return
            raise _Refused(404, "NoSuchRoute", f"{self.command} {path}")
        except _Refused as refused:
            self._send(b"{}", refused.status, **refused.headers)

    def _send(self, body: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), "Content-Type": "application/json", **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, content: Any, status: int = 200) -> None:
        self._send(json.dumps(content).encode(), status)

    def _owner(self) -> bool:
        given = self.headers.get("Authorization")
        if given not in (None, f"Bearer {TOKEN}"):
            raise _Refused(401, "", "Invalid credentials in Authorization header")
        return given is not None

    def _repo(self, name: str, content: bool = False) -> Repo:
        repo, owner = self.hub.repos.get(name), self._owner()
        if repo is None or (repo.private and not owner):  # the hub does not tell these apart
            raise _Refused(404 if owner else 401, "RepoNotFound", "Repository not found")
        if repo.gated and content and not owner:
            raise _Refused(403, "GatedRepo", "Access to this model is restricted")
        return repo

    def _files(self, repo: Repo, revision: str) -> tuple[str, Files]:
        sha = repo.branches.get(revision, revision)
        if sha not in repo.commits:
            raise _Refused(404, "RevisionNotFound", "Invalid rev id")
        return sha, repo.commits[sha]

    def info(self, _: bytes, name: str, revision: str | None) -> None:
        sha, files = self._files(self._repo(name), revision or "main")
        siblings = [{"rfilename": file} for file in sorted(files)]
        self._json({"id": name, "modelId": name, "sha": sha, "siblings": siblings, "private": False, "tags": []})

    def listing(self, _: bytes) -> None:
        author, search = self.query.get("author", [""])[0], self.query.get("search", [""])[0]
        names = [name for name in self.hub.repos if name.startswith(author) and search.lower() in name.lower()]
        self._json([{"id": name, "modelId": name, "private": False, "tags": []} for name in names])

    def refs(self, _: bytes, name: str) -> None:
        branches = self._repo(name).branches.items()
        found = [{"name": each, "ref": f"refs/heads/{each}", "targetCommit": sha} for each, sha in branches]
        self._json({"branches": found, "tags": [], "converts": []})

    def resolve(self, _: bytes, name: str, revision: str, file: str) -> None:
        sha, files = self._files(self._repo(name, content=True), revision)
        if file not in files:
            self._send(b"", 404, **{"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha})
            return
        etag = hashlib.sha1(files[file]).hexdigest()
        self._send(files[file], **{"X-Repo-Commit": sha, "ETag": f'"{etag}"', "Content-Type": "application/octet"})

    def create(self, body: bytes) -> None:
        if not self._owner():
            raise _Refused(401, "", "Invalid username or password.")
        asked = json.loads(body)
        owner = asked.get("organization") or "me"
        if owner != "me":
            raise _Refused(403, "", f"You don't have the rights to create a model under the namespace {owner}")
        name = f"{owner}/{asked['name']}"
        if name in self.hub.repos:
            self._json({"url": f"{self.hub.url}/{name}"}, 409)
            return
        self.hub.repos[name] = Repo(private=asked.get("private") or asked.get("visibility") == "private")
        self.hub.repos[name].commit({".gitattributes": b""})
        self._json({"url": f"{self.hub.url}/{name}", "name": name, "id": name})

    def branch(self, _: bytes, name: str, branch: str) -> None:
        repo = self._repo(name)
        self._json({}, 409 if branch in repo.branches else 200)
        repo.branches.setdefault(branch, repo.branches["main"])

    def yaml(self, body: bytes) -> None:
        import yaml

        front = yaml.safe_load(json.loads(body)["content"].split("---")[1])
        known = isinstance(front, dict) and isinstance(front.get("tags"), list)
        self._json({"errors": [] if known else [{"message": "no metadata"}], "warnings": []}, 200 if known else 400)

    def preupload(self, body: bytes, name: str, revision: str) -> None:
        self._files(self._repo(name), revision)
        files = [each["path"] for each in json.loads(body)["files"]]
        modes = {file: "lfs" if file.endswith(".safetensors") else "regular" for file in files}
        self._json({"files": [{"path": f, "uploadMode": mode, "shouldIgnore": False} for f, mode in modes.items()]})

    def lfs(self, body: bytes, name: str) -> None:
        self._repo(name)
        objects = [
            {**each, "actions": {"upload": {"href": f"{self.hub.url}/blobs/{each['oid']}"}}}
            for each in json.loads(body)["objects"]
        ]
        self._json({"transfer": "basic", "objects": objects})

    def blob(self, body: bytes, oid: str) -> None:
        assert hashlib.sha256(body).hexdigest() == oid
        self.hub.blobs[oid] = body
        self._send(b"")

    def commit(self, body: bytes, name: str, revision: str) -> None:
        repo = self._repo(name)
        files = dict(self._files(repo, revision)[1])
        message = ""
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                message = value["summary"]
            elif entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
            elif entry["key"] == "deletedFile":
                del files[value["path"]]
        sha = repo.commit(files, "pr/1" if "create_pr" in self.query else revision, message)
        made = {"commitUrl": f"{self.hub.url}/{name}/commit/{sha}", "commitOid": sha}
        if "create_pr" in self.query:
            made["pullRequestUrl"] = f"{self.hub.url}/{name}/discussions/1"
        self._json(made)


_NAME = r"([\w.-]+/[\w.-]+|[\w.-]+)"
_ROUTES = [
    (r"GET /api/models", _Handler.listing),
    (rf"GET /api/models/{_NAME}/refs", _Handler.refs),
    (rf"GET /api/models/{_NAME}/revision/(.+)", _Handler.info),
    (rf"GET /api/models/{_NAME}()", _Handler.info),
    (rf"(?:GET|HEAD) /{_NAME}/resolve/([^/]+)/(.+)", _Handler.resolve),
    (r"POST /api/repos/create", _Handler.create),
    (r"POST /api/validate-yaml", _Handler.yaml),
    (rf"POST /api/models/{_NAME}/branch/(.+)", _Handler.branch),
    (rf"POST /api/models/{_NAME}/preupload/(.+)", _Handler.preupload),
    (rf"POST /api/models/{_NAME}/commit/(.+)", _Handler.commit),
    (rf"POST /{_NAME}\.git/info/lfs/objects/batch", _Handler.lfs),
    (r"PUT /blobs/(\w+)", _Handler.blob),
]

_WORKER = """
import contextlib, io, json, sys
names = {}
for line in sys.stdin:
    answer = {"value": None, "error": None}
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(sys.stderr):
        try:
            exec(json.loads(line), names)
            answer["value"] = names.pop("value", None)
        except Exception as error:
            answer["error"] = [type(error).__name__, str(error)]
    print(json.dumps({**answer, "stderr": said.getvalue()}), flush=True)
"""


class Client:
    """A Python process that sees the hub at `endpoint`; runs code, which leaves its result in `value`."""

    def __init__(self, endpoint: str, home: Path, **environment: str) -> None:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGINGFACE"))}
        quiet = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", _WORKER],
            env=kept | quiet | {"HF_ENDPOINT": endpoint, "HF_HOME": str(home)} | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def __call__(self, code: str) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(code) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.communicate()
