"""The way of one image: admitted, decoded, fitted, detected in a batch, drawn."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

from serving.errors import ServiceError
from vision_server import metrics
from vision_server.admission import Admission, Place
from vision_server.annotate import annotate
from vision_server.detector import DetectItem
from vision_server.errors import InvalidField
from vision_server.images import Decoded, Image, Images
from vision_server.loaded import LoadedDetector
from vision_server.masks import draw_masks, with_masks
from vision_server.models import Models
from vision_server.requests import DetectOptions, ImageSource, Priority, StreamOptions
from vision_server.results import Detection, Found, Task, Timings
from vision_server.results import Detections as Answer

Follow = Callable[[Image, tuple[Detection, ...]], Awaitable[tuple[Detection, ...]]]


@dataclass(frozen=True, slots=True)
class Seen:
    """The answer about an image, with the image itself for who wants to look again."""

    answer: Answer
    image: Image


@dataclass(frozen=True, slots=True)
class Onlooker:
    """Somebody else who looks at the picture: `see` is handed all its pixels while the detector is still at work.

    The picture's place goes into `places`, to be given back by whoever holds the picture longest.
    """

    see: Callable[[Image], object]
    places: ExitStack


class Detections:
    """Answers one image at a time and caller; the batcher joins the callers."""

    def __init__(self, models: Models, images: Images, admission: Admission) -> None:
        self._models = models
        self._images = images
        self._admission = admission

    def check(self, options: DetectOptions, field: str = "options") -> None:
        """Raises what is wrong with the options, before there is an image; `field` is where they stand."""
        with self._models.use_detector(options.model, f"{field}.model") as model:
            _class_ids(model, options, field)

    def check_stream(self, options: StreamOptions) -> None:
        """Raises what is wrong with a stream's config, before there is a frame."""
        self.check(options.detect, "config.options")
        with self._models.use_detector(options.detect.model, "config.options.model") as model:
            if options.tracker is not None and model.card.task is Task.CLASSIFY:
                raise InvalidField(
                    "config.tracker",
                    f"is {options.tracker}, but {model.name!r} tells what a whole image is.",
                    "Trackers follow what models of the other tasks find.",
                )

    def capacity(self, options: DetectOptions) -> tuple[str, int]:
        """The model that answers, and how many images keep it busy: computed, as many waiting, one a decoding thread."""
        with self._models.use_detector(options.model, "options.model") as model:
            return model.name, 2 * model.batcher.capacity + self._images.threads

    async def detect(
        self,
        source: ImageSource,
        options: DetectOptions,
        deadline_s: float | None = None,
        *,
        priority: Priority = Priority.STANDARD,
        patient: bool = False,
        onlooker: Onlooker | None = None,
        follow: Follow | None = None,
    ) -> Seen:
        """Raises a ServiceError; `deadline_s` is a moment of time.perf_counter(). `patient`: waits when the server is full.

        `onlooker` sees the picture too. `follow` is handed what was found and answers it numbered, before masks are made and
        boxes drawn.
        """
        try:
            with self._models.use_detector(options.model, "options.model") as model:
                seen = await self._detect(model, source, options, deadline_s, priority, patient, onlooker, follow)
        except ServiceError as error:
            metrics.IMAGES.labels(error.reason).inc()
            raise
        metrics.IMAGES.labels("OK").inc()
        return seen

    async def _detect(
        self,
        model: LoadedDetector,
        source: ImageSource,
        options: DetectOptions,
        deadline_s: float | None,
        priority: Priority,
        patient: bool,
        onlooker: Onlooker | None,
        follow: Follow | None,
    ) -> Seen:
        began_s = time.perf_counter()
        class_ids = _class_ids(model, options, "options")
        detector, batcher = model.detector, model.batcher
        enter, size_bytes = self._admission, source.size_bytes
        if not patient:
            batcher.check_room(priority)  # before anything is decoded
        with ExitStack() as own_places:
            place = await enter.enter_when_free(size_bytes, priority) if patient else enter.enter(size_bytes, priority)
            (onlooker.places if onlooker else own_places).enter_context(place)
            decoded, fitted = await self._images.decode_then(
                source,
                place,
                detector.fit,
                detector.card.input_size_px,
                shorter_side=model.card.task is Task.CLASSIFY,
            )
            looked_at = options.annotate or onlooker is not None
            looking = asyncio.create_task(self._whole(decoded, source, place, onlooker)) if looked_at else None
            try:
                item = DetectItem(fitted, options, class_ids)
                batched = await batcher.submit(item, deadline_s=deadline_s, priority=priority)
                found = batched.result
                detections = found.detections if follow is None else await follow(decoded.image, found.detections)
                if looking is not None:
                    decoded = await looking
            finally:
                if looking is not None:
                    looking.cancel()
                    await asyncio.gather(looking, return_exceptions=True)
            image, decode_ms = decoded.image, decoded.decode_ms
            picture, drawing_ms = b"", 0.0
            if options.annotate or (options.masks and found.masks):
                detections, picture, drawing_ms = await self._images.run(
                    partial(_draw, image, found, detections, options)
                )
        metrics.DECODE_SECONDS.observe(decode_ms / 1000)
        model.meters.count_image(queue_ms=batched.queue_ms, postprocess_ms=found.postprocess_ms + drawing_ms)
        timings = Timings(
            decode_ms=decode_ms,
            queue_ms=batched.queue_ms,
            inference_ms=found.inference_ms,
            postprocess_ms=found.postprocess_ms + drawing_ms,
            total_ms=(time.perf_counter() - began_s) * 1000,
            batch_size=batched.batch_size,
        )
        version = model.card.version
        answer = Answer(
            model.name, version, image.width_px, image.height_px, detections, found.classes, timings, picture
        )
        return Seen(answer, image)

    async def _whole(self, decoded: Decoded, source: ImageSource, place: Place, onlooker: Onlooker | None) -> Decoded:
        """The picture for eyes, handed to the onlooker; where the detector's was reduced, decoded once more, all of it.

        The detector keeps its own, so that what is found does not depend on who else looks at the picture.
        """
        if decoded.image.reduction > 1:
            again = await self._images.decode(source, place)
            decoded = Decoded(again.image, decoded.decode_ms + again.decode_ms)
        if onlooker is not None:
            onlooker.see(decoded.image)
        return decoded


def _class_ids(model: LoadedDetector, options: DetectOptions, field: str) -> tuple[int, ...] | None:
    """The numbers of the labels asked for; None: all. Raises InvalidField; `field` is where the options stand."""
    try:
        return model.detector.class_ids(options.labels)
    except KeyError as error:
        raise InvalidField(
            f"{field}.labels", f"has {error.args[0]!r}, which the model does not know.", "GetModel tells its labels."
        ) from None


def _draw(
    image: Image, found: Found, detections: tuple[Detection, ...], options: DetectOptions
) -> tuple[tuple[Detection, ...], bytes, float]:
    """The detections with the masks that were asked for, the picture if it was, and how many milliseconds both took."""
    began_s = time.perf_counter()
    masks = draw_masks(found.masks, found.detections, detections) if found.masks else []
    picture = b""
    if options.annotate:
        picture = annotate(image.rgb, detections, found.classes, masks, reduction=image.reduction)
    if options.masks and masks:
        detections = with_masks(detections, masks, options.masks, image.width_px, image.height_px)
    return detections, picture, (time.perf_counter() - began_s) * 1000
