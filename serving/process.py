"""A server process from start to end: open the port, become ready, wait for a signal, drain, stop."""

from __future__ import annotations

import asyncio
import ctypes
import faulthandler
import os
import resource
import signal
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import grpc
import uvloop
from starlette.routing import BaseRoute

from serving import logs
from serving.health import Health
from serving.http1 import Http
from serving.http_calls import OwnCalls
from serving.listener import Listener
from serving.relay import LINGER_SECONDS
from serving.rpc import build_server, channel_options
from serving.settings import ServingSettings
from serving.transcoding import Transcoder
from serving.web import build_app

_log = logs.get_logger("process")

# What Linux takes for a Unix socket's path (sun_path of unix(7) has 108 bytes, the last of them 0).
_SOCKET_PATH_BYTES = 107
# What the end after a fault may take beyond its drain. Giving models back takes seconds, or, on a GPU that is lost, for ever.
LAST_SECONDS = 30.0


class Service(Protocol):
    """What a server hands to run()."""

    name: str
    """`vision_server`."""
    version: str
    """`0.1.0`."""
    domain: str
    """ErrorInfo's domain: `vision.ai4thai`."""
    service_names: Sequence[str]
    """Full proto names, for reflection and JSON: `ai4thai.vision.v1.VisionService`."""
    ready_name: str
    """The health name behind GET /health."""

    def add_to(self, server: grpc.aio.Server) -> None:
        """Adds the servicers."""

    def routes(self) -> Sequence[BaseRoute]:
        """Routes beside those of the contract, such as /info; they go before them, and may call methods (web.build_app)."""

    async def start(self, health: Health) -> None:
        """Called once the port is open; returns soon, long loading goes on in the background."""

    def drain(self) -> None:
        """Called when draining begins: ends what would otherwise last as long as its caller likes (a watch)."""

    async def stop(self) -> None:
        """Called after draining."""


def run(
    make_service: Callable[[], Service], serving: ServingSettings, port: int, settings_shown: Mapping[str, object]
) -> int:
    """Serves until SIGTERM or SIGINT, or until it cannot go on.

    Returns:
        The exit code: 0 after a clean drain; 1 when the port cannot be had, or after the drain that a fault has begun which only
        a new process mends (`Health.fail_for_good`), or LAST_SECONDS later when it hangs: what runs it starts it again, and
        nobody has to wake up.
    """
    logs.configure(serving.log_level, serving.log_format)
    _tune()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_serve(make_service(), serving, port, settings_shown))


async def _serve(service: Service, serving: ServingSettings, port: int, settings_shown: Mapping[str, object]) -> int:
    _log.info("starting", server=service.name, version=service.version, pid=os.getpid(), settings=dict(settings_shown))
    stopping = asyncio.Event()
    _on_signals(stopping)

    def end() -> None:
        if stopping.is_set():
            return
        # Nobody has sent a signal, so nobody will kill a process that hangs on its way out: it does so itself, from a thread
        # that needs no interpreter, and leaves the stacks in the log.
        until_stopped_s = serving.unready_seconds + serving.drain_seconds + LINGER_SECONDS
        faulthandler.dump_traceback_later(until_stopped_s + LAST_SECONDS, exit=True)
        stopping.set()

    health = Health(on_failed=end)
    health.expose(service.ready_name, "startup")
    health.report("startup", False, "starting")
    # grpcio listens on a socket of its own that nobody else can reach; the listener relays to it.
    with tempfile.TemporaryDirectory(prefix=f"{service.name}-") as folder:
        grpc_socket = Path(folder) / "grpc"
        if (size_bytes := len(os.fsencode(grpc_socket))) > _SOCKET_PATH_BYTES:
            _log.error(
                "the temporary directory's path is too long for a Unix socket",
                path=str(grpc_socket),
                size_bytes=size_bytes,
                limit_bytes=_SOCKET_PATH_BYTES,
                cure="Set TMPDIR to a shorter one, such as /tmp.",
            )
            return 1
        server = build_server(service.add_to, service.service_names, service.domain, health, serving)
        server.add_insecure_port(f"unix:{grpc_socket}")
        channel = grpc.aio.insecure_channel(f"unix:{grpc_socket}", options=channel_options(serving.max_message_bytes))
        transcoder = Transcoder(channel, service.domain, serving.max_message_bytes)
        app = build_app(
            health,
            service.ready_name,
            service.domain,
            [*service.routes(), *transcoder.routes(service.service_names)],
            serving.cors_origins,
            OwnCalls(channel, service.domain, serving.max_message_bytes),
        )
        http = Http(app, serving)
        listener = Listener(serving, port, grpc_socket, http)
        try:
            listener.bind()
        except OSError as error:
            _log.error(
                "cannot listen", host=serving.host, port=port, error=str(error), cure="Free the port or choose another."
            )
            return 1
        await server.start()
        http.start()
        listener.start()
        _log.info("listening", server=service.name, host=serving.host, port=listener.port)
        try:
            await service.start(health)
            health.report("startup", True, "started")
            await stopping.wait()
        finally:
            await _drain(service, serving, health, server, channel, http, listener)
    _log.info("stopped", server=service.name)
    return 1 if health.failed else 0


async def _drain(
    service: Service,
    serving: ServingSettings,
    health: Health,
    server: grpc.aio.Server,
    channel: grpc.aio.Channel,
    http: Http,
    listener: Listener,
) -> None:
    """Not ready first, then no new calls, then wait for the running ones, then stop."""
    _log.info("draining", seconds=serving.drain_seconds)
    health.drain()
    await asyncio.sleep(serving.unready_seconds)
    await listener.close()
    health.end_watches()
    service.drain()
    await asyncio.gather(server.stop(serving.drain_seconds), http.stop(serving.drain_seconds))
    await channel.close()
    await listener.finish()
    await service.stop()
    await health.stop()


def _on_signals(stopping: asyncio.Event) -> None:
    loop = asyncio.get_running_loop()

    def on_signal(number: signal.Signals) -> None:
        if stopping.is_set():
            # Someone is in a hurry: no drain, no cleaning up.
            _log.warning("second signal: leaving at once", signal=number.name)
            os._exit(128 + number)
        _log.info("signal received", signal=number.name)
        stopping.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number)


def _tune() -> None:
    """Settings of the process that make the port quick; each was measured."""
    # A thread that hogs the interpreter (decoding, loading) delays the loop by at most this: p99 fell from 14–35 to 6 ms.
    sys.setswitchinterval(0.0005)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 65536 if hard == resource.RLIM_INFINITY else min(65536, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    try:
        libc = ctypes.CDLL("libc.so.6")
        # glibc returns large blocks to the kernel at once, so that each 20 MB message is paged in anew; with these thresholds
        # (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, M_TOP_PAD) a 20 MB echo fell from 62 to 15 ms of CPU.
        for parameter, value in ((-3, 256 << 20), (-1, 512 << 20), (-2, 64 << 20)):
            libc.mallopt(parameter, value)
    except (OSError, AttributeError):
        pass  # another C library; nothing to tune
