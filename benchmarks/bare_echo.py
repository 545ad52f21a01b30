"""The echo of tests/serving on bare grpcio, the front's baseline: `python -m benchmarks.bare_echo [dressed]`."""

from __future__ import annotations

import asyncio
import json
import sys

import grpc
import uvloop
from ai4thai.vision.v1 import vision_service_pb2_grpc as rpc

from serving import logs
from serving.interceptors import CallInterceptor
from serving.rpc import channel_options
from tests.serving.echo_server import Echo


async def main() -> None:
    """Serves on a free TCP port, without front, health or reflection; `dressed`: with our interceptors."""
    dressed = CallInterceptor("vision.ai4thai", access_log=True, max_concurrent_calls=1000)
    logs.configure("info", "json")
    server = grpc.aio.server(
        interceptors=[dressed] if sys.argv[1:] == ["dressed"] else [], options=channel_options(64 << 20)
    )
    rpc.add_VisionServiceServicer_to_server(Echo(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(json.dumps({"event": "listening", "port": port}), flush=True)
    await server.wait_for_termination()


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())
