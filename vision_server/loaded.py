"""A model in memory: what computes it, and how many calls use it."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from vision_server.batcher import Batcher
from vision_server.describers.addresses import ELSEWHERE
from vision_server.describers.describer import Describer
from vision_server.detector import DetectItem, Detector
from vision_server.metrics import DetectorMeters
from vision_server.results import Card, Found
from vision_server.weights import model_name


@dataclass(frozen=True, slots=True)
class Source:
    """Where a model is loaded from: `place` is a file, a folder, or (`path` None) the id of a model on the Hugging Face hub.

    Two sources are equal while the files have not been touched.
    """

    place: str
    generates: bool
    path: Path | None = None
    files: tuple[tuple[str, int, int, int, int], ...] = ()

    @property
    def version(self) -> str:
        """What stands behind the `@` of the file's name; empty: nothing."""
        return "" if self.path is None else model_name(self.path.name).partition("@")[2]

    @classmethod
    def at(cls, path: Path, *, generates: bool) -> Source:
        """A file or folder as it is now."""
        found = sorted(path.rglob("*")) if path.is_dir() else [path]
        stats = [(file, file.stat()) for file in found if not file.is_dir()]
        # The time of the last change of the inode too: `cp -p` and `touch -r` keep the other one.
        files = tuple((str(file), s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for file, s in stats)
        return cls(str(path), generates, path, files)


class Loaded(ABC):
    """A model in memory, with the number of calls that use it; whoever uses it holds a lease."""

    def __init__(self, name: str, source: Source, card: Card, memory_bytes: int) -> None:
        self.name = name
        self.source = source
        self.card = replace(card, version=source.version or card.version)
        self.memory_bytes = memory_bytes
        """About what it takes on each of its devices: its weights as measured, the rest as estimated."""
        self.broken = ""
        """Why it computes no more; empty: it does."""
        self._users = 0
        self._unused = asyncio.Event()

    @contextmanager
    def lease(self) -> Iterator[Self]:
        """Keeps it in memory; a swap or unload waits for the end."""
        self._users += 1
        try:
            yield self
        finally:
            self._users -= 1
            if not self._users:
                self._unused.set()

    async def stop(self, within_s: float) -> None:
        """Lets the calls that use it end, those that have not after `within_s` are refused; then frees it."""
        with suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                while self._users:
                    self._unused.clear()
                    await self._unused.wait()
        await self._end()

    @abstractmethod
    async def _end(self) -> None: ...

    @property
    @abstractmethod
    def depth(self) -> int:
        """Requests that wait for it."""

    @property
    @abstractmethod
    def busy_s(self) -> Mapping[str, float]:
        """Seconds in which it computed since it was loaded, by device."""


class LoadedDetector(Loaded):
    """A detector on one or several devices, and the line before them; `detector` is the first device's."""

    def __init__(
        self,
        name: str,
        source: Source,
        detectors: Sequence[Detector],
        batcher: Batcher[DetectItem, Found],
        meters: DetectorMeters,
        memory_bytes: int,
    ) -> None:
        card = detectors[0].card
        if len(detectors) > 1:
            cards = [detector.card for detector in detectors]
            card = replace(
                card, device=",".join(c.device for c in cards), memory_bytes=sum(c.memory_bytes for c in cards)
            )
        super().__init__(name, source, card, memory_bytes)
        self._detectors = list(detectors)
        self.detector = detectors[0]
        self.batcher = batcher
        self.meters = meters

    @property
    def depth(self) -> int:
        """Images that wait for it."""
        return self.batcher.depth

    @property
    def busy_s(self) -> Mapping[str, float]:
        """Seconds in which it computed, by device."""
        return self.batcher.busy_s_by_device

    async def _end(self) -> None:
        await self.batcher.stop()
        for detector in self._detectors:
            await asyncio.to_thread(detector.close)


class LoadedDescriber(Loaded):
    """A describer."""

    def __init__(self, source: Source, describer: Describer[Any], memory_bytes: int) -> None:
        super().__init__(describer.name, source, describer.card, memory_bytes)
        self.describer = describer

    @property
    def depth(self) -> int:
        """Generations that wait for it."""
        return self.describer.queued

    @property
    def busy_s(self) -> Mapping[str, float]:
        """Seconds in which it computed, by device; of one that another server computes nothing is known."""
        return {} if self.card.device == ELSEWHERE else {self.card.device: self.describer.busy_seconds}

    async def _end(self) -> None:
        await self.describer.stop()
