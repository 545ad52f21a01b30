"""When what is killed or paused in a chaos run, and the thread that does it."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.chaos_stack import Stack, Supervised

KILLED = ("worker", "vision", "queue", "redis")
# A paused worker comes back this long after its lease has ended.
PAST_LEASE_S = (0.5, 2.5)
ALIVE_S = 10.0
# For so long a worker that is at work is looked for, to be paused in the middle of it.
AT_WORK_S = 3.0


@dataclass(frozen=True)
class Moment:
    """`at_s` after the beginning: kill -9 of `whom`, or SIGSTOP for `pause_s` beyond the lease."""

    at_s: float
    whom: str
    which: int = 0
    pause_s: float | None = None


def moments(seed: int, seconds: float, *, kills: int, pauses: int, workers: int) -> list[Moment]:
    """So many kills of each of KILLED and pauses of workers, at random times of a seeded generator."""
    numbers = random.Random(seed)
    found = [
        Moment(numbers.uniform(0, seconds), whom, numbers.randrange(workers)) for whom in KILLED for _ in range(kills)
    ]
    found += [
        Moment(numbers.uniform(0, seconds), "worker", numbers.randrange(workers), numbers.uniform(*PAST_LEASE_S))
        for _ in range(pauses)
    ]
    return sorted(found, key=lambda moment: moment.at_s)


class Chaos:
    """Makes the moments happen; start() begins, join() returns after the last one."""

    def __init__(self, stack: Stack, plan: Sequence[Moment], *, power_loss: bool = False) -> None:
        self._stack = stack
        self._plan = plan
        self._power_loss = power_loss
        self._thread = threading.Thread(target=self._run, name="chaos", daemon=True)
        self._ended = threading.Event()
        self._resuming: list[threading.Timer] = []
        self.done: Counter[str] = Counter()
        """Kills by whom, and `pause`."""
        self.last_s = 0.0
        """When the last of it was over, by time.monotonic()."""

    def start(self) -> None:
        """The first moment is counted from now."""
        self._thread.start()

    def join(self) -> None:
        """Until all is over, paused workers included."""
        self._thread.join()
        for timer in self._resuming:
            timer.join()
        self.last_s = max(self.last_s, time.monotonic())

    def stop(self) -> None:
        """No more of it."""
        self._ended.set()
        self._thread.join()
        for timer in self._resuming:
            timer.join()

    def _run(self) -> None:
        began_s = time.monotonic()
        for moment in self._plan:
            if self._ended.wait(max(0.0, began_s + moment.at_s - time.monotonic())):
                return
            if moment.pause_s is not None:
                self._pause(moment, moment.pause_s)
            elif self._kill(moment, self._target(moment)):
                self.done[moment.whom] += 1

    def _pause(self, moment: Moment, pause_s: float) -> None:
        """Pauses a worker with a job in hand if there is one within some time: that is what a fence is for."""
        until_s = time.monotonic() + AT_WORK_S
        while not (busy := self._stack.workers_at_work()) and time.monotonic() < until_s:
            time.sleep(0.05)
        target = busy[moment.which % len(busy)] if busy else self._target(moment)
        if target.pause():
            self.done["pause"] += 1
            timer = threading.Timer(self._stack.lease_s + pause_s, target.resume)
            timer.start()
            self._resuming.append(timer)

    def _kill(self, moment: Moment, target: Supervised) -> bool:
        """Kills it, once there is something to kill."""
        until_s = time.monotonic() + ALIVE_S
        while time.monotonic() < until_s:
            if target.is_alive:
                if self._power_loss and moment.whom == "redis":
                    self._stack.power.next_start_is_after_power_loss()
                return target.kill()
            time.sleep(0.02)
        return False

    def _target(self, moment: Moment) -> Supervised:
        stack = self._stack
        if moment.whom == "worker":
            return stack.workers[moment.which % len(stack.workers)]
        return {"vision": stack.vision, "queue": stack.queue, "redis": stack.redis}[moment.whom]
