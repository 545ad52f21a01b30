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
    line = echo.wait_for("a fault of our own", request_id="find-me-1")
    assert "a secret of the inside" in json.dumps(line)


def test_every_call_has_an_id_and_one_log_line(echo: ServerProcess) -> None:
    with grpc.insecure_channel(echo.address) as channel:
        stub = rpc.VisionServiceStub(channel)
        answer, call = stub.Detect.with_call(pb.DetectRequest(), metadata=(("x-request-id", "mine-42"),))
        fresh, _ = stub.Detect.with_call(pb.DetectRequest(), metadata=(("x-request-id", "not sane"),))
    assert answer.model_version == "mine-42"  # the handler saw it
    assert dict(call.trailing_metadata())["x-request-id"] == "mine-42"
    assert re.fullmatch("[0-9a-f]{32}", fresh.model_version)
    line = echo.wait_for("call ended", request_id="mine-42")
    assert line["code"] == "OK"
    assert line["method"] == "ai4thai.vision.v1.VisionService/Detect"
    assert line["caller"] == answer.model


def test_json_gives_the_same_answers_and_errors(echo: ServerProcess) -> None:
    answer = post(echo, "/v1/vision:detect", json={"image": {"content": "aGVsbG8="}}, headers={"x-request-id": "web-1"})
    assert answer.status_code == 200
    assert answer.json()["width_px"] == 5
    assert answer.headers["x-request-id"] == "web-1"
    assert echo.wait_for("call ended", request_id="web-1")["caller"].startswith("127.0.0.1:")

    refused = post(echo, "/v1/vision:analyze", json={"question": "bad field"})
    assert refused.status_code == 400
    error = refused.json()["error"]
    assert error["status"] == "INVALID_ARGUMENT"
    assert error["details"][0]["reason"] == "INVALID_FIELD"
    assert error["details"][1]["fieldViolations"][0]["field"] == "question"

    full = post(echo, "/v1/vision:analyze", json={"question": "full"})
    assert (full.status_code, full.headers["retry-after"]) == (429, "1")


@pytest.mark.parametrize(
    ("body", "field"),
    [
        (b"{", "body"),
        (b"[1]", "body"),
        (b'{"imag": {}}', "imag"),
        (b'{"image": {"contents": ""}}', "image.contents"),
        (b'{"options": {"min_confidence": "abc"}}', "options.min_confidence"),
        (b'{"options": {"labels": "x"}}', "options.labels"),
        (b'{"options": 7}', "options"),
        (b'{"image": {"content": 5}}', "image.content"),
        (b'{"image": {"raw": {"width_px": 1.5}}}', "image.raw.width_px"),
    ],
)
def test_json_that_does_not_fit_is_named(echo: ServerProcess, body: bytes, field: str) -> None:
    answer = post(echo, "/v1/vision:detect", content=body)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["status"] == "INVALID_ARGUMENT"
    assert error["details"][0]["reason"] == "MESSAGE_UNREADABLE"
    assert error["details"][1]["fieldViolations"][0]["field"] == field, error["message"]


def test_json_streams_one_object_a_line(echo: ServerProcess) -> None:
    answer = post(echo, "/v1/vision:generate", json={"options": {"max_new_tokens": 3}})
    lines = [json.loads(line) for line in answer.text.splitlines()]
    assert [line["delta"]["text"] for line in lines[:-1]] == ["0 ", "1 ", "2 "]
    assert lines[-1]["summary"]["text"] == "สรุป 3"
    loading = post(echo, "/v1/vision:generate", json={"options": {"max_new_tokens": 0}})
    assert (loading.status_code, loading.headers["retry-after"]) == (503, "3")


def test_unknown_paths_and_verbs_are_told_so(echo: ServerProcess) -> None:
    assert httpx.get(f"http://{echo.address}/nothing").json()["error"]["status"] == "NOT_FOUND"
    assert httpx.get(f"http://{echo.address}/v1/vision:detect").status_code == 405


def test_a_body_over_the_limit_is_refused(echo: ServerProcess) -> None:
    answer = post(echo, "/v1/vision:detect", content=b" " * (65 << 20))
    assert answer.status_code == 429
    assert answer.json()["error"]["details"][0]["metadata"]["limit_bytes"] == str(64 << 20)


def test_a_caller_that_leaves_takes_its_call_along(echo: ServerProcess) -> None:
    def generating() -> str:
        return httpx.get(f"http://{echo.address}/info").json()["capabilities"][0]

    web_url = f"http://{echo.address}/v1/vision:generate"
    with (
        grpc.insecure_channel(echo.address) as channel,
        httpx.stream("POST", web_url, json={"options": {"max_new_tokens": 600}}) as web,
    ):
        request = pb.GenerateRequest()
        request.options.max_new_tokens = 600
        call = rpc.VisionServiceStub(channel).Generate(request)
        next(iter(call))
        lines = web.iter_lines()
        next(lines)
        assert generating() == "2"
        call.cancel()
    deadline = time.monotonic() + 5
    while generating() != "0":
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_the_callers_deadline_is_the_answers(echo: ServerProcess) -> None:
    answer = post(echo, "/v1/vision:analyze", json={"question": "slow"}, headers={"x-server-timeout": "0.2"})
    assert answer.status_code == 504
    assert answer.json()["error"]["details"][0]["reason"] == "DEADLINE_EXCEEDED"
    assert post(echo, "/v1/vision:analyze", json={}, headers={"x-server-timeout": "soon"}).status_code == 400


def test_health_tells_one_truth_everywhere(echo: ServerProcess) -> None:
    with grpc.insecure_channel(echo.address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for name in ("", "ai4thai.vision.v1.VisionService"):
            assert stub.Check(health_pb2.HealthCheckRequest(service=name)).status == 1
        with pytest.raises(grpc.RpcError) as unknown:
            stub.Check(health_pb2.HealthCheckRequest(service="nobody"))
        assert unknown.value.code() == grpc.StatusCode.NOT_FOUND
        watch = stub.Watch(health_pb2.HealthCheckRequest(service="nobody"))
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
        watch.cancel()
    body = httpx.get(f"http://{echo.address}/health/detailed").json()
    assert body["status"] == "SERVING"
    assert body["services"]["ai4thai.vision.v1.VisionService"] == "SERVING"
    assert body["checks"]["ticks"]["status"] == "OK"


def test_metrics_count_the_calls(echo: ServerProcess) -> None:
    failing(echo, "full")
    text = httpx.get(f"http://{echo.address}/metrics").text
    labels = 'grpc_code="RESOURCE_EXHAUSTED",grpc_method="Analyze",grpc_service="ai4thai.vision.v1.VisionService"'
    line = re.escape(f"grpc_server_handled_total{{{labels}}} ") + r"(\d+)"
    assert int(re.search(line, text)[1]) >= 1
    assert "process_resident_memory_bytes" in text


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ('{"image":' * 5000 + "1" + "}" * 5000, "body"),
        ('{"image": {"content": "*?!"}}', "image.content"),
        ('{"image": {"content": "data:image/jpeg;base64,aGVsbG8="}}', "image.content"),
        ('{"options": []}', "options"),
        ('{"image": []}', "image"),
    ],
)
def test_json_that_would_be_misread_is_refused(echo: ServerProcess, body: str, field: str) -> None:
    error = post(echo, "/v1/vision:detect", content=body).json()["error"]
    assert error["status"] == "INVALID_ARGUMENT"
    assert error["details"][1]["fieldViolations"][0]["field"] == field, error["message"]


def test_health_watches_take_no_calls_place(echo: ServerProcess) -> None:
    with grpc.insecure_channel(echo.address) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=""))
        next(watch)
        assert "ai4thai_calls_in_flight 0.0" in httpx.get(f"http://{echo.address}/metrics").text
        watch.cancel()
