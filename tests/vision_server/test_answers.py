"""Analyze in one process: who sees the picture when, and what becomes of the look when something ends early."""

from __future__ import annotations

import asyncio
import io
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image as Pillow

from vision_server.admission import Admission
from vision_server.answers import Answers
from vision_server.batcher import Batched
from vision_server.describers.describer import Describer, PicturedTurn
from vision_server.detections import Detections
from vision_server.detector import DetectItem
from vision_server.errors import DeadlinePassed, QueueFull
from vision_server.images import Image, Images
from vision_server.letterbox import fit
from vision_server.requests import DetectOptions, EncodedImage, GenerateOptions, ImageSource, Priority, RawPixels
from vision_server.results import (
    Analysis,
    Box,
    Card,
    Classification,
    Detection,
    FinishReason,
    Found,
    GenerateSummary,
    GenerateTimings,
    Task,
    Usage,
)

SIDE_PX = 32
CARD = Card("1", Task.DETECT, "none", "fp32", "cpu", ("circle",), SIDE_PX, 0)
CIRCLE = Detection("circle", 0, 0.9, Box(0, 0, 10, 10))
GROUNDED = (
    "Detected objects: 1 circle.\n"
    "Positions from left to right, in percent of width (x) and height (y): circle x 0-10, y 0-10.\nWhat is this?"
)


class Batcher:
    """In a detector's place: computes until it is told what to find, or how to fail."""

    def __init__(self) -> None:
        self.items: list[DetectItem] = []
        self.began = asyncio.Event()
        self.answer: asyncio.Future[Found] = asyncio.get_running_loop().create_future()

    def check_room(self, priority: Priority) -> None:
        """There is always room."""

    async def submit(self, item: DetectItem, **_: object) -> Batched[Found]:
        self.items.append(item)
        self.began.set()
        return Batched(await self.answer, 0.0, 1)


class FakeDescriber(Describer[str]):
    """Looks until it is told what it has seen; its answer is the words that it was asked."""

    def __init__(self) -> None:
        super().__init__("fake", CARD)
        self.seen: asyncio.Future[Image] = asyncio.get_running_loop().create_future()
        self.looked: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.prepared: list[PicturedTurn] = []
        self.has_prepared = asyncio.Event()
        self.was_cancelled = False
        self.streams = 0

    def start(self) -> None:
        """Nothing to start."""

    async def stop(self) -> None:
        """Nothing to stop."""

    def check_room(self, priority: Priority) -> None:
        """There is always room."""

    async def look(self, image: Image) -> None:
        self.seen.set_result(image)
        try:
            await self.looked
        except asyncio.CancelledError:
            self.was_cancelled = True
            raise

    async def prepare(self, turns: Sequence[PicturedTurn]) -> str:
        self.prepared += turns
        self.has_prepared.set()
        return str(turns[-1].parts[-1])

    async def stream(
        self,
        prompt: str,
        options: GenerateOptions,
        *,
        priority: Priority = Priority.STANDARD,
        deadline_s: float | None = None,
        since_s: float | None = None,
    ) -> AsyncGenerator[str | GenerateSummary, None]:
        self.streams += 1
        yield GenerateSummary(prompt, FinishReason.STOP, Usage(1, 1, 1), GenerateTimings(0, 0, 0), self.name)

    @property
    def queued(self) -> int:
        return 0

    @property
    def busy_seconds(self) -> float:
        return 0.0


class Bench:
    """One detector, one describer, an admission that counts; analyze() is a call on its way."""

    def __init__(self, images: Images, *, max_bytes: int = 1 << 30) -> None:
        self.batcher, self.describer = Batcher(), FakeDescriber()
        detector = SimpleNamespace(fit=lambda image: fit(image, SIDE_PX), class_ids=lambda labels: None, card=CARD)
        meters = SimpleNamespace(count_image=lambda **_: None)
        self._detector = SimpleNamespace(name="fake", detector=detector, batcher=self.batcher, card=CARD, meters=meters)
        self.admission = Admission(max_images=4, max_bytes=max_bytes, estimate_s=lambda: 1.0)
        models: Any = self
        self.detections = Detections(models, images, self.admission)
        self.answers = Answers(models, images, self.admission, self.detections)

    @contextmanager
    def use_detector(self, name: str, field: str) -> Iterator[Any]:
        yield self._detector

    @contextmanager
    def use_describer(self, name: str, field: str) -> Iterator[Any]:
        yield SimpleNamespace(describer=self.describer)

    def analyze(self, source: ImageSource, deadline_s: float | None = None) -> asyncio.Task[Analysis]:
        asked = self.answers.analyze(source, "What is this?", DetectOptions(), "", GenerateOptions(), deadline_s)
        return asyncio.create_task(asked)

    async def seen(self) -> Image:
        """What the describer looks at."""
        return await asyncio.wait_for(asyncio.shield(self.describer.seen), 10)


@pytest.fixture(scope="module")
def images() -> Iterator[Images]:
    pool = Images(threads=2, max_bytes=10_000_000, max_pixels=10_000_000)
    pool.start()
    yield pool
    pool.stop()


def raw(side_px: int = 100) -> RawPixels:
    return RawPixels(bytes(side_px * side_px * 3), side_px, side_px)


def large_jpeg() -> EncodedImage:
    """Far larger than the detector's square, so that it is decoded reduced for it."""
    rgb = np.random.default_rng(1).integers(0, 256, (400, 600, 3), np.uint8)
    file = io.BytesIO()
    Pillow.fromarray(rgb).save(file, "JPEG")
    return EncodedImage(file.getvalue())


async def test_the_describer_looks_while_the_detector_computes(images: Images) -> None:
    bench = Bench(images)
    call = bench.analyze(raw())
    # Given a detector that is not done, the describer already looks at the picture.
    seen = await bench.seen()
    assert not bench.batcher.answer.done()
    # When the detector has found something while the look goes on, nothing is read twice: the answer waits for the look.
    bench.batcher.answer.set_result(Found((CIRCLE,)))
    await asyncio.wait_for(bench.describer.has_prepared.wait(), 10)
    await asyncio.sleep(0.01)
    assert not bench.describer.streams
    bench.describer.looked.set_result(None)
    # Then the question is grounded, about the very picture that was looked at.
    analysis = await call
    assert analysis.detections.detections == (CIRCLE,)
    assert analysis.answer.text == GROUNDED
    assert bench.describer.prepared[0].parts[0] is seen
    assert bench.admission.image_count == 0


async def test_a_large_jpeg_is_reduced_for_the_detector_and_whole_for_the_describer(images: Images) -> None:
    bench = Bench(images)
    source = large_jpeg()
    call = bench.analyze(source)
    seen = await bench.seen()
    assert (seen.reduction, seen.rgb.shape) == (1, (400, 600, 3))
    bench.batcher.answer.set_result(Found())
    bench.describer.looked.set_result(None)
    await call
    # What the detector was given is what it is given when nobody else looks.
    alone = Bench(images)
    alone.batcher.answer.set_result(Found())
    answer = (await alone.detections.detect(source, DetectOptions())).answer
    assert (answer.width_px, answer.height_px) == (600, 400)
    assert np.array_equal(bench.batcher.items[0].fitted.rgb, alone.batcher.items[0].fitted.rgb)


@pytest.mark.parametrize("fails", [True, False], ids=["fails", "outlasts the deadline"])
async def test_a_look_does_not_fail_the_call(images: Images, fails: bool) -> None:
    bench = Bench(images)
    asyncio.get_running_loop().set_exception_handler(
        lambda *_: None
    )  # else it tells, at last, of an error that is meant
    call = bench.analyze(raw(), time.perf_counter() + 0.3)
    await bench.seen()
    bench.batcher.answer.set_result(Found((CIRCLE,)))
    if fails:
        bench.describer.looked.set_exception(RuntimeError("it cannot see"))
    assert (await call).answer.text == GROUNDED
    await asyncio.sleep(0)
    assert bench.describer.was_cancelled != fails


@pytest.mark.parametrize("source", [raw(), large_jpeg()], ids=["decoded once", "reduced"])
async def test_when_the_detector_fails_the_look_ends(images: Images, source: ImageSource) -> None:
    bench = Bench(images)
    call = bench.analyze(source)
    await bench.seen()
    bench.batcher.answer.set_exception(DeadlinePassed(5.0))
    with pytest.raises(DeadlinePassed):
        await call
    await asyncio.sleep(0)
    assert bench.describer.was_cancelled
    assert not bench.describer.prepared
    assert bench.admission.image_count == bench.admission.size_bytes == 0


async def test_when_the_caller_leaves_detector_and_look_both_end(images: Images) -> None:
    bench = Bench(images)
    call = bench.analyze(large_jpeg())
    await bench.seen()
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    await asyncio.sleep(0)
    assert bench.batcher.answer.cancelled()
    assert bench.describer.was_cancelled
    assert bench.admission.image_count == bench.admission.size_bytes == 0


async def test_a_whole_picture_that_there_is_no_room_for_is_refused(images: Images) -> None:
    # Given room for the reduced picture, but beside another image not for the whole one,
    bench = Bench(images, max_bytes=1_000_000)
    source = large_jpeg()
    with bench.admission.enter(100_000):
        call = bench.analyze(source)
        await asyncio.wait_for(bench.batcher.began.wait(), 10)
        bench.batcher.answer.set_result(Found())
        with pytest.raises(QueueFull):
            await call
    assert not bench.describer.seen.done()
    assert bench.admission.image_count == bench.admission.size_bytes == 0


async def test_a_classifiers_answer_is_offered_too(images: Images) -> None:
    bench = Bench(images)
    bench.batcher.answer.set_result(Found(classes=(Classification("star", 3, 0.98), Classification("circle", 0, 0.02))))
    bench.describer.looked.set_result(None)
    assert (await bench.analyze(raw())).answer.text == "Image classes: star 98%, circle 2%.\nWhat is this?"


async def test_the_picture_counts_until_its_prompt_is_prepared(images: Images) -> None:
    bench = Bench(images)
    counts: list[int] = []
    prepare = bench.describer.prepare

    async def counted(turns: Sequence[PicturedTurn]) -> str:
        counts.append(bench.admission.image_count)
        return await prepare(turns)

    bench.describer.prepare = counted  # type: ignore[method-assign]
    bench.batcher.answer.set_result(Found())
    bench.describer.looked.set_result(None)
    await bench.analyze(raw())
    assert counts == [1]
    assert bench.admission.image_count == 0
