"""A server as any client sees it: its stubs, its web address, its metrics, its errors."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import grpc
import httpx
import pytest
from ai4thai.queue.v1 import queue_service_pb2_grpc
from ai4thai.vision.v1 import (
    device_service_pb2_grpc,
    generation_pb2,
    image_pb2,
    model_service_pb2_grpc,
    vision_service_pb2,
    vision_service_pb2_grpc,
)
from google.rpc import error_details_pb2
from google.rpc.status_pb2 import Status
from grpc_health.v1 import health_pb2_grpc
from grpc_status import rpc_status
from prometheus_client.parser import text_string_to_metric_families

from tests.processes import ServerProcess

# Larger than any server's limit, so that it is the server that refuses.
_NO_LIMIT = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]


class Server:
    """A running server process, with stubs for everything it may serve."""

    def __init__(self, process: ServerProcess) -> None:
        self.process = process
        self.address = process.address
        self.channel = grpc.insecure_channel(self.address, options=_NO_LIMIT)
        self.vision: Any = vision_service_pb2_grpc.VisionServiceStub(self.channel)
        self.models: Any = model_service_pb2_grpc.ModelServiceStub(self.channel)
        self.devices: Any = device_service_pb2_grpc.DeviceServiceStub(self.channel)
        self.queue: Any = queue_service_pb2_grpc.QueueServiceStub(self.channel)
        self.health: Any = health_pb2_grpc.HealthStub(self.channel)
        self.web = httpx.Client(base_url=f"http://{self.address}", timeout=60, trust_env=False)

    def close(self) -> None:
        self.web.close()
        self.channel.close()

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples that have these labels; 0 when there is none."""
        families = text_string_to_metric_families(self.web.get("/metrics").text)
        return sum(
            sample.value
            for family in families
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )

    @property
    def vision_calls_in_flight(self) -> int:
        """Calls of VisionService that are being answered; the health watches of other clients' channels are none."""
        service = "ai4thai.vision.v1.VisionService"
        started = self.metric("grpc_server_started_total", grpc_service=service)
        return round(started - self.metric("grpc_server_handled_total", grpc_service=service))


@dataclass(frozen=True)
class Refusal:
    """An error as a caller reads it."""

    code: str
    message: str
    reason: str = ""
    domain: str = ""
    field: str = ""
    retry_after_s: float | None = None
    metadata: Mapping[str, str] = dataclasses.field(default_factory=dict)


def refusal(status: Status) -> Refusal:
    """What a Status says."""
    info, bad, retry = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
    retry_after_s = None
    for detail in status.details:
        detail.Unpack(info)
        detail.Unpack(bad)
        if detail.Unpack(retry):
            retry_after_s = retry.retry_delay.ToTimedelta().total_seconds()
    codes = {code.value[0]: code.name for code in grpc.StatusCode}
    return Refusal(
        codes[status.code],
        status.message,
        info.reason,
        info.domain,
        bad.field_violations[0].field if bad.field_violations else "",
        retry_after_s,
        dict(info.metadata),
    )


def refused(call: Callable[[], object]) -> Refusal:
    """What a gRPC call that must fail says."""
    with pytest.raises(grpc.RpcError) as caught:
        call()
    error: Any = caught.value  # also a grpc.Call
    status = rpc_status.from_call(error)
    return refusal(status) if status else Refusal(error.code().name, error.details() or "")


def json_refusal(answer: httpx.Response) -> Refusal:
    """What an HTTP error response says."""
    error = answer.json()["error"]
    assert error["code"] == answer.status_code
    by_kind = {detail["@type"].rpartition(".")[2]: detail for detail in error["details"]}
    info = by_kind.get("ErrorInfo", {})
    violations = by_kind.get("BadRequest", {}).get("fieldViolations", [])
    return Refusal(
        error["status"],
        error["message"],
        info.get("reason", ""),
        info.get("domain", ""),
        violations[0]["field"] if violations else "",
        metadata=info.get("metadata", {}),
    )


def detect_request(content: bytes, **options: Any) -> vision_service_pb2.DetectRequest:
    """A DetectRequest for a file."""
    request = vision_service_pb2.DetectRequest(image=image_pb2.Image(content=content))
    for name, value in options.items():
        if isinstance(value, list):
            getattr(request.options, name).extend(value)
        else:
            setattr(request.options, name, value)
    return request


def question(content: bytes, text: str) -> generation_pb2.Message:
    """A user's turn: a picture, then words."""
    parts = [
        generation_pb2.MessagePart(image=image_pb2.Image(content=content)),
        generation_pb2.MessagePart(text=text),
    ]
    return generation_pb2.Message(role=generation_pb2.ROLE_USER, parts=parts)


def generate_request(content: bytes, text: str, **options: Any) -> vision_service_pb2.GenerateRequest:
    """A GenerateRequest with one picture and one question."""
    return vision_service_pb2.GenerateRequest(
        messages=[question(content, text)], options=generation_pb2.GenerateOptions(**options)
    )
