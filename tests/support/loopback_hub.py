"""A hub on loopback: speaks enough of the Hugging Face protocol for models and data, and fails as told."""

from __future__ import annotations

import base64
import hashlib
import http.server
import json
import re
import socket
import struct
import threading
import time
import urllib.parse
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_API = re.compile(
    r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(auth-check|revision|tree|paths-info|refs)(?:/([^/]+))?(.*))?"
)
_WRITE = re.compile(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/[^/]+")
_RESOLVE = re.compile(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")

_REFUSALS = {  # status: the Hub's X-Error-Code for it
    401: "RepoNotFound",
    403: "GatedRepo",
    404: "RepoNotFound",
}


@dataclass
class Fault:
    """What the hub does to the next `times` requests that fit.

    Args:
        kind: a status to answer with, or `cut` (half of the body, then the connection closes), `reset` (likewise, by a
            TCP reset), `stall` (never answers), `stall in the middle` (half of the body, then silence), `outage` (the
            connection closes, and the hub refuses new ones for `seconds`).
        path: a regular expression that the path and its query must hold.
        after: how many fitting requests are served well before.
    """

    kind: int | str
    path: str = ""
    times: int = 1
    method: str = "GET|HEAD|POST"
    after: int = 0
    seconds: float = 2.0
    headers: dict[str, str] = field(default_factory=dict)


class LoopbackHub:
    """Serves {directory}/models/{owner}/{name}/... and {directory}/datasets/{owner}/{name}/...

    Whoever shows a token is `user`, and may write.

    Attributes:
        user: what the hub says of them.
        injected: how many faults of each kind were really served.
        requests: every request, as `GET /path`.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.user: dict[str, Any] = {
            "name": "somebody",
            "orgs": [{"name": "lab"}],
            "auth": {"accessToken": {"role": "write"}},
        }
        self.faults: list[Fault] = []
        self.injected: Counter[str] = Counter()
        self.requests: list[str] = []
        self.released = threading.Event()  # lets stalled requests go
        self._lock = threading.Lock()
        self._port = 0
        self._serve()
        self.url = f"http://127.0.0.1:{self._port}"

    def _serve(self) -> None:
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", self._port), handler)
        self._server.daemon_threads = True
        self._port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def inject(self, kind: int | str, path: str = "", **how: Any) -> None:
        self.faults.append(Fault(kind, path, **how))

    def heal(self) -> None:
        """Forgets the faults that are left, and what was counted."""
        self.faults.clear()
        self.injected.clear()
        self.requests.clear()

    def close(self) -> None:
        self.released.set()
        self._server.shutdown()
        self._server.server_close()

    def environment(self, home: Path) -> dict[str, str]:
        """The environment of a process that takes this for the hub, with its cache in `home`."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DOWNLOAD_TIMEOUT": "1",
            "HF_HUB_ETAG_TIMEOUT": "1",
        }

    def take_fault(self, method: str, path: str) -> Fault | None:
        """The fault that this request is to meet, counted."""
        with self._lock:
            self.requests.append(f"{method} {path}")
            for fault in self.faults:
                if fault.times > 0 and re.search(fault.path, path) and re.fullmatch(fault.method, method):
                    if fault.after > 0:
                        fault.after -= 1
                        continue
                    fault.times -= 1
                    self.injected[str(fault.kind)] += 1
                    return fault
        return None

    def go_down(self, seconds: float) -> None:
        """Refuses connections for a while."""

        def outage() -> None:
            self._server.shutdown()
            self._server.server_close()
            time.sleep(seconds)
            self._serve()

        threading.Thread(target=outage, daemon=True).start()

    # What there is to serve.

    def repository(self, kind: str, name: str) -> Path | None:
        path = self.directory / kind / name
        return path if path.is_dir() else None

    @staticmethod
    def files(repository: Path) -> list[Path]:
        return sorted(path for path in repository.rglob("*") if path.is_file())

    def commit(self, repository: Path) -> str:
        digest = hashlib.sha1()
        for file in self.files(repository):
            digest.update(str(file.relative_to(repository)).encode() + file.read_bytes())
        return digest.hexdigest()


class _Handler(http.server.BaseHTTPRequestHandler):
    hub: LoopbackHub

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        fault = self.hub.take_fault(self.command, self.path)
        if fault is None or fault.kind in ("cut", "reset", "stall in the middle"):
            self._answer(fault)
        elif fault.kind == "stall":
            self.hub.released.wait(600)
        elif fault.kind == "outage":
            self.hub.go_down(fault.seconds)
        else:
            assert isinstance(fault.kind, int)
            body = json.dumps({"error": f"status {fault.kind}, injected"}).encode()
            code = {"X-Error-Code": _REFUSALS[fault.kind]} if fault.kind in _REFUSALS else {}
            self._send(fault.kind, body, code | fault.headers)

    do_HEAD = do_POST = do_GET

    def _answer(self, fault: Fault | None) -> None:
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        if path == "/api/whoami-v2" and "Authorization" not in self.headers:
            self._send(401, b"{}", {})
        elif path == "/api/whoami-v2":
            self._send_json(self.hub.user, fault)
        elif path == "/api/repos/create":
            wanted = json.loads(self._body())
            name = f"{wanted.get('organization') or self.hub.user['name']}/{wanted['name']}"
            (self.hub.directory / "models" / name).mkdir(parents=True)
            self._send_json({"url": f"{self.hub.url}/{name}", "id": name}, fault)
        elif path == "/api/validate-yaml":
            self._body()
            self._send_json({"errors": [], "warnings": []}, fault)
        elif found := _WRITE.fullmatch(path):
            self._write(self.hub.directory / "models" / found[1], found[2], fault)
        elif found := _API.fullmatch(path):
            kind, name, what, _revision, rest = found.groups()
            repository = self.hub.repository(kind, name)
            if repository is None:
                self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
            else:
                self._send_json(self._describe(repository, name, what, rest or ""), fault)
        elif found := _RESOLVE.fullmatch(path):
            repository = self.hub.repository("datasets" if found[1] else "models", found[2])
            file = repository / found[4] if repository else None
            if repository is None or file is None or not file.is_file():
                code = "EntryNotFound" if repository else "RepoNotFound"
                commit = {"X-Repo-Commit": self.hub.commit(repository)} if repository else {}
                self._send(404, b"", {"X-Error-Code": code} | commit)
            else:
                self._send_file(repository, file, fault)
        else:
            self._send(404, b"{}", {})

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _write(self, repository: Path, what: str, fault: Fault | None) -> None:
        """The two steps of a commit: how each file is to come (here all within the commit), and the commit."""
        if what == "preupload":
            how = {"uploadMode": "regular", "shouldIgnore": False, "oid": None}
            files = [{"path": file["path"]} | how for file in json.loads(self._body())["files"]]
            self._send_json({"files": files}, fault)
            return
        for line in self._body().splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                file = repository / entry["value"]["path"]
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(base64.b64decode(entry["value"]["content"]))
        commit, name = self.hub.commit(repository), repository.relative_to(self.hub.directory / "models")
        url = f"{self.hub.url}/{name}/commit/{commit}"
        self._send_json({"success": True, "commitUrl": url, "commitOid": commit, "hookOutput": ""}, fault)

    def _describe(self, repository: Path, name: str, what: str | None, rest: str) -> Any:
        files = self.hub.files(repository)
        if what == "auth-check":
            return {}
        if what == "refs":
            return {"branches": [], "converts": [], "tags": []}
        if what in ("tree", "paths-info"):
            if what == "tree":
                below = repository / rest.strip("/")
                chosen = [path for path in below.rglob("*") if path.is_file() or path.is_dir()]
                if "recursive=true" not in self.path.lower():
                    chosen = [path for path in chosen if path.parent == below]
            else:
                form = urllib.parse.parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
                chosen = [repository / path for path in form["paths"] if (repository / path).exists()]
            return [self._entry(repository, path) for path in sorted(chosen)]
        return {
            "id": name,
            "sha": self.hub.commit(repository),
            "siblings": [{"rfilename": str(file.relative_to(repository))} for file in files],
            "lastModified": "2025-01-01T00:00:00.000Z",
            "private": False,
            "gated": False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": [],
        }

    @staticmethod
    def _entry(repository: Path, path: Path) -> dict[str, Any]:
        entry = {"type": "directory" if path.is_dir() else "file", "path": str(path.relative_to(repository))}
        content = b"" if path.is_dir() else path.read_bytes()
        return entry | {"size": len(content), "oid": hashlib.sha1(content).hexdigest()}

    def _send_file(self, repository: Path, file: Path, fault: Fault | None) -> None:
        content = file.read_bytes()
        headers = {
            "ETag": f'"{hashlib.sha1(content).hexdigest()}"',
            "X-Repo-Commit": self.hub.commit(repository),
            "Accept-Ranges": "bytes",
        }
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked is None:
            self._send(200, content, headers, fault)
            return
        start, end = int(asked[1]), min(int(asked[2] or len(content)), len(content) - 1)
        if start >= len(content):
            self._send(416, b"", headers | {"Content-Range": f"bytes */{len(content)}"})
            return
        headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
        self._send(206, content[start : end + 1], headers, fault)

    def _send_json(self, value: Any, fault: Fault | None) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"}, fault)

    def _send(self, status: int, body: bytes, headers: dict[str, str], fault: Fault | None = None) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(body[: len(body) // 2] if fault else body)
        if fault is None:
            return
        self.wfile.flush()
        if fault.kind == "stall in the middle":
            self.hub.released.wait(600)
        elif fault.kind == "reset":
            time.sleep(0.1)  # the half that was sent arrives; then a reset, not an end
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
