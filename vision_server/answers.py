"""The way of one conversation: its images decoded, the prompt prepared, the answer streamed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import ExitStack, aclosing

from vision_server.admission import Admission
from vision_server.describers.describer import PicturedTurn
from vision_server.detections import Detections, Onlooker
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
                answer = describer.stream(
                    await describer.prepare(conversation),  # which nobody here holds longer than the describer does
                    options,
                    priority=priority,
                    deadline_s=deadline_s,
                    since_s=since_s,
                )
                del conversation
            async with aclosing(answer) as pieces:
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
        """The objects first, then the answer, grounded in them; meanwhile the describer looks. Raises a ServiceError."""
        since_s = time.perf_counter()
        with self._models.use_describer(model, "model") as loaded:
            describer = loaded.describer
            describer.check_room(priority)
            self._detections.check(detect_options, "detect_options")
            looks: list[asyncio.Task[None]] = []

            def look(image: Image) -> None:
                looks.append(asyncio.create_task(describer.look(image)))

            try:
                with ExitStack() as places:
                    onlooker = Onlooker(look, places)
                    seen = await self._detections.detect(
                        source, detect_options, deadline_s, priority=priority, onlooker=onlooker
                    )
                    found = seen.answer
                    asked = ground(
                        question, found.detections, found.classes, width_px=found.width_px, height_px=found.height_px
                    )
                    prompt = await describer.prepare([PicturedTurn(Role.USER, (seen.image, asked))])
                    # What it is still reading it would begin to read once more; a deadline that passes stream() tells.
                    left_s = None if deadline_s is None else max(0.0, deadline_s - time.perf_counter())
                    await asyncio.wait(looks, timeout=left_s)
            finally:
                for begun in looks:
                    begun.cancel()
            pieces = describer.stream(prompt, options, priority=priority, deadline_s=deadline_s, since_s=since_s)
            del prompt  # the describer lets go of the picture once it has read it
            return Analysis(found, await _whole(pieces))


async def _whole(answer: AsyncGenerator[str | GenerateSummary, None]) -> GenerateSummary:
    """An answer's end, which has all of its text."""
    async with aclosing(answer) as pieces:
        async for piece in pieces:
            if isinstance(piece, GenerateSummary):
                return piece
    raise RuntimeError("a generation ended without its summary")
