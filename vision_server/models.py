"""The models: loaded, swapped and unloaded by their names while the others serve.

    PENDING ─► LOADING ─► WARMING_UP ─► READY ◄─ loaded anew: the new one takes the name, then the old one's calls end
                  │ FAILED: why           │
                  └─────────┴── unload ───┴─► UNLOADING ─► UNLOADED

One model loads at a time, in the order asked for. One that serves stays READY while it is loaded anew; its progress tells.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import partial
from typing import Any, TypeVar

from serving.errors import ServiceError
from serving.health import Health
from serving.logs import get_logger
from vision_server import memory, metrics
from vision_server.catalog import Catalog, plain_name
from vision_server.describers.addresses import RemoteAddress
from vision_server.describers.peer import PeerError
from vision_server.describers.peer_errors import ModelAway
from vision_server.errors import (
    Draining,
    InvalidField,
    MemoryExceeded,
    ModelFailed,
    ModelLoading,
    ModelNotFound,
    ModelUnloaded,
    WrongTask,
)
from vision_server.loaded import Loaded, LoadedDescriber, LoadedDetector
from vision_server.loading import DeviceMissing, Loader
from vision_server.names import Names, ServedModel
from vision_server.reports import READY_NAME, Reports
from vision_server.results import ModelInfo, ModelState
from vision_server.settings import VisionSettings
from vision_server.weights import UnreadableWeights, WeightsMissing

_RETRY_AFTER_S = 2.0
# How long what was swapped out or unloaded waits for its calls; a long generation takes minutes on a CPU.
_DRAIN_S = 300.0
# Between two attempts to reach the server of a remote describer; each is one small question, and callers wait for none of them.
_FIRST_PAUSE_S = 1.0
_LONGEST_PAUSE_S = 10.0

T = TypeVar("T")

_log = get_logger("models")

__all__ = ["READY_NAME", "Models", "fail_on_lost_device"]


class Models:
    """All models of the server; start() loads those that it was told to serve. Lives on one event loop."""

    def __init__(self, settings: VisionSettings) -> None:
        self._settings = settings
        self._names = Names()
        told = ((dict.fromkeys(settings.detectors), False), (settings.describers, True))
        for models, generates in told:
            for number, (name, address) in enumerate(models.items()):
                self._names.add(
                    ServedModel(name, generates=generates, is_told=True, is_default=number == 0, address=address)
                )
        self._starting = {model.name for model in self._names}
        self._catalog = Catalog(settings.model_dir, settings.prefetched_dir)
        self._held: set[Loaded] = set()  # all that is in memory, on its way out too
        self._background: set[asyncio.Task[None]] = set()
        self._missed: set[ServedModel] = set()  # whose servers are away, and asked again and again
        self._busy_before_s: dict[str, float] = {}  # of what is no longer in memory
        self._limit_bytes = settings.max_model_bytes
        self._turns = 0

    def start(self, health: Health) -> None:
        """Begins to load; each model is the check and the health name `model/NAME`."""
        loop = asyncio.get_running_loop()
        self._leaving: asyncio.Future[None] = loop.create_future()
        self._turn = asyncio.Lock()
        self._loader = Loader(self._settings, partial(fail_on_lost_device, health), self._broke)
        self._reports = Reports(health, self._names, self._starting)
        metrics.MODELS.read_from(self._readings)
        for model in self._names:
            self._begin(model, fetch=not self._settings.offline)
        self._reports.begin()
        self._spawn(self._catalog.look())

    def drain(self) -> None:
        """Tells those who wait for a model to load or unload that the server leaves."""
        if not self._leaving.done():
            self._leaving.set_result(None)

    async def stop(self) -> None:
        """Frees the models, which nobody uses any more."""
        self.drain()
        loading = [model.loading for model in self._names if model.loading is not None]
        for task in (*loading, *self._background):
            task.cancel()
        for loaded in tuple(self._held):
            await loaded.stop(within_s=0)
        self._loader.stop()

    # ---- what there is

    @property
    def device(self) -> str:
        """`cpu`, `cuda:0`, `cuda:0,cuda:1`; `cpu` until the first model loads."""
        return ",".join(self._loader.devices) or "cpu"

    @property
    def limit_bytes(self) -> int:
        """What all models together may take on a device; 0 until the first one loads, unless it was set."""
        return self._limit_bytes

    @property
    def infos(self) -> tuple[ModelInfo, ...]:
        """The models that the server was told to serve, in the operator's order, then the others in memory by name."""
        others = sorted((model for model in self._names if not model.is_told), key=lambda model: model.name)
        return tuple(map(self._names.info, (*(model for model in self._names if model.is_told), *others)))

    @property
    def ready(self) -> bool:
        """Whether every model that the server was told to serve does, but for those unloaded since, and at least one does."""
        fine = (ModelState.READY, ModelState.UNLOADING, ModelState.UNLOADED)
        return any(model.state is ModelState.READY for model in self._names) and all(
            model.state in fine for model in self._names if model.is_told
        )

    async def list(self) -> tuple[ModelInfo, ...]:
        """The models that the server was told to serve, then the others that are in memory or lie here, by name."""
        await self._catalog.look()
        told = [self._names.info(model) for model in self._names if model.is_told]
        others = [self._names.info(model) for model in self._names if not model.is_told]
        others += [self._catalog.info(name) for name in self._catalog if self._names.exactly(name) is None]
        return (*told, *sorted(others, key=lambda info: info.name))

    async def get(self, name: str) -> ModelInfo:
        """One model that is in memory or lies here. Raises ModelNotFound."""
        if (model := self._names.find(name)) is not None:
            return self._names.info(model)
        await self._catalog.look()
        if name not in self._catalog:
            raise ModelNotFound(name, self._known, "name")
        return self._catalog.info(name)

    @contextmanager
    def use_detector(self, name: str, field: str) -> Iterator[LoadedDetector]:
        """A detector that serves, kept in memory meanwhile; '' is the default.

        Raises ModelNotFound, ModelLoading, ModelFailed, ModelUnloaded, WrongTask; `field` is where the name stands.
        """
        loaded = self._serving(name, field, generates=False)
        assert isinstance(loaded, LoadedDetector)
        with loaded.lease():
            yield loaded

    @contextmanager
    def use_describer(self, name: str, field: str) -> Iterator[LoadedDescriber]:
        """Like use_detector, for a describer."""
        loaded = self._serving(name, field, generates=True)
        assert isinstance(loaded, LoadedDescriber)
        with loaded.lease():
            yield loaded

    def busy_s(self) -> Mapping[str, float]:
        """Seconds in which models have computed since the start, by device; never falls."""
        busy_s = dict(self._busy_before_s)
        for loaded in self._held:
            _add(busy_s, loaded.busy_s)
        return busy_s

    def estimate_s(self) -> float:
        """When a caller that found the server full may come again, in seconds. Any thread may ask."""
        held = tuple(self._held)  # a model may come or go on the loop meanwhile
        return max([0.1, *(loaded.batcher.estimate_s() for loaded in held if isinstance(loaded, LoadedDetector))])

    def _serving(self, name: str, field: str, *, generates: bool) -> Loaded:
        model = self._names.find(name) if name else self._names.default(generates=generates)
        if model is None:
            if name in self._catalog:
                raise ModelUnloaded(name, field)
            raise ModelNotFound(name, self._known, field)
        if model.generates != generates:
            does, asked = ("generate", "detect") if model.generates else ("detect", "generate")
            raise WrongTask(model.name, does, asked, field)
        match model.state:
            case ModelState.READY:
                assert model.loaded is not None, "what is ready is loaded"
                return model.loaded
            case ModelState.FAILED:
                raise _why_not(model)
            case ModelState.UNLOADING | ModelState.UNLOADED:
                raise ModelUnloaded(model.name, field)
            case _:
                raise ModelLoading(model.name, model.load_progress, _RETRY_AFTER_S)

    @property
    def _known(self) -> tuple[str, ...]:
        """The names to choose from."""
        names = [model.name for model in self._names]
        return (*names, *(name for name in self._catalog if self._names.exactly(name) is None))

    # ---- what changes

    async def load(self, name: str, aliases: Sequence[str] = ()) -> ModelInfo:
        """Loads a model that lies here, or loads it anew when its weights have changed.

        One that is loading already is waited for. A caller that is cancelled stops nothing. Raises InvalidField,
        ModelNotFound, MemoryExceeded, ModelFailed, Draining.
        """
        model = await self._to_load(name, aliases)
        model.aliases_to_come |= dict.fromkeys(aliases)
        if model.state is ModelState.READY and model.is_called_by_version(name):
            self._note_load(model)  # that version is in memory, and newer weights would be another one
            return self._names.info(model)
        while True:
            joined = model.loading
            error = await self._until(joined or self._begin(model, fetch=False))
            if error is not None:
                raise error
            if joined is None or not await self._has_newer_weights(model):
                return self._names.info(model)

    async def unload(self, name: str) -> ModelInfo:
        """Takes no more calls for a model, lets its running ones end, frees it. Raises ModelNotFound, Draining."""
        model = self._names.find(name)
        if model is None:
            return await self.get(name)
        if model.unloading is None:
            model.unloading = asyncio.create_task(self._unload(model), name=f"unload {model.name}")
        await self._until(model.unloading)
        return self._names.info(model)

    async def _to_load(self, name: str, aliases: Sequence[str]) -> ServedModel:
        """The model that is to be loaded, its aliases checked; a new one when it lies here and is not known yet."""
        if not name:
            raise InvalidField("name", "is empty.", "ListModels tells which models there are.")
        if self._leaving.done():
            raise Draining
        await self._catalog.look()
        generates = await self._catalog.generates(name)
        while True:
            model = self._names.exactly(name)
            if model is None and generates is not None:
                model = ServedModel(plain_name(name), generates=generates)
            model = model or self._names.find(name)  # an alias, or a version
            if model is None:
                raise ModelNotFound(name, self._known, "name")
            self._names.check_aliases(model, aliases, self._catalog)
            model = self._names.add(model)
            if model.unloading is None:
                return model
            await self._until(model.unloading)  # and then perhaps it is not known any more

    def _begin(self, model: ServedModel, *, fetch: bool) -> asyncio.Task[ServiceError | None]:
        """Has a model loaded when its turn comes; the task tells what went wrong."""
        self._reports.begin_model(model)
        model.loading = asyncio.create_task(self._load(model, fetch), name=f"load {model.name}")
        self._enter(model, ModelState.PENDING, 0.0)
        return model.loading

    async def _load(self, model: ServedModel, fetch: bool) -> ServiceError | None:
        try:
            if model.address is not None:
                await self._connect(model, model.address)
            else:
                async with self._turn:
                    await self._load_now(model, fetch)
            self._note_load(model)
            return None
        except Exception as error:
            return self._failed(model, error)
        finally:
            model.loading = None
            model.aliases_to_come = {}
            self._starting.discard(model.name)
            self._reports.tell(model)

    async def _load_now(self, model: ServedModel, fetch: bool) -> None:
        began_s = time.perf_counter()
        loader, loop = self._loader, asyncio.get_running_loop()
        self._enter(model, ModelState.LOADING, 0.0)
        await loader.prepare()
        if not self._limit_bytes:
            self._limit_bytes = await loader.run(partial(memory.limit_bytes, loader.devices))
        source = await loader.run(partial(loader.find, model.name, model.generates, fetch=fetch, hub=model.is_told))
        self._enter(model, ModelState.LOADING, 0.05)
        if model.state is ModelState.READY and model.loaded is not None and model.loaded.source == source:
            return
        needed_bytes = await loader.run(partial(loader.needed_bytes, source))
        taken_bytes = sum(held.memory_bytes for held in self._held)
        if needed_bytes + taken_bytes > self._limit_bytes:
            raise MemoryExceeded(
                model.name, needed_bytes=needed_bytes, taken_bytes=taken_bytes, limit_bytes=self._limit_bytes
            )
        loaded = await loader.load(
            model.name,
            source,
            lambda state, share: loop.call_soon_threadsafe(self._enter, model, state, share),
            fetch=fetch,
        )
        self._put(model, loaded, began_s)

    async def _connect(self, model: ServedModel, address: RemoteAddress) -> None:
        """Has a model served that another server runs. It takes no turn: nothing is loaded, and the other server may be slow."""
        began_s = time.perf_counter()
        self._enter(model, ModelState.LOADING, 0.0)
        loaded = await self._loader.connect(model.name, address, partial(self._enter, model), self._went)
        self._put(model, loaded, began_s)

    def _put(self, model: ServedModel, loaded: Loaded, began_s: float) -> None:
        """Gives a model what was loaded, in the place of what it had."""
        if model.loaded is not None:
            self._spawn(self._retire(model.take()))
        model.loaded = loaded
        self._held.add(loaded)
        seconds = round(time.perf_counter() - began_s, 2)
        _log.info("model ready", model=model.name, seconds=seconds, **asdict(loaded.card))

    def _miss(self, model: ServedModel) -> None:
        """Has a model whose server is away asked for until it is there: that may start, or be started again, after this one."""
        if model not in self._missed:
            self._missed.add(model)
            self._spawn(self._seek(model))

    async def _seek(self, model: ServedModel) -> None:
        pause_s = _FIRST_PAUSE_S
        try:
            while True:
                await asyncio.sleep(pause_s)
                if model.loading is None and model.state is ModelState.FAILED:
                    self._begin(model, fetch=False)
                if model.loading is not None:
                    await asyncio.wait({model.loading})
                if model.state is not ModelState.FAILED:
                    return  # it is there, or has been unloaded
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
        finally:
            self._missed.discard(model)

    def _note_load(self, model: ServedModel) -> None:
        self._turns += 1
        model.turn, model.reason = self._turns, ""
        self._names.give_aliases(model)

    async def _has_newer_weights(self, model: ServedModel) -> bool:
        """Whether other weights lie on the disk than are in memory: who joins a load may have brought them meanwhile."""
        if model.address is not None:
            return False
        find = partial(self._loader.find, model.name, model.generates, fetch=False, hub=model.is_told)
        with suppress(WeightsMissing):
            source = await asyncio.to_thread(find)
            return model.loaded is not None and model.loaded.source != source
        return False

    def _failed(self, model: ServedModel, error: Exception) -> ServiceError:
        """Notes why a model could not be loaded; answers what its callers are told."""
        known = isinstance(error, WeightsMissing | UnreadableWeights | DeviceMissing | ServiceError | PeerError)
        reason = str(error) if known else f"{type(error).__name__}: {error}"
        if reason != model.reason or model not in self._missed:  # once a reason, however long a server is away
            _log.error(
                "a model could not be loaded", model=model.name, reason=reason, exc_info=None if known else error
            )
        model.step, model.reason = ModelState.FAILED, reason
        if model.loaded is None and not model.is_told and isinstance(error, WeightsMissing | MemoryExceeded):
            self._names.remove(model)
        # What was loaded halfway hangs on the traceback.
        error.__traceback__ = error.__cause__ = error.__context__ = None
        if model.address is None:
            self._spawn(asyncio.to_thread(memory.give_back))
        if isinstance(error, ServiceError):
            return error
        if isinstance(error, WeightsMissing) and not model.is_told:
            return ModelNotFound(model.name, self._known, "name")
        if model.address is not None:
            self._miss(model)
        return _why_not(model)

    async def _unload(self, model: ServedModel) -> None:
        self._reports.tell(model)
        try:
            if model.loading is not None:
                await asyncio.wait({model.loading})
            if model.loaded is not None:
                await self._retire(model.take())
        finally:
            model.step, model.reason, model.unloading = ModelState.UNLOADED, "", None
            self._names.take_aliases(model)
            if not model.is_told:
                self._names.remove(model)
            self._reports.tell(model)

    async def _retire(self, loaded: Loaded) -> None:
        """Lets the calls of what no name leads to any more end, then frees it."""
        try:
            await loaded.stop(_DRAIN_S)
        finally:
            _add(self._busy_before_s, loaded.busy_s)
            self._held.discard(loaded)
        _log.info("model freed", model=loaded.name, version=loaded.card.version)
        del loaded
        await asyncio.to_thread(memory.give_back)

    async def _until(self, task: asyncio.Task[T]) -> T:
        """What the task answers. Raises Draining when the server leaves before it does; cancelled, it leaves the task alone."""
        waited_for: set[asyncio.Future[Any]] = {task, self._leaving}
        await asyncio.wait(waited_for, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Draining
        return task.result()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    # ---- what is told

    def _enter(self, model: ServedModel, step: ModelState, progress: float) -> None:
        model.step, model.progress = step, progress
        self._reports.tell(model)

    def _readings(self) -> Iterator[metrics.ModelReading]:
        for model in self._names:
            devices = () if model.loaded is None or model.address is not None else model.loaded.card.device.split(",")
            size_bytes = sum(held.memory_bytes for held in self._held if held.name == model.name)
            busy_s = {} if model.loaded is None else model.loaded.busy_s
            yield metrics.ModelReading(model.name, model.state, dict.fromkeys(devices, size_bytes), busy_s)

    def _broke(self, loaded: Loaded, why: str) -> None:
        """An executor is given up; the process can only be started again."""
        self._reports.fail_for_good(why)
        for model in self._names:
            if model.loaded is loaded:
                self._reports.tell(model)

    def _went(self, loaded: Loaded, why: str) -> None:
        """The server of a remote describer is away."""
        loaded.broken = why
        for model in self._names:
            if model.loaded is loaded:
                self._reports.tell(model)
                self._miss(model)


def fail_on_lost_device(health: Health, error: Exception) -> None:
    """After a CUDA fault every later call of the process fails too: fails liveness, so that the container is restarted.

    Memory that ran out is no such fault: the next, smaller batch may fit.
    """
    if type(error).__name__ == "OutOfMemoryError":
        return
    if type(error).__name__ == "AcceleratorError" or "CUDA error" in str(error):
        health.fail_for_good(f"The GPU is lost to this process: {str(error).splitlines()[0]}")


def _why_not(model: ServedModel) -> ServiceError:
    """What callers of a model that failed are told."""
    failed = ModelFailed if model.address is None else ModelAway
    return failed(model.name, model.why)


def _add(sums: dict[str, float], more: Mapping[str, float]) -> None:
    for device, seconds in more.items():
        sums[device] = sums.get(device, 0.0) + seconds
