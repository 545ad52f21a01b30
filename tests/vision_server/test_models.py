"""The models' life, as health and /info tell it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from serving.errors import Code, ServiceError
from serving.health import Health
from vision_server.detector import DetectItem
from vision_server.images import Image
from vision_server.models import READY_NAME, Models
from vision_server.requests import DetectOptions
from vision_server.results import ModelInfo, ModelState
from vision_server.settings import VisionSettings
from vision_server.shapes.scenes import draw_scene


def settings(data_dir: Path, **changed: Any) -> VisionSettings:
    # PyTorch reads the shipped weights at once; for the others they are converted first, in each of these folders anew.
    return VisionSettings(**{"data_dir": data_dir, "device": "cpu", "engine": "pytorch", "torch_threads": 1, **changed})


@asynccontextmanager
async def serving(chosen: VisionSettings) -> AsyncIterator[tuple[Models, Health]]:
    models, health = Models(chosen), Health()
    models.start(health)
    try:
        yield models, health
    finally:
        await models.stop()


async def settled(models: Models) -> dict[str, ModelInfo]:
    async with asyncio.timeout(100):
        # ASYNC110: Models offers no event to wait for; callers look at /info or watch health.
        while any(info.state not in (ModelState.READY, ModelState.FAILED) for info in models.infos):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        await asyncio.sleep(0)
    return {info.name: info for info in models.infos}


def refusal(use: Any, *arguments: str) -> ServiceError:
    with pytest.raises(ServiceError) as refused, use(*arguments):
        pass
    return refused.value


async def test_a_model_that_cannot_be_loaded_says_why_and_the_others_serve(data_dir: Path, tmp_path: Path) -> None:
    # given: garbage with a model's name, and a name that is nowhere
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "broken.pt").write_bytes(b"this is no model")
    chosen = settings(tmp_path, detector="broken.pt, shapes-detector, nowhere.xyz", describer="", offline=True)
    async with serving(chosen) as (models, health):
        # then: at first nothing is ready, and asking is answered at once
        assert health.serving(READY_NAME) is False
        loading = refusal(models.use_detector, "shapes-detector", "options.model")
        assert (loading.code, loading.reason) == (Code.UNAVAILABLE, "MODEL_LOADING")
        assert loading.retry_after_s
        # when: all have settled
        infos = await settled(models)
        # then
        assert infos["broken.pt"].state is infos["nowhere.xyz"].state is ModelState.FAILED
        assert "nowhere.xyz" in infos["nowhere.xyz"].state_reason
        assert infos["broken.pt"].state_reason
        assert infos["shapes-detector"].state is ModelState.READY
        assert infos["shapes-detector"].load_progress == 1.0
        assert health.serving(READY_NAME) is True
        assert health.serving("model/shapes-detector") is True
        assert health.serving("model/broken.pt") is False
        assert health.why_not("model/nowhere.xyz") == [f"model/nowhere.xyz: {infos['nowhere.xyz'].state_reason}"]
        failed = refusal(models.use_detector, "broken.pt", "options.model")
        assert (failed.code, failed.reason) == (Code.FAILED_PRECONDITION, "MODEL_FAILED")
        assert infos["broken.pt"].state_reason in str(failed)
        unknown = refusal(models.use_detector, "yolo", "options.model")
        assert (unknown.code, unknown.reason, unknown.field) == (Code.NOT_FOUND, "MODEL_NOT_FOUND", "options.model")
        assert "shapes-detector" in str(unknown)
        wrong = refusal(models.use_describer, "shapes-detector", "model")
        assert (wrong.code, wrong.reason) == (Code.INVALID_ARGUMENT, "WRONG_TASK")
        assert models.ready is False


async def test_nothing_that_loads_is_not_ready_and_the_process_lives(data_dir: Path, tmp_path: Path) -> None:
    chosen = settings(tmp_path, detector="nowhere.xyz", describer="", offline=True)
    async with serving(chosen) as (models, health):
        await settled(models)
        assert health.serving(READY_NAME) is False
        assert health.serving("") is True
        assert "nowhere.xyz" in " ".join(health.why_not(READY_NAME))


async def test_the_states_come_in_order_and_progress_grows(data_dir: Path, tmp_path: Path) -> None:
    async with serving(settings(tmp_path, describer="")) as (models, _):
        states: list[ModelState] = []
        progress: list[float] = []
        async with asyncio.timeout(60):
            while not states or states[-1] is not ModelState.READY:
                [info] = models.infos
                if not states or states[-1] is not info.state:
                    states.append(info.state)
                    progress.append(info.load_progress)
                await asyncio.sleep(0.002)  # without a pause the loading thread hardly gets the interpreter
    every = [ModelState.PENDING, ModelState.LOADING, ModelState.WARMING_UP, ModelState.READY]
    assert states == [state for state in every if state in states]
    assert progress == sorted(progress)


async def test_an_empty_name_takes_the_default_and_none_configured_is_not_found(data_dir: Path, tmp_path: Path) -> None:
    async with serving(settings(tmp_path, describer="")) as (models, _):
        await settled(models)
        with models.use_detector("", "options.model") as model:
            assert model.name == "shapes-detector"
        assert [info.is_default for info in models.infos] == [True]
        none = refusal(models.use_describer, "", "model")
        assert none.code is Code.NOT_FOUND


@pytest.mark.parametrize("device", ["cuda:99", "tpu", "cpu,cuda:99", "cpu,tpu"])
async def test_a_device_that_is_not_there_is_told_with_those_that_are(
    data_dir: Path, tmp_path: Path, device: str
) -> None:
    async with serving(settings(tmp_path, describer="", device=device)) as (models, _):
        [info] = (await settled(models)).values()
        assert info.state is ModelState.FAILED
        assert device.rpartition(",")[2] in info.state_reason and "cpu" in info.state_reason
        assert "VISION_DEVICE" in info.state_reason


async def test_two_replicas_of_the_shipped_detector_answer_alike(data_dir: Path, tmp_path: Path) -> None:
    async with serving(settings(tmp_path, describer="", device="cpu,cpu", executors=1)) as (models, _):
        await settled(models)
        picture = draw_scene(np.random.default_rng(3), 320, 320).image
        with models.use_detector("", "options.model") as model:
            item = DetectItem(model.detector.fit(Image(picture, 320, 320)), DetectOptions())
            batched = await asyncio.gather(*(model.batcher.submit(item) for _ in range(12)))
        found = [answer.result.detections for answer in batched]
        assert found[0] and all(detections == found[0] for detections in found)
        assert models.device == "cpu,cpu"
