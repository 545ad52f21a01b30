"""Runs the generations of one describer side by side, a token of each in turn.

    stream ──► waiting ──► running: token, token, … ──► the caller's queue ──► pieces of text, the summary
                  │ left, expired: dropped before the next token

Knows tokens and text, nothing of models: what it steps is anything with the shape of Stepper.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from serving.logs import get_logger
from vision_server.describers.text_stream import TextStream
from vision_server.errors import DeadlinePassed, Draining, Fault, QueueFull
from vision_server.metrics import FIRST_TOKEN_SECONDS, GENERATED_TOKENS, GENERATIONS, RUNNING_GENERATIONS
from vision_server.requests import GenerateOptions
from vision_server.results import FinishReason, GenerateSummary, GenerateTimings, Usage

SMOOTHING = 0.2
FIRST_GUESS_S = 1.0

_log = get_logger("generations")


class Stepper(Protocol):
    """One generation of a model."""

    def step(self) -> int:
        """The next token's id."""

    def is_end(self, token_id: int) -> bool:
        """Whether the model ended its answer with it."""


@dataclass(frozen=True, slots=True)
class Order:
    """What is to be generated: `begin` makes the stepper, in the describer's thread."""

    begin: Callable[[], Stepper]
    decode: Callable[[Sequence[int]], str]
    options: GenerateOptions
    prompt_tokens: int
    image_tokens: int
    context_tokens: int


@dataclass(slots=True)
class _Running:
    order: Order
    since_s: float
    deadline_s: float | None
    events: asyncio.Queue[str | GenerateSummary | Exception]
    text: TextStream
    started_s: float = 0.0
    first_token_s: float = 0.0
    stepper: Stepper | None = None
    tokens: int = 0
    # Set by the caller's thread, read before each token by the describer's.
    left: threading.Event = field(default_factory=threading.Event)


class Generations:
    """One thread that steps, and the bounded queue before it. stream() belongs to one event loop."""

    def __init__(
        self,
        name: str,
        *,
        max_running: int,
        max_queued: int,
        begin_thread: Callable[[], None] = lambda: None,
        on_failure: Callable[[Exception], object] = lambda _: None,
    ) -> None:
        self._name = name
        self._max_running = max_running
        self._max_queued = max_queued
        self._begin_thread = begin_thread
        self._on_failure = on_failure
        self._waiting: deque[_Running] = deque()
        self._running: list[_Running] = []
        self._changed = threading.Condition()
        self._stopping = False
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._whole_s = FIRST_GUESS_S
        self._busy_s = 0.0
        self._busy_since_s: float | None = None

    def start(self) -> None:
        """Starts the thread."""
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._run, name=f"model {self._name}", daemon=True)
        self._thread.start()

    async def stop(self) -> None:
        """Ends what runs after its current token; refuses what waits."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join)

    @property
    def queued(self) -> int:
        """Generations that wait."""
        return len(self._waiting)

    @property
    def busy_seconds(self) -> float:
        """Seconds in which tokens were computed, since the start."""
        since_s = self._busy_since_s
        return self._busy_s + (0.0 if since_s is None else time.perf_counter() - since_s)

    def check_room(self) -> None:
        """Raises QueueFull when nothing more may wait; asked before the pictures are decoded, and again in stream()."""
        if len(self._waiting) >= self._max_queued:
            raise QueueFull(
                what="generations",
                waiting=len(self._waiting),
                limit=self._max_queued,
                retry_after_s=self._whole_s * (1 + len(self._waiting) / self._max_running),
            )

    async def stream(
        self, order: Order, *, deadline_s: float | None = None, since_s: float | None = None
    ) -> AsyncGenerator[str | GenerateSummary, None]:
        """Pieces of text as they come, at last the summary. Times are `time.perf_counter()`'s.

        Closing the iterator (or cancelling the caller) stops the generation before its next token. Raises QueueFull,
        DeadlinePassed, Draining, Fault.
        """
        self.check_room()
        if self._loop is None or self._stopping:
            raise Draining()
        running = _Running(
            order,
            time.perf_counter() if since_s is None else since_s,
            deadline_s,
            asyncio.Queue(),
            TextStream(order.decode, order.options.stop),
        )
        with self._changed:
            self._waiting.append(running)
            self._changed.notify_all()
        try:
            while True:
                event = await running.events.get()
                if isinstance(event, Exception):
                    raise event
                yield event
                if isinstance(event, GenerateSummary):
                    return
        finally:
            running.left.set()
            with self._changed:
                if running in self._waiting:
                    self._waiting.remove(running)

    def _run(self) -> None:
        self._begin_thread()
        while self._admit():
            self._busy_since_s = began_s = time.perf_counter()
            for running in tuple(self._running):
                self._advance(running)
            self._busy_since_s = None
            self._busy_s += time.perf_counter() - began_s
        for running in (*self._running, *self._waiting):
            self._tell(running, Draining())
        self._running.clear()
        self._waiting.clear()

    def _admit(self) -> bool:
        """Waits for work, lets waiting generations in; False: it is time to stop."""
        with self._changed:
            while not (self._stopping or self._running or self._waiting):
                self._changed.wait()
            while self._waiting and len(self._running) < self._max_running:
                running = self._waiting.popleft()
                running.started_s = time.perf_counter()
                self._running.append(running)
        RUNNING_GENERATIONS.labels(self._name).set(len(self._running))
        return not self._stopping

    def _advance(self, running: _Running) -> None:
        """One token of one generation, unless its caller has left."""
        if running.left.is_set():
            self._end(running, "cancelled")
            return
        if running.deadline_s is not None and time.perf_counter() >= running.deadline_s:
            self._tell(running, DeadlinePassed((time.perf_counter() - running.since_s) * 1000))
            self._end(running, "error")
            return
        try:
            if running.stepper is None:
                running.stepper = running.order.begin()
            token_id = running.stepper.step()
            running.tokens += 1
            GENERATED_TOKENS.labels(self._name).inc()
            if running.tokens == 1:
                running.first_token_s = time.perf_counter()
                FIRST_TOKEN_SECONDS.labels(self._name).observe(running.first_token_s - running.since_s)
            self._take(running, token_id, running.stepper.is_end(token_id))
        except Exception as error:
            _log.error("a generation failed", model=self._name, exc_info=error)
            self._on_failure(error)
            self._tell(running, Fault(f"The model {self._name!r}"))
            self._end(running, "error")

    def _take(self, running: _Running, token_id: int, ended: bool) -> None:
        order = running.order
        if not ended:
            self._tell_text(running, running.text.put(token_id))
            used = order.prompt_tokens + running.tokens
            if not running.text.stopped:
                if running.tokens < order.options.max_new_tokens and used < order.context_tokens:
                    return
                # A stop text may lie in what was held back, so the reason is asked after end().
                self._tell_text(running, running.text.end())
                ended = running.text.stopped
            else:
                ended = True
        else:
            self._tell_text(running, running.text.end())
        self._finish(running, FinishReason.STOP if ended else FinishReason.LENGTH)

    def _finish(self, running: _Running, reason: FinishReason) -> None:
        now_s = time.perf_counter()
        self._whole_s += SMOOTHING * (now_s - running.started_s - self._whole_s)
        summary = GenerateSummary(
            text=running.text.text,
            finish_reason=reason,
            usage=Usage(running.order.prompt_tokens, running.order.image_tokens, running.tokens),
            timings=GenerateTimings(
                queue_ms=(running.started_s - running.since_s) * 1000,
                time_to_first_token_ms=(running.first_token_s - running.since_s) * 1000,
                total_ms=(now_s - running.since_s) * 1000,
            ),
            model=self._name,
        )
        self._tell(running, summary)
        self._end(running, reason.value.lower())

    def _end(self, running: _Running, how: str) -> None:
        self._running.remove(running)
        running.stepper = None  # frees its cache
        GENERATIONS.labels(self._name, how).inc()

    def _tell_text(self, running: _Running, piece: str) -> None:
        if piece:
            self._tell(running, piece)

    def _tell(self, running: _Running, event: str | GenerateSummary | Exception) -> None:
        assert self._loop is not None
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(running.events.put_nowait, event)
