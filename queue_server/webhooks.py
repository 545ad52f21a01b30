"""Tells the ends of jobs to those who asked to be told: each at least once, whatever is killed meanwhile.

The zset `{vq}:hooks` is the truth: the script that ends a job puts it there, and only a receiver's 2xx, the last try, or the end
of the job's lifetime takes it away. Each queue server takes what is due, for a while that outlasts a try, so that two do not call
the same receiver at once, and another does when this one dies.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any
from weakref import WeakValueDictionary

from queue_server import keys, statuses, wire
from queue_server.addresses import Guard
from queue_server.connection import Connection
from queue_server.errors import QueueFull, StoreUnavailable, WebhookFailed
from queue_server.jobs import Job
from queue_server.lines import of_job
from queue_server.records import read_fields, read_job, write_status
from queue_server.settings import QueueSettings
from queue_server.webhook_calls import Resolve, Sender, SendFailed
from serving.health import Warned
from serving.logs import get_logger
from serving.transcoding import to_dict

# How often due webhooks are looked for: what a receiver waits beyond the job's end, at most; sooner again after some were found.
TICK_S = 0.5
NEXT_S = 0.05
# Webhooks in hand, and those of them that are being sent. No receiver, however slow, has more than its share.
MAX_TAKEN, MAX_TAKEN_EACH = 256, 64
MAX_SENT, MAX_SENT_EACH = 32, 8
# A receiver that is away is left alone for as long as a webhook's second try waits: its others are put off, uncounted.
MAX_RESTING = 1000
RETRY_FACTOR = 6
RETRY_LIMIT_S = 5 * 3600.0
RETRY_AFTER_LIMIT_S = 3600.0
STOP_S = 5.0
# Due for longer than this, something is wrong here rather than with a receiver.
LATE_S = 60.0

_log = get_logger("webhooks")


class Webhooks:
    """start() begins to look for ends to tell; without a secret nothing is sent."""

    def __init__(self, connection: Connection, settings: QueueSettings, *, resolve: Resolve | None = None) -> None:
        self._connection = connection
        self._settings = settings
        secret = settings.webhook_secret.get_secret_value()
        self._enabled = bool(secret)
        self._sender = Sender(
            Guard(settings.webhook_allowed_hosts.split(",")), secret, settings.webhook_timeout_s, resolve=resolve
        )
        self._task: asyncio.Task[None] | None = None
        # A try, what is done around it, and as much again.
        self._lease_s = 2 * (settings.webhook_timeout_s + 1.0)
        self._taken: dict[asyncio.Task[None], str] = {}
        self._sending: set[asyncio.Task[None]] = set()
        self._stopping = False
        self._resting: dict[str, float] = {}
        self._room = asyncio.Semaphore(MAX_SENT)
        self._rooms: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()

    async def start(self) -> None:
        """Begins to look."""
        if self._enabled:
            await self._sender.start()
            self._task = asyncio.create_task(self._run(), name="webhooks")

    async def stop(self) -> None:
        """Lets what is being sent end, for a few seconds; the rest is sent by another server when its lease ends."""
        if self._task is None:
            return
        self._stopping = True
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task
        if self._sending:
            await asyncio.wait(self._sending, timeout=STOP_S)
        late = list(self._taken)
        for task in late:
            task.cancel()
        await asyncio.gather(*late, return_exceptions=True)
        await self._sender.stop()

    async def check(self) -> str:
        """How many ends wait to be told; a detail for health. Raises StoreUnavailable."""
        client = self._connection.client
        pipeline = client.pipeline(transaction=False)
        pipeline.zcard(keys.HOOKS).zrange(keys.HOOKS, 0, 0, withscores=True).time()
        waiting, first, (seconds, _) = await self._connection.ask(pipeline.execute())
        late_s = seconds - first[0][1] / 1000 if first else 0.0
        detail = f"{waiting} wait, {len(self._taken)} are in hand"
        if not self._enabled:
            detail = "none are sent: there is no QUEUE_WEBHOOK_SECRET"
            return Warned(f"{detail}, and {waiting} wait") if waiting else detail
        return Warned(f"{detail}; one has been due for {late_s:.0f} s") if late_s > LATE_S else detail

    async def _run(self) -> None:
        while True:
            found = False
            try:
                found = await self._take()
            except (StoreUnavailable, QueueFull) as error:
                _log.debug("cannot look for webhooks", error=str(error))
            except Exception:
                # What it was is looked for again at the next tick; the others must not wait for it.
                _log.exception("looking for webhooks failed once")
            await asyncio.sleep(NEXT_S if found else TICK_S)

    async def _take(self) -> bool:
        """Takes what is due in hand; whether there was anything."""
        room = MAX_TAKEN - len(self._taken)
        if room <= 0:
            return True
        now_s = time.monotonic()
        self._resting = {receiver: until_s for receiver, until_s in self._resting.items() if until_s > now_s}
        records = await self._connection.run(
            "hooks_take",
            {
                "limit": room,
                "per_receiver": MAX_TAKEN_EACH,
                "taken": Counter(self._taken.values()),
                "resting": {receiver: round((until_s - now_s) * 1000) for receiver, until_s in self._resting.items()},
                "lease_ms": round(self._lease_s * 1000),
            },
        )
        for record in records:
            fields = read_fields(record)
            receiver = _receiver(fields["hook"])
            task = asyncio.create_task(self._wait_and_tell(read_job(fields), int(fields["hook_take"]), receiver))
            self._taken[task] = receiver
            task.add_done_callback(lambda done: self._taken.pop(done, None))
        return bool(records)

    async def _wait_and_tell(self, job: Job, take: int, receiver: str) -> None:
        taken_s = time.monotonic()
        async with self._rooms.setdefault(receiver, asyncio.Semaphore(MAX_SENT_EACH)):
            rest_s = self._resting.get(receiver, 0.0) - time.monotonic()
            if rest_s > 0:
                await asyncio.sleep(min(rest_s, self._lease_s / 2))
            async with self._room:
                # One whose lease might not outlast the try is left to it: due again when it ends.
                if time.monotonic() - taken_s < self._lease_s / 2 and not self._stopping:
                    sending = asyncio.create_task(self._tell(job, take))
                    self._sending.add(sending)
                    sending.add_done_callback(self._sending.discard)
                    await sending

    async def _tell(self, job: Job, take: int) -> None:
        assert job.webhook is not None
        began_s = time.monotonic()
        failure: SendFailed | None = None
        try:
            # One id for each end, the same at each try, so that a receiver can tell an end from its repetition.
            await self._sender.send(job.webhook.url, f"{job.job_id}.{job.revision}", _body(job))
        except SendFailed as error:
            failure = error
        except Exception:
            _log.exception("a fault of our own", **of_job(job))
            failure = SendFailed("a fault of the queue server")
        tries = job.webhook.attempt_count + 1
        settled = {"job_id": job.job_id, "rev": job.revision, "take": take, "outcome": "delivered", "error": ""}
        delay_s = 0.0
        if failure is not None:
            self._rest(_receiver(job.webhook.url), failure)
            last = failure.final or tries >= self._settings.webhook_tries
            delay_s = max(self._delay_s(tries), min(failure.retry_after_s, RETRY_AFTER_LIMIT_S))
            settled["outcome"] = "given_up" if last else "failed"
            settled["error"] = write_status(statuses.write_error(WebhookFailed(why=str(failure))))
        settled["delay_ms"] = round(delay_s * 1000)
        try:
            outcome, tries = await self._connection.run("hooks_settle", settled)
        except Exception as error:
            # The lease runs out and it is tried again: at least once is what is promised.
            _log.warning("what became of a webhook could not be recorded", **of_job(job), error=str(error))
            return
        fields: dict[str, Any] = {"tries": tries, "seconds": round(time.monotonic() - began_s, 3)}
        if failure is not None:
            fields |= {"why": str(failure), **({"detail": failure.detail} if failure.detail else {})}
        match outcome.decode():
            case "delivered":
                _log.info("webhook delivered", **of_job(job), **fields)
            case "failed":
                _log.warning("webhook not taken", **of_job(job), **fields, again_in_s=round(delay_s, 1))
            case "given_up":
                _log.warning("webhook given up", **of_job(job), **fields)
            case _:
                _log.debug("webhook settled by another", **of_job(job), **fields)

    def _rest(self, receiver: str, failure: SendFailed) -> None:
        if failure.away and len(self._resting) < MAX_RESTING:
            rest_s = max(self._settings.webhook_retry_s, min(failure.retry_after_s, RETRY_AFTER_LIMIT_S))
            self._resting[receiver] = time.monotonic() + rest_s

    def _delay_s(self, tries: int) -> float:
        """The wait after so many tries; a fifth of it random, up or down, so that what failed together is not tried together."""
        whole_s = min(RETRY_LIMIT_S, self._settings.webhook_retry_s * float(RETRY_FACTOR ** min(tries - 1, 10)))
        return whole_s * (0.8 + 0.4 * random.random())


def _body(job: Job) -> str:
    values = {
        "type": "job.ended",
        "timestamp": datetime.fromtimestamp(job.end_ms / 1000, UTC).isoformat(timespec="milliseconds"),
        "data": {"job": to_dict(wire.write_job(job))},
    }
    return json.dumps(values, ensure_ascii=False, separators=(",", ":"))


def _receiver(url: str) -> str:
    """A URL's beginning up to its host and port, as hooks_take.lua reads it."""
    scheme, _, rest = url.partition("//")
    for end in "/?#":
        rest = rest.partition(end)[0]
    return f"{scheme}//{rest}"
