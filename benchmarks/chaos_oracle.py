"""Judges a chaos run from outside: what the submitters were promised and saw, against what the queue says in the end."""

from __future__ import annotations

import asyncio
import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ai4thai import AsyncQueueClient
from ai4thai.errors import NotFound
from ai4thai.job_results import DetectJobResult, Job, JobState

from benchmarks.chaos_plan import MAX_ATTEMPTS, Planned, seen
from benchmarks.chaos_power import Cut

ASKED_AT_ONCE = 16
# The oracle's own table of what may follow what; the queue's is not asked.
NEXT: Mapping[str, frozenset[str]] = {
    "": frozenset({"SCHEDULED", "QUEUED"}),
    "SCHEDULED": frozenset({"QUEUED", "CANCELLED", "EXPIRED"}),
    "QUEUED": frozenset({"QUEUED", "RUNNING", "CANCELLED", "EXPIRED"}),
    "RUNNING": frozenset({"RUNNING", "SCHEDULED", "QUEUED", "SUCCEEDED", "FAILED", "CANCELLED"}),
}
LOST = "JOB_LOST"


@dataclass
class Promise:
    """What a submitter was told of one job."""

    planned: Planned
    job_ids: list[tuple[float, str]] = field(default_factory=list)
    """Each id that was acknowledged, with the time of its first acknowledgement; more than one only when jobs were lost."""
    refusals: list[str] = field(default_factory=list)
    too_late: bool = False
    """It was turned away until its deadline had passed."""
    turned_away_count: int = 0
    watches_broken_count: int = 0
    seen: dict[str, list[tuple[float, int, str]]] = field(default_factory=lambda: defaultdict(list))
    """By id: the changes that the watch brought, (time, revision, state)."""
    told_lost: dict[str, tuple[float, str]] = field(default_factory=dict)
    """By id: when the watch was told, and the reason it was given."""
    cancel_asked: set[str] = field(default_factory=set)
    cancel_acknowledged: dict[str, tuple[float, str]] = field(default_factory=dict)
    """By id: when, and the state in the answer."""


@dataclass(frozen=True)
class Told:
    """What the queue says of a job in the end: every change from the first, and the job with its result; None: there is none."""

    history: Sequence[Job]
    job: Job | None
    reason: str = ""
    """Why there is none."""


@dataclass
class Verdict:
    """What was found; `problems` empty: every promise was kept."""

    job_count: int = 0
    """Jobs that were acknowledged."""
    ends: Counter[str] = field(default_factory=Counter)
    attempts: Counter[int] = field(default_factory=Counter)
    """Jobs by how many attempts they took."""
    turned_away_count: int = 0
    watches_broken_count: int = 0
    lost_count: int = 0
    """Jobs that were acknowledged and are gone; whoever asked for one was told NOT_FOUND."""
    lost_reported_count: int = 0
    """Of these: told JOB_LOST. A queue server that was killed, too, cannot know what it had acknowledged."""
    problems: list[str] = field(default_factory=list)


def read_promises(plans: Iterable[Planned], logs: Iterable[Path]) -> dict[str, Promise]:
    """By request_id, from the submitters' logs."""
    promises = {planned.request_id: Promise(planned) for planned in plans}
    for path in logs:
        for line in _lines(path):
            _note(promises[line["request_id"]], line)
    return promises


def _note(promise: Promise, line: Mapping[str, Any]) -> None:
    job_id, at_s = line.get("job_id", ""), line["at_s"]
    match line["event"]:
        case "acknowledged":
            if job_id not in {known for _, known in promise.job_ids}:
                promise.job_ids.append((at_s, job_id))
        case "refused":
            promise.refusals.append(f"{line['code']} {line['reason']}: {line['message']}")
        case "too late":
            promise.too_late = True
        case "turned away":
            promise.turned_away_count += 1
        case "watch broke":
            promise.watches_broken_count += 1
        case "saw":
            promise.seen[job_id].append((at_s, line["revision"], line["state"]))
        case "lost":
            promise.told_lost[job_id] = (at_s, line["reason"])
        case "asked to cancel":
            promise.cancel_asked.add(job_id)
        case "cancel acknowledged":
            promise.cancel_acknowledged[job_id] = (at_s, line["state"])


async def ask(address: str, job_ids: Sequence[str]) -> dict[str, Told]:
    """What the queue says now of each job, read with the real client."""
    gate = asyncio.Semaphore(ASKED_AT_ONCE)
    async with AsyncQueueClient(address) as client:

        async def one(job_id: str) -> tuple[str, Told]:
            async with gate:
                try:
                    job = await client.get(job_id)
                    # The watch of a job that has not ended would wait for its end.
                    return job_id, Told([one async for one in client.watch(job_id)] if job.has_ended else (), job)
                except NotFound as error:
                    return job_id, Told((), None, error.reason)

        return dict(await asyncio.gather(*(one(job_id) for job_id in job_ids)))


def judge(
    promises: Mapping[str, Promise],
    told: Mapping[str, Told],
    right: Callable[[bytes], str],
    cuts: Sequence[Cut] = (),
    queue_killed_s: Sequence[float] = (),
) -> Verdict:
    """The verdict.

    Args:
        promises: what the submitters were told.
        told: what the queue says in the end, by id.
        right: what chaos_plan.seen must say of an image.
        cuts: power losses, which explain what is gone.
        queue_killed_s: when the queue server was killed, which explains that it does not know what is gone.
    """
    verdict = Verdict(job_count=sum(bool(promise.job_ids) for promise in promises.values()))
    for promise in promises.values():
        _Judge(promise, told, right, cuts, queue_killed_s, verdict).judge()
    return verdict


class _Judge:
    def __init__(
        self,
        promise: Promise,
        told: Mapping[str, Told],
        right: Callable[[bytes], str],
        cuts: Sequence[Cut],
        queue_killed_s: Sequence[float],
        verdict: Verdict,
    ) -> None:
        self._promise = promise
        self._told = told
        self._right = right
        self._cuts = cuts
        self._queue_killed_s = queue_killed_s
        self._verdict = verdict

    def judge(self) -> None:
        """Looks at each id of one planned job; all but the last were lost."""
        promise, verdict = self._promise, self._verdict
        verdict.turned_away_count += promise.turned_away_count
        verdict.watches_broken_count += promise.watches_broken_count
        for refusal in promise.refusals:
            self._problem("", f"was refused: {refusal}")
        if not promise.job_ids and not promise.too_late:
            self._problem("", "was never acknowledged")
        for number, (acknowledged_s, job_id) in enumerate(promise.job_ids):
            told = self._told[job_id]
            if told.job is None or job_id in promise.told_lost:
                self._judge_lost(job_id, acknowledged_s, told)
            elif number < len(promise.job_ids) - 1:
                self._problem(job_id, "is kept, and another job was made for the same request_id")
            else:
                self._judge_kept(job_id, told.job, told.history)

    def _judge_lost(self, job_id: str, acknowledged_s: float, told: Told) -> None:
        told_s, reason = self._promise.told_lost.get(job_id, (math.inf, told.reason))
        self._verdict.lost_count += 1
        self._verdict.lost_reported_count += reason == LOST
        if not self._explained(acknowledged_s):
            self._problem(job_id, f"was acknowledged and is lost ({reason})")
        elif reason != LOST and not any(acknowledged_s <= at_s <= told_s for at_s in self._queue_killed_s):
            self._problem(job_id, f"is lost, and its submitter was told {reason} instead of {LOST}")

    def _judge_kept(self, job_id: str, job: Job, history: Sequence[Job]) -> None:
        verdict, promise = self._verdict, self._promise
        verdict.ends[job.state] += 1
        verdict.attempts[job.attempt_count] += 1
        if not job.has_ended:
            self._problem(job_id, f"never ended: it is {job.state}")
            return
        self._judge_history(job_id, history)
        watched = promise.seen[job_id]
        ends = [state for _, _, state in watched if JobState(state).is_end]
        if not ends:
            self._problem(job_id, f"its watch never brought its end, {job.state}")
        elif ends[-1] != job.state and not self._explained(watched[-1][0]):
            self._problem(job_id, f"its watch brought the end {ends[-1]}, it is {job.state}")
        revisions = [revision for _, revision, _ in watched]
        if revisions != list(range(1, len(revisions) + 1)) and not self._cuts:
            self._problem(job_id, f"its watch brought the revisions {revisions}")
        self._judge_outcome(job_id, job)

    def _judge_history(self, job_id: str, history: Sequence[Job]) -> None:
        states = [change.state for change in history]
        if (end_count := sum(state.is_end for state in states)) != 1:
            self._problem(job_id, f"its end was recorded {end_count} times: {' '.join(states)}")
            return
        if [change.revision for change in history] != list(range(1, len(history) + 1)):
            self._problem(job_id, f"its history has the revisions {[change.revision for change in history]}")
        before = ""
        for state in states:
            if state not in NEXT[before]:
                self._problem(job_id, f"went from {before or 'nothing'} to {state}")
            before = state

    def _judge_outcome(self, job_id: str, job: Job) -> None:
        planned, promise = self._promise.planned, self._promise
        allowed = {JobState.SUCCEEDED}
        if job_id in promise.cancel_asked:
            allowed.add(JobState.CANCELLED)
        if planned.deadline_s is not None:
            allowed.add(JobState.EXPIRED)
        acknowledged_s, state = promise.cancel_acknowledged.get(job_id, (0.0, ""))
        if state == JobState.CANCELLED and not self._explained(acknowledged_s):
            allowed = {JobState.CANCELLED}
        if job.state not in allowed:
            error = f" ({job.error.reason}: {job.error.message})" if job.error is not None else ""
            self._problem(job_id, f"is {job.state}{error}, of {MAX_ATTEMPTS} attempts it took {job.attempt_count}")
        if job.state == JobState.SUCCEEDED:
            items = [seen(item) for item in job.result.items] if isinstance(job.result, DetectJobResult) else []
            if items != [self._right(image) for image in planned.images]:
                self._problem(job_id, f"has a wrong result: {items}")
        elif job.result is not None:
            self._problem(job_id, f"is {job.state} and has a result")

    def _explained(self, at_s: float) -> bool:
        return any(cut.explains(at_s) for cut in self._cuts)

    def _problem(self, job_id: str, text: str) -> None:
        self._verdict.problems.append(f"job {job_id or self._promise.planned.request_id} {text}")


def read_events(path: Path) -> list[dict[str, Any]]:
    """The JSON lines of a log; whatever else is in it is left out."""
    return list(_lines(path))


def _lines(path: Path) -> Iterable[dict[str, Any]]:
    for line in path.read_text(errors="replace").splitlines():
        if line.startswith("{"):
            try:
                yield json.loads(line)
            except ValueError:
                continue  # the last word of a process that was killed
