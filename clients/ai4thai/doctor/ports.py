"""Are the ports of this machine free, or taken by whom they are meant for?"""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator
from typing import Final

from ai4thai.doctor.findings import Finding, Level, Situation
from ai4thai.doctor.servers import SERVICES, ask_health

_PORTS: Final = (("vision", "VISION_SERVICE_PORT", 2001), ("queue", "QUEUE_WORKER_PORT", 2003))
_HERE_S = 1.0


def check_ports(situation: Situation) -> Iterator[Finding]:
    """Those of the servers, and Redis' where no REDIS_URL says that it is elsewhere."""
    for name, variable, default in _PORTS:
        yield _check(situation, name, variable, situation.port(variable, default))
    if not situation.secret("REDIS_URL"):
        yield _check(situation, "redis", "REDIS_PORT", situation.port("REDIS_PORT", 6379))


def _check(situation: Situation, name: str, variable: str, port: int) -> Finding:
    if not 0 < port < 65536:
        return Finding("ports", Level.FAILURE, f"{port} ({name}): is no port", f"Set {variable} to 1024 – 65535.")
    host = situation.env.get("SERVING_HOST", "") or "0.0.0.0"
    problem = _taken(host, port)
    if problem == 0:
        return Finding("ports", Level.OK, f"{port} ({name}): free")
    if problem == errno.EACCES:
        return Finding(
            "ports",
            Level.FAILURE,
            f"{port} ({name}): this user may not listen there",
            f"Set {variable} to 1024 or more.",
        )
    if problem != errno.EADDRINUSE:
        return Finding(
            "ports",
            Level.FAILURE,
            f"{port} ({name}): cannot listen on {host}: {errno.errorcode.get(problem, problem)}",
            "Set SERVING_HOST to an address of this machine, or to 0.0.0.0.",
        )
    ours = _redis_answers(port) if name == "redis" else _served_by_us(port)
    if ours == name:
        return Finding("ports", Level.OK, f"{port} ({name}): ours listens there")
    who = f"our {ours} server" if ours else _who(port)
    return Finding(
        "ports",
        Level.FAILURE,
        f"{port} ({name}): taken by {who}",
        f"Stop it, or set {variable} to another port.",
    )


def _taken(host: str, port: int) -> int:
    """Why a server could not listen there, as an errno; 0: it could."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.create_server((host, port), family=family).close()
    except OSError as error:
        return error.errno or errno.EADDRINUSE
    return 0


def _served_by_us(port: int) -> str:
    """Which of our servers answers there; empty: none."""
    health = ask_health(f"http://localhost:{port}", _HERE_S).health
    return next((name for name, service in SERVICES.items() if service in health.get("services", {})), "")


def _redis_answers(port: int) -> str:
    """`redis` when something there speaks its protocol, also when it wants a password first."""
    try:
        with socket.create_connection(("localhost", port), _HERE_S) as connection:
            connection.settimeout(_HERE_S)
            connection.sendall(b"PING\r\n")
            answer = connection.recv(64)
    except OSError:
        return ""
    return "redis" if answer.startswith((b"+PONG", b"-NOAUTH", b"-LOADING", b"-DENIED", b"-MASTERDOWN")) else ""


def _who(port: int) -> str:
    """The process that listens there, where this user may see it."""
    try:
        import psutil
    except ImportError:
        return f"another program (ss -ltnp 'sport = :{port}' tells which)"
    try:
        for connection in psutil.net_connections("tcp"):
            listens_there = connection.status == psutil.CONN_LISTEN and connection.laddr[1:2] == (port,)
            if listens_there and connection.pid:
                return f"process {connection.pid} ({psutil.Process(connection.pid).name()})"
    except psutil.Error:
        pass
    return f"a process of another user (sudo ss -ltnp 'sport = :{port}' tells which)"
