"""A describer that another server runs: its generations wait here, are asked there, and stream through.

    stream() ──► line, by priority ──► the peer ──► events ──► whole grapheme clusters ──► the caller
                   │ left, expired: gone at once     │ left, expired: the connection is closed, at which the peer stops

While it serves, its peer is looked at every few seconds. Once that is away `on_away` is told and this describer is done for; its
owner connects anew, and puts another in its place.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, suppress
from dataclasses import dataclass

from vision_server.admission import SHARES
from vision_server.describers.addresses import ELSEWHERE
from vision_server.describers.connecting import choose
from vision_server.describers.describer import Describer, PicturedTurn
from vision_server.describers.peer import AnswerEvent, Peer, PeerAway, PeerError, PeerUnreadable
from vision_server.describers.peer_errors import is_doubtful, told
from vision_server.describers.remote_messages import write_body, write_messages
from vision_server.describers.text_stream import TextStream
from vision_server.errors import DeadlinePassed, Draining, QueueFull
from vision_server.images import Image
from vision_server.line import Line
from vision_server.metrics import (
    FIRST_TOKEN_SECONDS,
    GENERATED_PIECES,
    GENERATED_TOKENS,
    GENERATIONS,
    RUNNING_GENERATIONS,
)
from vision_server.requests import GenerateOptions, Priority
from vision_server.results import Card, FinishReason, GenerateSummary, GenerateTimings, Task, Usage

_LOOK_EVERY_S = 10.0
# One look that fails may be a server busy with something large; two in a row mean it.
_LOOK_AGAIN_S = 1.0
_SMOOTHING = 0.2
_FIRST_GUESS_S = 1.0
_LENGTH = "length"
# What vLLM and SGLang say of an answer that was given up on their side: it is not whole.
_GIVEN_UP = ("abort", "error")
# Long words of one token have some twenty characters; a peer that sends far more has not heeded `max_tokens`.
_MAX_CHARS_A_TOKEN = 128


@dataclass(slots=True, eq=False)
class _Generation:
    """A caller's, from the line to its end."""

    priority: Priority
    since_s: float
    deadline_s: float | None
    place: asyncio.Future[None]
    """Done when it may begin."""
    started_s: float = 0.0


class RemoteDescriber(Describer[bytes]):
    """One model of a peer: at most `max_running` generations are asked of it at once, `max_queued` wait here.

    Together they hold at most `max_bytes` of conversations, most of it pictures.
    """

    def __init__(
        self,
        name: str,
        model: str,
        peer: Peer,
        *,
        max_running: int,
        max_queued: int,
        max_bytes: int,
        ageing_ms: float,
        threads: int,
        on_away: Callable[[str], object] = lambda _: None,
    ) -> None:
        super().__init__(
            name,
            Card(
                version=model,
                task=Task.GENERATE,
                engine="openai",
                precision="",
                device=ELSEWHERE,
                labels=(),
                input_size_px=0,
                memory_bytes=0,
            ),
        )
        self._model = model
        self._peer = peer
        self._max_running = max_running
        self._max_queued = max_queued
        self._max_bytes = max_bytes
        self._size_bytes = 0
        self._on_away = on_away
        self._line: Line[_Generation] = Line(ageing_ms / 1000)
        self._running: set[_Generation] = set()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix=f"prepare {name}")
        self._stopping = False
        self._doubt = asyncio.Event()
        self._looking: asyncio.Task[None] | None = None
        self._whole_s = _FIRST_GUESS_S

    def start(self) -> None:
        """Begins to look at the peer."""
        self._looking = asyncio.create_task(self._look_until_away(), name=f"look at {self._peer.url}")

    async def stop(self) -> None:
        """See Describer."""
        self._stopping = True
        if self._looking is not None:
            self._looking.cancel()
        for waiting in tuple(self._line):
            self._line.remove(waiting)
            if not waiting.place.done():
                waiting.place.set_exception(Draining())
        self._pool.shutdown(wait=False, cancel_futures=True)
        await self._peer.close()  # which ends what runs

    def check_room(self, priority: Priority) -> None:
        """See Describer."""
        limit = math.ceil(self._max_queued * SHARES[priority])
        waiting = len(self._line)
        if waiting >= limit:
            raise QueueFull(what="generations", waiting=waiting, limit=limit, retry_after_s=self._retry_after_s)

    async def look(self, image: Image) -> None:
        """Nothing: a picture goes to the peer with its question."""

    async def prepare(self, turns: Sequence[PicturedTurn]) -> bytes:
        """The conversation as JSON. Raises InvalidField."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, write_messages, turns)

    @property
    def queued(self) -> int:
        """See Describer."""
        return len(self._line)

    @property
    def busy_seconds(self) -> float:
        """0: the computing is elsewhere."""
        return 0.0

    @property
    def _retry_after_s(self) -> float:
        return self._whole_s * (1 + len(self._line) / self._max_running)

    async def stream(
        self,
        prompt: bytes,
        options: GenerateOptions,
        *,
        priority: Priority = Priority.STANDARD,
        deadline_s: float | None = None,
        since_s: float | None = None,
    ) -> AsyncGenerator[str | GenerateSummary, None]:
        """See Describer. Raises ModelAway, PeerFull and InvalidField besides."""
        self.check_room(priority)
        if self._looking is None or self._stopping:
            raise Draining()
        if self._size_bytes and self._size_bytes + len(prompt) > self._max_bytes:
            raise QueueFull(
                what="bytes of conversations",
                waiting=self._size_bytes,
                limit=self._max_bytes,
                retry_after_s=self._retry_after_s,
            )
        place = asyncio.get_running_loop().create_future()
        generation = _Generation(priority, time.perf_counter() if since_s is None else since_s, deadline_s, place)
        self._size_bytes += len(prompt)
        try:
            await self._begin(generation)
            how = "cancelled"
            try:
                async with aclosing(self._generate(prompt, options, generation)) as pieces:
                    async for piece in pieces:
                        if isinstance(piece, GenerateSummary):
                            how = piece.finish_reason.value.lower()
                        yield piece
            except Exception:
                how = "error"
                raise
            finally:
                GENERATIONS.labels(self.name, how).inc()
        finally:
            self._size_bytes -= len(prompt)
            self._end(generation)

    async def _generate(
        self, prompt: bytes, options: GenerateOptions, generation: _Generation
    ) -> AsyncGenerator[str | GenerateSummary, None]:
        chunks: list[str] = []
        # What a token is to a model here, a piece is to the peer.
        text = TextStream(lambda numbers: "".join(chunks[number] for number in numbers), options.stop)
        left_chars = options.max_new_tokens * _MAX_CHARS_A_TOKEN
        reason, usage, first_s = "", None, 0.0
        body = write_body(prompt, self._model, options)
        headers = {"x-priority": generation.priority.name.lower()}  # another vision server heeds it
        async with aclosing(self._peer.answer(body, headers)) as events:
            while not text.stopped and (event := await self._next(events, generation)) is not None:
                reason, usage = event.finish_reason or reason, event.usage or usage
                if event.text:
                    if not chunks:
                        first_s = time.perf_counter()
                        FIRST_TOKEN_SECONDS.labels(self.name).observe(first_s - generation.since_s)
                    left_chars -= len(event.text)
                    if left_chars < 0:
                        raise self._told(PeerUnreadable(f"{self._peer.url} sends more than it was asked for"))
                    chunks.append(event.text)
                    GENERATED_TOKENS.labels(self.name).inc()
                    if piece := text.put(len(chunks) - 1):
                        GENERATED_PIECES.labels(self.name).inc()
                        yield piece
        if not text.stopped and (not reason or reason in _GIVEN_UP):
            raise self._told(PeerAway(f"{self._peer.url} gave up in the middle of an answer"))
        if piece := text.end():
            GENERATED_PIECES.labels(self.name).inc()
            yield piece
        # A peer that does not tell is taken to send a piece for each token.
        usage = usage or Usage(0, 0, len(chunks))
        GENERATED_TOKENS.labels(self.name).inc(max(0, usage.completion_tokens - len(chunks)))
        now_s = time.perf_counter()
        self._whole_s += _SMOOTHING * (now_s - generation.started_s - self._whole_s)
        yield GenerateSummary(
            text=text.text,
            finish_reason=FinishReason.LENGTH if reason == _LENGTH and not text.stopped else FinishReason.STOP,
            usage=usage,
            timings=GenerateTimings(
                queue_ms=(generation.started_s - generation.since_s) * 1000,
                time_to_first_token_ms=((first_s or now_s) - generation.since_s) * 1000,
                total_ms=(now_s - generation.since_s) * 1000,
            ),
            model=self.name,
        )

    async def _next(self, events: AsyncGenerator[AnswerEvent, None], generation: _Generation) -> AnswerEvent | None:
        """The peer's next event; None: there are no more. Raises ServiceError."""
        try:
            async with asyncio.timeout(_left_s(generation)):
                if self._stopping:
                    raise Draining()
                return await anext(events, None)
        except TimeoutError:
            raise _passed(generation) from None
        except PeerError as error:
            raise Draining() if self._stopping else self._told(error) from None

    def _told(self, error: PeerError) -> Exception:
        if is_doubtful(error):
            self._doubt.set()
        return told(self.name, error, self._retry_after_s)

    # ---- the line

    async def _begin(self, generation: _Generation) -> None:
        """Waits for a place. Raises DeadlinePassed, Draining."""
        self._line.add(generation, generation.priority, time.perf_counter())
        self._fill()
        try:
            async with asyncio.timeout(_left_s(generation)):
                await generation.place
        except TimeoutError:
            raise _passed(generation) from None
        generation.started_s = time.perf_counter()

    def _end(self, generation: _Generation) -> None:
        """Gives its place to the next one, wherever it was."""
        self._line.remove(generation)
        self._running.discard(generation)
        self._fill()

    def _fill(self) -> None:
        while len(self._running) < self._max_running and (head := self._line.head()) is not None:
            self._line.remove(head)
            self._running.add(head)
            if not head.place.done():  # else it has just left, and _end() comes
                head.place.set_result(None)
        RUNNING_GENERATIONS.labels(self.name).set(len(self._running))

    # ---- the peer

    async def _look_until_away(self) -> None:
        failed = False
        while True:
            if failed:
                await asyncio.sleep(_LOOK_AGAIN_S)
            else:
                with suppress(TimeoutError):
                    async with asyncio.timeout(_LOOK_EVERY_S):
                        await self._doubt.wait()
            self._doubt.clear()
            try:
                choose(self._peer.url, await self._peer.models(), self._model)
            except PeerError as error:
                if failed:
                    self._on_away(str(error))
                    return
                failed = True
            else:
                failed = False


def _left_s(generation: _Generation) -> float | None:
    """Seconds until its deadline; None: it has none."""
    return None if generation.deadline_s is None else max(0.0, generation.deadline_s - time.perf_counter())


def _passed(generation: _Generation) -> DeadlinePassed:
    return DeadlinePassed((time.perf_counter() - generation.since_s) * 1000)
