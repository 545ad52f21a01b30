"""A describer whose model runs in this process: prompts prepared off the loop, generations stepped by the scheduler's thread."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from vision_server.describers.describer import Describer, PicturedTurn
from vision_server.describers.language_model import LanguageModel
from vision_server.describers.prompts import Prompt
from vision_server.describers.scheduler import Generations
from vision_server.images import Image
from vision_server.requests import GenerateOptions, Priority, Role
from vision_server.results import GenerateSummary


class LocalDescriber(Describer[Prompt]):
    """A loaded language model, the threads that prepare its prompts, and its generations."""

    def __init__(self, model: LanguageModel, generations: Generations, *, threads: int) -> None:
        super().__init__(model.name, model.card)
        self._model = model
        self._generations = generations
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix=f"prepare {model.name}")

    def start(self) -> None:
        """Begins to step."""
        self._generations.start()

    async def stop(self) -> None:
        """See Describer."""
        await self._generations.stop()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def check_room(self, priority: Priority) -> None:
        """See Describer."""
        self._generations.check_room(priority)

    async def look(self, image: Image) -> None:
        """See Describer."""
        with suppress(Exception):  # who asks about it will be told
            self._generations.look(await self.prepare([PicturedTurn(Role.USER, (image, "?"))]))

    async def prepare(self, turns: Sequence[PicturedTurn]) -> Prompt:
        """See Describer."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, self._model.prepare, turns)

    def stream(
        self,
        prompt: Prompt,
        options: GenerateOptions,
        *,
        priority: Priority = Priority.STANDARD,
        deadline_s: float | None = None,
        since_s: float | None = None,
    ) -> AsyncGenerator[str | GenerateSummary, None]:
        """See Describer."""
        return self._generations.stream(prompt, options, priority=priority, deadline_s=deadline_s, since_s=since_s)

    @property
    def queued(self) -> int:
        """See Describer."""
        return self._generations.queued

    @property
    def busy_seconds(self) -> float:
        """See Describer."""
        return self._generations.busy_seconds
