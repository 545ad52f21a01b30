"""The way of one image: admitted, decoded, fitted, detected in a batch, drawn."""

from __future__ import annotations

import time
from dataclasses import dataclass

from serving.errors import ServiceError
from vision_server import metrics
from vision_server.admission import Admission
from vision_server.annotate import annotate
from vision_server.detector import DetectItem
from vision_server.errors import InvalidField
from vision_server.images import Image, Images
from vision_server.models import Models
from vision_server.requests import DetectOptions, ImageSource, Priority
from vision_server.results import Detections as Answer
from vision_server.results import Timings


@dataclass(frozen=True, slots=True)
class Seen:
    """The answer about an image, with the image itself for who wants to look again."""

    answer: Answer
    image: Image


class Detections:
    """Answers one image at a time and caller; the batcher joins the callers."""

    def __init__(self, models: Models, images: Images, admission: Admission) -> None:
        self._models = models
        self._images = images
        self._admission = admission

    def check(self, options: DetectOptions, field: str = "options") -> None:
        """Raises what is wrong with the options, before there is an image; `field` is where they stand."""
        _, detector, _ = self._models.detector(options.model, f"{field}.model")
        try:
            detector.class_ids(options.labels)
        except KeyError as error:
            raise InvalidField(
                f"{field}.labels",
                f"has {error.args[0]!r}, which the model does not know.",
                "GetModel tells its labels.",
            ) from None

    async def detect(
        self,
        source: ImageSource,
        options: DetectOptions,
        deadline_s: float | None = None,
        *,
        priority: Priority = Priority.STANDARD,
        patient: bool = False,
    ) -> Seen:
        """Raises a ServiceError; `deadline_s` is a moment of time.perf_counter(). `patient`: waits when the server is full."""
        try:
            seen = await self._detect(source, options, deadline_s, priority, patient)
        except ServiceError as error:
            metrics.IMAGES.labels(error.reason).inc()
            raise
        metrics.IMAGES.labels("OK").inc()
        return seen

    async def _detect(
        self,
        source: ImageSource,
        options: DetectOptions,
        deadline_s: float | None,
        priority: Priority,
        patient: bool,
    ) -> Seen:
        began_s = time.perf_counter()
        self.check(options)
        model, detector, batcher = self._models.detector(options.model, "options.model")
        enter = self._admission
        with await enter.enter_when_free(source.size_bytes) if patient else enter.enter(source.size_bytes) as place:
            decoded, fitted = await self._images.decode_then(source, place, detector.fit)
            image = decoded.image
            item = DetectItem(fitted, options, detector.class_ids(options.labels))
            batched = await batcher.submit(item, deadline_s=deadline_s)
            found = batched.result
            drawn_s = 0.0
            picture = b""
            if options.annotate:
                drawing_s = time.perf_counter()
                picture = await self._images.run(lambda: annotate(image.rgb, found.detections))
                drawn_s = time.perf_counter() - drawing_s
        metrics.DECODE_SECONDS.observe(decoded.decode_ms / 1000)
        metrics.QUEUE_SECONDS.labels(model.name).observe(batched.queue_ms / 1000)
        metrics.INFERENCE_SECONDS.labels(model.name).observe(found.inference_ms / 1000)
        metrics.POSTPROCESS_SECONDS.labels(model.name).observe(found.postprocess_ms / 1000)
        metrics.BATCH_SIZE.labels(model.name).observe(batched.batch_size)
        timings = Timings(
            decode_ms=decoded.decode_ms,
            queue_ms=batched.queue_ms,
            inference_ms=found.inference_ms,
            postprocess_ms=found.postprocess_ms + drawn_s * 1000,
            total_ms=(time.perf_counter() - began_s) * 1000,
            batch_size=batched.batch_size,
        )
        version = model.card.version if model.card else ""
        answer = Answer(
            model.name, version, image.width_px, image.height_px, found.detections, found.classes, timings, picture
        )
        return Seen(answer, image)
