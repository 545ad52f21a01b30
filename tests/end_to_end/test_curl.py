"""curl on every documented URL of both servers."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.calling import Server
from tests.end_to_end.foreign_programs import assert_found, output_of
from tests.end_to_end.pictures import Picture, jpeg

VISION, QUEUE = "ai4thai.vision.v1.VisionService", "ai4thai.queue.v1.QueueService"


def curl(server: Server, path: str, *arguments: str, body: str | None = None) -> tuple[int, str]:
    """Status and body."""
    command: list[str | Path] = [
        "curl",
        "-sS",
        "--http1.1",
        "--noproxy",
        "*",
        "-m",
        "60",
        "-w",
        "\n%{http_code}",
        *arguments,
    ]
    if body is not None:
        command += ["-H", "content-type: application/json", "--data-binary", "@-"]
    text, _, status = output_of(*command, f"http://{server.address}{path}", stdin=body).rpartition("\n")
    return int(status), text


def curl_json(server: Server, path: str, *arguments: str, body: str | None = None) -> Any:
    status, text = curl(server, path, *arguments, body=body)
    assert status == 200, text
    return json.loads(text)


def test_curl_reads_the_health_of_both_servers(vision: Server, queue: Server) -> None:
    for server, service, check in ((vision, VISION, "model/shapes-detector"), (queue, QUEUE, "redis")):
        assert curl_json(server, "/health") == {"status": "SERVING"}
        assert curl_json(server, "/health/live") == {"status": "SERVING"}
        detailed = curl_json(server, "/health/detailed")
        assert detailed["status"] == "SERVING"
        assert detailed["services"][service] == "SERVING"
        assert detailed["checks"][check]["status"] == "OK"
        assert detailed["draining"] is False
        status, text = curl(server, "/metrics")
        assert status == 200
        assert "# TYPE grpc_server_handled_total counter" in text
        assert "process_resident_memory_bytes" in text


def test_curl_reads_what_the_vision_server_is(vision: Server) -> None:
    info = curl_json(vision, "/info")
    assert info["ready"] is True
    assert info["device"] == "cpu" or info["device"].startswith("cuda")
    assert {"detect", "detect_stream", "generate", "analyze"} <= set(info["capabilities"])
    assert int(info["limits"]["max_image_bytes"]) >= 20_000_000
    states = {model["name"]: model["state"] for model in info["models"]}
    assert {states["shapes-detector"], states["shapes-describer"]} == {"MODEL_STATE_READY"}
    listed = curl_json(vision, "/v1/models")["models"]
    for model in listed:
        assert curl_json(vision, f"/v1/models/{model['name']}")["model"] == model
    status, text = curl(vision, "/v1/models/nobody")
    assert (status, json.loads(text)["error"]["details"][0]["reason"]) == (404, "MODEL_NOT_FOUND")
    assert curl_json(vision, "/v1/devices")["devices"]


def test_curl_detects(vision: Server, picture: Picture, detect_body: str) -> None:
    answer = curl_json(vision, "/v1/vision:detect", body=detect_body)
    assert_found(answer, picture)
    assert (answer["width_px"], answer["height_px"]) == picture.image.size


def test_curl_generates_line_by_line(vision: Server, picture: Picture) -> None:
    image = {"image": {"content": base64.b64encode(jpeg(picture.image)).decode()}}
    message = {"role": "ROLE_USER", "parts": [image, {"text": "อธิบายภาพนี้"}]}
    status, text = curl(vision, "/v1/vision:generate", "-N", body=json.dumps({"messages": [message]}))
    assert status == 200
    *deltas, last = [json.loads(line) for line in text.splitlines()]
    assert len(deltas) >= 5
    assert "".join(delta["delta"]["text"] for delta in deltas) == last["summary"]["text"]
    assert last["summary"]["finish_reason"] == "FINISH_REASON_STOP"


def test_curl_analyzes(vision: Server, picture: Picture, detect_body: str) -> None:
    body = json.dumps({**json.loads(detect_body), "question": "How many shapes are there?"})
    answer = curl_json(vision, "/v1/vision:analyze", body=body)
    assert_found(answer["detection"], picture)
    assert answer["text"] == "There are 3."


@pytest.mark.usefixtures("workers")
def test_curl_takes_a_job_from_begin_to_end(queue: Server, picture: Picture, detect_body: str) -> None:
    content = json.loads(detect_body)["image"]
    body = json.dumps({"request_id": "curl-1", "queue": "curl", "work": {"detect": {"images": [content]}}})
    submitted = curl_json(queue, "/v1/jobs", body=body)
    assert submitted["created"] is True
    job_id = submitted["job"]["job_id"]
    assert curl_json(queue, "/v1/jobs", body=body)["job"]["job_id"] == job_id

    status, text = curl(queue, f"/v1/jobs/{job_id}:watch", "-N")
    assert status == 200
    changes = [json.loads(line) for line in text.splitlines()]
    assert changes[-1]["job"]["state"] == "JOB_STATE_SUCCEEDED"
    assert [int(change["revision"]) for change in changes] == sorted({int(change["revision"]) for change in changes})

    job = curl_json(queue, f"/v1/jobs/{job_id}")["job"]
    assert_found(job["result"]["detect"]["items"][0]["detection"], picture)
    assert [one["job_id"] for one in curl_json(queue, "/v1/jobs?queue=curl&page_size=10")["jobs"]] == [job_id]
    assert curl_json(queue, "/v1/jobs?queue=curl&states=JOB_STATE_FAILED")["jobs"] == []
    stats = curl_json(queue, "/queue/stats")
    assert "curl" in [one["queue"] for one in stats["queues"]]
    assert stats["worker_count"] >= 1
    assert len(curl_json(queue, "/v1/workers")["workers"]) == stats["worker_count"]

    cancelled = curl_json(queue, f"/v1/jobs/{job_id}:cancel", body="{}")["job"]
    assert cancelled["state"] == "JOB_STATE_SUCCEEDED"  # it had ended: nothing changes
    assert curl_json(queue, f"/v1/jobs/{job_id}", "-X", "DELETE") == {}
    status, text = curl(queue, f"/v1/jobs/{job_id}")
    assert (status, json.loads(text)["error"]["details"][0]["reason"]) == (404, "JOB_NOT_FOUND")


@pytest.mark.parametrize(
    ("path", "arguments", "status", "reason"),
    [
        ("/v1/jobs:batch", ("-d", "{}"), 400, "INVALID_FIELD"),
        ("/v1/jobs/x:retry", ("-d", "{}"), 404, "JOB_NOT_FOUND"),
        ("/v1/media/x", (), 404, "MEDIA_NOT_FOUND"),
        ("/v1/media/x:download", (), 404, "MEDIA_NOT_FOUND"),
        ("/v1/queues/Not%20One:pause", ("-d", "{}"), 400, "INVALID_FIELD"),
        ("/v1/queues/never:purge", ("-d", "{}"), 404, "QUEUE_NOT_FOUND"),
        ("/queue/depth?queue=Not%20One", (), 400, "INVALID_FIELD"),
    ],
)
def test_curl_is_told_what_the_queue_cannot_do(
    queue: Server, path: str, arguments: tuple[str, ...], status: int, reason: str
) -> None:
    code, text = curl(queue, path, *arguments)
    assert (code, json.loads(text)["error"]["details"][0]["reason"]) == (status, reason)
