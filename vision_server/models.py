"""The models' life: pending → loading → warming up → ready, or failed with the reason; one after another, off the loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from typing import TypeVar

from serving.health import Health
from serving.logs import get_logger
from vision_server import metrics
from vision_server.batcher import Batcher
from vision_server.describer import Describer
from vision_server.detector import DetectItem, Detector, UnreadableWeights
from vision_server.errors import ModelFailed, ModelLoading, ModelNotFound, WrongTask
from vision_server.generations import Generations
from vision_server.results import Card, Found, ModelInfo, ModelState, Task
from vision_server.settings import VisionSettings
from vision_server.weights import SHIPPED, WeightsMissing, find_describer, find_detector, is_local_describer

READY_NAME = "ai4thai.vision.v1.VisionService"
_RETRY_AFTER_S = 2.0
# How far along a model is when a step begins; the weights' reading is most of the work.
_PROGRESS = {ModelState.LOADING: 0.1, ModelState.WARMING_UP: 0.8, ModelState.READY: 1.0}

T = TypeVar("T")

_log = get_logger("models")


class ServedModel:
    """A name that the server was told to serve, with what stands behind it once it is loaded."""

    def __init__(self, name: str, *, generates: bool, is_default: bool) -> None:
        self.name = name
        self.generates = generates
        self.is_default = is_default
        self.state = ModelState.PENDING
        self.reason = ""
        self.card: Card | None = None
        self.detector: Detector | None = None
        self.batcher: Batcher[DetectItem, Found] | None = None
        self.describer: Describer | None = None
        self.generations: Generations | None = None

    @property
    def info(self) -> ModelInfo:
        """As callers see it."""
        task = self.card.task if self.card else Task.GENERATE if self.generates else Task.UNKNOWN
        progress = _PROGRESS.get(self.state, 0.0)
        return ModelInfo(self.name, task, self.state, progress, self.is_default, self.card, self.reason)

    @property
    def busy_s(self) -> float:
        """Seconds in which it computed, since it was loaded."""
        return (self.batcher.busy_s if self.batcher else 0.0) + (
            self.generations.busy_seconds if self.generations else 0.0
        )

    @property
    def depth(self) -> int:
        """Requests that wait for it."""
        return (self.batcher.depth if self.batcher else 0) + (self.generations.queued if self.generations else 0)


class Models:
    """All models of the server; start() loads them in the background. Lives on one event loop."""

    def __init__(self, settings: VisionSettings) -> None:
        self._settings = settings
        self._device = "cpu"
        self._models: dict[str, ServedModel] = {}
        for names, generates in ((settings.detectors, False), (settings.describers, True)):
            for name in names:
                self._models.setdefault(name, ServedModel(name, generates=generates, is_default=name == names[0]))
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="load")
        self._loading: asyncio.Task[None] | None = None
        self._torch_threads = settings.torch_threads or 1
        self._last_busy = (time.perf_counter(), 0.0)

    def start(self, health: Health) -> None:
        """Begins to load; each model is the check and the health name `model/NAME`."""
        for model in self._models.values():
            health.expose(f"model/{model.name}", f"model/{model.name}")
            health.report(f"model/{model.name}", False, "pending")
            metrics.WAITING_REQUESTS.labels(model.name).set_function(partial(getattr, model, "depth"))
            metrics.MODEL_READY.labels(model.name).set(0)
        health.report(
            "models", False, f"loading: {', '.join(self._models)}" if self._models else "no model is configured"
        )
        health.expose(READY_NAME, "models")
        self._loading = asyncio.create_task(self._load_all(health), name="load models")

    async def stop(self) -> None:
        """Lets what runs end, and forgets the models."""
        if self._loading is not None:
            self._loading.cancel()
        for model in self._models.values():
            if model.batcher is not None:
                await model.batcher.stop()
            if model.generations is not None:
                await model.generations.stop()
        self._loader.shutdown(wait=False, cancel_futures=True)

    @property
    def device(self) -> str:
        """`cpu` or `cuda:0`; known once the first model loads."""
        return self._device

    @property
    def infos(self) -> tuple[ModelInfo, ...]:
        """Every model, in the operator's order."""
        return tuple(model.info for model in self._models.values())

    @property
    def ready(self) -> bool:
        """Whether every model serves."""
        return all(model.state is ModelState.READY for model in self._models.values())

    def info(self, name: str) -> ModelInfo:
        """One model. Raises ModelNotFound."""
        if name not in self._models:
            raise ModelNotFound(name, tuple(self._models), "name")
        return self._models[name].info

    def detector(self, name: str, field: str) -> tuple[ServedModel, Detector, Batcher[DetectItem, Found]]:
        """A detector that serves; '' is the default. Raises ModelNotFound, ModelLoading, ModelFailed, WrongTask."""
        model = self._find(name, field, generates=False)
        if model.detector is None or model.batcher is None:
            raise ModelLoading(model.name, model.info.load_progress, _RETRY_AFTER_S)
        return model, model.detector, model.batcher

    def describer(self, name: str, field: str) -> tuple[Describer, Generations]:
        """A describer that serves; '' is the default. Raises ModelNotFound, ModelLoading, ModelFailed, WrongTask."""
        model = self._find(name, field, generates=True)
        if model.describer is None or model.generations is None:
            raise ModelLoading(model.name, model.info.load_progress, _RETRY_AFTER_S)
        return model.describer, model.generations

    def take_busy_ratio(self) -> float:
        """Share of the time since the last call (at least a second ago) in which models computed, 0 to 1."""
        now_s, busy_s = time.perf_counter(), sum(model.busy_s for model in self._models.values())
        last_s, last_busy_s = self._last_busy
        if now_s - last_s >= 1.0:
            self._last_busy = (now_s, busy_s)
        return min(1.0, max(0.0, (busy_s - last_busy_s) / max(now_s - last_s, 1e-6)))

    def estimate_s(self) -> float:
        """When a caller that found the server full may come again, in seconds."""
        return max([0.1, *(model.batcher.estimate_s() for model in self._models.values() if model.batcher)])

    def _find(self, name: str, field: str, *, generates: bool) -> ServedModel:
        if name:
            model = self._models.get(name)
        else:
            model = next((m for m in self._models.values() if m.generates == generates and m.is_default), None)
        if model is None:
            raise ModelNotFound(name, tuple(self._models), field)
        if model.generates != generates:
            does, asked = ("generate", "detect") if model.generates else ("detect", "generate")
            raise WrongTask(model.name, does, asked, field)
        if model.state is ModelState.FAILED:
            raise ModelFailed(model.name, model.reason)
        if model.state is not ModelState.READY:
            raise ModelLoading(model.name, model.info.load_progress, _RETRY_AFTER_S)
        return model

    async def _load_all(self, health: Health) -> None:
        loop = asyncio.get_running_loop()
        for model in self._models.values():
            try:
                # Asked for each model: when torch itself cannot be imported, each says so instead of loading for ever.
                self._device = await loop.run_in_executor(self._loader, _pick_device, self._settings.device)
                await self._load(model, health)
            except Exception as error:
                known = isinstance(error, WeightsMissing | UnreadableWeights)
                model.state = ModelState.FAILED
                model.reason = str(error) if known else f"{type(error).__name__}: {error}"
                _log.error("a model could not be loaded", model=model.name, reason=model.reason, exc_info=not known)
                health.report(f"model/{model.name}", False, model.reason)
        served = [model.name for model in self._models.values() if model.state is ModelState.READY]
        failed = [f"{m.name}: {m.reason}" for m in self._models.values() if m.state is ModelState.FAILED]
        detail = "; ".join(["serving " + ", ".join(served)] * bool(served) + failed) or "no model is configured"
        health.report("models", bool(served), detail)

    async def _load(self, model: ServedModel, health: Health) -> None:
        asyncio.get_running_loop()
        began_s = time.perf_counter()
        self._enter(model, ModelState.LOADING, health)
        if model.generates:
            await self._load_describer(model, health)
        else:
            await self._load_detector(model, health)
        self._enter(model, ModelState.READY, health)
        metrics.MODEL_READY.labels(model.name).set(1)
        _log.info(
            "model ready",
            model=model.name,
            seconds=round(time.perf_counter() - began_s, 2),
            **asdict(model.info)["card"],
        )

    async def _load_detector(self, model: ServedModel, health: Health) -> None:
        settings = self._settings
        path = await self._off_loop(partial(find_detector, model.name, settings.model_dir, offline=settings.offline))
        detector = Detector(path, self._device, input_px=settings.detector_input_px, torch_threads=self._torch_threads)
        model.card = await self._off_loop(detector.load)
        self._enter(model, ModelState.WARMING_UP, health)
        await self._off_loop(detector.warm_up)
        model.detector = detector
        model.batcher = Batcher(
            model.name,
            detector.execute,
            max_batch=settings.max_batch,
            max_delay_ms=settings.max_delay_ms,
            max_queued=settings.max_queued_images,
            executors=settings.executors or (self._settings.core_count if self._device == "cpu" else 1),
            begin_thread=partial(_set_torch_threads, self._torch_threads),
            on_failure=partial(fail_on_lost_device, health),
        )
        model.batcher.start()

    async def _load_describer(self, model: ServedModel, health: Health) -> None:
        settings, loop = self._settings, asyncio.get_running_loop()
        describer = await self._off_loop(
            partial(
                Describer.load,
                model.name,
                find_describer(model.name, settings.model_dir),
                device=self._device,
                quantization=self._quantization(model.name),
                offline=settings.offline or is_local_describer(model.name, settings.model_dir),
            )
        )
        model.card = describer.card
        self._enter(model, ModelState.WARMING_UP, health)
        await self._off_loop(describer.warm_up)
        model.describer = describer
        model.generations = Generations(
            model.name,
            max_running=settings.max_running_generations,
            max_queued=settings.max_queued_generations,
            begin_thread=partial(_set_torch_threads, self._torch_threads),
            on_failure=lambda error: loop.call_soon_threadsafe(fail_on_lost_device, health, error),
        )
        model.generations.start()

    async def _off_loop(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._loader, work)

    def _enter(self, model: ServedModel, state: ModelState, health: Health) -> None:
        model.state = state
        health.report(f"model/{model.name}", state is ModelState.READY, state.value)
        left = [m.name for m in self._models.values() if m.state not in (ModelState.READY, ModelState.FAILED)]
        if left:
            health.report("models", False, f"loading: {', '.join(left)}")

    def _quantization(self, name: str) -> str:
        if self._settings.quantization != "auto":
            return self._settings.quantization
        return "nf4" if self._device.startswith("cuda") and name not in SHIPPED else "none"


def fail_on_lost_device(health: Health, error: Exception) -> None:
    """After a CUDA fault every later call of the process fails too: fails liveness, so that the container is restarted.

    Memory that ran out is no such fault: the next, smaller batch may fit.
    """
    if type(error).__name__ == "OutOfMemoryError":
        return
    if type(error).__name__ == "AcceleratorError" or "CUDA error" in str(error):
        health.fail_for_good(f"The GPU is lost to this process: {str(error).splitlines()[0]}")


def _set_torch_threads(count: int) -> None:
    """torch keeps the number for each thread that computes."""
    import torch

    torch.set_num_threads(count)


def _pick_device(wanted: str) -> str:
    """`auto`: the first GPU that torch sees, else the CPU."""
    import torch

    if wanted == "auto":
        return "cuda:0" if torch.cuda.is_available() else "cpu"
    return "cuda:0" if wanted == "cuda" else wanted
