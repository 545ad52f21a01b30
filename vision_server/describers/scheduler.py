"""Steps the generations of one model together: rows join and leave between two steps, each with options of its own.

    stream() ──► line, by priority ──► being read, a piece a step ──► row: token, token, … ──► pieces of text, the summary
                    │ left, expired: gone at once                       │ left, expired, done: its place is free at the next step

Knows tokens and text, nothing of models: what it steps is anything with the shape of Model.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from serving.logs import get_logger
from vision_server import metrics
from vision_server.admission import SHARES
from vision_server.describers.sampling import NotNumbers, Sampler, choose
from vision_server.describers.text_stream import TextStream
from vision_server.errors import AnswerTooLong, DeadlinePassed, Draining, ExecutorStuck, Fault, MemoryRanOut, QueueFull
from vision_server.line import Line
from vision_server.requests import GenerateOptions, Priority
from vision_server.results import FinishReason, GenerateSummary, GenerateTimings, Usage

if TYPE_CHECKING:
    from vision_server.describers.prompts import Prompt
    from vision_server.describers.reading import Reading
    from vision_server.describers.rows import Rows

SMOOTHING = 0.2
FIRST_GUESS_S = 1.0
_MAX_LOOKS = 16

_log = get_logger("generations")

Event = str | GenerateSummary | Exception


class Model(Protocol):
    """What LanguageModel is to the scheduler."""

    name: str
    context_tokens: int
    prefill_tokens: int
    max_cache_bytes: int
    token_bytes: int

    @property
    def rows(self) -> Rows:
        """What computes."""

    @property
    def needs_history(self) -> bool:
        """Whether process() looks at the tokens before."""

    def decode(self, token_ids: Sequence[int]) -> str:
        """The tokens' text."""

    def is_end(self, token_id: int) -> bool:
        """Whether the model ended its answer with it."""

    def process(self, histories: Sequence[Sequence[int]], scores: Any) -> Any:
        """The rows' scores as the model wants them changed by what stands before."""


@dataclass(slots=True, eq=False)
class _Row:
    """A generation, from the line to its end."""

    prompt: Prompt
    options: GenerateOptions
    end: int
    """Tokens of prompt and answer when it has to stop."""
    priority: Priority
    since_s: float
    deadline_s: float | None
    events: asyncio.Queue[Event]
    text: TextStream
    sampler: Sampler
    started_s: float = 0.0
    first_token_s: float = 0.0
    number: int = 0
    """The greater, the later it joined."""
    history: list[int] = field(default_factory=list)
    """The last token alone, or all, where the model looks at them."""
    tokens: int = 0
    held_bytes: int = 0
    # Set by the caller's thread, read before each step by the model's.
    left: threading.Event = field(default_factory=threading.Event)


class Generations:
    """One thread that steps, and the bounded line before it. stream() and look() belong to one event loop.

    `on_failure` is told, in the thread, what the model raised; `on_stuck`, on the loop and once, that reading and stepping have
    taken longer than `stuck_after_s`: nothing can end such a thread, so its callers are told and it is for the owner to give up.
    """

    def __init__(
        self,
        model: Model,
        *,
        max_running: int,
        max_queued: int,
        max_bytes: int = 1 << 30,
        ageing_ms: float = 500.0,
        begin_thread: Callable[[], None] = lambda: None,
        on_failure: Callable[[Exception], object] = lambda _: None,
        stuck_after_s: float = 600.0,
        on_stuck: Callable[[str], object] = lambda _: None,
    ) -> None:
        self._max_bytes = max_bytes
        self._held_bytes = 0
        self._stuck_after_s = stuck_after_s
        self._on_stuck = on_stuck
        self._watcher: asyncio.Task[None] | None = None
        self._model = model
        self._name = model.name
        self._max_running = max_running
        self._max_queued = max_queued
        self._begin_thread = begin_thread
        self._on_failure = on_failure
        self._line: Line[_Row] = Line(ageing_ms / 1000)
        self._looks: deque[Prompt] = deque(maxlen=_MAX_LOOKS)
        self._looking: Reading | None = None
        self._reading: tuple[_Row, Reading] | None = None
        self._rows: list[_Row] = []
        self._joined = 0
        self._outbox: list[tuple[_Row, Event]] = []
        self._changed = threading.Condition()
        self._stopping = False
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._whole_s = FIRST_GUESS_S
        self._busy_s = 0.0
        self._busy_since_s: float | None = None
        self._count_tokens = metrics.GENERATED_TOKENS.labels(self._name)
        self._count_pieces = metrics.GENERATED_PIECES.labels(self._name)
        self._first_token_s = metrics.FIRST_TOKEN_SECONDS.labels(self._name)
        self._step_s = metrics.STEP_SECONDS.labels(self._name)
        self._step_rows = metrics.STEP_ROWS.labels(self._name)
        self._running_rows = metrics.RUNNING_GENERATIONS.labels(self._name)

    # ---- for the callers, on their loop

    def start(self) -> None:
        """Starts the thread."""
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._run, name=f"model {self._name}", daemon=True)
        self._thread.start()
        self._watcher = asyncio.create_task(self._watch())

    async def stop(self) -> None:
        """Ends what runs after its current token; refuses what waits. A thread that is stuck is left to itself."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        if self._watcher is not None and self._thread is not None:
            was_stuck = self._watcher.done()
            self._watcher.cancel()
            if not was_stuck:
                await asyncio.to_thread(self._thread.join)

    @property
    def queued(self) -> int:
        """Generations that wait."""
        return len(self._line)

    @property
    def busy_seconds(self) -> float:
        """Seconds in which the model computed, since the start."""
        since_s = self._busy_since_s
        return self._busy_s + (0.0 if since_s is None else time.perf_counter() - since_s)

    def check_room(self, priority: Priority = Priority.STANDARD) -> None:
        """Raises QueueFull when no more of this priority may wait; asked before pictures are decoded, and in stream()."""
        limit = math.ceil(self._max_queued * SHARES[priority])
        waiting = len(self._line)
        if waiting >= limit:
            raise QueueFull(
                what="generations",
                waiting=waiting,
                limit=limit,
                retry_after_s=self._whole_s * (1 + waiting / self._max_running),
            )

    def look(self, prompt: Prompt) -> None:
        """Has a prompt's pictures read when there is time, so that they are at hand; a hint: the oldest of many is dropped."""
        with self._changed:
            self._looks.append(prompt)
            self._changed.notify()

    async def stream(
        self,
        prompt: Prompt,
        options: GenerateOptions,
        *,
        priority: Priority = Priority.STANDARD,
        deadline_s: float | None = None,
        since_s: float | None = None,
    ) -> AsyncGenerator[str | GenerateSummary, None]:
        """Pieces of text as they come, at last the summary. Times are `time.perf_counter()`'s.

        Closing the iterator (or cancelling the caller) ends the generation before its next token. Raises QueueFull,
        AnswerTooLong, MemoryRanOut, DeadlinePassed, Draining, Fault.
        """
        self.check_room(priority)
        if self._loop is None or self._stopping:
            raise Draining()
        row = self._row(prompt, options, priority, deadline_s, since_s)
        del prompt  # the row has it, and lets go of it once it has been read
        self._hold(row)
        with self._changed:
            self._line.add(row, priority, time.perf_counter())
            self._changed.notify()
        try:
            while True:
                event = await self._next_event(row)
                if isinstance(event, Exception):
                    raise event
                yield event
                if isinstance(event, GenerateSummary):
                    return
        finally:
            row.left.set()
            self._release(row)
            with self._changed:
                if not row.started_s:
                    self._line.remove(row)
                    self._count_end(row, "cancelled")
                self._changed.notify()

    def _row(
        self,
        prompt: Prompt,
        options: GenerateOptions,
        priority: Priority,
        deadline_s: float | None,
        since_s: float | None,
    ) -> _Row:
        model = self._model
        end = min(prompt.prompt_tokens + options.max_new_tokens, model.context_tokens)
        if not model.rows.fits([end]):
            raise AnswerTooLong(
                prompt.prompt_tokens, options.max_new_tokens, model.max_cache_bytes // max(1, model.token_bytes)
            )
        ids = prompt.inputs["input_ids"][0].tolist()
        return _Row(
            prompt=prompt,
            options=options,
            end=end,
            priority=priority,
            since_s=time.perf_counter() if since_s is None else since_s,
            deadline_s=deadline_s,
            events=asyncio.Queue(),
            text=TextStream(model.decode, options.stop),
            sampler=Sampler(temperature=options.temperature, top_p=options.top_p, seed=options.seed),
            history=ids if model.needs_history else ids[-1:],
        )

    def _hold(self, row: _Row) -> None:
        """Counts a prompt that is not read yet: its pictures' pixels may take hundreds of megabytes. Raises QueueFull."""
        size_bytes = row.prompt.size_bytes
        with self._changed:
            if self._held_bytes and self._held_bytes + size_bytes > self._max_bytes:
                raise QueueFull(
                    what="bytes of prompts",
                    waiting=self._held_bytes,
                    limit=self._max_bytes,
                    retry_after_s=self._whole_s,
                )
            self._held_bytes += size_bytes
            row.held_bytes = size_bytes

    def _release(self, row: _Row) -> None:
        with self._changed:
            self._held_bytes -= row.held_bytes
            row.held_bytes = 0

    @staticmethod
    async def _next_event(row: _Row) -> Event:
        """What the model's thread tells, or that the deadline has passed: it is kept also while the thread is busy."""
        if row.deadline_s is None:
            return await row.events.get()
        try:
            async with asyncio.timeout(max(0.0, row.deadline_s - time.perf_counter())):
                return await row.events.get()
        except TimeoutError:
            return DeadlinePassed((time.perf_counter() - row.since_s) * 1000)

    async def _watch(self) -> None:
        """Waits for the thread to be stuck, and gives up on it then."""
        # ASYNC110: a thread that is stuck sets no event.
        while (since_s := self._busy_since_s) is None or time.perf_counter() - since_s < self._stuck_after_s:  # noqa: ASYNC110
            await asyncio.sleep(min(1.0, self._stuck_after_s / 10))
        why = f"a step has computed for {self._stuck_after_s:g} s"
        _log.error("a describer is stuck and given up", model=self._name, after_s=self._stuck_after_s)
        self._stopping = True  # whoever comes is refused
        error = ExecutorStuck(self._name, self._stuck_after_s)
        reading = (self._reading[0],) if self._reading else ()
        _put([(row, error) for row in (*self._rows, *reading, *self._line)])
        self._on_stuck(why)

    # ---- the model's thread

    def _run(self) -> None:
        self._begin_thread()
        while self._wait():
            self._busy_since_s = began_s = time.perf_counter()
            try:
                self._let_go()
                self._read()
                if self._rows:
                    self._step()
            except Exception as error:  # of our own, or the device's: nobody may wait for ever because of it
                for row in tuple(self._rows):
                    self._leave(row)
                    self._fail(row, error)
            self._busy_since_s = None
            self._busy_s += time.perf_counter() - began_s
            self._deliver()
        with self._changed:
            rest = [*self._rows, *self._line, *([self._reading[0]] if self._reading else [])]
        for row in rest:
            self._tell(row, Draining())
        self._deliver()

    def _wait(self) -> bool:
        """Until there is something to do; False: it is time to stop."""
        with self._changed:
            while not (
                self._stopping or self._rows or self._reading or self._looking or self._looks or len(self._line)
            ):
                self._changed.wait()
            return not self._stopping

    def _let_go(self) -> None:
        """Frees the places of those who have left (the caller's own side tells who is late)."""
        if self._reading is not None and self._reading[0].left.is_set():
            row, _ = self._reading
            self._reading = None
            self._count_end(row, "cancelled")
        for row in tuple(self._rows):
            if row.left.is_set():
                self._leave(row, "cancelled")

    def _read(self) -> None:
        """Prompts, then pictures looked at ahead, up to `prefill_tokens`: running rows wait no longer than that takes."""
        left_tokens = self._model.prefill_tokens
        while left_tokens > 0:
            if self._reading is None and not self._begin_reading():
                break
            assert self._reading is not None
            row, reading = self._reading
            if row.left.is_set():
                return  # _let_go() takes it
            try:
                left_tokens -= max(1, reading.advance())
                if reading.done:
                    self._model.rows.join(row.prompt, reading, row.end)
            except Exception as error:
                self._reading = None
                self._fail(row, error)
                continue
            if reading.done:
                self._reading = None
                row.prompt = row.prompt.without_tensors()
                self._release(row)
                self._joined += 1
                row.number = self._joined
                self._rows.append(row)
        while left_tokens > 0 and (looking := self._next_look()) is not None:
            try:
                left_tokens -= max(1, looking.advance())
            except Exception as error:  # a hint: who asks with this picture will be told
                _log.warning("a picture could not be looked at ahead", model=self._name, exc_info=error)
                self._looking = None
        self._running_rows.set(len(self._rows))

    def _begin_reading(self) -> bool:
        """Takes the next one from the line, if there is a place for it and room for its whole answer."""
        with self._changed:
            row = self._line.head()
            if row is None or len(self._rows) >= self._max_running:
                return False
            if not self._model.rows.fits([*(other.end for other in self._rows), row.end]):
                return False  # and nobody passes it by: a long one would wait for ever
            self._line.remove(row)
            row.started_s = time.perf_counter()
        self._reading = (row, self._model.rows.read(row.prompt))
        return True

    def _next_look(self) -> Reading | None:
        if self._looking is None or self._looking.done:
            with self._changed:
                self._looking = self._model.rows.look(self._looks.popleft()) if self._looks else None
        return self._looking

    def _step(self) -> None:
        """One token for each row. When the pass fails, the newest row fails alone and the others step again."""
        began_s = time.perf_counter()
        while True:
            try:
                scores = self._model.rows.step([row.history[-1] for row in self._rows])
                break
            except Exception as error:
                newest = max(self._rows, key=lambda row: row.number)
                self._leave(newest)
                self._fail(newest, error)
                if not self._rows:
                    return
        rows = tuple(self._rows)
        if self._model.needs_history:
            scores = self._model.process([row.history for row in rows], scores)
        tokens = choose(scores, [row.sampler for row in rows])
        self._step_s.observe(time.perf_counter() - began_s)
        self._step_rows.observe(len(rows))
        for row, token in zip(rows, tokens, strict=True):
            if isinstance(token, NotNumbers):
                self._leave(row)
                self._fail(row, token)
            else:
                self._take(row, token)

    def _take(self, row: _Row, token: int) -> None:
        """A row's next token: on to its text, or its end."""
        row.tokens += 1
        self._count_tokens.inc()
        if row.tokens == 1:
            row.first_token_s = time.perf_counter()
            self._first_token_s.observe(row.first_token_s - row.since_s)
        if self._model.needs_history:
            row.history.append(token)
        else:
            row.history[0] = token
        ended = self._model.is_end(token)
        if not ended:
            self._tell_text(row, row.text.put(token))
            if not row.text.stopped and row.prompt.prompt_tokens + row.tokens < row.end:
                return
        if not row.text.stopped:
            # A stop text may lie in what was held back, so the reason is asked after end().
            self._tell_text(row, row.text.end())
        self._finish(row, FinishReason.STOP if ended or row.text.stopped else FinishReason.LENGTH)

    def _finish(self, row: _Row, reason: FinishReason) -> None:
        now_s = time.perf_counter()
        self._whole_s += SMOOTHING * (now_s - row.started_s - self._whole_s)
        summary = GenerateSummary(
            text=row.text.text,
            finish_reason=reason,
            usage=Usage(row.prompt.prompt_tokens, row.prompt.image_tokens, row.tokens),
            timings=GenerateTimings(
                queue_ms=(row.started_s - row.since_s) * 1000,
                time_to_first_token_ms=(row.first_token_s - row.since_s) * 1000,
                total_ms=(now_s - row.since_s) * 1000,
            ),
            model=self._name,
        )
        self._tell(row, summary)
        self._leave(row, reason.value.lower())

    def _fail(self, row: _Row, error: Exception) -> None:
        """Tells a caller what became of its generation. Memory that ran out says nothing about the device's health."""
        if is_out_of_memory(error):
            _log.warning("memory ran out for a generation", model=self._name, rows=len(self._rows))
            self._tell(row, MemoryRanOut(self._name, self._whole_s))
            _free_device_cache()
        else:
            _log.error("a generation failed", model=self._name, exc_info=error)
            self._on_failure(error)
            self._tell(row, Fault(f"The model {self._name!r}"))
        self._count_end(row, "error")
        error.__traceback__ = None  # it holds tensors

    def _leave(self, row: _Row, how: str = "") -> None:
        """Frees a row's place; the last row takes it, here as in the model's rows."""
        index = self._rows.index(row)
        try:
            self._model.rows.leave(index)
        except Exception as error:  # a lost device
            self._on_failure(error)
        self._rows[index] = self._rows[-1]
        self._rows.pop()
        self._running_rows.set(len(self._rows))
        if how:
            self._count_end(row, how)

    def _count_end(self, row: _Row, how: str) -> None:
        metrics.GENERATIONS.labels(self._name, how).inc()

    def _tell_text(self, row: _Row, piece: str) -> None:
        if piece:
            self._count_pieces.inc()
            self._tell(row, piece)

    def _tell(self, row: _Row, event: Event) -> None:
        self._outbox.append((row, event))

    def _deliver(self) -> None:
        """Hands over what a step gave, all at once: each call wakes the loop."""
        if not self._outbox:
            return
        outbox, self._outbox = self._outbox, []
        assert self._loop is not None
        with suppress(RuntimeError):  # the loop is closed: nobody listens any more
            self._loop.call_soon_threadsafe(_put, outbox)


def _put(outbox: Sequence[tuple[_Row, Event]]) -> None:
    for row, event in outbox:
        row.events.put_nowait(event)


def is_out_of_memory(error: Exception) -> bool:
    """CUDA has a class for it; torch's CPU allocator only words ("DefaultCPUAllocator: can't allocate memory")."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error))
    )


def _free_device_cache() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()
