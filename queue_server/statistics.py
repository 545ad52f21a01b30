"""Counts the jobs of each queue, from what the scripts have counted along."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from queue_server import keys
from queue_server.connection import Connection
from queue_server.records import read_fields

# The last minutes of GetQueueStats' quantiles, in slots.
LATENCY_SLOTS = 30
THROUGHPUT_S = 60
MAX_CLIENTS_TOLD = 20
# scripts/record.lua sorts latencies into steps of 10 %.
STEP = 1.1
BUCKETS_S = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 900, 3600)
"""Upper bounds of the Prometheus histograms; scripts/record.lua counts by the same."""
WEBHOOK_OUTCOMES = ("delivered", "failed", "given_up")
"""Told as 0 before there is one, as lost attempts are: an increase from nothing to 1 is none to Prometheus."""
EVERY_QUEUE = "*"
"""Stands for all queues together; no queue can be called so."""
TIMES = ("total", "wait", "run")
"""What there is a histogram of: submission to end, queued to begun, an attempt."""


@dataclass(frozen=True)
class QueueCounts:
    """The counts of one queue. Ages and latencies are None without any job to tell them of."""

    queue: str
    depth: int
    scheduled: int
    running: int
    failed: int
    oldest_age_s: float | None
    throughput_per_s: float
    latency_p50_s: float | None
    latency_p95_s: float | None
    paused: bool = False
    held: int = 0
    size_bytes: int = 0
    clients: tuple[tuple[str, int], ...] = ()
    """Clients with jobs waiting, by how many, those with most first."""


@dataclass(frozen=True)
class Histogram:
    """A cumulative histogram of times: counts by upper bound, all of them, their sum."""

    counts: Mapping[float, int]
    count: int
    sum_s: float


@dataclass(frozen=True)
class Totals:
    """What has happened in one queue since its first job, by kind."""

    queue: str
    depth: int
    scheduled: int
    running: int
    oldest_age_s: float
    paused: bool = False
    held: int = 0
    size_bytes: int = 0
    attempts: Mapping[str, int] = field(default_factory=dict)
    outcomes: Mapping[tuple[str, str], int] = field(default_factory=dict)
    """Attempts ended, by kind and outcome."""
    ended: Mapping[tuple[str, str], int] = field(default_factory=dict)
    """Jobs ended, by kind and state."""
    times: Mapping[tuple[str, str], Histogram] = field(default_factory=dict)
    """By kind and one of TIMES."""


@dataclass(frozen=True)
class StoreTotals:
    """What Prometheus is told of the whole store; `memory_limit_bytes` 0: Redis has no maxmemory."""

    worker_count: int = 0
    memory_bytes: int = 0
    memory_limit_bytes: int = 0
    webhooks_waiting: int = 0
    webhook_tries: Mapping[str, int] = field(default_factory=dict)
    """By outcome: `delivered`, `failed` (and to be tried again), `given_up`. Empty: not read yet."""


@dataclass(frozen=True)
class Depth:
    """How much there is to do in a queue, or EVERY_QUEUE, now; `held` is part of `depth`, `oldest_age_s` 0 when nothing waits."""

    queue: str
    depth: int
    held: int
    running: int
    oldest_age_s: float


@dataclass(frozen=True)
class WorkerRecord:
    """A worker that is alive."""

    name: str
    concurrency: int
    start_ms: int
    seen_ms: int
    job_ids: tuple[str, ...]
    ended_count: int


class Statistics:
    """Reads; changes nothing."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def queues(self, only: str = "") -> list[QueueCounts]:
        """The counts of each queue that has had a job or is paused, or of one; by name."""
        names = await self._names(only)
        now_ms = await self._now_ms()
        slot = now_ms // 1000 // keys.SLOT_S
        pipeline = self._connection.client.pipeline(transaction=False)
        for name in names:
            pipeline.hgetall(keys.queue_counts(name))
            pipeline.zrange(keys.queue_wait(name), 0, 0, withscores=True)
            pipeline.sismember(keys.PAUSED, name)
            pipeline.hget(keys.BYTES, f"q:{name}")
            pipeline.zrevrange(keys.queue_clients(name), 0, MAX_CLIENTS_TOLD - 1, withscores=True)
            for number in range(slot, slot - LATENCY_SLOTS, -1):
                pipeline.hgetall(keys.queue_slot(name, number))
        replies = await self._connection.ask(pipeline.execute())
        width = 5 + LATENCY_SLOTS
        return [
            _read_counts(name, replies[index * width : (index + 1) * width], now_ms) for index, name in enumerate(names)
        ]

    async def totals(self, kinds: tuple[str, ...]) -> list[Totals]:
        """What Prometheus is told of each queue."""
        names = await self._names("")
        now_ms = await self._now_ms()
        pipeline = self._connection.client.pipeline(transaction=False)
        for name in names:
            pipeline.hgetall(keys.queue_counts(name))
            pipeline.zrange(keys.queue_wait(name), 0, 0, withscores=True)
            pipeline.sismember(keys.PAUSED, name)
            pipeline.hget(keys.BYTES, f"q:{name}")
            for kind in kinds:
                pipeline.hgetall(keys.queue_times(name, kind))
        replies = await self._connection.ask(pipeline.execute())
        width = 4 + len(kinds)
        return [
            _read_totals(name, kinds, replies[index * width : (index + 1) * width], now_ms)
            for index, name in enumerate(names)
        ]

    async def store_totals(self) -> StoreTotals:
        """What Prometheus is told beside the queues."""
        pipeline = self._connection.client.pipeline(transaction=False)
        pipeline.info("memory").zcard(keys.HOOKS).hgetall(keys.HOOK_COUNTS)
        memory, webhooks_waiting, tries = await self._connection.ask(pipeline.execute())
        return StoreTotals(
            worker_count=len(await self.workers()),
            memory_bytes=int(memory["used_memory"]),
            memory_limit_bytes=int(memory.get("maxmemory", 0)),
            webhooks_waiting=webhooks_waiting,
            webhook_tries=dict.fromkeys(WEBHOOK_OUTCOMES, 0)
            | {outcome: int(number) for outcome, number in read_fields(tries).items()},
        )

    async def depth(self, queue: str) -> Depth:
        """How much there is to do in a queue; in the same time for any number of jobs. Nothing in one that has had no job."""
        names = await self._names("") if queue == EVERY_QUEUE else [queue]
        pipeline = self._connection.client.pipeline(transaction=False)
        for name in names:
            pipeline.hmget(keys.queue_counts(name), "QUEUED", "HELD", "RUNNING")
            pipeline.zrange(keys.queue_wait(name), 0, 0, withscores=True)
        *replies, (seconds, microseconds) = await self._connection.ask(pipeline.time().execute())
        now_ms = seconds * 1000 + microseconds // 1000
        depth, held, running = (sum(int(counts[part] or 0) for counts in replies[::2]) for part in range(3))
        ages_s = [_oldest_age_s(oldest, now_ms) or 0.0 for oldest in replies[1::2]]
        return Depth(queue, depth, held, running, max(ages_s, default=0.0))

    async def workers(self) -> list[WorkerRecord]:
        """The workers that are alive, by name."""
        client = self._connection.client
        names = sorted(name.decode() for name in await self._connection.ask(client.zrange(keys.WORKERS, 0, -1)))
        pipeline = client.pipeline(transaction=False)
        for name in names:
            pipeline.hgetall(keys.worker(name))
        replies = await self._connection.ask(pipeline.execute())
        # The hash of a worker that was killed expires by itself.
        return [_read_worker(name, reply) for name, reply in zip(names, replies, strict=True) if reply]

    async def _names(self, only: str) -> list[str]:
        found = await self._connection.ask(self._connection.client.sunion(keys.QUEUES, keys.PAUSED))
        return sorted(name.decode() for name in found if not only or name.decode() == only)

    async def _now_ms(self) -> int:
        seconds, microseconds = await self._connection.ask(self._connection.client.time())
        return int(seconds) * 1000 + int(microseconds) // 1000


def quantile(steps: Mapping[int, int], share: float) -> float | None:
    """The value that `share` of all lie at or below, in seconds; `steps` counts them by step of STEP, in milliseconds."""
    total = sum(steps.values())
    if not total:
        return None
    wanted, seen = math.ceil(total * share), 0
    for step in sorted(steps):
        seen += steps[step]
        if seen >= wanted:
            # The middle of the step.
            return float(STEP ** (step + 0.5)) / 1000
    raise AssertionError("share is at most 1")


def _read_counts(name: str, replies: list[Any], now_ms: int) -> QueueCounts:
    counts = _Counts(replies[0])
    slots = [read_fields(slot) for slot in replies[5:]]
    steps: dict[int, int] = {}
    for slot in slots:
        for key, value in slot.items():
            if key.startswith("b"):
                steps[int(key[1:])] = steps.get(int(key[1:]), 0) + int(value)
    # The slot that is being filled and the full ones before it, up to a minute.
    recent = THROUGHPUT_S // keys.SLOT_S
    seconds = (recent - 1) * keys.SLOT_S + max(1.0, (now_ms / 1000) % keys.SLOT_S)
    succeeded = sum(int(slot.get("SUCCEEDED", 0)) for slot in slots[:recent])
    return QueueCounts(
        queue=name,
        depth=counts["QUEUED"],
        scheduled=counts["SCHEDULED"],
        running=counts["RUNNING"],
        failed=counts["FAILED"],
        oldest_age_s=_oldest_age_s(replies[1], now_ms),
        throughput_per_s=succeeded / seconds,
        latency_p50_s=quantile(steps, 0.5),
        latency_p95_s=quantile(steps, 0.95),
        paused=bool(replies[2]),
        held=counts["HELD"],
        size_bytes=int(replies[3] or 0),
        clients=tuple((client.decode(), int(waiting)) for client, waiting in replies[4]),
    )


def _read_totals(name: str, kinds: tuple[str, ...], replies: list[Any], now_ms: int) -> Totals:
    counts = _Counts(replies[0])
    attempts: dict[str, int] = {}
    outcomes: dict[tuple[str, str], int] = {}
    ended: dict[tuple[str, str], int] = {}
    for key, value in counts.fields.items():
        match key.split(":"):
            case ["attempts", kind]:
                attempts[kind] = int(value)
            case ["outcome", kind, outcome]:
                outcomes[kind, outcome] = int(value)
            case ["ended", kind, state]:
                ended[kind, state] = int(value)
    for kind in attempts:
        outcomes.setdefault((kind, "lost"), 0)
    times = {}
    for kind, reply in zip(kinds, replies[4:], strict=True):
        fields = read_fields(reply)
        for what in TIMES:
            if f"{what}:ms" in fields:
                times[kind, what] = _read_histogram(fields, what)
    return Totals(
        queue=name,
        depth=counts["QUEUED"],
        scheduled=counts["SCHEDULED"],
        running=counts["RUNNING"],
        oldest_age_s=_oldest_age_s(replies[1], now_ms) or 0.0,
        paused=bool(replies[2]),
        held=counts["HELD"],
        size_bytes=int(replies[3] or 0),
        attempts=attempts,
        outcomes=outcomes,
        ended=ended,
        times=times,
    )


def _read_histogram(fields: Mapping[str, str], name: str) -> Histogram:
    """Adds up: the scripts count each time once, in the bucket that it falls into."""
    count, by_bound = 0, {}
    for bound in BUCKETS_S:
        count += int(fields.get(f"{name}:{bound:g}", 0))
        by_bound[bound] = count
    return Histogram(by_bound, count + int(fields.get(f"{name}:inf", 0)), int(fields[f"{name}:ms"]) / 1000)


class _Counts:
    def __init__(self, reply: dict[bytes, bytes]) -> None:
        self.fields = read_fields(reply)

    def __getitem__(self, name: str) -> int:
        return int(self.fields.get(name, 0))


def _oldest_age_s(reply: Any, now_ms: int) -> float | None:
    match reply:
        case [(_, since_ms)] | [[_, since_ms]]:
            return max(0.0, (now_ms - float(since_ms)) / 1000)
    return None


def _read_worker(name: str, reply: dict[bytes, bytes]) -> WorkerRecord:
    fields = read_fields(reply)
    return WorkerRecord(
        name=name,
        concurrency=int(fields["concurrency"]),
        start_ms=int(fields["start_ms"]),
        seen_ms=int(fields["seen_ms"]),
        job_ids=tuple(json.loads(fields["jobs"])),
        ended_count=int(fields["ended"]),
    )
