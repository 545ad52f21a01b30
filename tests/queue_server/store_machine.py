"""The job store's rules against a model in memory, step by step, on a real server; test_state_machine.py runs it."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any, TypeVar

import pytest
import redis
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from queue_server import keys
from queue_server.actors import build_broker
from queue_server.connection import Connection
from queue_server.errors import JobNotFound, QueueNotFound, RequestIdReused, WrongState
from queue_server.jobs import ENDED, RETRIED, JobState, Priority, Progress, Submission
from queue_server.queues import Queues
from queue_server.store import Store
from queue_server.worker_store import Claim, Expired, Outcome, WorkerStore
from tests.queue_server.conftest import queue_settings, worker_settings
from tests.queue_server.consistency import WAITING, Everything

T = TypeVar("T")

ONE_ITEM = Progress(0, 1, "")

HOUR_MS = 3_600_000
# So few that clients come to hold jobs back.
SHARE = {"client_window": 2, "client_running": 3}
QUEUES = st.sampled_from(["default", "default", "reports"])
CLIENTS = st.sampled_from(["", "ann", "ann", "bob"])
REQUEST_IDS = st.sampled_from(["", "", "", "r1", "r2"])
OUTCOME_STATES = [JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED, JobState.SCHEDULED, JobState.QUEUED]
OUTCOMES = st.sampled_from(OUTCOME_STATES)
SUBMISSIONS = st.fixed_dictionaries(
    {
        "queue": QUEUES,
        "client": CLIENTS,
        "request_id": REQUEST_IDS,
        "priority": st.sampled_from(list(Priority)),
        "later": st.sampled_from([False, False, True]),
        "deadline": st.sampled_from([False, False, True]),
        "max_attempts": st.integers(1, 3),
        "body": st.sampled_from(["same", "same", "other"]),
    }
)


MISHAPS = (
    *("a_time_comes", "a_time_comes", "a_lease_runs_out", "a_lease_runs_out", "a_deadline_passes", "a_deadline_passes"),
    *("sweep", "a_lifetime_passes", "a_worker_dies", "send_again", "messages_are_lost"),
)


@dataclass
class Modelled:
    """What the model knows of a job. Whether it is held, and its dispatch number, are looked up: invariants bind them."""

    job_id: str
    queue: str
    client: str
    request_id: str
    body: str
    state: JobState
    max_attempts: int
    deadline: bool
    revision: int = 1
    attempt: int = 0
    spent: int = 0
    cancel: bool = False
    progress: Progress = ONE_ITEM
    holder: str = ""
    """The claim of the attempt that runs."""
    finished: str = ""
    """The claim whose outcome was recorded last."""
    late: bool = False
    """Its deadline has passed."""
    lives: int = 1
    claims: list[Claim] = field(default_factory=list)

    def go(self, state: JobState) -> None:
        self.state = state
        self.revision += 1


class StoreMachine(RuleBasedStateMachine):
    """One step after another; the concurrent test below has them all at once."""

    url = ""

    @initialize()
    def begin(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.redis = redis.Redis.from_url(self.url)
        self.redis.flushall()
        asked = queue_settings(self.url, **SHARE)
        self.connection = Connection(self.url, 10.0, asked.terms)
        self.run(self.connection.start())
        self.store, self.queues = Store(self.connection, asked), Queues(self.connection, asked)
        self.worker = WorkerStore(worker_settings(self.url, "nowhere:1", lease_s=3600, **SHARE))
        self.worker.start()
        self.broker = build_broker(self.redis)
        self.jobs: dict[str, Modelled] = {}
        self.old: list[tuple[Modelled, Claim]] = []
        """Claims of jobs that are gone."""
        self.hand: list[tuple[str, str, int]] = []
        """Messages that a worker has: priority, job, number."""
        self.dropped: set[str] = set()
        """Messages that were lost with a worker."""
        self.paused: set[str] = set()
        self.ended: Counter[str] = Counter()
        self.count = 0
        for ask in (self.store.cancel, self.store.delete, self.store.retry, self.store.job):
            with pytest.raises(JobNotFound):
                self.run(ask("j99999"))

    def teardown(self) -> None:
        if hasattr(self, "loop"):
            self.run(self.connection.stop())
            self.worker.stop()
            self.redis.close()
            self.loop.close()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.loop.run_until_complete(work)

    def record(self, job_id: str, name: str) -> str:
        return (self.redis.hget(keys.job(job_id), name) or b"").decode()

    def of(self, *states: JobState) -> list[str]:
        """The jobs of these states; of any, without one."""
        return sorted(job for job in self.jobs if not states or self.jobs[job].state in states)

    def pick(self, data: st.DataObject, *states: JobState) -> Modelled | None:
        """One of these."""
        jobs = self.of(*states)
        return self.jobs[data.draw(st.sampled_from(jobs))] if jobs else None

    # ---- the queue server's part

    def submission(self, asked: dict[str, Any]) -> Submission:
        self.count += 1
        now_ms = int(time.time() * 1000)
        return Submission(
            job_id=f"j{self.count:05}",
            request_id=asked["request_id"],
            fingerprint=asked["body"],
            queue=asked["queue"],
            priority=asked["priority"],
            not_before_ms=now_ms + HOUR_MS if asked["later"] else 0,
            deadline_ms=now_ms + 2 * HOUR_MS if asked["deadline"] else 0,
            max_attempts=asked["max_attempts"],
            labels={},
            kind="detect",
            item_count=1,
            work=b"work" * 3,
            blobs={},
            media_ids=(),
            client=asked["client"],
        )

    def submitted(self, asked: Submission, outcome: object) -> None:
        """Compares a submission's outcome with what the model says, and takes it over."""
        same = next(
            (
                job
                for job in self.jobs.values()
                if asked.request_id and (job.client, job.request_id) == (asked.client, asked.request_id)
            ),
            None,
        )
        if same is not None and same.body != asked.fingerprint:
            assert isinstance(outcome, RequestIdReused)
            return
        assert isinstance(outcome, tuple), outcome
        job, created = outcome
        assert created == (same is None)
        if same is not None:
            assert job.job_id == same.job_id
            return
        assert job.job_id == asked.job_id
        self.jobs[job.job_id] = Modelled(
            job_id=job.job_id,
            queue=asked.queue,
            client=asked.client,
            request_id=asked.request_id,
            body=asked.fingerprint,
            state=JobState.SCHEDULED if asked.not_before_ms else JobState.QUEUED,
            max_attempts=asked.max_attempts,
            deadline=bool(asked.deadline_ms),
        )

    @rule(asked=SUBMISSIONS)
    def submit(self, asked: dict[str, Any]) -> None:
        submission = self.submission(asked)
        try:
            outcome: object = self.run(self.store.submit(submission))
        except RequestIdReused as error:
            outcome = error
        self.submitted(submission, outcome)

    @rule(asked=st.lists(SUBMISSIONS, min_size=2, max_size=5), queue=QUEUES, client=CLIENTS)
    def submit_some(self, asked: list[dict[str, Any]], queue: str, client: str) -> None:
        self.submit_many(asked, queue, client)

    def submit_many(self, asked: list[dict[str, Any]], queue: str, client: str) -> None:
        submissions = [self.submission({**one, "queue": queue, "client": client}) for one in asked]
        for submission, outcome in zip(submissions, self.run(self.store.submit_many(submissions)), strict=True):
            self.submitted(submission, outcome)

    @precondition(lambda self: self.jobs)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        if (job := self.pick(data)) is None:
            return
        seen = self.run(self.store.cancel(job.job_id))
        if job.state in WAITING:
            self.ends(job, JobState.CANCELLED)
            job.cancel = True
        elif job.state == JobState.RUNNING and not job.cancel:
            job.cancel = True
            job.revision += 1
        assert seen.state == job.state

    @precondition(lambda self: self.jobs)
    @rule(data=st.data())
    def delete(self, data: st.DataObject) -> None:
        if (job := self.pick(data)) is None:
            return
        if job.state in ENDED:
            self.run(self.store.delete(job.job_id))
            self.forget(job)
        else:
            with pytest.raises(WrongState):
                self.run(self.store.delete(job.job_id))

    @precondition(lambda self: self.jobs)
    @rule(data=st.data())
    def retry(self, data: st.DataObject) -> None:
        if (job := self.pick(data, *ENDED)) is None and (job := self.pick(data)) is None:
            return
        if job.state in RETRIED:
            self.run(self.store.retry(job.job_id))
            job.go(JobState.QUEUED)
            job.spent, job.cancel, job.deadline, job.late = 0, False, False, False
            job.progress = Progress(0, job.progress.total_count, "")
            job.lives += 1
        else:
            with pytest.raises(WrongState):
                self.run(self.store.retry(job.job_id))

    @rule(
        queue=QUEUES,
        whats=st.lists(st.sampled_from(["pause", "resume", "resume", "purge"]), min_size=1, max_size=3),
        asked=st.lists(SUBMISSIONS, min_size=2, max_size=3),
    )
    def operate(self, queue: str, whats: list[str], asked: list[dict[str, Any]]) -> None:
        """The operator's hand, and submissions in between."""
        for what in whats:
            getattr(self, what)(queue)
            self.the_store_is_as_the_model()
            if what == "pause":
                self.submit_many(asked, queue, "ann")

    def pause(self, queue: str) -> None:
        self.run(self.queues.pause(queue))
        self.paused.add(queue)

    def resume(self, queue: str) -> None:
        self.run(self.queues.resume(queue))
        self.paused.discard(queue)

    def purge(self, queue: str) -> None:
        async def purge() -> list[list[str]]:
            return [row async for row in self.queues.purge(queue)]

        waiting = [job for job in self.jobs.values() if job.queue == queue and job.state in WAITING]
        if not self.redis.sismember(keys.QUEUES, queue):
            with pytest.raises(QueueNotFound):
                self.run(purge())
            return
        # What was submitted within this millisecond may be purged too, and may be left: it is asked a little later.
        time.sleep(0.002)
        assert sorted(row[0] for row in self.run(purge())) == sorted(job.job_id for job in waiting)
        for job in waiting:
            self.ends(job, JobState.CANCELLED)
            job.cancel = True

    # ---- the workers' part

    @rule(count=st.integers(1, 4), priority=st.sampled_from(list(Priority)))
    def fetch(self, count: int, priority: Priority) -> None:
        for data in self.broker.do_fetch(priority.value, count):
            if data is not None:
                job_id, number = read_message(data)
                self.hand.append((priority.value, job_id, number))

    @precondition(lambda self: self.hand)
    @rule(data=st.data(), acknowledge=st.booleans())
    def claim_what_came(self, data: st.DataObject, acknowledge: bool) -> None:
        message = data.draw(st.sampled_from(self.hand))
        priority, job_id, number = message
        self.claim(job_id, number)
        if acknowledge:
            self.broker.do_ack(priority, f"{job_id}.{number}")
            self.hand.remove(message)
            # One that was passed over is of no more use; the job of one that was begun has it no more.
            assert f"{job_id}.{number}" not in {
                one.message
                for one in Everything(self.redis).jobs.values()
                if (one.job.state == JobState.QUEUED and not one.job.held)
            }

    @precondition(lambda self: self.jobs)
    @rule(data=st.data(), number=st.integers(1, 5))
    def claim_out_of_turn(self, data: st.DataObject, number: int) -> None:
        if (job := self.pick(data)) is not None:
            self.claim(job.job_id, number)

    def claim(self, job_id: str, number: int) -> None:
        job = self.jobs.get(job_id)
        held, dispatch = self.record(job_id, "held") == "1", self.record(job_id, "dispatch")
        self.count += 1
        claim_id = f"claim {self.count}"
        answer = self.worker.claim(job_id, number, claim_id, "w", b"late")
        if job is None:
            assert answer == "gone"
        elif job.state != JobState.QUEUED or held or number != int(dispatch):
            assert answer == "stale"
        elif job.late:
            assert isinstance(answer, Expired)
            self.ends(job, JobState.EXPIRED)
        elif job.queue in self.paused:
            assert answer == "paused"
        else:
            assert isinstance(answer, Claim)
            job.go(JobState.RUNNING)
            job.attempt += 1
            job.spent += 1
            job.progress = Progress(0, job.progress.total_count, "")
            job.holder = claim_id
            job.claims.append(answer)
            assert (answer.job.attempt, answer.work) == (job.attempt, b"work" * 3)
            # The same claim, asked again because its answer was lost, is the same attempt
            again = self.worker.claim(job_id, number, claim_id, "w", b"")
            assert isinstance(again, Claim) and again.job == answer.job

    @precondition(lambda self: self.of(JobState.QUEUED))
    @rule(count=st.integers(1, 3), acknowledge=st.booleans())
    def work(self, count: int, acknowledge: bool) -> None:
        """As a worker does: takes messages, the most urgent first, and begins what they tell of."""
        for priority in Priority:
            for data in self.broker.do_fetch(priority.value, count):
                if data is not None:
                    job_id, number = read_message(data)
                    self.claim(job_id, number)
                    if acknowledge:
                        self.broker.do_ack(priority.value, f"{job_id}.{number}")
                    else:
                        self.hand.append((priority.value, job_id, number))

    @precondition(lambda self: self.old or any(job.claims for job in self.jobs.values()))
    @rule(data=st.data(), done=st.integers(0, 2))
    def renew(self, data: st.DataObject, done: int) -> None:
        if (picked := self.pick_claim(data)) is None:
            return
        job, claim = picked
        progress = Progress(done, 2, "working")
        word = self.worker.renew(claim, progress)
        if not self.runs(job, claim):
            assert word == "lost"
            return
        assert word == ("cancel" if job.cancel else "ok")
        if progress != job.progress:
            job.progress = progress
            job.revision += 1

    @precondition(lambda self: self.of(JobState.RUNNING))
    @rule(data=st.data(), states=st.lists(OUTCOMES, min_size=1, max_size=3), free=st.booleans())
    def finish(self, data: st.DataObject, states: list[JobState], free: bool) -> None:
        for state in states:
            if (job := self.pick(data, JobState.RUNNING)) is not None:
                self.say(job, job.claims[-1], state, free)

    @precondition(lambda self: self.old or any(job.claims for job in self.jobs.values()))
    @rule(data=st.data(), state=OUTCOMES, free=st.booleans())
    def finish_any(self, data: st.DataObject, state: JobState, free: bool) -> None:
        if (picked := self.pick_claim(data)) is not None:
            self.say(*picked, state, free)

    def say(self, job: Modelled, claim: Claim, state: JobState, free: bool) -> None:
        """Tells the outcome of an attempt, of one that is over too."""
        outcome = Outcome(state, Progress(1, 2, "said"), b"result", b"error", b"why", delay_s=3600, free=free)
        recorded, word = self.worker.finish(claim, outcome)
        if job.job_id in self.jobs and job.finished == claim.claim_id:
            assert (recorded, word) == (True, job.state)
        elif not self.runs(job, claim):
            assert not recorded
        else:
            wanted = JobState.CANCELLED if job.cancel and state != JobState.SUCCEEDED else state
            assert (recorded, word) == (True, wanted)
            job.finished, job.holder = claim.claim_id, ""
            if free and wanted != JobState.CANCELLED:
                job.spent -= 1
            if wanted in ENDED:
                job.progress = outcome.progress
                self.ends(job, wanted)
            else:
                job.go(wanted)
            # Said twice, it is the same
            assert self.worker.finish(claim, outcome) == (True, wanted)

    def send_again(self, data: st.DataObject) -> None:
        if (job := self.pick(data)) is not None:
            number = data.draw(st.sampled_from([1, 2, int(self.record(job.job_id, "dispatch"))]))
            self.worker.redispatch(job.job_id, number)

    def a_worker_dies(self, _: st.DataObject) -> None:
        self.dropped |= {f"{job_id}.{number}" for _, job_id, number in self.hand}
        self.hand.clear()

    # ---- what time and mishaps do

    @precondition(lambda self: self.jobs)
    @rule(data=st.data(), whats=st.lists(st.sampled_from(MISHAPS), min_size=1, max_size=3))
    def mishap(self, data: st.DataObject, whats: list[str]) -> None:
        for what in whats:
            getattr(self, what)(data)
            self.the_store_is_as_the_model()

    def a_deadline_passes(self, data: st.DataObject) -> None:
        job = self.pick(data)
        if job is not None and job.deadline:
            self.redis.hset(keys.job(job.job_id), "deadline_ms", 1)
            self.redis.zadd(keys.DEADLINES, {job.job_id: 1}, xx=True)
            job.late = True

    def sweep(self, _: st.DataObject) -> None:
        late = [job for job in self.jobs.values() if job.state in WAITING and job.late]
        self.moved("sweep_expired", late, expired="")
        for job in late:
            self.ends(job, JobState.EXPIRED)
        self.run(self.store.release_held())

    def a_time_comes(self, data: st.DataObject) -> None:
        if (job := self.pick(data, JobState.SCHEDULED)) is not None:
            self.redis.zadd(keys.DELAYED, {job.job_id: 1}, xx=True)
            self.moved("sweep_due", [job])
            job.go(JobState.QUEUED)

    def a_lease_runs_out(self, data: st.DataObject) -> None:
        if (job := self.pick(data, JobState.RUNNING)) is None:
            return
        self.redis.zadd(keys.LEASES, {job.job_id: 1}, xx=True)
        assert [row[3] for row in self.run(self.store.sweep("sweep_lost", errors={}))] == ["UNKNOWN"]
        self.moved("sweep_lost", [job], errors={"w": "bG9zdA=="})
        job.holder = ""
        if job.cancel:
            self.ends(job, JobState.CANCELLED)
        elif job.spent >= job.max_attempts:
            self.ends(job, JobState.FAILED)
        else:
            job.go(JobState.QUEUED)

    def a_lifetime_passes(self, data: st.DataObject) -> None:
        if (job := self.pick(data, *ENDED)) is not None:
            self.redis.zadd(keys.ENDED, {job.job_id: 1}, xx=True)
            self.moved("sweep_forgotten", [job])
            self.forget(job)

    def messages_are_lost(self, _: st.DataObject) -> None:
        # Given that whatever lies in the lists was lost too
        for priority in Priority:
            while messages := self.broker.do_fetch(priority.value, 50):
                self.dropped |= {"{}.{}".format(*read_message(data)) for data in messages if data is not None}
        time.sleep(0.002)
        self.run(self.store.sweep("sweep_overdue", priorities=[one.value for one in Priority], overdue_ms=0))
        # Then all that wait for a worker are in a list again
        self.dropped.clear()
        self.hand.clear()

    # ---- the model

    def moved(self, script: str, jobs: list[Modelled], **parameters: object) -> None:
        """Runs a sweep, which moves these jobs and no others; a second one moves none."""
        assert sorted(row[0] for row in self.run(self.store.sweep(script, **parameters))) == sorted(
            job.job_id for job in jobs
        )
        assert self.run(self.store.sweep(script, **parameters)) == []

    def pick_claim(self, data: st.DataObject) -> tuple[Modelled, Claim] | None:
        """A claim of any attempt, over or not; of a job that is gone too."""
        claims = [(job, claim) for job in self.jobs.values() for claim in job.claims] + self.old
        if not claims:
            return None
        # The last ones are those that run, mostly.
        job, claim = data.draw(st.sampled_from(claims[::-1]))
        return job, claim

    def runs(self, job: Modelled, claim: Claim) -> bool:
        return job.job_id in self.jobs and job.state == JobState.RUNNING and job.holder == claim.claim_id

    def ends(self, job: Modelled, state: JobState) -> None:
        job.go(state)
        self.ended[state.value] += 1

    def forget(self, job: Modelled) -> None:
        del self.jobs[job.job_id]
        self.old.extend((job, claim) for claim in job.claims[-1:])

    @invariant()
    def the_store_is_as_the_model(self) -> None:
        everything = Everything(self.redis)
        in_hand = self.dropped | {f"{job_id}.{number}" for _, job_id, number in self.hand}
        assert everything.problems(in_hand) == []
        assert everything.jobs.keys() == self.jobs.keys()
        for job_id, seen in everything.jobs.items():
            model, job = self.jobs[job_id], seen.job
            assert (job.state, job.revision, job.attempt, job.spent, job.cancel_requested, job.progress) == (
                *(model.state, model.revision, model.attempt, model.spent, model.cancel, model.progress),
            ), job_id
            ends = [one for one in seen.history if one.ended]
            assert len(ends) == model.lives - (job.state not in ENDED)
        # Ends are counted once each, those of deleted jobs too
        counted: Counter[str] = Counter()
        for queue in ("default", "reports"):
            for name, number in self.redis.hgetall(keys.queue_counts(queue)).items():
                if name.startswith(b"ended:"):
                    counted[name.decode().rpartition(":")[2]] += int(number)
        assert counted == self.ended
        self.nobody_waits_for_nothing(everything)

    def nobody_waits_for_nothing(self, everything: Everything) -> None:
        """A held job has a reason: its queue is paused, or its client has its share of the list or of the workers."""
        jobs = [seen.job for seen in everything.jobs.values()]
        for held in (job for job in jobs if job.held):
            mine = [job for job in jobs if (job.queue, job.client) == (held.queue, held.client)]
            listed = [job for job in mine if job.state == JobState.QUEUED and not job.held]
            running = [job for job in mine if job.state == JobState.RUNNING]
            assert (
                held.queue in self.paused
                or sum(job.priority == held.priority for job in listed) >= SHARE["client_window"]
                or len(listed) + len(running) >= SHARE["client_running"]
            ), f"{held.job_id} is held for nothing"


def read_message(data: bytes) -> tuple[str, int]:
    job_id, number = json.loads(data)["args"]
    return job_id, number
