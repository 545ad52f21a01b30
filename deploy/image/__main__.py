"""Starts an image of a target and runs that target's checks: `python3 -m deploy.image IMAGE [TARGET]`."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable

from deploy.image import checks
from deploy.image.engines import Container, Engine, choose, free_port

TARGETS = ("production", "h100-optimized", "queue", "development")
VISION_SERVICE = "ai4thai.vision.v1.VisionService"
QUEUE_SERVICE = "ai4thai.queue.v1.QueueService"


class Report:
    """Runs checks one after the other and counts what is wrong."""

    def __init__(self, image: str) -> None:
        self._image = image
        self.faults = 0

    def check(self, name: str, work: Callable[[], object]) -> bool:
        """Whether it holds; a line is printed for each, of a fault on stderr too."""
        began_s = time.perf_counter()
        try:
            work()
        except Exception as error:
            self.faults += 1
            print(f"   ✗  {name}")
            print(f"{self._image}: {name}: {error}", file=sys.stderr, flush=True)
            return False
        print(f"   ✓  {name} ({time.perf_counter() - began_s:.1f} s)", flush=True)
        return True


def main() -> int:
    """See deploy/image-check.sh."""
    parser = argparse.ArgumentParser(prog="deploy/image-check.sh", description=__doc__)
    parser.add_argument("image")
    parser.add_argument("target", nargs="?", choices=TARGETS, default="production")
    parser.add_argument("--wait", type=float, default=900, metavar="SECONDS", help="for HEALTHCHECK; models load")
    parser.add_argument("--env", action="append", default=[], metavar="NAME=VALUE", help="for the server")
    asked = parser.parse_args()
    env = dict(pair.split("=", 1) for pair in asked.env)
    try:
        engine = choose()
        config = engine.config(asked.image)
    except Exception as error:
        print(f"{asked.image}: {error}", file=sys.stderr)
        return 2
    report = Report(asked.image)
    print(f"{asked.image} ({asked.target}, {type(engine).__name__.lower()})")
    if asked.target == "development":
        _check_development(engine, asked.image, report)
        return 1 if report.faults else 0
    report.check("labels, init, STOPSIGNAL, user", lambda: checks.says_who_it_is(config))
    if asked.target == "queue":
        _check_queue(engine, asked.image, config.health_check, env, report)
    else:
        _check_vision(engine, asked.image, config.health_check, env, asked.wait, report)
    return 1 if report.faults else 0


def _check_vision(
    engine: Engine, image: str, health_check: list[str], env: dict[str, str], wait_s: float, report: Report
) -> None:
    port = free_port()
    container = engine.start(image, port, {"VISION_SERVICE_PORT": str(port), **env})
    try:
        address = container.address(port)
        _check_inside(container, report)
        if report.check("HEALTHCHECK passes", lambda: checks.becomes_healthy(container, health_check, wait_s)):
            report.check(
                "HTTP", lambda: checks.answers_http(address, ["/health", "/health/detailed", "/info", "/v1/models"])
            )
            report.check("grpcurl", lambda: checks.answers_grpcurl(address, VISION_SERVICE))
            report.check("detects", lambda: checks.finds_objects(address))
            report.check("describes", lambda: checks.describes(address))
            report.check("SIGTERM with a stream in flight", lambda: checks.drains(container, port, 60))
        _show_log_after(report, container)
    finally:
        container.remove()


def _check_queue(engine: Engine, image: str, health_check: list[str], env: dict[str, str], report: Report) -> None:
    """The server and the worker, with the embedded broker of the same image for a Redis."""
    port, redis_port = free_port(), free_port()
    broker_command = ["python", "-m", "queue_server.broker", "--port", str(redis_port), "--data-dir", "/data/broker"]
    started: list[Container] = []

    def start(command: list[str] | None = None) -> Container:
        variables = {"QUEUE_WORKER_PORT": str(port), "REDIS_URL": f"redis://127.0.0.1:{redis_port}/0", **env}
        started.append(engine.start(image, port, variables, command, started[0] if started else None))
        return started[-1]

    try:
        broker = start(broker_command)
        server = start()
        worker = start(["python", "-m", "queue_server.worker"])
        _check_inside(server, report)
        report.check("no GPU library", lambda: checks.has_no_gpu_library(server))
        if report.check("HEALTHCHECK passes", lambda: checks.becomes_healthy(server, health_check, 120)):
            # Published by the first of them, whose network the others share.
            address = broker.address(port)
            report.check("HTTP", lambda: checks.answers_http(address, ["/health", "/health/detailed", "/queue/stats"]))
            report.check("grpcurl", lambda: checks.answers_grpcurl(address, QUEUE_SERVICE))
            report.check("worker lives", lambda: checks.becomes_healthy(worker, ["ai4thai", "health", "--worker"], 60))
        for name, container in (("worker", worker), ("server", server)):
            container.terminate()
            report.check(f"{name}: SIGTERM", lambda container=container: checks.ends_in_order(container, 60))  # type: ignore[misc]
        _show_log_after(report, *started)
    finally:
        for container in reversed(started):
            container.remove()


def _check_development(engine: Engine, image: str, report: Report) -> None:
    container = engine.start(image, free_port(), {}, ["sleep", "600"])
    try:
        report.check("pip check", lambda: checks.has_what_it_needs(container))
        for tool in ("pytest", "ruff", "mypy", "buf", "hadolint", "ai4thai"):
            report.check(tool, lambda tool=tool: checks.runs(container, [tool, "--version"]))  # type: ignore[misc]
    finally:
        container.remove()


def _check_inside(container: Container, report: Report) -> None:
    report.check("writes in /data and /tmp alone", lambda: checks.writes_only_where_it_may(container))
    report.check("pip check", lambda: checks.has_what_it_needs(container))


def _show_log_after(report: Report, *containers: Container) -> None:
    for container in containers if report.faults else ():
        print("\n".join(container.log().splitlines()[-30:]), file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
