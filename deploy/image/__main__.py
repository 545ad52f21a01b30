"""Starts an image of a target and runs that target's checks: `python3 -m deploy.image IMAGE [TARGET]`."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from deploy.image import checks
from deploy.image.engines import Container, Engine, choose, free_port

# The targets that compute on a GPU where there is one, and what of each needs it.
ON_A_GPU = {"production": ("torch",), "h100-optimized": ("torch", "tensorrt")}
TARGETS = (*ON_A_GPU, "queue", "development")
_LOG_LINES = 30
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
            self._tell(name, error)
            return False
        print(f"   ✓  {name} ({time.perf_counter() - began_s:.1f} s)", flush=True)
        return True

    @contextmanager
    def containers(self) -> Iterator[list[Container]]:
        """For those that are started: where anything was wrong their logs are shown, and all are removed at the end.

        What the engine itself cannot do in between is a fault too.
        """
        started: list[Container] = []
        try:
            yield started
        except Exception as error:
            self._tell("starts and can be asked", error)
        finally:
            for container in started if self.faults else ():
                print("\n".join(container.log().splitlines()[-_LOG_LINES:]), file=sys.stderr, flush=True)
            for container in reversed(started):
                container.remove()

    def _tell(self, name: str, error: Exception) -> None:
        self.faults += 1
        print(f"   ✗  {name}", flush=True)
        print(f"{self._image}: {name}: {error}", file=sys.stderr, flush=True)


def main() -> int:
    """See deploy/image-check.sh."""
    parser = argparse.ArgumentParser(prog="deploy/image-check.sh", description=__doc__)
    parser.add_argument("image")
    parser.add_argument("target", nargs="?", choices=TARGETS, default="production")
    parser.add_argument("--wait", type=float, default=900, metavar="SECONDS", help="for HEALTHCHECK; models load")
    parser.add_argument("--env", action="append", default=[], metavar="NAME=VALUE", help="for the server")
    parser.add_argument(
        "--gpus",
        default="all" if os.environ.get("ACCELERATOR") == "gpu" else "",
        metavar="WHICH",
        help="for the vision server, as in `docker run`: all, device=0 (all where ACCELERATOR=gpu)",
    )
    asked = parser.parse_args()
    env = dict(pair.split("=", 1) for pair in asked.env)
    gpus = asked.gpus if asked.target in ON_A_GPU else ""
    try:
        engine = choose(gpus)
        config = engine.config(asked.image)
    except Exception as error:
        print(f"{asked.image}: {error}", file=sys.stderr)
        return 2
    report = Report(asked.image)
    on = f"GPUs: {gpus}" if gpus else "no GPU"
    print(f"{asked.image} ({asked.target}, {type(engine).__name__.lower()}, {on})", flush=True)
    if asked.target == "development":
        _check_development(engine, asked.image, report)
        return 1 if report.faults else 0
    report.check("labels, init, STOPSIGNAL, user", lambda: checks.says_who_it_is(config))
    if asked.target == "queue":
        _check_queue(engine, asked.image, config.health_check, env, report)
    else:
        libraries = ON_A_GPU[asked.target] if gpus else ()
        _check_vision(engine, asked.image, config.health_check, env, asked.wait, libraries, report)
    return 1 if report.faults else 0


def _check_vision(
    engine: Engine,
    image: str,
    health_check: list[str],
    env: dict[str, str],
    wait_s: float,
    gpu_libraries: Sequence[str],
    report: Report,
) -> None:
    """`gpu_libraries`: what must be there for the GPU that it is given; empty: it is given none."""
    port = free_port()
    # Not auto, which would go on with the CPU if the GPU could not be seen.
    device = {"VISION_DEVICE": "cuda"} if gpu_libraries else {}
    with report.containers() as started:
        container = engine.start(image, port, {"VISION_SERVICE_PORT": str(port), **device, **env})
        started.append(container)
        _check_inside(container, report)
        if gpu_libraries:
            name = f"a GPU for {', '.join(gpu_libraries)}"
            report.check(name, lambda: checks.computes_on_a_gpu(container, gpu_libraries))
        if report.check("HEALTHCHECK passes", lambda: checks.becomes_healthy(container, health_check, wait_s)):
            address = container.address(port)
            report.check(
                "HTTP", lambda: checks.answers_http(address, ["/health", "/health/detailed", "/info", "/v1/models"])
            )
            report.check("grpcurl", lambda: checks.answers_grpcurl(address, VISION_SERVICE))
            report.check("detects", lambda: checks.finds_objects(address))
            report.check("describes", lambda: checks.describes(address))
            report.check("SIGTERM with a stream in flight", lambda: checks.drains(container, port, 60))


def _check_queue(engine: Engine, image: str, health_check: list[str], env: dict[str, str], report: Report) -> None:
    """The server and the worker, with the embedded broker of the same image for a Redis."""
    port, redis_port = free_port(), free_port()
    variables = {"QUEUE_WORKER_PORT": str(port), "REDIS_URL": f"redis://127.0.0.1:{redis_port}/0", **env}
    broker_command = ["python", "-m", "queue_server.broker", "--port", str(redis_port), "--data-dir", "/data/broker"]
    with report.containers() as started:
        broker = engine.start(image, port, variables, broker_command)
        started.append(broker)
        server = engine.start(image, port, variables, beside=broker)
        started.append(server)
        worker = engine.start(image, port, variables, ["python", "-m", "queue_server.worker"], beside=broker)
        started.append(worker)
        _check_inside(server, report)
        report.check("no GPU library", lambda: checks.has_no_gpu_library(server))
        if report.check("HEALTHCHECK passes", lambda: checks.becomes_healthy(server, health_check, 120)):
            # Published by the first of them, whose network the others share.
            address = broker.address(port)
            report.check("HTTP", lambda: checks.answers_http(address, ["/health", "/health/detailed", "/queue/stats"]))
            report.check("grpcurl", lambda: checks.answers_grpcurl(address, QUEUE_SERVICE))
            report.check("worker lives", lambda: checks.becomes_healthy(worker, ["ai4thai", "health", "--worker"], 60))
            report.check("worker: SIGTERM", lambda: checks.stops(worker, 60))
            report.check("server: SIGTERM", lambda: checks.stops(server, 60))


def _check_development(engine: Engine, image: str, report: Report) -> None:
    with report.containers() as started:
        container = engine.start(image, free_port(), {}, ["sleep", "600"])
        started.append(container)
        report.check("pip check", lambda: checks.has_what_it_needs(container))
        for tool in ("pytest", "ruff", "mypy", "buf", "hadolint", "ai4thai"):
            report.check(tool, lambda tool=tool: checks.runs(container, [tool, "--version"]))  # type: ignore[misc]


def _check_inside(container: Container, report: Report) -> None:
    report.check("writes in /data and /tmp alone", lambda: checks.writes_only_where_it_may(container))
    report.check("pip check", lambda: checks.has_what_it_needs(container))


if __name__ == "__main__":
    sys.exit(main())
