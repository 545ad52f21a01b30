"""Loads one model by its name: weights found, engine chosen, warmed up, its queue begun."""

from __future__ import annotations

import asyncio
import gc
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from typing import TypeVar

from vision_server import memory
from vision_server.batcher import Batcher
from vision_server.describers.addresses import RemoteAddress
from vision_server.describers.connecting import connect
from vision_server.describers.language_model import LanguageModel, Limits
from vision_server.describers.local import LocalDescriber
from vision_server.describers.peer import Peer
from vision_server.describers.remote import RemoteDescriber
from vision_server.describers.scheduler import Generations
from vision_server.detector import DetectItem, Detector
from vision_server.lanes import Lane, Replica
from vision_server.loaded import Loaded, LoadedDescriber, LoadedDetector, Source
from vision_server.metrics import DetectorMeters
from vision_server.results import Found, ModelState
from vision_server.settings import VisionSettings
from vision_server.weights import SHIPPED, WeightsMissing, find_detector, find_here

T = TypeVar("T")


Progress = Callable[[ModelState, float], object]
"""Is told, in the loader's thread, how far a load is: its state, and 0 to 1."""


class DeviceMissing(Exception):
    """The devices that the operator named are not there; the text says which are."""


class Loader:
    """Does what blocks in a thread of its own, one thing after another, and leaves the event loop alone.

    The thread is a daemon: one that hangs on a network drive or in a driver keeps no process from ending. `on_failure` is told,
    on the loop, what an executor raised as a whole; `on_broken` which model computes no more, and why.
    """

    def __init__(
        self,
        settings: VisionSettings,
        on_failure: Callable[[Exception], object],
        on_broken: Callable[[Loaded, str], object],
    ) -> None:
        self._settings = settings
        self._on_failure = on_failure
        self._on_broken = on_broken
        self._lane: Lane | None = None
        self.devices: tuple[str, ...] = ()
        """The devices of this process, the first one first; known once prepare() has run."""

    async def run(self, work: Callable[[], T]) -> T:
        """What `work` returns or raises, done in the loader's thread."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[T] = loop.create_future()

        def then(outcome: T | Exception) -> None:
            if done.done():
                return  # the waiter was cancelled
            if isinstance(outcome, Exception):
                done.set_exception(outcome)
            else:
                done.set_result(outcome)

        if self._lane is None:
            self._lane = Lane("load", lambda: None)
        self._lane.run(work, then)
        return await done

    def stop(self) -> None:
        """Lets the thread end once it has nothing more to do."""
        if self._lane is not None:
            self._lane.end()
            self._lane = None

    async def prepare(self) -> None:
        """Imports what is needed and picks the devices; raises what is wrong with them."""
        if not self.devices:
            self.devices = await self.run(
                partial(_prepare, self._settings.device, bool(self._settings.local_describers))
            )

    def find(self, name: str, generates: bool, *, fetch: bool, hub: bool) -> Source:
        """Where a model's weights are now. Blocks, the longer the more is to be fetched. Raises WeightsMissing.

        `fetch`: a detector that Ultralytics publishes may be fetched. `hub`: a describer that is not here may be on the hub.
        """
        settings = self._settings
        folders = (settings.model_dir, settings.prefetched_dir)
        if not generates:
            device = self.devices[0]
            path = find_detector(name, *folders, offline=not fetch, engine=settings.engine, device=device)
            return Source.at(path, generates=False)
        folder = find_here(name, *folders)
        if folder is not None:
            return Source.at(folder, generates=True)
        if not hub:
            raise WeightsMissing(f"{name!r} is not in {settings.model_dir} any more")
        return Source(name, generates=True)

    def needed_bytes(self, source: Source) -> int:
        """About what a model takes on each of its devices, before it is loaded; 0: not known, for it lies on the hub. Blocks."""
        if source.path is None:
            return 0
        value_bytes = self._value_bytes
        if source.generates:
            quantization = self._quantization(source)
            return memory.describer_bytes(
                memory.describer_weights_bytes(source.path, quantization=quantization, value_bytes=value_bytes)
            )
        return memory.detector_bytes(
            memory.detector_weights_bytes(source.path, value_bytes=value_bytes),
            side_px=self._settings.detector_input_px or memory.USUAL_SIDE_PX,
            # On a CPU every engine computes one image after another.
            images=self._lanes * (1 if self.devices[0] == "cpu" else self._settings.max_batch),
            value_bytes=value_bytes,
        )

    async def load(self, name: str, source: Source, progress: Progress, *, fetch: bool) -> Loaded:
        """Loads, warms up, begins to serve. Raises whatever is wrong with the weights. `fetch`: from the hub if need be."""
        if source.generates:
            model = await self.run(partial(self._read_describer, name, source, progress, fetch=fetch))
            return self._begin_describer(name, source, model)
        detectors = await self.run(partial(self._read_detectors, source, progress))
        return self._begin_detectors(name, source, detectors)

    def _read_detectors(self, source: Source, progress: Progress) -> list[Detector]:
        """One for each device, warmed up."""
        settings = self._settings
        assert source.path is not None, "a detector is a file or a folder"
        detectors = [
            Detector(
                source.path,
                device,
                input_px=settings.detector_input_px,
                threads=self._threads,
                engine=settings.engine,
                lanes=self._lanes,
                max_batch=settings.max_batch,
                cache_dir=settings.data_dir / "cache" / "openvino",
            )
            for device in self.devices
        ]
        for number, detector in enumerate(detectors):
            progress(ModelState.LOADING, 0.1 + 0.5 * number / len(detectors))
            detector.load()
        for number, detector in enumerate(detectors):
            progress(ModelState.WARMING_UP, 0.6 + 0.4 * number / len(detectors))
            detector.warm_up()
        return detectors

    def _begin_detectors(self, name: str, source: Source, detectors: Sequence[Detector]) -> LoadedDetector:
        settings = self._settings

        def broke(why: str) -> None:
            loaded.broken = why
            self._on_broken(loaded, why)

        meters = DetectorMeters(name)
        replicas = [
            Replica(
                detector.card.device,
                meters.counting(detector.execute),
                lanes=self._lanes,
                begin_thread=partial(_set_torch_threads, self._threads),
                rebuild=partial(_rebuild, detector, source),
            )
            for detector in detectors
        ]
        batcher: Batcher[DetectItem, Found] = Batcher(
            name,
            replicas,
            # Where an engine computes one image after another, each lane is given one: none idles, and priorities count sooner.
            max_batch=min(settings.max_batch, detectors[0].batch_sizes[-1]),
            max_delay_ms=settings.max_delay_ms,
            max_queued=settings.max_queued_images,
            max_wait_ms=settings.max_wait_ms,
            ageing_ms=settings.priority_ageing_ms,
            stuck_after_s=settings.stuck_after_s,
            on_failure=self._on_failure,
            on_broken=broke,
        )
        memory_bytes = memory.detector_bytes(
            max(detector.card.memory_bytes for detector in detectors),
            side_px=detectors[0].card.input_size_px,
            images=self._lanes * detectors[0].batch_sizes[-1],
            value_bytes=self._value_bytes,
        )
        loaded = LoadedDetector(name, source, detectors, batcher, meters, memory_bytes)
        batcher.start()
        return loaded

    def _read_describer(self, name: str, source: Source, progress: Progress, *, fetch: bool) -> LanguageModel:
        """Warmed up; on the first device."""
        progress(ModelState.LOADING, 0.1)
        model = LanguageModel.load(
            name,
            source.place,
            device=self.devices[0],
            quantization=self._quantization(source),
            offline=not fetch or source.path is not None,
            limits=Limits(
                max_rows=self._settings.max_running_generations,
                max_cache_bytes=self._settings.max_cache_bytes,
                max_feature_bytes=self._settings.max_image_cache_bytes,
                prefill_tokens=self._settings.prefill_tokens,
            ),
        )
        progress(ModelState.WARMING_UP, 0.8)
        model.warm_up()
        return model

    def _begin_describer(self, name: str, source: Source, model: LanguageModel) -> LoadedDescriber:
        loop = asyncio.get_running_loop()

        def broke(why: str) -> None:
            loaded.broken = why
            self._on_broken(loaded, why)

        # A prompt with pictures may honestly take a CPU minutes.
        patience = 1 if model.card.device.startswith("cuda") else 10
        generations = Generations(
            model,
            max_running=self._settings.max_running_generations,
            max_queued=self._settings.max_queued_generations,
            max_bytes=self._settings.max_queued_bytes,
            ageing_ms=self._settings.priority_ageing_ms,
            begin_thread=partial(_set_torch_threads, self._threads),
            on_failure=lambda error: loop.call_soon_threadsafe(self._on_failure, error),
            stuck_after_s=self._settings.stuck_after_s * patience,
            on_stuck=broke,
        )
        describer = LocalDescriber(model, generations, threads=min(4, self._settings.core_count))
        loaded = LoadedDescriber(source, describer, model.card.memory_bytes + model.max_cache_bytes)
        describer.start()
        return loaded

    async def connect(
        self, name: str, address: RemoteAddress, progress: Progress, on_away: Callable[[Loaded, str], object]
    ) -> LoadedDescriber:
        """A describer that another server runs, found there and tried out; needs no device, and waits for no other load.

        `on_away` is told, on the loop, that its server is away later, and why. Raises PeerError.
        """
        settings = self._settings
        peer = Peer(
            address.base_url,
            api_key=settings.remote_api_key.get_secret_value(),
            silence_s=settings.remote_silence_s,
            max_answers=settings.max_remote_generations,
        )
        await asyncio.to_thread(peer.open)
        try:
            progress(ModelState.LOADING, 0.1)
            model = await connect(
                peer, address.model, lambda: progress(ModelState.WARMING_UP, 0.5), settings.remote_silence_s
            )
        except BaseException:
            await peer.close()
            raise
        describer = RemoteDescriber(
            name,
            model,
            peer,
            max_running=settings.max_remote_generations,
            max_queued=settings.max_queued_generations,
            max_bytes=settings.max_queued_bytes,
            ageing_ms=settings.priority_ageing_ms,
            threads=min(4, settings.core_count),
            on_away=lambda why: on_away(loaded, why),
        )
        loaded = LoadedDescriber(Source(f"{address.base_url}#{model}", generates=True), describer, 0)
        describer.start()
        return loaded

    @property
    def _threads(self) -> int:
        return self._settings.torch_threads or 1

    @property
    def _lanes(self) -> int:
        """Batches side by side on each device; the CPU's cores are shared by the replicas on it.

        On the CPU one more than cores: while one lane hands over its answer and is given the next image, another computes
        (2 cores, 16 callers: 146 images/s with two lanes, 157 with three).
        """
        settings = self._settings
        if settings.executors:
            return settings.executors
        on_cpu = Counter(self.devices)["cpu"]
        return max(1, settings.core_count // on_cpu) + 1 if on_cpu else 1

    @property
    def _value_bytes(self) -> int:
        """Of a number: fp32 on the CPU, 16 bits on a GPU."""
        return 2 if self.devices[0].startswith("cuda") else 4

    def _quantization(self, source: Source) -> str:
        wanted = self._settings.quantization_of(source.place if source.path is None else source.path.name)
        if wanted != "auto":
            return wanted
        on_cuda = self.devices[0].startswith("cuda")
        return "nf4" if on_cuda and source.path not in SHIPPED.values() else "none"


def _prepare(wanted: str, with_describers: bool) -> tuple[str, ...]:
    """Imports the large libraries and picks the devices."""
    from vision_server import torchvision_ops

    torchvision_ops.install()
    import_module("ultralytics.nn.autobackend")
    if with_describers:
        from transformers import AutoModelForImageTextToText, AutoProcessor  # noqa: F401  # names that import the rest
    # After every unload the garbage is collected. Half a million objects of these libraries would hold the interpreter, and so
    # the event loop, for 180 ms each time; frozen they are passed over.
    gc.collect()
    gc.freeze()
    return _pick_devices(wanted)


def _pick_devices(wanted: str) -> tuple[str, ...]:
    """`auto`: the first GPU that torch sees, else the CPU; several, separated by commas, work side by side.

    Raises DeviceMissing.
    """
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    names = [name.strip() for name in wanted.split(",") if name.strip()]
    if not names or names == ["auto"]:
        return ("cuda:0",) if count else ("cpu",)
    devices = tuple("cuda:0" if name == "cuda" else name for name in names)
    there_are = ("cpu", *(f"cuda:{number}" for number in range(count)))
    for device in devices:
        if device not in there_are:
            raise DeviceMissing(f"VISION_DEVICE names {device!r}; torch sees {', '.join(there_are)}")
    if len({device == "cpu" for device in devices}) > 1:
        raise DeviceMissing(f"VISION_DEVICE is {wanted!r}; name GPUs or the CPU, not both")
    return devices


def _rebuild(detector: Detector, source: Source) -> None:
    """Makes a broken executor anew, from the same weights."""
    assert source.path is not None, "a detector is a file or a folder"
    if Source.at(source.path, generates=False) != source:
        raise RuntimeError(f"its weights {source.place} have changed since they were loaded; load the model again")
    detector.load()
    detector.warm_up()


def _set_torch_threads(count: int) -> None:
    """torch keeps the number for each thread that computes."""
    import torch

    torch.set_num_threads(count)
