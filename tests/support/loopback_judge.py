"""An OpenAI-compatible server on loopback, whose replies a function gives."""

from __future__ import annotations

import http.server
import json
import re
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

Messages = list[dict[str, str]]

EXPLANATION = "words that begin with a capital letter"
# Few questions: a feature takes one for its explanation, and 2 x 20 / 5 for its scores.
FEW = ("--explain_examples", "10", "--explain_tests", "10", "--explain_min_windows", "30", "--explained_features", "3")


class LoopbackJudge:
    """A server of chat completions.

    Args:
        reply: the text that answers a conversation, or a status to answer with.

    Attributes:
        conversations: what was asked so far.
    """

    def __init__(self, reply: Callable[[Messages], str | int]) -> None:
        self.reply = reply
        self.conversations: list[Messages] = []
        self.keys: set[str | None] = set()
        handler = type("Handler", (_Handler,), {"judge": self})
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
    judge: LoopbackJudge
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.judge.conversations.append(asked["messages"])
        self.judge.keys.add(self.headers.get("Authorization"))
        answer = self.judge.reply(asked["messages"]) if self.path == "/v1/chat/completions" else 404
        status, body = (answer, {}) if isinstance(answer, int) else (200, _completion(asked["model"], answer))
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def _completion(model: str, text: str) -> dict[str, Any]:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    return {"id": "1", "object": "chat.completion", "created": int(time.time()), "model": model, "choices": [choice]}


def is_about_tests(messages: Messages) -> bool:
    """Whether a conversation asks for a score, and not for an explanation."""
    return "Latent explanation:" in messages[-1]["content"]


def texts_to_test(messages: Messages) -> Sequence[str]:
    """Returns the texts of the examples that a conversation asks about."""
    texts = messages[-1]["content"].partition("Text examples:\n\n")[2].removesuffix("\n")
    return re.split(r"(?:^|\n)Example \d+: ", texts)[1:]


def is_capital(text: str) -> bool:
    return bool(text.strip()[:1].isupper())


def by_rule(messages: Messages) -> str:
    """Explains everything in the same way, and calls an example right if its text begins with a capital letter."""
    if not is_about_tests(messages):
        return f"Some thoughts.\n[EXPLANATION]: {EXPLANATION}"
    return str([int(is_capital(text)) for text in texts_to_test(messages)])
