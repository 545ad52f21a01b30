"""One submitter of a chaos run, `python -m benchmarks.chaos_submitter`: submits, cancels and watches as a real one would.

A process with the real client. A submission that is refused because something is away is made again with the same request_id
until it is acknowledged. Every acknowledged job is watched to its end. Whatever is asked and answered goes to stdout, a JSON line
each: the oracle's only knowledge of what was promised.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from ai4thai import AsyncQueueClient, Submission
from ai4thai.errors import AI4ThaiError, Busy, Cancelled, DeadlineExceeded, InvalidInput, NotFound, Unavailable

from benchmarks.chaos_plan import MAX_ATTEMPTS, Planned, read_plan

CALL_S = 10.0
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 2.0
# What a submitter expects of servers that are killed, and answers by trying again.
PASSING = (Unavailable, Busy, DeadlineExceeded, Cancelled)


class Submitter:
    """The life of each job: submit until acknowledged, perhaps cancel, watch to the end; when it is lost, once more."""

    def __init__(self, address: str, jobs: Sequence[Planned]) -> None:
        self._jobs = jobs
        self._client = AsyncQueueClient(address, timeout_s=CALL_S)

    async def run(self, started_s: float) -> None:
        """All jobs, each at its time after `started_s` (of time.monotonic)."""
        lives = []
        for (batch, at_s), group in groupby(self._jobs, key=lambda job: (job.batch, job.at_s)):
            jobs = list(group)
            await asyncio.sleep(max(0.0, started_s + at_s - time.monotonic()))
            if batch:
                lives.append(asyncio.create_task(self._lives(jobs)))
            else:
                lives += [asyncio.create_task(self._life(job)) for job in jobs]
        await asyncio.gather(*lives)
        await self._client.close()

    async def _lives(self, jobs: Sequence[Planned]) -> None:
        job_ids = await self._submit_together(jobs)
        await asyncio.gather(*(self._life(job, job_ids.get(job.request_id)) for job in jobs))

    async def _life(self, job: Planned, job_id: str | None = None) -> None:
        while True:
            job_id = job_id or await self._submit(job)
            if job_id is None:
                return
            cancelling = asyncio.create_task(self._cancel(job, job_id))
            if job.again:
                await self._submit(job)
            is_kept = await self._watch(job, job_id)
            await cancelling
            if is_kept:
                return
            job_id = None

    async def _submit(self, job: Planned) -> str | None:
        """The job's id; None: it was refused for good."""
        pause_s = FIRST_PAUSE_S
        submission = _submission(job)
        while True:
            tell("asked", job)
            try:
                got = await self._client.submit(submission)
                tell("acknowledged", job, job_id=got.job_id, state=got.state)
                return got.job_id
            except AI4ThaiError as error:
                if not _is_passing(job, error):
                    return None
                pause_s = await _pause(pause_s, error)

    async def _submit_together(self, jobs: Sequence[Planned]) -> dict[str, str]:
        """The ids by request_id of those that were taken or refused one by one; the others are to be submitted alone."""
        for job in jobs:
            tell("asked", job)
        outcomes = await self._client.submit_many([_submission(job) for job in jobs])
        job_ids = {}
        for job, outcome in zip(jobs, outcomes, strict=True):
            if outcome.job is not None:
                job_ids[job.request_id] = outcome.job.job_id
                tell("acknowledged", job, job_id=outcome.job.job_id, state=outcome.job.state)
            elif outcome.error is not None:
                _is_passing(job, outcome.error)
        return job_ids

    async def _cancel(self, job: Planned, job_id: str) -> None:
        if job.cancel_after_s is None:
            return
        await asyncio.sleep(job.cancel_after_s)
        pause_s = FIRST_PAUSE_S
        while True:
            tell("asked to cancel", job, job_id=job_id)
            try:
                got = await self._client.cancel(job_id)
                tell("cancel acknowledged", job, job_id=job_id, state=got.state)
                return
            except NotFound:
                return  # the watch tells of it
            except PASSING as error:
                pause_s = await _pause(pause_s, error)

    async def _watch(self, job: Planned, job_id: str) -> bool:
        """Until the job has ended; False: the queue says that there is no such job."""
        revision = 0
        while True:
            try:
                async for change in self._client.watch(job_id, revision):
                    revision = change.revision
                    tell("saw", job, job_id=job_id, revision=revision, state=change.state)
                return True
            except NotFound as error:
                tell("lost", job, job_id=job_id, reason=error.reason)
                return False
            except InvalidInput as error:
                tell("rewound", job, job_id=job_id, reason=error.reason, revision=revision)
                revision = 0
            except AI4ThaiError as error:
                tell("watch broke", job, job_id=job_id, code=error.code, reason=error.reason)
                await asyncio.sleep(0.5)


def tell(event: str, job: Planned, **fields: object) -> None:
    """A line of the log."""
    line = {"event": event, "at_s": time.monotonic(), "request_id": job.request_id, **fields}
    print(json.dumps(line), flush=True)


def _submission(job: Planned) -> Submission:
    return Submission.detect(
        job.images,
        request_id=job.request_id,
        client=job.client,
        queue=job.queue,
        priority=job.priority,
        delay_s=job.delay_s,
        deadline_s=job.deadline_s,
        max_attempts=MAX_ATTEMPTS,
    )


def _is_passing(job: Planned, error: AI4ThaiError) -> bool:
    """Whether to submit again; tells of the refusal."""
    if isinstance(error, PASSING):
        tell("turned away", job, code=error.code, reason=error.reason)
        return True
    if isinstance(error, InvalidInput) and job.deadline_s is not None:
        tell("too late", job)  # its deadline passed while it was turned away
    else:
        tell("refused", job, code=error.code, reason=error.reason, message=error.message)
    return False


async def _pause(pause_s: float, error: AI4ThaiError) -> float:
    """Waits as long as a polite caller does; how long it will wait the next time."""
    await asyncio.sleep(min(LONGEST_PAUSE_S, max(pause_s, error.retry_after_s or 0.0)))
    return min(LONGEST_PAUSE_S, pause_s * 2)


def main() -> int:
    """Ends when all its jobs have ended."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--address", required=True)
    parser.add_argument("--plan", type=Path, required=True)
    parser.add_argument("--started", type=float, required=True, help="the run's beginning, by time.monotonic()")
    arguments = parser.parse_args()

    async def run() -> None:
        await Submitter(arguments.address, read_plan(arguments.plan)).run(arguments.started)

    asyncio.run(run())
    return 0


if __name__ == "__main__":
    sys.exit(main())
