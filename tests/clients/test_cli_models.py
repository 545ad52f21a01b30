"""`ai4thai models` and `ai4thai devices`, and the client's methods under them."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import pytest
from ai4thai import AsyncVisionClient, InvalidInput, NotFound, VisionClient
from ai4thai.cli import app
from ai4thai.server_info import Device, Model, ModelState
from ai4thai.vision.v1 import device_service_pb2, model_service_pb2
from typer.testing import CliRunner, Result

from serving.errors import Code, ServiceError
from tests.clients.fake_servers import FakeServer, FakeVision


class FakeLife(FakeVision):
    """Has one model in memory and one on the disk; loading takes a few looks at its progress."""

    def __init__(self) -> None:
        super().__init__()
        self.models = {
            "cams": model_service_pb2.Model(
                name="cams",
                version="1",
                task=model_service_pb2.TASK_DETECT,
                engine="openvino",
                precision="fp32",
                device="cpu",
                state=model_service_pb2.MODEL_STATE_READY,
                load_progress=1,
                labels=["cat", "dog"],
                input_size_px=640,
                memory_bytes=2_100_000,
                is_default=True,
                aliases=["live"],
            ),
            "yards": model_service_pb2.Model(name="yards", state=model_service_pb2.MODEL_STATE_UNLOADED),
        }
        self.looks = threading.Semaphore(0)
        self.left = threading.Event()

    def ListModels(self, request: Any, context: Any) -> model_service_pb2.ListModelsResponse:
        self.script.begin("ListModels", request, context)
        return model_service_pb2.ListModelsResponse(models=self.models.values())

    def GetModel(self, request: Any, context: Any) -> model_service_pb2.GetModelResponse:
        self.script.begin("GetModel", request, context)
        self.looks.release()
        return model_service_pb2.GetModelResponse(model=self._find(request.name, context))

    def LoadModel(self, request: Any, context: Any) -> model_service_pb2.LoadModelResponse:
        self.script.begin("LoadModel", request, context)
        model = self._find(request.name, context)
        for state, progress in ((2, 0.25), (3, 0.75)):
            model.state, model.load_progress = state, progress
            self.looks.acquire(timeout=5)
        model.aliases.extend(request.aliases)
        model.state, model.load_progress = model_service_pb2.MODEL_STATE_READY, 1
        return model_service_pb2.LoadModelResponse(model=model)

    def UnloadModel(self, request: Any, context: Any) -> model_service_pb2.UnloadModelResponse:
        self.script.begin("UnloadModel", request, context)
        model = self._find(request.name, context)
        model.state, model.load_progress = model_service_pb2.MODEL_STATE_UNLOADED, 0
        return model_service_pb2.UnloadModelResponse(model=model)

    def WatchDevices(self, request: Any, context: Any) -> Iterator[device_service_pb2.WatchDevicesResponse]:
        self.script.begin("WatchDevices", request, context)
        context.add_callback(self.left.set)
        for number in range(20):
            device = device_service_pb2.Device(kind="cpu", name="A fake CPU", busy_ratio=number / 20)
            yield device_service_pb2.WatchDevicesResponse(devices=[device])
            time.sleep(0.02)

    def _find(self, name: str, context: Any) -> model_service_pb2.Model:
        if name not in self.models:
            self.script.fail_next(
                "find", ServiceError(Code.NOT_FOUND, "MODEL_NOT_FOUND", f"There is no model {name!r}.", field="name")
            )
            self.script.begin("find", None, context)
        return self.models[name]


@pytest.fixture
def vision_server() -> Iterator[FakeServer]:
    with FakeServer(FakeLife()) as server:
        yield server


@pytest.fixture
def fake_life(vision_server: FakeServer) -> FakeLife:
    assert isinstance(vision_server.fake, FakeLife)
    return vision_server.fake


@pytest.fixture
def run(vision_server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    monkeypatch.setenv("AI4THAI_VISION_ADDRESS", vision_server.address)
    monkeypatch.setenv("COLUMNS", "160")
    return lambda *arguments: CliRunner().invoke(app, list(arguments))


def lines_of(result: Result) -> list[Any]:
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_models_are_listed_with_their_state(run: Callable[..., Result]) -> None:
    result = run("models", "list")
    assert result.exit_code == 0, result.output
    assert "cams *" in result.stdout and "READY" in result.stdout and "openvino fp32 cpu" in result.stdout
    assert "UNLOADED" in result.stdout and "%" not in result.stdout and "unspecified" not in result.stdout
    assert [(model["name"], model["state"]) for model in lines_of(run("models", "list", "--json"))] == [
        ("cams", "READY"),
        ("yards", "UNLOADED"),
    ]


def test_one_model_is_shown_in_full(run: Callable[..., Result]) -> None:
    shown = run("models", "show", "cams").stdout
    for words in ("cams", "READY", "version", "live", "640 px", "2.1 MB", "cat, dog", "name no model"):
        assert words in shown
    missing = run("models", "show", "ghost")
    assert (missing.exit_code, missing.stderr) == (1, "Error: There is no model 'ghost'.\n")


def test_load_waits_until_the_model_is_ready(run: Callable[..., Result], fake_life: FakeLife) -> None:
    result = run("models", "load", "yards", "--alias", "gate", "--alias", "live")
    assert result.exit_code == 0, result.output
    assert "yards" in result.stdout and "READY" in result.stdout and "gate, live" in result.stdout
    assert list(fake_life.script.requests["LoadModel"].aliases) == ["gate", "live"]
    assert fake_life.script.calls.count("GetModel") >= 2  # it watched
    [model] = lines_of(run("models", "load", "cams", "--json"))
    assert (model["state"], model["load_progress"]) == ("READY", 1)
    assert run("models", "load", "ghost").exit_code == 1


def test_a_load_that_is_refused_says_why(run: Callable[..., Result], fake_life: FakeLife) -> None:
    refusal = ServiceError(
        Code.FAILED_PRECONDITION, "MEMORY_EXCEEDED", "The model 'yards' takes about 9 bytes; 8 of 10 are taken."
    )
    fake_life.script.fail_next("LoadModel", refusal)
    result = run("models", "load", "yards")
    assert (result.exit_code, result.stderr) == (1, f"Error: {refusal}\n")


def test_unload_says_what_became_of_it(run: Callable[..., Result], fake_life: FakeLife) -> None:
    assert "UNLOADED" in run("models", "unload", "cams").stdout
    assert fake_life.models["cams"].state == model_service_pb2.MODEL_STATE_UNLOADED


def test_info_shows_how_far_a_model_is(run: Callable[..., Result], fake_life: FakeLife) -> None:
    fake_life.models["yards"].state = model_service_pb2.MODEL_STATE_LOADING
    fake_life.models["yards"].load_progress = 0.4
    fake_life.models["cams"].load_progress = 0.7  # serves, while newer weights load
    listed = run("models", "list").stdout
    assert "LOADING 40%" in listed and "READY newer weights 70%" in listed


def test_devices_once_and_again_and_again(run: Callable[..., Result]) -> None:
    assert "A fake CPU" in run("devices").stdout
    [[device]] = lines_of(run("devices", "--json"))
    assert device["utilization"] is None
    moments = lines_of(run("devices", "--watch", "--json", "--interval", "0.1"))
    assert len(moments) == 20 and moments[10][0]["busy_ratio"] == 0.5
    assert "A fake CPU" in run("devices", "--watch").stdout


def test_the_client_reads_a_model_and_its_life(vision: VisionClient, fake_life: FakeLife) -> None:
    assert [model.name for model in vision.list_models()] == ["cams", "yards"]
    cams = vision.get_model("cams")
    assert isinstance(cams, Model) and (cams.aliases, cams.labels) == (("live",), ("cat", "dog"))
    fake_life.looks.release(2)
    assert vision.load_model("yards", ["gate"]).aliases == ("gate",)
    assert vision.unload_model("yards").state == ModelState.UNLOADED
    with pytest.raises(NotFound):
        vision.get_model("ghost")
    with pytest.raises(TypeError, match="aliases is a list"):
        vision.load_model("yards", "gate")
    fake_life.script.fail_next("LoadModel", ServiceError(Code.INVALID_ARGUMENT, "INVALID_FIELD", "no", field="aliases"))
    with pytest.raises(InvalidInput):
        vision.load_model("yards")


def test_a_watch_ends_with_its_reader(vision: VisionClient, fake_life: FakeLife) -> None:
    watch = vision.watch_devices(0.25)
    moments = list(islice(watch, 3))
    assert [device.busy_ratio for [device] in moments] == pytest.approx([0, 0.05, 0.1])
    assert isinstance(moments[0][0], Device)
    assert fake_life.script.requests["WatchDevices"].interval.nanos == 250_000_000
    watch.close()  # type: ignore[attr-defined]  # a generator's
    assert fake_life.left.wait(10)


async def test_the_asyncio_client_does_the_same(async_vision: AsyncVisionClient, fake_life: FakeLife) -> None:
    assert [model.name for model in await async_vision.list_models()] == ["cams", "yards"]
    assert (await async_vision.get_model("yards")).state == ModelState.UNLOADED
    fake_life.looks.release(2)
    assert (await async_vision.load_model("yards", ["gate"])).state == ModelState.READY
    assert (await async_vision.unload_model("yards")).state == ModelState.UNLOADED
    seen: list[float] = []
    async for [device] in async_vision.watch_devices(0.1):
        seen.append(device.busy_ratio)
        if len(seen) == 3:
            break
    assert seen == pytest.approx([0, 0.05, 0.1])
