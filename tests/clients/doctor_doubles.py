"""What the doctor meets in its tests and no machine of ours has: programs, packages and servers in shape only."""

from __future__ import annotations

import json
import socketserver
import ssl
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

# Paths to (status, headers, body); what is not there is 404.
Answers = Mapping[str, tuple[int, Mapping[str, str], object]]

SMI = """#!/bin/sh
case "$*" in
  "") echo "| NVIDIA-SMI {driver}      Driver Version: {driver}      CUDA Version: {cuda} |" ;;
  -L) echo "GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-11111111-aaaa)"
      {slices} ;;
  *) echo "0, GPU-11111111-aaaa, NVIDIA H100 80GB HBM3, 81559, 1200, {mig}" ;;
esac
"""
SLICE = 'echo "  MIG 1g.20gb     Device  0: (UUID: MIG-22222222-bbbb)"'


def write_program(folder: Path, name: str, text: str) -> None:
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(text)
    path.chmod(0o755)


def write_nvidia_smi(
    folder: Path, *, driver: str = "580.95.05", cuda: str = "13.0", mig: str = "Disabled", slices: str = ":"
) -> None:
    """An H100 as nvidia-smi tells it."""
    write_program(folder, "nvidia-smi", SMI.format(driver=driver, cuda=cuda, mig=mig, slices=slices))


def write_torch(folder: Path, cuda: str) -> None:
    """A torch that says which CUDA it is built for."""
    package = folder / "torch"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise AssertionError('the doctor must not import torch')\n")
    (package / "version.py").write_text(f"__version__ = '2.13.0'\ncuda: Optional[str] = {cuda!r}\n")


@contextmanager
def web_server(
    answers: Answers, asked: list[tuple[str, dict[str, str]]] | None = None, certificate: Path | None = None
) -> Iterator[str]:
    """`host:port` of a server that gives these answers; `asked` gets each request's path and headers.

    With a `certificate`, the path of its .pem and .key without their endings, it speaks TLS.
    """

    class Face(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if asked is not None:
                asked.append((self.path, {name.lower(): value for name, value in self.headers.items()}))
            status, headers, body = answers.get(self.path, (404, {}, {}))
            content = json.dumps(body).encode()
            self.send_response_only(status)
            for name, value in {"content-length": str(len(content)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        do_HEAD = do_GET

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Face)
    if certificate is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate.with_suffix(".pem"), certificate.with_suffix(".key"))
        server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield f"localhost:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def redis_in_shape(replies: Mapping[str, bytes]) -> Iterator[int]:
    """The port of a server that answers commands by their name, in Redis' protocol, as bytes."""

    class Face(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            while line := self.rfile.readline():
                words = [self.rfile.read(int(self.rfile.readline()[1:]) + 2)[:-2] for _ in range(int(line[1:]))]
                name = words[0].decode().upper()
                self.wfile.write(replies.get(name, b"+OK\r\n" if name == "CLIENT" else b"-ERR unknown command\r\n"))

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Face) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        try:
            yield int(server.server_address[1])
        finally:
            server.shutdown()


def bulk(text: str) -> bytes:
    """A string as Redis sends it."""
    return f"${len(text.encode())}\r\n{text}\r\n".encode()


def health_of(service: str, status: str = "SERVING", **more: object) -> dict[str, object]:
    """What /health/detailed of one of our servers says."""
    return {
        "status": status,
        "why": [],
        "draining": False,
        "services": {"": "SERVING", service: status},
        "checks": {"startup": {"status": "OK", "detail": "started"}},
        **more,
    }
