"""A server process that answers in plain ways, to test serving/ by: `python -m tests.serving.echo_server PORT`."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import AsyncIterator, Sequence
from typing import Any

from ai4thai.vision.v1 import vision_service_pb2 as pb
from ai4thai.vision.v1 import vision_service_pb2_grpc as rpc
from starlette.responses import JSONResponse
from starlette.routing import BaseRoute, Route

from serving import process
from serving.errors import Code, ServiceError
from serving.health import Health
from serving.interceptors import caller
from serving.logs import request_id
from serving.relay import LINGER_SECONDS
from serving.settings import ServingSettings, describe

NAME = "ai4thai.vision.v1.VisionService"


class Echo(rpc.VisionServiceServicer):
    """Detect answers who called and how many bytes came; Analyze fails as its question says; Generate counts slowly."""

    name, version, domain = "echo", "0", "vision.ai4thai"
    service_names: Sequence[str] = (NAME,)
    ready_name = NAME

    def add_to(self, server: Any) -> None:
        rpc.add_VisionServiceServicer_to_server(self, server)

    def routes(self) -> Sequence[BaseRoute]:
        return [Route("/plain", lambda _: JSONResponse({"plain": True}))]

    async def start(self, health: Health) -> None:
        self.generating = 0
        self._ticking = 0
        self._stuck = False
        self._health = health
        health.add_probe("ticks", self._tick, interval_s=0.1)
        health.expose(NAME, "ticks")

    def drain(self) -> None:
        print("draining", flush=True)

    async def stop(self) -> None:
        if self._stuck:
            threading.Event().wait()  # as on a device that is lost
        print("stopped in order", flush=True)

    async def _tick(self) -> str:
        self._ticking += 1
        return f"{self._ticking} ticks"

    async def Detect(self, request: Any, context: Any) -> Any:
        return pb.DetectResponse(
            model=caller(context),
            model_version=request_id.get(),
            width_px=len(request.image.content),
            annotated_image=request.image.content if request.options.annotate else b"",
        )

    async def DetectStream(self, request_iterator: Any, context: Any) -> AsyncIterator[Any]:
        async for request in request_iterator:
            result = pb.FrameResult(
                frame_id=request.frame.frame_id,
                detection=pb.DetectResponse(annotated_image=request.frame.image.content),
            )
            yield pb.DetectStreamResponse(result=result)

    async def Generate(self, request: Any, context: Any) -> AsyncIterator[Any]:
        count = request.options.max_new_tokens
        if count == 0:
            raise ServiceError(Code.UNAVAILABLE, "MODEL_LOADING", "Loading.", retry_after_s=2.5)
        self.generating += 1
        try:
            for number in range(count):
                yield pb.GenerateResponse(delta=pb.GenerateDelta(text=f"{number} "))
                await asyncio.sleep(0.05)
            yield pb.GenerateResponse(summary=pb.GenerateSummary(text=f"สรุป {count}"))
        finally:
            self.generating -= 1

    async def Analyze(self, request: Any, context: Any) -> Any:
        if request.question == "bad field":
            raise ServiceError(
                Code.INVALID_ARGUMENT,
                "INVALID_FIELD",
                "question is 'bad field'.",
                cure="Ask something else.",
                field="question",
                metadata={"limit": 3},
            )
        if request.question == "full":
            raise ServiceError(Code.RESOURCE_EXHAUSTED, "QUEUE_FULL", "Full.")
        if request.question in ("lost", "lost and stuck"):
            self._stuck = request.question == "lost and stuck"
            self._health.fail_for_good("The device is lost to this process.")
        if request.question == "slow":
            await asyncio.sleep(30)
        if request.question == "fault":
            raise RuntimeError("a secret of the inside")
        return pb.AnalyzeResponse(text=request.question)

    async def GetServerInfo(self, request: Any, context: Any) -> Any:
        return pb.GetServerInfoResponse(version=self.version, capabilities=[str(self.generating)])


if __name__ == "__main__":
    settings = ServingSettings()
    process.LAST_SECONDS = 0.5 - LINGER_SECONDS  # soon, since nobody lingers here
    sys.exit(process.run(Echo, settings, int(sys.argv[1]), describe(settings)))
