"""A stand-in for the hub on 127.0.0.1 that serves folders as repos, and can misbehave in the ways in which networks do.

    with FakeHub({"org/name": folder, "datasets/org/name": other}) as hub:
        hub.connect(monkeypatch)      # this process's huggingface_hub asks it from now on
        hub.environment               # and this makes a child process ask it

As with the real hub, large files (LFS) are answered with a redirect to a second server on another port, the CDN. A repo
has one branch, `main`, and one commit, whose id follows from the contents: change the folder, and the branch has moved.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import socket
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

__all__ = ["FakeHub", "Faults", "SeenRequest", "blob_id", "sha256"]

_LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".gguf", ".model", ".parquet")
_BLOCK_BYTES = 64 * 1024


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def blob_id(data: bytes) -> str:
    """git's hash of a file with this content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass(frozen=True)
class SeenRequest:
    """A request as it came in; `server` is "hub" or "cdn", header names are lower case."""

    server: str
    method: str
    path: str
    headers: dict[str, str]


@dataclass
class Faults:
    """What goes wrong. A list is used up from the front, one item per answer that it applies to; a flag stays."""

    statuses: list[int] = field(default_factory=list)
    """Answer with this status instead."""
    status_headers: dict[str, str] = field(default_factory=dict)
    """Headers of those answers."""
    cuts: list[int] = field(default_factory=list)
    """Cut the connection after this many bytes of a file's body."""
    stalls: list[int] = field(default_factory=list)
    """Send nothing more after this many bytes of a body, until `FakeHub.released` is set."""
    short_ends: list[int] = field(default_factory=list)
    """End the body after this many bytes, without an announced length, as if that were all."""
    flips: int = 0
    """Change one bit in the middle of this many bodies."""
    pages: list[bytes] = field(default_factory=list)
    """Answer with this web page, without an announced length, in place of a file."""
    ignores_range: bool = False
    """Always send the whole file."""
    refuses_range: bool = False
    """Answer 416 to every Range."""
    shifts_range: bool = False
    """Send the right status and other bytes than those asked for."""
    compresses: bool = False
    """Compress small files even for those who did not ask for it."""
    wrong_length: int = 0
    """Append this many bytes to every file, with a length that fits them."""
    other_commit: str | None = None
    """Name this commit in the answers to downloads."""
    other_etag: str | None = None
    """Name this SHA-256 in the redirects to the CDN."""
    listing: bytes | None = None
    """Answer the question for a model with this."""
    extra_files: list[dict[str, Any]] = field(default_factory=list)
    """List these files too, as they stand."""


class FakeHub:
    """Serves `repos`, which maps ids to folders, those of data sets with `datasets/` in front. Everything but the
    folders can be changed while it runs.

    `tokens` are the access tokens that exist. `private` repos are there for any of them, the files of `gated` ones for
    those in `accepted`; `renamed` maps old ids to new ones. `requests` holds what was asked, `body_bytes` what was sent
    of each file, by `org/name/path`.
    """

    def __init__(self, repos: Mapping[str, Path]) -> None:
        self.repos = dict(repos)
        self.tokens: set[str] = set()
        self.accepted: set[str] = set()
        self.private: set[str] = set()
        self.gated: set[str] = set()
        self.renamed: dict[str, str] = {}
        self.faults = Faults()
        self.released = threading.Event()
        self.requests: list[SeenRequest] = []
        self.body_bytes: dict[str, int] = {}
        self.lock = threading.Lock()
        self._servers: list[_Server] = []

    def __enter__(self) -> FakeHub:
        self._servers = [_Server(partial(_HubHandler, self)), _Server(partial(_CdnHandler, self))]
        return self

    def __exit__(self, *_: object) -> None:
        from huggingface_hub.utils import close_session  # type: ignore[attr-defined]  # public, not marked as exported

        self.released.set()
        close_session()
        for server in self._servers:
            server.stop()

    @property
    def url(self) -> str:
        return self._servers[0].url

    @property
    def cdn_url(self) -> str:
        return self._servers[1].url

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables that make a process ask this hub, directly and without anybody's token."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_TOKEN_PATH": "/nonexistent/token",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }

    def connect(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Make huggingface_hub in this process ask this hub until the test ends. It read its settings on import."""
        from huggingface_hub import constants
        from huggingface_hub.utils import close_session  # type: ignore[attr-defined]  # public, not marked as exported

        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE"):
            monkeypatch.delenv(name, raising=False)
        for name in ("NO_PROXY", "no_proxy"):
            monkeypatch.setenv(name, "127.0.0.1")
        monkeypatch.setattr(constants, "ENDPOINT", self.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", self.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nonexistent/token")
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        close_session()

    def commit(self, repo: str) -> str:
        """The commit that `main` stands for: it follows from the names and bytes of the files."""
        digest = hashlib.sha1()
        for path, data in sorted(self.contents(repo).items()):
            digest.update(f"{path}\0{sha256(data)}\n".encode())
        return digest.hexdigest()

    def contents(self, repo: str) -> dict[str, bytes]:
        """Every file of the repo."""
        folder = self.repos[repo]
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    def seen(self, server: str, method: str = "GET", path: str = "") -> list[SeenRequest]:
        """The requests to `server` whose path contains `path`."""
        with self.lock:
            return [
                seen for seen in self.requests if (seen.server, seen.method) == (server, method) and path in seen.path
            ]


class _Server(ThreadingHTTPServer):
    """An HTTP server in a thread of its own, whose `stop` also ends the connections that clients keep open."""

    daemon_threads = True

    def __init__(self, handler: Callable[..., BaseHTTPRequestHandler]) -> None:
        super().__init__(("127.0.0.1", 0), handler)
        self._connections: set[socket.socket] = set()
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def stop(self) -> None:
        self.shutdown()
        self._thread.join()
        for connection in list(self._connections):
            _hang_up(connection)
        self.server_close()

    def process_request(self, request: Any, client_address: Any) -> None:
        self._connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is what many tests are about."""


def _hang_up(connection: socket.socket) -> None:
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server_name = ""

    def __init__(self, hub: FakeHub, *args: Any) -> None:
        self.hub = hub
        super().__init__(*args)

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        with self.hub.lock:
            self.hub.requests.append(SeenRequest(self.server_name, self.command, self.path, headers))
        self.answer(unquote(urlsplit(self.path).path), parse_qs(urlsplit(self.path).query))

    def answer(self, path: str, query: dict[str, list[str]]) -> None:
        raise NotImplementedError

    def reply(self, status: int, headers: Mapping[str, str], body: bytes = b"") -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def reply_error(self, status: int, message: str, code: str | None = None) -> None:
        named = {} if code is None else {"X-Error-Code": code}
        self.reply(status, {"X-Error-Message": message, **named}, json.dumps({"error": message}).encode())

    def send_file(self, key: str, data: bytes, headers: Mapping[str, str]) -> None:
        """Answer with a file or the part of it that was asked for, as well as the faults allow."""
        faults = self.hub.faults
        data += b"\0" * faults.wrong_length
        with self.hub.lock:
            page = faults.pages.pop(0) if faults.pages else None
            if faults.flips:
                faults.flips -= 1
                middle = len(data) // 2
                data = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
        if page is not None:
            return self._send_page(page)
        asked = self.headers.get("Range")
        if asked and faults.refuses_range:
            return self.reply(416, {"Content-Range": f"bytes */{len(data)}"})
        if asked and not faults.ignores_range:
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
            if start >= len(data):
                return self.reply(416, {"Content-Range": f"bytes */{len(data)}"})
            start += faults.shifts_range
            place = {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}", "Accept-Ranges": "bytes"}
            return self._send_body(206, key, data[start:], {**headers, **place})
        return self._send_body(200, key, data, {**headers, "Accept-Ranges": "bytes"})

    def _send_page(self, page: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(page)

    def _send_body(self, status: int, key: str, body: bytes, headers: Mapping[str, str]) -> None:
        faults = self.hub.faults
        length = {"Content-Length": str(len(body))}
        with self.hub.lock:
            cut = faults.cuts.pop(0) if faults.cuts else None
            stall = faults.stalls.pop(0) if faults.stalls else None
            if faults.short_ends:
                body, length = body[: faults.short_ends.pop(0)], {"Connection": "close"}
        self.send_response(status)
        for name, value in {**length, **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        self._send_blocks(key, body[: min(stop for stop in (cut, stall, len(body)) if stop is not None)])
        if stall is not None:
            self.hub.released.wait()
        if cut is not None or stall is not None or "Connection" in length:
            self.close_connection = True

    def _send_blocks(self, key: str, body: bytes) -> None:
        for start in range(0, len(body), _BLOCK_BYTES):
            block = body[start : start + _BLOCK_BYTES]
            self.wfile.write(block)
            with self.hub.lock:
                self.hub.body_bytes[key] = self.hub.body_bytes.get(key, 0) + len(block)


class _HubHandler(_Handler):
    server_name = "hub"

    def answer(self, path: str, query: dict[str, list[str]]) -> None:
        hub = self.hub
        with hub.lock:
            status = hub.faults.statuses.pop(0) if hub.faults.statuses else None
        if status is not None:
            return self.reply(status, hub.faults.status_headers, b"no")
        api, parts = path.startswith("/api/"), path.removeprefix("/api").removeprefix("/models").strip("/").split("/")
        width = 3 if parts[0] == "datasets" else 2
        repo, rest = "/".join(parts[:width]), parts[width:]
        if repo in hub.renamed:
            return self.reply(307, {"Location": self.path.replace(repo, hub.renamed[repo])})
        if not self._may_see(repo):
            return None
        if api and (not rest or rest[0] == "revision"):
            if self._has_revision(repo, "/".join(rest[1:]) or "main"):
                self._describe(repo, with_blobs=query.get("blobs") == ["true"])
        elif not api and len(rest) > 2 and rest[0] == "resolve":
            if self._may_read(repo) and self._has_revision(repo, rest[1]):
                self._resolve(repo, "/".join(rest[2:]))
        else:
            self.reply_error(404, "Sorry, we can't find the page you are looking for.")
        return None

    @property
    def _token(self) -> str | None:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None

    def _may_see(self, repo: str) -> bool:
        hub, token = self.hub, self._token
        if token is not None and token not in hub.tokens:
            self.reply_error(401, "Invalid credentials in Authorization header")
            return False
        if repo not in hub.repos or (repo in hub.private and token is None):
            if token is None:
                self.reply_error(401, "Invalid username or password.")
            else:
                self.reply_error(404, "Repository not found", "RepoNotFound")
            return False
        return True

    def _may_read(self, repo: str) -> bool:
        if repo not in self.hub.gated or self._token in self.hub.accepted:
            return True
        restricted = f"Access to model {repo} is restricted"
        if self._token is None:
            self.reply_error(401, f"{restricted}. You must have access to it and be authenticated.", "GatedRepo")
        else:
            self.reply_error(403, f"{restricted} and you are not in the authorized list.", "GatedRepo")
        return False

    def _has_revision(self, repo: str, revision: str) -> bool:
        if revision in ("main", self.hub.commit(repo)):
            return True
        self.reply_error(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return False

    def _describe(self, repo: str, *, with_blobs: bool) -> None:
        hub = self.hub
        files = [_listing(path, data, with_blobs) for path, data in sorted(hub.contents(repo).items())]
        answer = {
            "_id": "0123456789abcdef01234567",
            "id": repo.removeprefix("datasets/"),
            "modelId": repo,
            "sha": hub.commit(repo),
            "private": repo in hub.private,
            "gated": "auto" if repo in hub.gated else False,
            "siblings": files + hub.faults.extra_files,
        }
        body = json.dumps(answer).encode() if hub.faults.listing is None else hub.faults.listing
        self.reply(200, {"Content-Type": "application/json; charset=utf-8"}, body)

    def _resolve(self, repo: str, path: str) -> None:
        hub = self.hub
        data = hub.contents(repo).get(path)
        commit = {"X-Repo-Commit": hub.faults.other_commit or hub.commit(repo)}
        if data is None:
            self.reply_error(404, "Entry not found", "EntryNotFound")
        elif path.endswith(_LFS_SUFFIXES):
            linked = {
                "X-Linked-Etag": f'"{hub.faults.other_etag or sha256(data)}"',
                "X-Linked-Size": str(len(data)),
                "Location": f"{hub.cdn_url}/{repo}/{path}?signature=0123",
            }
            self.reply(302, {**commit, **linked}, b"Found. Redirecting")
        elif hub.faults.compresses or "gzip" in self.headers.get("Accept-Encoding", ""):
            compressed = {"Content-Encoding": "gzip", "ETag": f'W/"{blob_id(data)}"'}
            self._send_body(200, f"{repo}/{path}", gzip.compress(data), {**commit, **compressed})
        else:
            self.send_file(f"{repo}/{path}", data, {**commit, "ETag": f'"{blob_id(data)}"'})


class _CdnHandler(_Handler):
    server_name = "cdn"

    def answer(self, path: str, query: dict[str, list[str]]) -> None:
        repo = next(repo for repo in self.hub.repos if path.startswith(f"/{repo}/"))
        name = path.removeprefix(f"/{repo}/")
        if "Authorization" in self.headers or query.get("signature") != ["0123"]:
            return self.reply(400, {}, b"Only one auth mechanism allowed")
        data = self.hub.contents(repo)[name]
        return self.send_file(f"{repo}/{name}", data, {"ETag": f'"{sha256(data)}"'})


def _listing(path: str, data: bytes, with_blobs: bool) -> dict[str, Any]:
    if not with_blobs:
        return {"rfilename": path}
    if not path.endswith(_LFS_SUFFIXES):
        return {"rfilename": path, "size": len(data), "blobId": blob_id(data)}
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256(data)}\nsize {len(data)}\n".encode()
    lfs = {"sha256": sha256(data), "size": len(data), "pointerSize": len(pointer)}
    return {"rfilename": path, "size": len(data), "blobId": blob_id(pointer), "lfs": lfs}
