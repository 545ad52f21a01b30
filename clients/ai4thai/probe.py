"""Tells whether one server, or the worker here, is well: one line and an exit code, for health checks.

`ai4thai health --grpc HOST:PORT` and `ai4thai health --worker`. The rest of the command line is not imported, gRPC only when a
server is asked: 0.05 to 0.3 s, where all of it takes 0.85 s to import.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

DEFAULT_TIMEOUT_S = 5.0
_OURS = "ai4thai."
# A beat waits up to 30 s for a Redis that stalls; a worker that has not come round for much longer is stuck.
_STUCK_AFTER_S = 90.0
_BEATS = "ai4thai-worker-*.json"


class Finding(NamedTuple):
    """Whether it is well, and a line that says so."""

    is_well: bool
    line: str


class Beat(NamedTuple):
    """What a worker last told of itself."""

    worker: str
    at_monotonic_s: float
    redis_error: str


def is_meant(arguments: Sequence[str]) -> bool:
    """Whether these are the arguments of a probe (and not of another command, nor of its help)."""
    wanted = any(word.partition("=")[0] in ("--grpc", "--worker") for word in arguments)
    return arguments[:1] == ["health"] and wanted and not {"-h", "--help"} & set(arguments)


def main(arguments: Sequence[str]) -> int:
    """Prints one line; 0: well, 1: not, 2: cannot be asked so."""
    parser = argparse.ArgumentParser(prog="ai4thai health", add_help=False, allow_abbrev=False)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--grpc", metavar="HOST:PORT")
    what.add_argument("--worker", action="store_true")
    parser.add_argument("--service", metavar="NAME")
    parser.add_argument("--timeout", metavar="SECONDS", type=float, default=DEFAULT_TIMEOUT_S)
    asked = parser.parse_args(arguments)
    if not asked.timeout > 0:
        parser.error("--timeout must be more than 0")
    try:
        finding = ask_worker() if asked.worker else ask_server(asked.grpc, asked.service, asked.timeout)
    except ValueError as error:  # no address
        parser.error(str(error))
    print(finding.line, file=sys.stdout if finding.is_well else sys.stderr)
    return 0 if finding.is_well else 1


def ask_server(address: str, service: str | None = None, timeout_s: float = DEFAULT_TIMEOUT_S) -> Finding:
    """Asks grpc.health.v1 once, without trying again.

    `service` None: every service of ours that the server lists must be SERVING, which is readiness: the models are loaded,
    Redis answers. "": that the process lives. Raises ValueError for what is no address.
    """
    import grpc

    from ai4thai.channel import channel_target

    target, is_tls = channel_target(address)
    # A probe goes to the server itself, whatever proxy the environment names for others.
    options = [("grpc.enable_http_proxy", 0), ("grpc.enable_retries", 0)]
    channel = (
        grpc.secure_channel(target, grpc.ssl_channel_credentials(), options=options)
        if is_tls
        else grpc.insecure_channel(target, options=options)
    )
    with channel:
        try:
            missing = _not_serving(channel, service, timeout_s)
        except grpc.RpcError as error:
            code: grpc.StatusCode = error.code()
            if code is grpc.StatusCode.DEADLINE_EXCEEDED:
                return Finding(False, f"UNREACHABLE {address}: no answer within {timeout_s:g} s")
            word = "UNREACHABLE" if code is grpc.StatusCode.UNAVAILABLE else code.name
            return Finding(False, f"{word} {address}: {error.details()}")
    if not missing:
        return Finding(True, f"SERVING {address}")
    why = "" if is_tls else _reasons(target)
    return Finding(False, f"NOT_SERVING {address}: {why or ', '.join(missing)}")


def _not_serving(channel: Any, service: str | None, timeout_s: float) -> list[str]:
    """The names of what is asked for and not SERVING; empty: all is well."""
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    serving = health_pb2.HealthCheckResponse.SERVING
    stub: Any = health_pb2_grpc.HealthStub(channel)  # its published types leave the methods out
    if service is None:
        try:
            request = health_pb2.HealthListRequest()  # type: ignore[attr-defined]  # newer than its stubs
            listed = stub.List(request, timeout=timeout_s).statuses
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.UNIMPLEMENTED:
                raise
            service = ""  # not a server of ours, but one with health: Check is all it has
        else:
            asked = [name for name in listed if name.startswith(_OURS)] or list(listed)
            return sorted(name or "the process" for name in asked if listed[name].status != serving)
    answer = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=timeout_s)
    return [] if answer.status == serving else [service or "the process"]


def _reasons(target: str) -> str:
    """What GET /health on the same port gives as the reasons; empty where there is no such page."""
    from http.client import HTTPConnection, HTTPException

    host = target.rpartition("/")[2].removeprefix("ipv4:").removeprefix("ipv6:")
    try:
        connection = HTTPConnection(host, timeout=1.0)
        try:
            connection.request("GET", "/health")
            why = json.loads(connection.getresponse().read()).get("why", [])
            return "; ".join(str(reason) for reason in why)
        finally:
            connection.close()
    except (OSError, HTTPException, ValueError, AttributeError):
        return ""


def ask_worker(folder: Path | None = None) -> Finding:
    """Reads what the workers of this machine, or this container, last told of themselves (queue_server/beats.py).

    A worker that waits for a Redis which is away is well: it goes on by itself when Redis is back, and to start it again would
    cure nothing. One that has not come round for 90 s is stuck; one that has left no word, or has ended since, is not there.
    """
    beats = [beat for file in sorted((folder or Path(tempfile.gettempdir())).glob(_BEATS)) if (beat := _beat(file))]
    if not beats:
        return Finding(False, "NOT_RUNNING no worker has told here that it lives")
    for beat in beats:
        silent_s = time.monotonic() - beat.at_monotonic_s
        if silent_s > _STUCK_AFTER_S:
            return Finding(False, f"STUCK {beat.worker}: has not come round for {silent_s:.0f} s")
    waits = [f"{beat.worker} waits for Redis: {beat.redis_error}" for beat in beats if beat.redis_error]
    return Finding(
        True, f"WAITING {'; '.join(waits)}" if waits else f"BEATING {', '.join(beat.worker for beat in beats)}"
    )


def _beat(file: Path) -> Beat | None:
    """What one worker has told; None: it is gone (killed, or ended meanwhile), or this is no worker's word."""
    import fcntl  # Windows has none, and no workers

    try:
        while True:
            with file.open("rb") as found:
                try:
                    fcntl.flock(found, fcntl.LOCK_SH | fcntl.LOCK_NB)
                except BlockingIOError:  # held by who wrote it: it lives
                    told = json.load(found)
                    return Beat(str(told["worker"]), float(told["at_monotonic_s"]), str(told["redis_error"]))
                if os.path.samestat(os.fstat(found.fileno()), file.stat()):
                    return None
                # A living worker has put a newer word in its place, between our opening and asking for the lock.
    except (OSError, ValueError, KeyError, TypeError):
        return None
