"""Models loaded, swapped and unloaded through the front door, while callers call."""

from __future__ import annotations

import json
import queue as queues
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
from ai4thai.vision.v1 import device_service_pb2, image_pb2, model_service_pb2
from ai4thai.vision.v1 import vision_service_pb2 as pb
from google.protobuf.duration_pb2 import Duration

from tests.end_to_end.calling import Server, detect_request, generate_request, json_refusal, refused
from tests.end_to_end.conftest import TIMES, wait_until, wait_until_ready
from tests.end_to_end.pictures import assert_all_found, foreign, jpeg
from tests.processes import ServerProcess
from vision_server.weights import SHIPPED, SHIPPED_DESCRIBER, SHIPPED_DETECTOR

PICTURE = foreign(3, 3, 3)
GOOD = jpeg(PICTURE.image)
# Both detect shapes; of what they find this one tells the boxes of turned objects too, so that one can be told from the other.
DETECTOR, OTHER = SHIPPED[SHIPPED_DETECTOR], SHIPPED["shapes-oriented"]


@dataclass
class Life:
    """A server with two detectors and a describer in memory, and more in its model directory."""

    server: Server
    models_dir: Path

    def put(self, name: str, weights: Path = DETECTOR) -> None:
        """Weights under this name, whole at once, as an operator is told to put them."""
        temporary = self.models_dir / f".{name}"
        shutil.copyfile(weights, temporary)
        temporary.rename(self.models_dir / name)

    def load(self, name: str, *aliases: str) -> model_service_pb2.Model:
        request = model_service_pb2.LoadModelRequest(name=name, aliases=aliases)
        return self.server.models.LoadModel(request, timeout=100).model

    def unload(self, name: str) -> model_service_pb2.Model:
        return self.server.models.UnloadModel(model_service_pb2.UnloadModelRequest(name=name), timeout=60).model

    def get(self, name: str) -> model_service_pb2.Model:
        return self.server.models.GetModel(model_service_pb2.GetModelRequest(name=name), timeout=20).model

    def detect(self, name: str, **options: Any) -> pb.DetectResponse:
        return self.server.vision.Detect(detect_request(GOOD, model=name, **options), timeout=60)


@pytest.fixture(scope="module")
def life(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Life]:
    data_dir = tmp_path_factory.mktemp("life")
    (data_dir / "models").mkdir()
    env = {
        **TIMES,
        "AI4THAI_DATA_DIR": str(data_dir),
        "VISION_SERVICE_PORT": "0",
        "VISION_DETECTOR": f"cams,{SHIPPED_DETECTOR}",
        "VISION_ENGINE": "pytorch",  # reads weights at once; the others convert them first
        "VISION_EXECUTORS": "1",
        "VISION_OFFLINE": "true",
        "SERVING_UNREADY_SECONDS": "0.2",
    }
    shutil.copyfile(DETECTOR, data_dir / "models" / "cams.pt")
    with ServerProcess("vision_server", env=env) as process:
        wait_until_ready(process)
        server = Server(process)
        yield Life(server, data_dir / "models")
        server.close()


@dataclass
class Traffic:
    """What callers saw."""

    answered: int = 0
    versions: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


@contextmanager
def traffic(life: Life, model: str, callers: int = 2) -> Iterator[Traffic]:
    """Calls a model without a pause, from several threads, meanwhile."""
    seen, ended, lock = Traffic(), threading.Event(), threading.Lock()

    def call() -> None:
        while not ended.is_set():
            try:
                version, failure = life.detect(model).model_version, ""
            except grpc.RpcError as error:
                version, failure = "", str(error)
            with lock:
                seen.answered += 1
                seen.versions += [version] * (version not in seen.versions[-1:] and not failure)
                seen.failures += [failure] * bool(failure)

    with ThreadPoolExecutor(callers) as threads:
        for _ in range(callers):
            threads.submit(call)
        try:
            yield seen
        finally:
            ended.set()


def test_loading_one_model_leaves_the_server_ready_and_fails_no_call_of_the_others(life: Life) -> None:
    """Triton #7014: the server is not ready while it loads a model. (#5940, that calls of others wait for it:
    vision_server/test_models_life.py, with a load that ends when it is told to.)
    """
    life.put("more.pt")
    health: list[int] = []
    with traffic(life, SHIPPED_DETECTOR) as seen:
        wait_until("the callers call", lambda: seen.answered > 3)
        with ThreadPoolExecutor(1) as beside:
            loading = beside.submit(life.load, "more")
            while not loading.done():
                health.append(life.server.web.get("/health").status_code)
        assert loading.result().state == model_service_pb2.MODEL_STATE_READY
    assert set(health) == {200}
    assert not seen.failures
    assert_all_found(life.detect("more").detections, PICTURE)
    life.unload("more")


def test_loads_unloads_and_swaps_under_traffic_fail_no_call(life: Life) -> None:
    life.put("coming.pt")
    versions = {life.get("cams").version}
    with traffic(life, "cams") as seen, traffic(life, SHIPPED_DETECTOR, callers=1) as beside:
        for weights in (OTHER, DETECTOR):
            life.put("cams.pt", weights)
            versions.add(life.load("cams").version)  # loads the newer weights beside the older ones, then swaps
            life.load("coming")
            assert_all_found(life.detect("coming").detections, PICTURE)
            life.unload("coming")
    assert seen.failures == beside.failures == []
    assert seen.answered > 10 and beside.answered > 5
    # Both weights answered, and none but those two.
    assert len(versions) == 2 and set(seen.versions) == versions
    assert life.get("cams").task == model_service_pb2.TASK_DETECT


def test_a_stream_goes_on_over_a_swap_and_its_answers_say_which_weights_they_are_of(life: Life) -> None:
    life.put("cams.pt", DETECTOR)
    old = life.load("cams").version
    life.put("cams.pt", OTHER)
    sending: queues.SimpleQueue[pb.DetectStreamRequest | None] = queues.SimpleQueue()
    sending.put(pb.DetectStreamRequest(config=pb.StreamConfig()))
    call = life.server.vision.DetectStream(iter(sending.get, None), timeout=100)
    versions: list[str] = []

    def look() -> None:
        """A frame there, its answer back."""
        sending.put(pb.DetectStreamRequest(frame=pb.Frame(frame_id=len(versions), image=image_pb2.Image(content=GOOD))))
        versions.append(next(call).result.detection.model_version)

    look()
    with ThreadPoolExecutor(1) as beside:
        loading = beside.submit(life.load, "cams")
        while not loading.done():
            look()
        new = loading.result().version
    look()
    sending.put(None)
    [last] = call
    assert versions == sorted(versions, key=[old, new].index)
    assert versions[0] == old and versions[-1] == new != old
    assert (last.summary.error_count, last.summary.detected_count) == (0, len(versions))
    life.put("cams.pt", DETECTOR)
    life.load("cams")


def test_a_describer_comes_and_goes_too(life: Life) -> None:
    shutil.copytree(SHIPPED[SHIPPED_DESCRIBER], life.models_dir / "teller@3")
    loaded = life.load("teller@3", "narrator")
    assert (loaded.task, loaded.version) == (model_service_pb2.TASK_GENERATE, "3")
    for name in ("teller", "teller@3", "narrator"):
        request = generate_request(GOOD, "How many shapes are there?")
        request.model = name
        *_, last = life.server.vision.Generate(request, timeout=60)
        assert last.summary.text == "There are 3."
    wrong = refused(lambda: life.detect("narrator"))
    assert (wrong.code, wrong.reason) == ("INVALID_ARGUMENT", "WRONG_TASK")
    assert life.unload("narrator").state == model_service_pb2.MODEL_STATE_UNLOADED
    gone = refused(lambda: list(life.server.vision.Generate(request, timeout=60)))
    assert (gone.code, gone.field) == ("NOT_FOUND", "model")


def test_json_loads_lists_and_unloads(life: Life) -> None:
    life.put("yards@1.pt")
    web = life.server.web
    listed = [(model["name"], model["state"]) for model in web.get("/v1/models").json()["models"]]
    # Told ones in the operator's order, then what lies on the disk by name.
    assert listed[:3] == [(n, "MODEL_STATE_READY") for n in ("cams", SHIPPED_DETECTOR, SHIPPED_DESCRIBER)]
    assert listed[3:] == sorted(listed[3:]) and ("yards@1", "MODEL_STATE_UNLOADED") in listed
    loaded = web.post("/v1/models/yards@1:load", json={"aliases": ["gate"]})
    assert loaded.status_code == 200, loaded.text
    model = loaded.json()["model"]
    assert (model["name"], model["version"], model["aliases"]) == ("yards@1", "1", ["gate"])
    assert "yards@1" in [model["name"] for model in web.get("/info").json()["models"]]
    assert life.server.metric("ai4thai_model_ready", model="yards@1") == 1
    life.detect("gate")
    assert web.post("/v1/models/gate:unload").json()["model"]["state"] == "MODEL_STATE_UNLOADED"
    assert 'model="yards@1"' not in web.get("/metrics").text
    assert "model/yards@1" not in web.get("/health/detailed").json()["checks"]
    nowhere = json_refusal(web.post("/v1/models/nowhere:load"))
    assert (nowhere.code, nowhere.reason, nowhere.field) == ("NOT_FOUND", "MODEL_NOT_FOUND", "name")
    assert "yards@1" in nowhere.message and SHIPPED_DETECTOR in nowhere.message
    outside = json_refusal(web.post("/v1/models/..%2F..%2Fetc%2Fpasswd:load"))
    assert outside.code == "NOT_FOUND"
    alias = json_refusal(web.post("/v1/models/yards@1:load", json={"aliases": ["cams"]}))
    assert (alias.code, alias.field) == ("INVALID_ARGUMENT", "aliases")


def test_weights_that_cannot_be_read_are_told_and_harm_nobody(life: Life) -> None:
    (life.models_dir / "torn.pt").write_bytes(DETECTOR.read_bytes()[:100_000])
    said = refused(lambda: life.load("torn"))
    assert (said.code, said.reason) == ("FAILED_PRECONDITION", "MODEL_FAILED")
    torn = life.get("torn")
    assert torn.state == model_service_pb2.MODEL_STATE_FAILED and torn.state_reason in said.message
    assert life.server.web.get("/health").status_code == 200
    assert life.server.web.get("/info").json()["ready"] is True
    life.detect("")
    life.unload("torn")


def test_the_devices_are_watched_by_grpc_and_by_json(life: Life) -> None:
    interval = Duration(nanos=200_000_000)
    with traffic(life, "", callers=1):
        call = life.server.devices.WatchDevices(device_service_pb2.WatchDevicesRequest(interval=interval), timeout=60)
        began_s = time.monotonic()
        ratios = [next(call).devices[0].busy_ratio for _ in range(4)]
        assert time.monotonic() - began_s >= 0.5
        call.cancel()
        assert all(0 <= ratio <= 1 for ratio in ratios) and max(ratios) > 0
        with life.server.web.stream("GET", "/v1/devices:watch", params={"interval": "0.2s"}) as answer:
            assert answer.headers["content-type"] == "application/x-ndjson"
            lines = [json.loads(line) for line, _ in zip(answer.iter_lines(), range(2), strict=False)]
        assert [set(line) for line in lines] == [{"devices"}] * 2
    often = json_refusal(life.server.web.get("/v1/devices:watch?interval=0.01s"))
    assert (often.code, often.field) == ("INVALID_ARGUMENT", "interval")
    wait_until(
        "the watches have ended",
        lambda: (
            life.server.metric("grpc_server_started_total", grpc_method="WatchDevices")
            == life.server.metric("grpc_server_handled_total", grpc_method="WatchDevices")
        ),
    )


def test_draining_ends_a_watch_of_the_devices(life: Life) -> None:
    """The last test of this server: it ends it."""
    watch = life.server.devices.WatchDevices(device_service_pb2.WatchDevicesRequest(), timeout=100)
    assert next(watch).devices
    began_s = time.monotonic()
    life.server.process.signal(signal.SIGTERM)
    assert len(list(watch)) < 100  # ends by itself, without an error
    assert life.server.process.wait(60) == 0
    assert time.monotonic() - began_s < 25
