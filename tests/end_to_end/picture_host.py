"""A web host that has the samples as files."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from tests.processes import ROOT

SAMPLES = ROOT / "clients" / "ai4thai" / "samples"


class _Files(BaseHTTPRequestHandler):
    """`/moved` leads to the same host under another name."""

    def do_GET(self) -> None:
        if self.path == "/moved":
            self.send_response(302)
            self.send_header("location", f"http://localhost:{self.server.server_address[1]}/scene-01.jpg")
            self.end_headers()
            return
        file = SAMPLES / self.path[1:]
        self.send_response(200 if file.is_file() else 404)
        self.end_headers()
        if file.is_file():
            self.wfile.write(file.read_bytes())

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def picture_host() -> Iterator[str]:
    """Its `host:port`."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Files)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
