"""What happens around every call: ids, errors with details, the same in JSON, counts, health."""

from __future__ import annotations

import json
import re
import time
from typing import Any

import grpc
import httpx
import pytest
from ai4thai.vision.v1 import vision_service_pb2 as pb
from ai4thai.vision.v1 import vision_service_pb2_grpc as rpc
from google.rpc import error_details_pb2
from google.rpc.status_pb2 import Status
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from tests.processes import ServerProcess


def failing(server: ServerProcess, question: str, **call: Any) -> grpc.RpcError:
    with grpc.insecure_channel(server.address) as channel, pytest.raises(grpc.RpcError) as caught:
        rpc.VisionServiceStub(channel).Analyze(pb.AnalyzeRequest(question=question), timeout=5, **call)
    return caught.value


def details(status: Status) -> dict[str, Any]:
    found = {}
    for kind in (error_details_pb2.ErrorInfo, error_details_pb2.BadRequest, error_details_pb2.RetryInfo):
        for packed in status.details:
            message = kind()
            if packed.Unpack(message):
                found[kind.__name__] = message
    return found


def post(server: ServerProcess, path: str, **rest: Any) -> httpx.Response:
    return httpx.post(f"http://{server.address}{path}", timeout=10, **rest)


def test_a_bad_field_is_named_with_value_and_cure(echo: ServerProcess) -> None:
    error = failing(echo, "bad field")
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
    found = details(rpc_status.from_call(error))
    assert found["ErrorInfo"].reason == "INVALID_FIELD"
    assert found["ErrorInfo"].domain == "vision.ai4thai"
    assert found["ErrorInfo"].metadata["limit"] == "3"
    assert found["BadRequest"].field_violations[0].field == "question"
    assert error.details() == "question is 'bad field'. Ask something else."


def test_full_says_when_to_come_back(echo: ServerProcess) -> None:
    error = failing(echo, "full")
    assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert details(rpc_status.from_call(error))["RetryInfo"].retry_delay.ToMilliseconds() == 1000


def test_a_fault_shows_nothing_of_the_inside_but_the_log_has_it(echo: ServerProcess) -> None:
    error = failing(echo, "fault", metadata=(("x-request-id", "find-me-1"),))
    assert error.code() == grpc.StatusCode.INTERNAL
    assert "secret" not in str(error)
    labels = 'grpc_code="RESOURCE_EXHAUSTED",grpc_method="Analyze",grpc_service="ai4thai.vision.v1.VisionService"'
    line = re.escape(f"grpc_server_handled_total{{{labels}}} ") + r"(\d+)"
    assert int(re.search(line, text)[1]) >= 1
    assert "process_resident_memory_bytes" in text
