from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.processes import ServerProcess


@pytest.fixture(scope="session")
def echo() -> Iterator[ServerProcess]:
    """A server process that has nothing to do with images; see echo_server.py."""
    with ServerProcess("tests.serving.echo_server", "0") as server:
        server.wait_for("health check passes", check="ticks")
        yield server


@pytest.fixture(scope="session")
def hasty() -> Iterator[ServerProcess]:
    """One that soon hangs up on who does not speak."""
    env = {"SERVING_FIRST_BYTES_SECONDS": "1", "SERVING_HTTP_REQUEST_SECONDS": "1", "SERVING_MAX_CONNECTIONS": "1200"}
    with ServerProcess("tests.serving.echo_server", "0", env=env) as server:
        server.wait_for("health check passes", check="ticks")
        yield server
