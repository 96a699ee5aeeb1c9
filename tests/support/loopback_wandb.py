"""A wandb host on loopback: answers as much as a run needs, or refuses, hangs and dies as told."""

from __future__ import annotations

import http.server
import json
import threading
from collections import Counter
from typing import Any

KEY = "0123456789abcdef" * 2 + "01234567"  # of the right length, and nobody's


class LoopbackWandb:
    """Attributes:
    behaviour: `works`, `refuses`, `hangs`, or a status to answer everything with.
    becomes: the behaviour once a run has started.
    recovers_after: how many misbehaved answers there are, if there is an end to them.
    injected: how many requests met each misbehaviour (one that refuses is counted once, when it closes).
    history: the lines of history that arrived.
    """

    def __init__(self, behaviour: str | int) -> None:
        self.behaviour = behaviour
        self.injected: Counter[str] = Counter()
        self.requests: list[str] = []
        self.history: list[dict[str, Any]] = []
        self.becomes = behaviour
        self.recovers_after: int | None = None
        self.released = threading.Event()
        handler = type("Handler", (_Handler,), {"host": self})
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        if behaviour == "refuses":
            self.injected["refuses"] += 1
            self.close()

    def environment(self, directory: Any) -> dict[str, str]:
        """The environment of a process that records here, with its files in `directory`."""
        return {"WANDB_BASE_URL": self.url, "WANDB_API_KEY": KEY, "WANDB_DIR": str(directory), "WANDB_MODE": "online"}

    def close(self) -> None:
        self.released.set()
        self._server.shutdown()
        self._server.server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
    host: LoopbackWandb

    def log_message(self, *_: Any) -> None:
        pass

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        host = self.host
        operation = (
            json.loads(body).get("query", "").split("(")[0].split("{")[0].strip() if "graphql" in self.path else ""
        )
        host.requests.append(f"{self.command} {self.path} {operation}".strip())
        if host.behaviour != "works":
            host.injected[str(host.behaviour)] += 1
            if host.recovers_after == sum(host.injected.values()):
                host.behaviour, host.becomes, status = "works", "works", host.behaviour
                self._send(int(status), {"errors": [{"message": "injected"}]})
            elif host.behaviour == "hangs":
                host.released.wait(600)
            else:
                self._send(int(host.behaviour), {"errors": [{"message": "injected"}]})
            return
        if "graphql" in self.path:
            self._send(200, {"data": _answer(host.url, operation, json.loads(body).get("variables") or {})})
            if "UpsertBucket" in operation and host.becomes != host.behaviour:
                host.behaviour = host.becomes
                if host.behaviour == "refuses":
                    host.injected["refuses"] += 1
                    threading.Thread(target=host.close).start()
        elif self.path.endswith("/file_stream"):
            content = json.loads(body).get("files", {}).get("wandb-history.jsonl", {}).get("content", [])
            host.history += [json.loads(line) for line in content]
            self._send(200, {"exitcode": None, "limits": {}})
        else:
            self._send(200, {})

    do_GET = do_PUT = do_POST

    def _send(self, status: int, value: Any) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def _answer(url: str, operation: str, variables: dict[str, Any]) -> dict[str, Any]:
    if "UpsertBucket" in operation:
        name = variables.get("name") or "run"
        project = {"id": "cA==", "name": variables.get("project") or "p", "entity": {"id": "ZQ==", "name": "somebody"}}
        bucket = {
            "id": "cnVu",
            "name": name,
            "displayName": name,
            "description": "",
            "config": "{}",
            "sweepName": None,
            "project": project,
            "historyLineCount": 0,
        }
        return {"upsertBucket": {"bucket": bucket, "inserted": True}}
    if "CreateRunFiles" in operation:
        files = [{"name": name, "uploadUrl": f"{url}/upload/{name}"} for name in variables.get("files") or ()]
        return {"createRunFiles": {"runID": "cnVu", "uploadHeaders": [], "files": files}}
    if "Viewer" in operation:
        return {
            "viewer": {
                "id": "dQ==",
                "username": "somebody",
                "entity": "somebody",
                "flags": "{}",
                "teams": {"edges": []},
            }
        }
    if "ServerFeatures" in operation:
        return {"serverInfo": {"features": []}}
    return {}
