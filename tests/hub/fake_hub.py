"""A small Hugging Face hub on loopback that can be told to misbehave.

It answers what the adapter asks: ``/api/models/ORG/NAME[/revision/REV]`` and ``/ORG/NAME/resolve/COMMIT/FILE`` with
ranges; large files are redirected to a second server, as the real hub redirects to its storage.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

REPO = "org/model"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE = 100_000  # files from this size are "LFS" and live on the second server


@dataclass
class FakeHub:
    """The repository, the misbehaviour, and what was asked."""

    files: dict[str, bytes]
    revisions: dict[str, str] = field(default_factory=lambda: {"main": COMMIT, "v1.0": COMMIT})
    token: str | None = None  # required to see the repository
    gated: bool = False
    break_after: list[int] = field(default_factory=list)  # bytes after which the next storage answers break off
    statuses: list[tuple[int, dict[str, str]]] = field(default_factory=list)  # answers to the next storage requests
    api_status: int | None = None
    stall_after: int | None = None  # storage answers send so many bytes and then wait
    ignore_ranges: bool = False
    not_a_hub: bool = False
    corrupt: dict[str, bytes] = field(default_factory=dict)
    url: str = ""
    storage_url: str = ""
    requests: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    sent: int = 0  # bytes of file contents

    def listing(self) -> list[dict[str, Any]]:
        entries = []
        for name, content in self.files.items():
            blob = hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
            entry: dict[str, Any] = {"rfilename": name, "size": len(content), "blobId": blob}
            if len(content) >= LARGE:
                entry["blobId"] = "0" * 40
                entry["lfs"] = {
                    "size": len(content), "sha256": hashlib.sha256(content).hexdigest(), "pointerSize": 134,
                }  # fmt: skip
            entries.append(entry)
        return entries

    def asked(self, part: str) -> list[dict[str, str]]:
        """The headers of the requests whose URL contains `part`, names in lower case."""
        return [headers for _, path, headers in self.requests if part in path]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: FakeHub
    storage = False

    def log_message(self, *_: Any) -> None:
        """Keep quiet: the requests are recorded."""

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.hub.requests.append(("storage" if self.storage else "hub", path, headers))
        if self.storage:
            self._content(path.removeprefix("/storage/"))
        elif path.startswith("/api/models/"):
            self._api(path.removeprefix("/api/models/"))
        elif found := re.fullmatch(r"/(\w+/\w+)/resolve/(\w+)/(.+)", path):
            self._resolve(*found.groups())
        else:
            self._answer(404, b"{}")

    def _refused(self) -> bool:
        authorized = self.headers.get("Authorization") == f"Bearer {self.hub.token}"
        if self.hub.gated and not authorized:
            self._answer(403, b"{}", {"X-Error-Code": "GatedRepo"})
        elif self.hub.token is not None and not authorized:
            self._answer(401, b"{}", {"X-Error-Code": "RepoNotFound"})
        else:
            return False
        return True

    def _api(self, rest: str) -> None:
        if self.hub.not_a_hub:
            self._answer(200, b"<html>Welcome to the hotel network</html>")
            return
        if self.hub.api_status is not None:
            self._answer(self.hub.api_status, b"{}")
            return
        if self._refused():
            return
        repo, _, revision = rest.partition("/revision/")
        if repo != REPO:
            self._answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
            return
        commit = self.hub.revisions.get(revision or "main", revision if revision == COMMIT else None)
        if commit is None:
            self._answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            return
        info = {"id": REPO, "sha": commit, "private": False, "tags": [], "siblings": self.hub.listing()}
        self._answer(200, json.dumps(info).encode())

    def _resolve(self, repo: str, commit: str, name: str) -> None:
        if self._refused():
            return
        if repo != REPO or commit != COMMIT or name not in self.hub.files:
            self._answer(404, b"{}", {"X-Error-Code": "EntryNotFound"})
        elif len(self.hub.files[name]) >= LARGE:
            self._answer(302, b"", {"Location": f"{self.hub.storage_url}/storage/{name}?signature=abc"})
        else:
            self._content(name)

    def _content(self, name: str) -> None:
        if self.hub.statuses:
            self._answer(self.hub.statuses[0][0], b"{}", self.hub.statuses.pop(0)[1])
            return
        content = self.hub.corrupt.get(name, self.hub.files[name])
        start, end, status = 0, len(content), 200
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked and not self.hub.ignore_ranges:
            start, status = int(asked[1]), 206
            end = min(end, int(asked[2]) + 1) if asked[2] else end
            if start >= len(content):
                self._answer(416, b"", {"Content-Range": f"bytes */{len(content)}"})
                return
        body = content[start:end]
        extra = {"Content-Range": f"bytes {start}-{end - 1}/{len(content)}"} if status == 206 else {}
        whole = len(body)
        if self.hub.break_after:
            body = body[: self.hub.break_after.pop(0)]
        if self.hub.stall_after is not None and len(body) > self.hub.stall_after:
            self._stall(status, body, extra)
            return
        self.hub.sent += len(body)
        self._answer(status, body, extra | {"ETag": '"x"', "X-Repo-Commit": COMMIT}, length=whole)
        self.close_connection = len(body) < whole

    def _stall(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self._answer(status, body[: self.hub.stall_after], headers, length=len(body))
        while self.hub.stall_after is not None:
            time.sleep(0.02)
        self.close_connection = True

    def _answer(
        self, status: int, body: bytes, headers: dict[str, str] | None = None, *, length: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        self.wfile.write(body)


@contextmanager
def running(hub: FakeHub) -> Iterator[FakeHub]:
    """Serve `hub` on two free loopback ports."""
    servers = [
        ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub, "storage": storage}))
        for storage in (False, True)
    ]
    hub.url, hub.storage_url = (f"http://127.0.0.1:{server.server_address[1]}" for server in servers)
    threads = [threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True) for server in servers]
    for thread in threads:
        thread.start()
    try:
        yield hub
    finally:
        for server, thread in zip(servers, threads, strict=True):
            server.shutdown()
            server.server_close()
            thread.join()
