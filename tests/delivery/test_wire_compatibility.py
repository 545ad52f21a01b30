"""The wire stays compatible: a client of every release calls the servers of today; a change that would break one is caught."""

from __future__ import annotations

import base64
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from ai4thai.vision.v1 import image_pb2
from ai4thai.vision.v1 import vision_service_pb2 as pb
from grpc_health.v1 import health_pb2, health_pb2_grpc

from benchmarks.rehearsal_parts import ROOT, wait_until
from tests.delivery.fleet import SCENE, Fleet
from tests.delivery.queues import QueueSide
from tests.delivery.released import RELEASES, Released, camera

BUF = str(Path(sys.executable).parent / "buf")
CONTENT = base64.b64encode(SCENE.read_bytes()).decode()
IMAGE = {"content": CONTENT}
VISION, MODELS, DEVICES = (f"ai4thai.vision.v1.{name}Service" for name in ("Vision", "Model", "Device"))
QUEUE = "ai4thai.queue.v1.QueueService"
ASKED = [{"role": "ROLE_USER", "parts": [{"image": IMAGE}, {"text": "How many shapes are there?"}]}]


@pytest.fixture
def vision(fleet: Fleet) -> Iterator[grpc.Channel]:
    """A channel to the vision server that has a describer."""
    fleet.wait_until_whole()
    with grpc.insecure_channel(fleet.servers[-1].address) as channel:
        yield channel


@pytest.fixture
def queue(fleet: Fleet, queue_side: QueueSide) -> Iterator[grpc.Channel]:
    """A channel to the queue, through the edge; a worker is there."""
    with (
        queue_side.running("today"),
        grpc.secure_channel(fleet.queue.removeprefix("grpcs://"), fleet.credentials) as channel,
    ):
        yield channel


def breaking(protos: Path, released: Path) -> subprocess.CompletedProcess[str]:
    """What `make check` does with each release."""
    build = subprocess.run([BUF, "build", str(protos), "-o", "-#format=binpb"], capture_output=True, check=True)
    done = subprocess.run(
        [BUF, "breaking", "-#format=binpb", "--against", str(released)], input=build.stdout, capture_output=True
    )
    return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())


def test_a_change_that_breaks_a_release_is_caught(tmp_path: Path) -> None:
    # Given the contract as it is: nothing breaks
    assert RELEASES
    for released in RELEASES:
        done = breaking(ROOT / "protos", released)
        assert done.returncode == 0, done.stdout + done.stderr
    # When a field changes its type, another goes, a method is renamed
    for number, (file, before, after, told) in enumerate(
        [
            (
                "vision/v1/detection.proto",
                "string label = 1;",
                "int32 label = 1;",
                'changed type from "string" to "int32"',
            ),
            ("queue/v1/queue_service.proto", "  string job_id = 1;", "", 'field "1" with name "job_id"'),
            ("queue/v1/queue_service.proto", "rpc GetJob(", "rpc FetchJob(", '"GetJob"'),
        ]
    ):
        changed = tmp_path / str(number)
        shutil.copytree(ROOT / "protos", changed)
        path = changed / "ai4thai" / file
        text = path.read_text()
        assert before in text
        path.write_text(text.replace(before, after))
        # Then it is told
        done = breaking(changed, RELEASES[0])
        assert done.returncode != 0 and told in done.stdout, done.stdout
    # And what only adds is none
    changed = tmp_path / "added"
    shutil.copytree(ROOT / "protos", changed)
    path = changed / "ai4thai/vision/v1/detection.proto"
    path.write_text(path.read_text() + "\n// New.\nmessage Novelty {\n  // New.\n  string name = 1;\n}\n")
    assert breaking(changed, RELEASES[0]).returncode == 0


@pytest.mark.parametrize("image", RELEASES, ids=lambda path: path.stem)
def test_a_client_of_a_release_calls_every_method_of_todays_servers(
    image: Path, vision: grpc.Channel, queue: grpc.Channel
) -> None:
    released = Released(image)

    def one(channel: grpc.Channel, method: str, **request: Any) -> Any:
        return released.call(channel, method, request)[0]

    # Vision
    (found,) = released.call(vision, f"{VISION}/Detect", {"image": IMAGE})
    assert {"star", "circle"} <= {thing["label"] for thing in found["detections"]}
    answers = released.call(vision, f"{VISION}/DetectStream", *camera([CONTENT] * 3))
    assert [a["result"].get("frame_id", "0") for a in answers[:-1]] == ["0", "1", "2"] and "summary" in answers[-1]
    answers = released.call(vision, f"{VISION}/Generate", {"messages": ASKED})
    assert "".join(a["delta"]["text"] for a in answers[:-1]) and "summary" in answers[-1]
    assert one(vision, f"{VISION}/Analyze", image=IMAGE, question="How many shapes are there?")["text"]
    assert one(vision, f"{VISION}/GetServerInfo")["version"]
    # Models and devices
    names = {model["name"] for model in one(vision, f"{MODELS}/ListModels")["models"]}
    assert "shapes-detector" in names
    assert one(vision, f"{MODELS}/GetModel", name="shapes-detector")["model"]["state"] == "MODEL_STATE_READY"
    assert one(vision, f"{MODELS}/LoadModel", name="shapes-classifier")["model"]["state"] == "MODEL_STATE_READY"
    one(vision, f"{MODELS}/UnloadModel", name="shapes-classifier")
    assert one(vision, f"{DEVICES}/ListDevices")["devices"]
    assert released.call(vision, f"{DEVICES}/WatchDevices", {"interval": "0.2s"}, at_most=1)[0]["devices"]
    # The queue: a job to its end
    work = {"detect": {"images": [IMAGE]}}
    job = one(queue, f"{QUEUE}/SubmitJob", work=work, request_id="released-1")["job"]
    assert one(queue, f"{QUEUE}/SubmitJob", work=work, request_id="released-1")["job"]["job_id"] == job["job_id"]
    changes = released.call(queue, f"{QUEUE}/WatchJob", {"job_id": job["job_id"]})
    assert changes[-1]["job"]["state"] == "JOB_STATE_SUCCEEDED"
    result = one(queue, f"{QUEUE}/GetJob", job_id=job["job_id"])["job"]["result"]
    assert result["detect"]["items"][0]["detection"]["detections"]
    # Its other calls
    one(queue, f"{QUEUE}/PauseQueue", queue="held")
    both = one(queue, f"{QUEUE}/BatchSubmitJobs", requests=[{"work": work, "queue": "held"}, {"work": {}}])["items"]
    assert "accepted" in both[0] and both[1]["error"]["code"] == grpc.StatusCode.INVALID_ARGUMENT.value[0]
    held = both[0]["accepted"]["job"]["job_id"]
    assert one(queue, f"{QUEUE}/CancelJob", job_id=held)["job"]["state"] == "JOB_STATE_CANCELLED"
    assert one(queue, f"{QUEUE}/RetryJob", job_id=held)["job"]["state"] == "JOB_STATE_QUEUED"
    assert one(queue, f"{QUEUE}/PurgeQueue", queue="held")["cancelled_count"] == "1"
    one(queue, f"{QUEUE}/ResumeQueue", queue="held")
    one(queue, f"{QUEUE}/DeleteJob", job_id=held)
    assert {one["job_id"] for one in one(queue, f"{QUEUE}/ListJobs")["jobs"]} >= {job["job_id"]}
    assert one(queue, f"{QUEUE}/GetQueueStats")["queues"]
    assert one(queue, f"{QUEUE}/ListWorkers")["workers"]
    file = released.call(queue, f"{QUEUE}/UploadMedia", {"config": {"content_type": "image/jpeg"}}, {"chunk": CONTENT})[
        0
    ]
    pieces = released.call(queue, f"{QUEUE}/GetMedia", {"media_id": file["media"]["media_id"]})
    assert b"".join(base64.b64decode(piece.get("chunk", "")) for piece in pieces) == SCENE.read_bytes()
    # Then nothing that it knows has been left out
    assert released.called == released.methods


def test_what_a_later_client_adds_is_passed_over(vision: grpc.Channel) -> None:
    # Given a request with a field that today's contract does not have: number 15000, a string
    request = pb.DetectRequest(image=image_pb2.Image(content=SCENE.read_bytes())).SerializeToString()
    later = request + bytes([0xC2, 0xA9, 0x07, 0x03]) + b"new"
    call = vision.unary_unary(f"/{VISION}/Detect", response_deserializer=pb.DetectResponse.FromString)
    # Then it is answered like the others
    assert len(call(later, timeout=60).detections) == len(call(request, timeout=60).detections) > 0
    # And a method that is yet to come is UNIMPLEMENTED, which tells such a client to do without
    with pytest.raises(grpc.RpcError) as refused:
        vision.unary_unary(f"/{VISION}/Imagine")(b"", timeout=60)
    assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED
    stub: Any = health_pb2_grpc.HealthStub(vision)
    wait_until("it serves", lambda: stub.Check(health_pb2.HealthCheckRequest(), timeout=30).status == 1)
