"""The face of whatever answers conversations; answers.py knows nothing else of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from vision_server.images import Image
from vision_server.requests import GenerateOptions, Priority, Role
from vision_server.results import Card, GenerateSummary

PromptT = TypeVar("PromptT")


@dataclass(frozen=True, slots=True)
class PicturedTurn:
    """One turn of a conversation whose pictures are decoded."""

    role: Role
    parts: tuple[str | Image, ...]


class Describer(ABC, Generic[PromptT]):
    """Answers many conversations at once. All methods belong to one event loop and leave it alone.

    prepare() gives what the pictures and words become for it; once it has returned, the pictures are not needed any more.
    """

    def __init__(self, name: str, card: Card) -> None:
        self.name = name
        self.card = card

    @abstractmethod
    def start(self) -> None:
        """Begins to serve."""

    @abstractmethod
    async def stop(self) -> None:
        """Ends what runs after its current token (Draining), refuses what waits."""

    @abstractmethod
    def check_room(self, priority: Priority) -> None:
        """Raises QueueFull when nothing more of this priority may wait; asked before pictures are decoded, and in stream()."""

    @abstractmethod
    async def look(self, image: Image) -> None:
        """Reads a picture ahead, while its question is still being made; a hint, it raises nothing."""

    @abstractmethod
    async def prepare(self, turns: Sequence[PicturedTurn]) -> PromptT:
        """The conversation as it will be read. Raises PromptTooLong, InvalidField."""

    @abstractmethod
    def stream(
        self,
        prompt: PromptT,
        options: GenerateOptions,
        *,
        priority: Priority = Priority.STANDARD,
        deadline_s: float | None = None,
        since_s: float | None = None,
    ) -> AsyncGenerator[str | GenerateSummary, None]:
        """Pieces of text as they come, at last the summary; times are `time.perf_counter()`'s.

        Closing the iterator (or cancelling the caller) ends the generation before its next token. Raises QueueFull,
        DeadlinePassed, Draining, Fault.
        """

    @property
    @abstractmethod
    def queued(self) -> int:
        """Generations that wait."""

    @property
    @abstractmethod
    def busy_seconds(self) -> float:
        """Seconds in which it computed since it began; 0 for one whose computing is elsewhere."""
