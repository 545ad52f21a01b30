"""The threads that compute the batches of one device: mended when they break, given up when they break again.

    READY ─ a batch fails whole, or is stuck ─► MENDING: what still runs ends, the executor is rebuilt ─► READY
      └──── again before one has worked, or stuck a second time ever ──► OUT ◄── that fails or takes too long ─┘

A device that is not READY takes no batches; what waits for it waits on.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum, auto
from functools import partial
from queue import SimpleQueue
from typing import Generic, TypeVar

from serving.logs import get_logger
from vision_server.errors import ExecutorStuck, Fault

Item = TypeVar("Item")
Result = TypeVar("Result")
T = TypeVar("T")

_log = get_logger("lanes")

# How fast the guess at an item's time follows what is measured.
_LEARNING_RATE = 0.2


@dataclass(frozen=True)
class Replica(Generic[Item, Result]):
    """An executor on one device; `name` is the device: `cpu`, `cuda:0`.

    `execute` takes items and answers as many outcomes in their order: a result, or the exception that is that item's own. It
    is called from `lanes` threads side by side, each of which calls `begin_thread` first. `rebuild` makes the executor anew
    (and had better try it out: raising says that it is of no use); a stuck thread may still hold the old one. All block.
    """

    name: str
    execute: Callable[[Sequence[Item]], Sequence[Result | Exception]]
    lanes: int = 1
    begin_thread: Callable[[], None] = lambda: None
    rebuild: Callable[[], None] | None = None


@dataclass(frozen=True, slots=True)
class Computed(Generic[Result]):
    """What became of a batch. Moments are of time.perf_counter().

    `error` is what the executor first raised as a whole; `worked` whether it answered for any of the items even so.
    """

    outcomes: Sequence[Result | Exception]
    began_s: float
    took_s: float
    error: Exception | None = None
    worked: bool = True


def compute(
    model: str, execute: Callable[[Sequence[Item]], Sequence[Result | Exception]], items: Sequence[Item]
) -> Computed[Result]:
    """Executes a batch; one that raises is tried again in halves, down to single items.

    So an item that the executor cannot bear fails alone, and a batch too large for the memory is computed all the same. An
    executor that is broken costs one more try for each item, and raises in each.
    """
    began_s = time.perf_counter()
    outcomes: list[Result | Exception] = []
    first_error: Exception | None = None
    worked = False
    parts = [items]
    while parts:
        part = parts.pop()
        error: Exception | None = None
        try:
            answered = execute(part)
            if len(answered) != len(part):
                raise RuntimeError(f"the executor answered {len(answered)} outcomes for {len(part)} items")
        except BaseException as raised:  # Rust's panics are no Exceptions, and a thread has nobody to pass them on to
            if first_error is None:
                then = "fails" if len(items) == 1 else "is tried again in halves"
                _log.error(f"a batch raised and {then}", model=model, batch_size=len(items), exc_info=True)
            error = raised if isinstance(raised, Exception) else RuntimeError(repr(raised))
            # The traceback holds the failed try's tensors: with them alive the halves would run out of memory too.
            error.__traceback__ = error.__cause__ = error.__context__ = None
        if error is None:
            outcomes.extend(answered)
            worked = True
            continue
        if first_error is None:
            first_error = error
        if len(part) == 1:
            outcomes.append(Fault(model))
        else:
            middle = len(part) // 2
            parts += [part[middle:], part[:middle]]
    return Computed(outcomes, began_s, time.perf_counter() - began_s, first_error, worked)


class Lane:
    """A daemon thread that does blocking work for the event loop, one piece after another.

    Not a ThreadPoolExecutor: the interpreter joins its threads at exit, and one that is stuck in a driver never ends.
    """

    def __init__(self, name: str, begin_thread: Callable[[], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._begin_thread = begin_thread
        self._work: SimpleQueue[tuple[Callable[[], object], Callable[..., object]] | None] = SimpleQueue()
        threading.Thread(target=self._serve, name=name, daemon=True).start()

    def run(self, work: Callable[[], T], then: Callable[[T | Exception], object]) -> None:
        """Does `work`; `then` is called on the loop with what it returned, or raised."""
        self._work.put((work, then))

    def end(self) -> None:
        """Lets the thread end once it has nothing to do."""
        self._work.put(None)

    def _serve(self) -> None:
        begun: object = self._try(self._begin_thread)
        while (job := self._work.get()) is not None:
            work, then = job
            outcome = begun if isinstance(begun, Exception) else self._try(work)
            with suppress(RuntimeError):  # the loop has closed: nobody waits any more
                self._loop.call_soon_threadsafe(then, outcome)
            del job, work, then, outcome  # an idle thread keeps no images

    @staticmethod
    def _try(work: Callable[[], T]) -> T | Exception:
        try:
            return work()
        except BaseException as error:
            return error if isinstance(error, Exception) else RuntimeError(repr(error))


class _State(Enum):
    READY = auto()
    MENDING = auto()
    OUT = auto()


@dataclass(eq=False, slots=True)
class _Batch(Generic[Result]):
    size: int
    then: Callable[[Computed[Result]], object]
    began_s: float = field(default_factory=time.perf_counter)
    age_s: float = 0.0


class Lanes(Generic[Item, Result]):
    """The lanes of one replica. Lives on one event loop; start() and end() act.

    All on that loop: `on_free` is called when a batch could be taken again, `on_failure` with what an executor raised as a
    whole, `on_out` with the reason when the replica is of no use any more.
    """

    def __init__(
        self,
        model: str,
        replica: Replica[Item, Result],
        *,
        stuck_after_s: float,
        rebuild_within_s: float,
        on_free: Callable[[], object],
        on_failure: Callable[[Exception], object],
        on_out: Callable[[str], object],
    ) -> None:
        self._model = model
        self._replica = replica
        self._stuck_after_s = stuck_after_s
        self._rebuild_within_s = rebuild_within_s
        self._on_free = on_free
        self._on_failure = on_failure
        self._on_out = on_out
        self._state = _State.READY
        self._idle: list[Lane] = []
        self._busy: dict[Lane, _Batch[Result]] = {}
        self._rebuilding_s: float | None = None  # for how long; None: not
        self._broke_s = 0.0  # when it last failed or was stuck
        self._was_stuck = False  # ever: each time costs a thread and what it holds, which never come back
        self._busy_s = 0.0
        self.unproven = False
        """Whether it broke and no batch has worked since."""
        self.item_s = 0.0
        """Seconds that an item takes in a batch, as the last ones did; 0: not known yet."""

    def start(self) -> None:
        """Starts the threads."""
        self._idle = [self._new_lane() for _ in range(self._replica.lanes)]

    def end(self) -> None:
        """Lets the threads end."""
        for lane in (*self._idle, *self._busy):
            lane.end()
        self._state = _State.OUT

    @property
    def device(self) -> str:
        """The replica's name."""
        return self._replica.name

    @property
    def lane_count(self) -> int:
        """Batches that can be computed side by side."""
        return self._replica.lanes

    @property
    def free(self) -> int:
        """Batches that it could take now."""
        return len(self._idle) if self._state is _State.READY else 0

    @property
    def computing(self) -> int:
        """Batches that it computes now."""
        return len(self._busy)

    @property
    def out(self) -> bool:
        """Whether it is of no use any more."""
        return self._state is _State.OUT

    @property
    def busy_s(self) -> float:
        """Seconds in which its lanes had a batch to compute, averaged over them; never falls, batches of now count."""
        now_s = time.perf_counter()
        running_s = sum(now_s - batch.began_s for batch in tuple(self._busy.values()))
        return (self._busy_s + running_s) / self._replica.lanes

    def run(self, items: Sequence[Item], then: Callable[[Computed[Result]], object]) -> None:
        """Computes a batch in a free lane; `then` is called once, whatever happens."""
        lane = self._idle.pop()
        self._busy[lane] = batch = _Batch(len(items), then)
        lane.run(partial(compute, self._model, self._replica.execute, items), partial(self._finished, lane, batch))

    def tick(self, passed_s: float) -> None:
        """Tells it that time has passed, to notice what is stuck.

        Told, not read from a clock: while the whole process is stopped (SIGSTOP, a frozen machine), nothing grows old.
        """
        for lane, batch in tuple(self._busy.items()):
            batch.age_s += passed_s
            if batch.age_s > self._stuck_after_s:
                self._give_up(lane, batch)
        if self._rebuilding_s is not None:
            self._rebuilding_s += passed_s
            if self._rebuilding_s > self._rebuild_within_s:
                self._leave(f"its executor could not be rebuilt within {self._rebuild_within_s:g} s")

    def _new_lane(self) -> Lane:
        return Lane(f"{self._model} {self._replica.name}", self._replica.begin_thread)

    def _finished(self, lane: Lane, batch: _Batch[Result], outcome: Computed[Result] | Exception) -> None:
        if self._busy.pop(lane, None) is None:
            _log.warning("a batch that was given up has ended after all", model=self._model, device=self._replica.name)
            return
        self._idle.append(lane)
        if isinstance(outcome, Exception):  # the thread could not even begin
            _log.error("a thread cannot begin", model=self._model, device=self._replica.name, exc_info=outcome)
            faults = [Fault(self._model) for _ in range(batch.size)]
            outcome = Computed(faults, batch.began_s, 0.0, outcome, worked=False)
        self._busy_s += time.perf_counter() - batch.began_s
        if outcome.worked:
            item_s = outcome.took_s / batch.size
            self.item_s = self.item_s + _LEARNING_RATE * (item_s - self.item_s) if self.item_s else item_s
        if outcome.error is not None:
            self._on_failure(outcome.error)
        if batch.began_s <= self._broke_s:
            # Begun before the executor broke: whatever became of it says nothing of the new one.
            self._rebuild_when_quiet()
        elif outcome.worked:
            self.unproven = False
        else:
            self._break(f"two batches in a row failed, the last by {outcome.error!r}", again=self.unproven)
        self._on_free()  # before the answers: the device computes while they are written
        batch.then(outcome)

    def _give_up(self, lane: Lane, batch: _Batch[Result]) -> None:
        """Leaves a stuck thread to itself, which nothing can end, and puts another in its place."""
        _log.error(
            "a batch is stuck and given up",
            model=self._model,
            device=self._replica.name,
            batch_size=batch.size,
            after_s=self._stuck_after_s,
        )
        del self._busy[lane]
        lane.end()
        self._busy_s += time.perf_counter() - batch.began_s
        self._idle.append(self._new_lane())
        again, self._was_stuck = self._was_stuck or self.unproven, True
        if batch.began_s <= self._broke_s:
            self._rebuild_when_quiet()
        else:
            self._break(f"it broke again: a batch was stuck for {self._stuck_after_s:g} s", again=again)
        self._on_free()
        stuck = [ExecutorStuck(self._model, self._stuck_after_s) for _ in range(batch.size)]
        batch.then(Computed(stuck, batch.began_s, batch.age_s, worked=False))

    def _break(self, why: str, *, again: bool) -> None:
        self._broke_s = time.perf_counter()
        if again:
            self._leave(why)
            return
        self.unproven = True
        if self._replica.rebuild is not None:
            self._state = _State.MENDING
            self._rebuild_when_quiet()

    def _rebuild_when_quiet(self) -> None:
        """Rebuilds once the replica's other batches have ended, so that two executors need not fit side by side."""
        if self._state is not _State.MENDING or self._busy or self._rebuilding_s is not None:
            return
        assert self._replica.rebuild is not None, "only what can be rebuilt is mended"
        _log.warning("rebuilding an executor", model=self._model, device=self._replica.name)
        self._rebuilding_s = 0.0
        self._idle[-1].run(self._replica.rebuild, self._rebuilt)

    def _rebuilt(self, outcome: object) -> None:
        self._rebuilding_s = None
        if self._state is not _State.MENDING:
            return  # given up meanwhile
        if isinstance(outcome, Exception):
            _log.error("an executor cannot be rebuilt", model=self._model, device=self._replica.name, exc_info=outcome)
            self._on_failure(outcome)
            self._leave(f"its executor could not be rebuilt ({outcome!r})")
            return
        _log.info("an executor is rebuilt", model=self._model, device=self._replica.name)
        self._state = _State.READY
        self._on_free()

    def _leave(self, why: str) -> None:
        self._rebuilding_s = None
        self.end()
        _log.error("a device is out", model=self._model, device=self._replica.name, why=why)
        self._on_out(f"{self._replica.name}: {why}")
