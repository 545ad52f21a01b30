"""What Dramatiq delivers: hints that a job may be begun, the interactive ones first.

The message of a job is `run_<priority>(job_id, dispatch_no)` on the queue `<priority>`. Messages are never sent from here: the
script that queues a job writes the message too, in Dramatiq's layout, so that neither exists without the other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import dramatiq
from dramatiq.brokers.redis import RedisBroker
from redis import Redis

from queue_server.jobs import Priority
from queue_server.keys import DRAMATIQ_NAMESPACE

# The broker's memory of workers that vanished; jobs do not depend on it (their lease is shorter), messages fetched ahead do.
HEARTBEAT_TIMEOUT_MS = 15_000
# In a million fetches: how often messages of vanished workers are looked for. The default, 1000, takes minutes.
MAINTENANCE_CHANCE = 100_000


class HintBroker(RedisBroker):
    """Dramatiq's Redis broker without delayed messages: delays and retries live in the job store, where a crash keeps them."""

    def declare_queue(self, queue_name: str) -> None:
        """Declares the queue alone; Dramatiq would add a second one for delays, with a thread that polls it."""
        if queue_name not in self.queues:
            self.emit_before("declare_queue", queue_name)
            self.queues.add(queue_name)
            self.emit_after("declare_queue", queue_name)


def build_broker(client: Redis) -> HintBroker:
    """A broker without middleware: time limits, retries, results are ours."""
    return HintBroker(  # type: ignore[no-untyped-call]
        client=client,
        namespace=DRAMATIQ_NAMESPACE,
        middleware=[],
        heartbeat_timeout=HEARTBEAT_TIMEOUT_MS,
        maintenance_chance=MAINTENANCE_CHANCE,
    )


def declare_actors(broker: HintBroker, run: Callable[[str, int], None]) -> None:
    """One actor for each priority; `run` must never raise: Dramatiq would drop the message all the same."""
    # A lower number goes first among the messages that a worker process holds.
    for rank, priority in enumerate(Priority):
        _declare(broker, run, priority, rank * 10)


def _declare(broker: HintBroker, run: Callable[[str, int], None], priority: Priority, rank: int) -> Any:
    def actor(job_id: str, dispatch_no: int) -> None:
        run(job_id, dispatch_no)

    # A variable, because dramatiq's overloads leave out the form with both a function and options.
    declare: Any = dramatiq.actor
    return declare(actor, actor_name=f"run_{priority.value}", queue_name=priority.value, priority=rank, broker=broker)
