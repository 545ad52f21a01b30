"""Clients that are not ours: grpcurl, buf curl, Node.js, curl, a health probe."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from grpc_health.v1 import health_pb2

from tests.end_to_end.calling import Server
from tests.end_to_end.conftest import wait_until
from tests.end_to_end.pictures import Picture, encoded, foreign, jpeg
from tests.processes import ROOT
from vision_server.shapes.boxes import matched_boxes

BIN = Path(sys.executable).parent
NODE = Path(__file__).parent / "node"
VISION, QUEUE = "ai4thai.vision.v1.VisionService", "ai4thai.queue.v1.QueueService"
LARGE_PX = (2700, 2460)  # 19.9 MB as a BMP: just below the limit of 20 MB


def output_of(*command: str | Path, stdin: str | None = None, cwd: Path = ROOT) -> str:
    done = subprocess.run(command, input=stdin, cwd=cwd, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def grpcurl(*arguments: str, stdin: str | None = None) -> str:
    return output_of(BIN / "grpcurl", "-plaintext", *arguments, stdin=stdin)


@pytest.fixture(scope="module")
def picture() -> Picture:
    return foreign(3, 3, 3)


@pytest.fixture(scope="module")
def detect_body(picture: Picture) -> str:
    """A DetectRequest in JSON, the image in base64."""
    return json.dumps({"image": {"content": base64.b64encode(jpeg(picture.image)).decode()}})


def assert_found(answer: dict[str, Any], picture: Picture) -> None:
    """A DetectResponse in JSON, under the proto's field names or in camelCase, tells what is in the picture."""

    def edge(box: dict[str, float], name: str) -> float:
        return box.get(f"{name}_px", box.get(name.replace("_m", "M") + "Px", 0))

    boxes = [
        (d["label"], d["confidence"], tuple(edge(d["box"], name) for name in ("x_min", "y_min", "x_max", "y_max")))
        for d in answer["detections"]
    ]
    assert len(boxes) == len(picture.truth) == len(matched_boxes(boxes, picture.truth, 0.5)), (boxes, picture.truth)


# ---- grpcurl


@pytest.mark.parametrize(
    ("server", "services"),
    [
        ("vision", {VISION, "ai4thai.vision.v1.ModelService", "ai4thai.vision.v1.DeviceService"}),
        ("queue", {QUEUE}),
    ],
)
def test_grpcurl_lists_the_services(request: pytest.FixtureRequest, server: str, services: set[str]) -> None:
    address = request.getfixturevalue(server).address
    listed = set(grpcurl(address, "list").split())
    assert services <= listed
    assert {"grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"} <= listed


def test_grpcurl_describes_services_methods_and_messages(vision: Server, queue: Server) -> None:
    assert "rpc DetectStream ( stream .ai4thai.vision.v1.DetectStreamRequest )" in grpcurl(
        vision.address, "describe", VISION
    )
    assert "is a method" in grpcurl(vision.address, "describe", f"{VISION}.Detect")
    assert "min_confidence" in grpcurl(vision.address, "describe", "ai4thai.vision.v1.DetectOptions")
    assert "SubmitJob" in grpcurl(queue.address, "describe", f"{QUEUE}.SubmitJob")
    assert f"{VISION}.Analyze" in grpcurl(vision.address, "list", VISION)


def test_grpcurl_asks_for_the_health(vision: Server, queue: Server) -> None:
    for server, service in ((vision, VISION), (vision, "model/shapes-detector"), (queue, QUEUE)):
        body = json.dumps({"service": service})
        answer = json.loads(grpcurl("-d", body, server.address, "grpc.health.v1.Health/Check"))
        assert answer == {"status": "SERVING"}


def test_grpcurl_detects(vision: Server, picture: Picture, detect_body: str) -> None:
    assert_found(json.loads(grpcurl("-d", "@", vision.address, f"{VISION}/Detect", stdin=detect_body)), picture)


def test_grpcurl_shows_an_errors_details(vision: Server) -> None:
    command: list[str | Path] = [BIN / "grpcurl", "-plaintext", "-d", "{}", vision.address, f"{VISION}/Detect"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert done.returncode != 0
    assert "InvalidArgument" in done.stderr
    assert "IMAGE_EMPTY" in done.stderr


# ---- buf curl


@pytest.mark.parametrize("schema", ["reflection", "protos"])
def test_buf_curl_detects(vision: Server, picture: Picture, detect_body: str, schema: str) -> None:
    where = [] if schema == "reflection" else ["--schema", "protos"]
    url = f"http://{vision.address}/{VISION}/Detect"
    command: list[str | Path] = [
        BIN / "buf",
        "curl",
        "--protocol",
        "grpc",
        "--http2-prior-knowledge",
        *where,
        "-d",
        "@-",
        url,
    ]
    assert_found(json.loads(output_of(*command, stdin=detect_body)), picture)


def test_buf_curl_streams(vision: Server, picture: Picture) -> None:
    image = base64.b64encode(jpeg(picture.image)).decode()
    frames = [json.dumps({"frame": {"frame_id": number, "image": {"content": image}}}) for number in (5, 6)]
    requests = "\n".join([json.dumps({"config": {}}), *frames])
    url = f"http://{vision.address}/{VISION}/DetectStream"
    command: list[str | Path] = [BIN / "buf", "curl", "--protocol", "grpc", "--http2-prior-knowledge", "-d", "@-", url]
    answers = values(output_of(*command, stdin=requests))
    assert [answer["result"]["frameId"] for answer in answers[:2]] == ["5", "6"]
    assert_found(answers[0]["result"]["detection"], picture)
    assert answers[2]["summary"]["detectedCount"] == "2"


def values(text: str) -> list[Any]:
    """JSON values one after the other, on however many lines."""
    decoder, found = json.JSONDecoder(), []
    while text := text.lstrip():
        value, end = decoder.raw_decode(text)
        found.append(value)
        text = text[end:]
    return found


# ---- Node.js


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory, in_ci: bool) -> Path:
    """A folder with client.js and what it needs."""
    npm = shutil.which("npm")
    if npm is None:
        assert not in_ci, "npm is missing"
        pytest.skip("npm is missing")
    folder = tmp_path_factory.mktemp("node")
    for name in ("package.json", "package-lock.json", "client.js"):
        shutil.copy(NODE / name, folder)
    output_of(npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--no-update-notifier", cwd=folder)
    return folder


def run_node(folder: Path, server: Server, what: str, *files: Path) -> list[Any]:
    command: list[str | Path] = ["node", "client.js", ROOT / "protos", server.address, what, *files]
    return [json.loads(line) for line in output_of(*command, cwd=folder).splitlines()]


def test_node_sends_20_mb_in_one_call(vision: Server, picture: Picture, node: Path) -> None:
    large = picture.resized(*LARGE_PX)
    file = node / "large.bmp"
    file.write_bytes(encoded(large.image, "BMP"))
    assert 19_900_000 < file.stat().st_size < 20_000_000
    (answer,) = run_node(node, vision, "detect", file)
    assert (answer["width_px"], answer["height_px"]) == LARGE_PX
    assert_found(answer, large)


def test_node_streams_both_ways(vision: Server, node: Path) -> None:
    pictures = [foreign(index, 2, 3) for index in range(40, 45)]
    files = [node / f"{number}.jpg" for number in range(len(pictures))]
    for file, one in zip(files, pictures, strict=True):
        file.write_bytes(jpeg(one.image))
    files.insert(2, node / "broken.jpg")
    files[2].write_bytes(b"broken")
    *results, last = run_node(node, vision, "stream", *files)
    assert [answer["result"]["frame_id"] for answer in results] == [str(number) for number in range(len(files))]
    outcomes = [answer["result"]["outcome"] for answer in results]
    assert outcomes == ["detection", "detection", "error", "detection", "detection", "detection"]
    assert "IMAGE_UNREADABLE" in json.dumps(results[2]) or results[2]["result"]["error"]["code"] == 3
    right = [results[0], results[1], *results[3:]]
    hits = sum(
        {d["label"] for d in answer["result"]["detection"]["detections"]} == {s.label for s in one.shapes}
        for answer, one in zip(right, pictures, strict=True)
    )
    assert hits >= 4
    assert (last["summary"]["received_count"], last["summary"]["error_count"]) == ("6", "1")


# ---- curl, every documented URL


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
    assert {model["name"]: model["state"] for model in info["models"]} == {
        "shapes-detector": "MODEL_STATE_READY",
        "shapes-describer": "MODEL_STATE_READY",
    }
    listed = curl_json(vision, "/v1/models")["models"]
    for model in listed:
        assert curl_json(vision, f"/v1/models/{model['name']}")["model"] == model
    status, text = curl(vision, "/v1/models/nobody")
    assert (status, json.loads(text)["error"]["details"][0]["reason"]) == (404, "MODEL_NOT_FOUND")
    assert curl_json(vision, "/v1/devices")["devices"]


@pytest.mark.parametrize("path", ["/v1/models/shapes-detector:load", "/v1/models/shapes-detector:unload"])
def test_curl_is_told_what_is_not_served_yet(vision: Server, path: str) -> None:
    status, text = curl(vision, path, body="{}")
    assert (status, json.loads(text)["error"]["details"][0]["reason"]) == (501, "NOT_SERVED_YET")


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
    ("path", "arguments"),
    [
        ("/v1/jobs:batch", ("-d", "{}")),
        ("/v1/jobs/x:retry", ("-d", "{}")),
        ("/v1/media/x", ()),
        ("/v1/queues/x:pause", ("-d", "{}")),
        ("/v1/queues/x:resume", ("-d", "{}")),
        ("/v1/queues/x:purge", ("-d", "{}")),
    ],
)
def test_curl_is_told_what_the_queue_does_not_serve_yet(queue: Server, path: str, arguments: tuple[str, ...]) -> None:
    status, text = curl(queue, path, *arguments)
    assert (status, json.loads(text)["error"]["details"][0]["reason"]) == (501, "NOT_SERVED_YET")


# ---- a health probe


def test_a_plain_probe_sees_both_servers_ready(vision: Server, queue: Server) -> None:
    serving = health_pb2.HealthCheckResponse.SERVING
    expected = {vision: ["", VISION, "model/shapes-detector", "model/shapes-describer"], queue: ["", QUEUE]}
    for server, names in expected.items():
        for name in names:
            request = health_pb2.HealthCheckRequest(service=name)
            assert server.health.Check(request, timeout=5).status == serving, name
            watch = server.health.Watch(request, timeout=5)
            assert next(watch).status == serving
            watch.cancel()
    wait_until("the probes have left", lambda: vision.metric("ai4thai_calls_in_flight") == 0)
