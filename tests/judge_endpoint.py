"""An OpenAI-compatible endpoint whose model is a judge."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Endpoint(ThreadingHTTPServer):
    """An OpenAI-compatible server whose judge likes long answers, and answers in the first place."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[dict[str, Any]] = []
        self.broken = False
        self.usage: Any = {"total_tokens": 7}
        self.refuses: list[int] = []
        """Statuses of the next answers."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Endpoint

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.asked.append({**body, "authorization": self.headers.get("authorization")})
        if self.server.refuses:
            self.send_response(self.server.refuses.pop(0))
            self.send_header("retry-after", "0")
            self.end_headers()
            return
        data = json.loads(body["messages"][1]["content"])
        if "answer" in data:
            said: dict[str, Any] = {"score": min(10, len(data["answer"]))}
        else:
            longer = len(data["A"]) - len(data["B"])
            said = {"better": "A" if longer >= 0 else "B"}  # equal lengths: whoever comes first
        content = "I like the first" if self.server.broken else json.dumps(said)
        answer = {"choices": [{"message": {"content": content}}], "usage": self.server.usage}
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    def log_message(self, *arguments: Any) -> None: ...


@contextmanager
def judging() -> Iterator[Endpoint]:
    server = Endpoint()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
