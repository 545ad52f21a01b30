"""Connections that grow old: clients come back, so that they find servers added behind the same name, and nothing is lost."""

from __future__ import annotations

import time

import grpc
from ai4thai.vision.v1 import vision_service_pb2 as pb
from ai4thai.vision.v1 import vision_service_pb2_grpc as rpc

from tests.processes import ServerProcess


def test_an_old_connection_takes_no_new_calls_and_ends_those_that_run() -> None:
    # Given a server that lets connections live for half a second, and a stream of two on one of them
    env = {"SERVING_MAX_CONNECTION_AGE_SECONDS": "0.5"}
    with (
        ServerProcess("tests.serving.echo_server", "0", env=env) as echo,
        grpc.insecure_channel(echo.address) as channel,
    ):
        stub = rpc.VisionServiceStub(channel)
        counting = pb.GenerateRequest(options={"max_new_tokens": 40})
        stream = stub.Generate(counting, timeout=60)
        next(stream)
        # When calls go on meanwhile
        callers, until_s = set[str](), time.monotonic() + 30
        while len(callers) < 3 and time.monotonic() < until_s:
            callers.add(stub.Detect(pb.DetectRequest(), timeout=10).model)
            time.sleep(0.05)
        # Then they come over one connection after the other, none fails, and the stream comes to its end
        assert len(callers) >= 3
        assert [answer.HasField("summary") for answer in stream][-1]
