"""What Dramatiq delivers: hints that a job may be begun, the interactive ones first.

A message is `run(job_id, dispatch_no)`. Messages are never sent from here: the script that queues a job writes the message too,
in Dramatiq's layout, so that neither exists without the other. There is one list for each priority; a worker's one consumer
asks them in order, and only for as many messages as the worker has idle threads. (With Dramatiq's own consumers, one for each
queue, a worker holds messages of every priority ahead, and begins a batch job while an interactive one waits.)
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import dramatiq
import redis
from dramatiq.broker import Consumer, MessageProxy
from dramatiq.brokers.redis import RedisBroker
from dramatiq.common import compute_backoff
from dramatiq.errors import ConnectionClosed
from dramatiq.message import Message

from queue_server.jobs import Priority
from queue_server.keys import DRAMATIQ_NAMESPACE, dramatiq_list, dramatiq_messages
from serving.logs import get_logger

QUEUE = "jobs"
"""The one queue that Dramatiq knows of; its messages lie in the lists `{vq}:d:<priority>`."""

# The broker's memory of workers that vanished; jobs do not depend on it (their lease tells), messages in hand do.
HEARTBEAT_TIMEOUT_MS = 15_000
# In a million fetches: how often messages of vanished workers are looked for. The default, 1000, takes minutes.
MAINTENANCE_CHANCE = 100_000
# One fetch in so many begins with standard jobs, one in twice as many with batch jobs: urgent ones do not starve them.
OTHERS_TURN = 8
# An idle worker asks Dramatiq's script this often: it notes who lives, and now and then looks for those that do not.
BEAT_S = 5.0
# While Redis is away it is asked this often.
AWAY_S = 0.25

_log = get_logger("actors")


class HintBroker(RedisBroker):
    """Dramatiq's Redis broker with one consumer for all priorities, and without delayed messages.

    Delays and retries live in the job store, where a crash keeps them.
    """

    def declare_queue(self, queue_name: str) -> None:
        """Declares the queue alone; Dramatiq would add a second one for delays, with a thread that polls it."""
        if queue_name not in self.queues:
            self.emit_before("declare_queue", queue_name)
            self.queues.add(queue_name)
            self.emit_after("declare_queue", queue_name)

    def consume(self, queue_name: str, prefetch: int = 1, timeout: int = 5000) -> HintConsumer:
        """The consumer of a worker; `timeout`: it asks at least this often, in milliseconds."""
        return HintConsumer(self, prefetch, timeout)


class HintConsumer(Consumer):
    """Hands out messages while fewer than `prefetch` are in hand, those of the first priority that has some."""

    def __init__(self, broker: HintBroker, prefetch: int, timeout_ms: int) -> None:
        self._broker = broker
        self._prefetch = prefetch
        self._timeout_ms = timeout_ms
        self._fetched: deque[bytes | None] = deque()
        self._in_hand: set[str] = set()
        self._freed = threading.Event()
        self._misses = self._turn = 0
        self._dealt_with: deque[MessageProxy] = deque()
        self._away = False
        self._fetched_s = time.monotonic()

    def __next__(self) -> MessageProxy | None:
        self._freed.clear()
        room = self._prefetch - len(self._in_hand)
        if not self._fetched and room > 0:
            try:
                self._fetch(room, self._acknowledge())
                self._away = False
            except redis.RedisError as error:
                # Dramatiq would begin anew after 3 s; what Redis has lost of this, the sweeper sends again.
                if not self._away:
                    _log.warning("Redis does not answer; asking for messages until it does", error=str(error))
                self._away = True
                time.sleep(AWAY_S)
                return None
        while self._fetched:
            data = self._fetched.popleft()
            if data is not None:
                self._misses = 0
                message: Message[Any] = Message.decode(data)
                self._in_hand.add(message.message_id)
                return MessageProxy(message)
        # Nothing there: ask ever less often. No room: wait for a thread to become idle.
        wait_ms = self._timeout_ms
        if room > 0:
            self._misses, wait_ms = compute_backoff(self._misses, max_backoff=self._timeout_ms)
        self._freed.wait(wait_ms / 1000)
        return None

    def ack(self, message: MessageProxy) -> None:
        """The message has been dealt with; Redis is told of it before the next fetch."""
        self._dealt_with.append(message)
        self._in_hand.discard(message.message_id)
        self._freed.set()

    # The actor never raises; a message that cannot be run at all (an unknown actor) is of no more use than one that was run.
    nack = ack

    def requeue(self, messages: Iterable[MessageProxy]) -> None:
        """The worker stops; the messages that it has not begun go back."""
        try:
            for message in messages:
                self._broker.do_requeue(_priority(message), message.options["redis_message_id"])
        except redis.RedisError as error:
            raise ConnectionClosed(error) from None  # type: ignore[no-untyped-call]

    def close(self) -> None:
        """Gives back what was fetched and not handed out."""
        waiting = [MessageProxy(Message.decode(data)) for data in self._fetched if data is not None]
        self._fetched.clear()
        self.requeue(waiting)
        try:
            self._acknowledge()
        except redis.RedisError as error:
            raise ConnectionClosed(error) from None  # type: ignore[no-untyped-call]

    def _acknowledge(self) -> frozenset[Priority]:
        """Acknowledges what has been dealt with, and answers which lists have messages: one round trip for both.

        The commands are those of Dramatiq's own script, which would take one call for each message.
        """
        dealt_with = [self._dealt_with.popleft() for _ in range(len(self._dealt_with))]
        pipeline = self._broker.client.pipeline(transaction=False)
        for message in dealt_with:
            priority, number = _priority(message), message.options["redis_message_id"]
            pipeline.srem(f"{DRAMATIQ_NAMESPACE}:__acks__.{self._broker.broker_id}.{priority}", number)
            pipeline.hdel(dramatiq_messages(priority), number)
        for one in Priority:
            pipeline.llen(dramatiq_list(one.value))
        try:
            replies = pipeline.execute()
        except redis.RedisError:
            self._dealt_with.extendleft(reversed(dealt_with))
            raise
        return frozenset(one for one, length in zip(Priority, replies[-len(Priority) :], strict=True) if length)

    def _fetch(self, room: int, there: frozenset[Priority]) -> None:
        self._turn += bool(there)
        if not there and time.monotonic() - self._fetched_s > BEAT_S:
            there = frozenset(Priority)
        if there:
            self._fetched_s = time.monotonic()
        for priority in _order(self._turn):
            if priority not in there:
                continue
            messages = self._broker.do_fetch(priority.value, room)
            self._fetched.extend(messages)
            room -= len(messages)
            if room <= 0:
                return


def build_broker(client: redis.Redis) -> HintBroker:
    """A broker without middleware: time limits, retries, results are ours."""
    return HintBroker(  # type: ignore[no-untyped-call]
        client=client,
        namespace=DRAMATIQ_NAMESPACE,
        middleware=[],
        heartbeat_timeout=HEARTBEAT_TIMEOUT_MS,
        maintenance_chance=MAINTENANCE_CHANCE,
    )


def declare_actor(broker: HintBroker, run: Callable[[str, int], None]) -> None:
    """Has `run` called for each message; it must never raise: the message is done with all the same."""
    # A variable, because dramatiq's overloads leave out the form with both a function and options.
    declare: Any = dramatiq.actor
    declare(run, actor_name="run", queue_name=QUEUE, broker=broker)


def _order(turn: int) -> Sequence[Priority]:
    """The priorities in the order in which a turn asks them for messages: the less urgent ones wait, but not for ever."""
    if turn % (2 * OTHERS_TURN) == 0:
        return (Priority.BATCH, Priority.STANDARD, Priority.INTERACTIVE)
    if turn % OTHERS_TURN == 0:
        return (Priority.STANDARD, Priority.BATCH, Priority.INTERACTIVE)
    return tuple(Priority)


def _priority(message: MessageProxy) -> str:
    return str(message.options["priority"])
