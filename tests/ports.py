"""Ports for tests that must know one before its server is there, or one where nobody answers."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

# Below the ports that Linux gives to who asks for port 0 (32768–60999): one of those, let go of, is soon another server's.
_FIRST = 20000
_EACH = 2000  # for each worker of pytest-xdist
_WORKERS = 6


def free_port() -> int:
    """A port that nobody listens at, never the same twice in one run of the tests."""
    for port in _ports:
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
        return port
    raise RuntimeError(f"No port of this test worker's {_EACH} is free any more.")


def _own() -> Iterator[int]:
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % _WORKERS
    # Two runs on one machine begin at different places.
    begin = os.getpid() % _EACH
    for number in range(_EACH):
        yield _FIRST + worker * _EACH + (begin + number) % _EACH


_ports = _own()
