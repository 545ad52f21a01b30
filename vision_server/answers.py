"""The way of one conversation: its images decoded, the prompt prepared, the answer streamed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import ExitStack, aclosing

from vision_server.admission import Admission
from vision_server.describers.describer import PicturedTurn
from vision_server.detections import Detections
from vision_server.grounding import ground
from vision_server.images import Image, Images
from vision_server.models import Models
from vision_server.requests import DetectOptions, GenerateOptions, ImageSource, Priority, Role, Turn
from vision_server.results import Analysis, GenerateSummary


class Answers:
    """Asks the describers."""

    def __init__(self, models: Models, images: Images, admission: Admission, detections: Detections) -> None:
        self._models = models
        self._images = images
        self._admission = admission
        self._detections = detections

    async def generate(
        self,
        model: str,
        turns: Sequence[Turn],
        options: GenerateOptions,
        deadline_s: float | None = None,
        priority: Priority = Priority.STANDARD,
    ) -> AsyncGenerator[str | GenerateSummary, None]:
        """Pieces of text, then the summary. Raises a ServiceError."""
        since_s = time.perf_counter()
        with self._models.use_describer(model, "model") as loaded:
            describer = loaded.describer
            describer.check_room(priority)
            with ExitStack() as places:

                async def pictured(part: str | ImageSource) -> str | Image:
                    if isinstance(part, str):
                        return part
                    place = places.enter_context(self._admission.enter(part.size_bytes, priority))
                    return (await self._images.decode(part, place)).image

                conversation = [
                    PicturedTurn(turn.role, tuple(await asyncio.gather(*(pictured(part) for part in turn.parts))))
                    for turn in turns
                ]
                prompt = await describer.prepare(conversation)
            async with aclosing(
                describer.stream(prompt, options, priority=priority, deadline_s=deadline_s, since_s=since_s)
            ) as pieces:
                async for piece in pieces:
                    yield piece

    async def analyze(
        self,
        source: ImageSource,
        question: str,
        detect_options: DetectOptions,
        model: str,
        options: GenerateOptions,
        deadline_s: float | None = None,
        priority: Priority = Priority.STANDARD,
    ) -> Analysis:
        """The objects first, then the answer, grounded in them; the image is decoded once. Raises a ServiceError."""
        since_s = time.perf_counter()
        with self._models.use_describer(model, "model") as loaded:
            describer = loaded.describer
            describer.check_room(priority)
            self._detections.check(detect_options, "detect_options")
            seen = await self._detections.detect(source, detect_options, deadline_s, priority=priority, whole=True)
            asked = ground(question, [found.label for found in seen.answer.detections])
            conversation = [PicturedTurn(Role.USER, (seen.image, asked))]
            prompt = await describer.prepare(conversation)
            pieces = describer.stream(prompt, options, priority=priority, deadline_s=deadline_s, since_s=since_s)
            return Analysis(seen.answer, await _whole(pieces))


async def _whole(answer: AsyncGenerator[str | GenerateSummary, None]) -> GenerateSummary:
    """An answer's end, which has all of its text."""
    async with aclosing(answer) as pieces:
        async for piece in pieces:
            if isinstance(piece, GenerateSummary):
                return piece
    raise RuntimeError("a generation ended without its summary")
