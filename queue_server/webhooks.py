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

# How often due webhooks are looked for: what a receiver waits beyond the job's end, at most.
TICK_S = 0.5
MAX_UNDER_WAY = 32
# No receiver, however slow, has more than its share of those.
MAX_PER_RECEIVER = 8
# A receiver that failed is left alone for as long as its webhook's second try waits: all others of its are put off, uncounted.
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
        self._under_way: dict[asyncio.Task[None], str] = {}
        self._resting: dict[str, float] = {}

    async def start(self) -> None:
        """Begins to look."""
        if self._enabled:
            await self._sender.start()
            self._task = asyncio.create_task(self._run(), name="webhooks")

    async def stop(self) -> None:
        """Lets what is under way end, for a few seconds; what does not is sent again by another server."""
        if self._task is None:
            return
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task
        if self._under_way:
            _, late = await asyncio.wait(self._under_way, timeout=STOP_S)
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
        detail = f"{waiting} wait, {len(self._under_way)} are under way"
        if not self._enabled:
            detail = "none are sent: there is no QUEUE_WEBHOOK_SECRET"
            return Warned(f"{detail}, and {waiting} wait") if waiting else detail
        return Warned(f"{detail}; one has been due for {late_s:.0f} s") if late_s > LATE_S else detail

    async def _run(self) -> None:
        while True:
            try:
                full = await self._take()
            except (StoreUnavailable, QueueFull) as error:
                _log.debug("cannot look for webhooks", error=str(error))
                full = False
            except Exception:
                # What it was is looked for again at the next tick; the others must not wait for it.
                _log.exception("looking for webhooks failed once")
                full = False
            if full and self._under_way:
                # There may be more than there was room for: on as soon as there is room.
                await asyncio.wait(self._under_way, timeout=TICK_S, return_when=asyncio.FIRST_COMPLETED)
            else:
                await asyncio.sleep(TICK_S)

    async def _take(self) -> bool:
        """Begins to send what is due; whether there may be more."""
        room = MAX_UNDER_WAY - len(self._under_way)
        if room <= 0:
            return True
        now_s = time.monotonic()
        self._resting = {receiver: until_s for receiver, until_s in self._resting.items() if until_s > now_s}
        records = await self._connection.run(
            "hooks_take",
            {
                "limit": room,
                "per_receiver": MAX_PER_RECEIVER,
                "sending": Counter(self._under_way.values()),
                "resting": {receiver: round((until_s - now_s) * 1000) for receiver, until_s in self._resting.items()},
                # A try, what is done around it, and as much again.
                "lease_ms": round(2 * (self._settings.webhook_timeout_s + 1.0) * 1000),
            },
        )
        for record in records:
            fields = read_fields(record)
            task = asyncio.create_task(self._tell(read_job(fields), int(fields["hook_take"])))
            self._under_way[task] = _receiver(fields["hook"])
            task.add_done_callback(lambda done: self._under_way.pop(done, None))
        return bool(records)

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
        if not failure.final and len(self._resting) < MAX_RESTING:
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
