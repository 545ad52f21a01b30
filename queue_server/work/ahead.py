"""Reads an iterator in a thread of its own, a few items ahead."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from types import TracebackType
from typing import Generic, TypeVar

T = TypeVar("T")

# How soon either side notices that the other has left.
NOTICED_S = 0.1


class _End:
    """After the last item; `error` is what the iterator raised instead."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error


class Ahead(Generic[T]):
    """The items, in their order, to be read by one other thread while the block lasts; leaving it waits for the reading thread.

    What the iterator raises is raised where the items are read.
    """

    def __init__(self, items: Iterator[T], count: int) -> None:
        self._items = items
        self._read: queue.Queue[T | _End] = queue.Queue(count)
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._run, name="ahead", daemon=True)

    def __enter__(self) -> Ahead[T]:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._left.set()
        self._thread.join()

    def __iter__(self) -> Iterator[T]:
        while not self._left.is_set():
            try:
                item = self._read.get(timeout=NOTICED_S)
            except queue.Empty:
                continue
            if not isinstance(item, _End):
                yield item
            elif item.error is not None:
                raise item.error
            else:
                return

    def _run(self) -> None:
        try:
            for item in self._items:
                if not self._put(item):
                    return
            self._put(_End())
        except Exception as error:
            self._put(_End(error))

    def _put(self, item: T | _End) -> bool:
        while not self._left.is_set():
            try:
                self._read.put(item, timeout=NOTICED_S)
                return True
            except queue.Full:
                continue
        return False
