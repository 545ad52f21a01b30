"""A receiver of webhooks on a real socket that answers as it is told, with TLS or without."""

from __future__ import annotations

import json
import ssl
import threading
import time
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from standardwebhooks import Webhook

SECRET = "whsec_" + "c2VjcmV0IG9mIHRoZSB0ZXN0cyBvZiB3ZWJob29rcw=="


@dataclass(frozen=True)
class Received:
    """One call; `verified` is what standardwebhooks makes of it."""

    path: str
    headers: dict[str, str]
    body: str
    at_s: float

    def verified(self, secret: str = SECRET) -> dict[str, Any]:
        values: dict[str, Any] = Webhook(secret).verify(self.body, self.headers)
        return values

    @property
    def job_id(self) -> str:
        return str(json.loads(self.body)["data"]["job"]["job_id"])


class HookReceiver:
    """Answers 200 unless `answers` says otherwise: each of them is used once, `(status, headers)`."""

    def __init__(self, context: ssl.SSLContext | None = None) -> None:
        self.received: list[Received] = []
        self.answers: list[tuple[int, dict[str, str]]] = []
        self.always: tuple[int, dict[str, str]] = (200, {})
        self.delay_s = 0.0
        self.endless = False
        self.in_flight = self.most_in_flight = 0
        self._news = threading.Condition()
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                receiver._answer(self)

            def log_message(self, *_: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128

            def handle_error(self, *_: object) -> None:
                pass

        self._server = Server(("127.0.0.1", 0), Handler)
        self.port = self._server.server_address[1]
        if context is not None:
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)

    def __enter__(self) -> HookReceiver:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def url(self, path: str = "/hook?of=tests") -> str:
        return f"http://127.0.0.1:{self.port}{path}"

    def wait_for(self, count: int, timeout_s: float = 15) -> list[Received]:
        """Once so many have come; raises AssertionError."""
        with self._news:
            came = self._news.wait_for(lambda: len(self.received) >= count, timeout_s)
            assert came, f"{len(self.received)} webhooks came, {count} were expected"
            return list(self.received)

    def _answer(self, handler: BaseHTTPRequestHandler) -> None:
        body = handler.rfile.read(int(handler.headers["content-length"])).decode()
        with self._news:
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
            headers = {name.lower(): value for name, value in handler.headers.items()}
            self.received.append(Received(handler.path, headers, body, time.monotonic()))
            status, more = self.answers.pop(0) if self.answers else self.always
            self._news.notify_all()
        time.sleep(self.delay_s)
        with self._news:
            self.in_flight -= 1
        handler.send_response(status)
        for name, value in more.items():
            handler.send_header(name, value)
        handler.send_header("content-length", "999999999" if self.endless else "2")
        handler.end_headers()
        handler.wfile.write(b"ok")
        handler.wfile.flush()
        if self.endless:
            time.sleep(5)
