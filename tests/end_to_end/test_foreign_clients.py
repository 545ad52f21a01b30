"""gRPC clients that are not ours: grpcurl, buf curl, Node.js, a health probe."""

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
from tests.end_to_end.foreign_programs import assert_found, output_of
from tests.end_to_end.pictures import Picture, encoded, foreign, jpeg
from tests.processes import ROOT
from tests.programs import needed

BIN = Path(sys.executable).parent
NODE = Path(__file__).parent / "node"
VISION, QUEUE = "ai4thai.vision.v1.VisionService", "ai4thai.queue.v1.QueueService"
LARGE_PX = (2700, 2460)  # 19.9 MB as a BMP: just below the limit of 20 MB


def grpcurl(*arguments: str, stdin: str | None = None) -> str:
    return output_of(BIN / "grpcurl", "-plaintext", *arguments, stdin=stdin)


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
def node(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with client.js and what it needs."""
    npm = needed("npm")
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


# ---- a health probe


def test_a_plain_probe_sees_both_servers_ready(vision: Server, queue: Server) -> None:
    serving = health_pb2.HealthCheckResponse.SERVING
    expected = {vision: ["", VISION, "model/shapes-detector", "model/shapes-describer"], queue: ["", QUEUE]}
    for server, names in expected.items():
        for name in names:
            request = health_pb2.HealthCheckRequest(service=name)
            assert server.health.Check(request, timeout=30).status == serving, name
            watch = server.health.Watch(request, timeout=30)
            assert next(watch).status == serving
            watch.cancel()
    wait_until("the probes have left", lambda: vision.vision_calls_in_flight == 0)
