"""Reads everything in Redis at one moment and tells what does not fit together: records against indexes, counts, messages."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise

import redis

from queue_server import keys
from queue_server.jobs import ENDED, FIRST, NEXT, RETRIED, Job, JobState, Priority
from queue_server.records import Fields, Kept, history, read_change, read_fields, read_job

WAITING = (JobState.SCHEDULED, JobState.QUEUED)


@dataclass(frozen=True)
class Seen:
    """A record, its job, and the job after each of its changes."""

    fields: Fields
    job: Job
    history: tuple[Job, ...]

    @property
    def message(self) -> str:
        """The id of the message that may begin it now."""
        return f"{self.job.job_id}.{self.fields['dispatch']}"


class Everything:
    """A snapshot: call it while nobody writes."""

    def __init__(self, client: redis.Redis) -> None:
        self._values: dict[str, object] = {}
        names = [name.decode() for name in client.scan_iter(count=1000)]
        pipeline = client.pipeline(transaction=False)
        for name in names:
            pipeline.type(name)
        types = [kind.decode() for kind in pipeline.execute()]
        for name, kind in zip(names, types, strict=True):
            match kind:
                case "hash":
                    pipeline.hgetall(name)
                case "zset":
                    pipeline.zrange(name, 0, -1)
                case "set":
                    pipeline.smembers(name)
                case "list":
                    pipeline.lrange(name, 0, -1)
                case _:
                    pipeline.exists(name)
        self._values = dict(zip(names, pipeline.execute(), strict=True))
        self.jobs: dict[str, Seen] = {}
        for name in names:
            job_id = name.removeprefix(f"{keys.TAG}:job:")
            if name != job_id and ":" not in job_id:
                self.jobs[job_id] = self._read(job_id)
        self.lists = {one: [name.decode() for name in self._list(keys.dramatiq_list(one))] for one in Priority}

    def problems(self, in_hand: Container[str] = ()) -> list[str]:
        """What is wrong, one line each; `in_hand`: messages that workers have, or that were lost on purpose."""
        return [*self._wrong_indexes(), *self._wrong_counts(), *self._wrong_messages(in_hand), *self._wrong_histories()]

    def _read(self, job_id: str) -> Seen:
        fields = read_fields(self._values[keys.job(job_id)])
        base = read_fields(self._values.get(keys.base(job_id), {}))
        changes = [read_change(line) for line in self._list(keys.changes(job_id))]
        return Seen(fields, read_job(fields), tuple(history(Kept(fields, base, changes))))

    def _list(self, name: str) -> list[bytes]:
        return list(self._values.get(name, []))

    def _members(self, name: str) -> set[str]:
        return {member.decode() for member in self._values.get(name, [])}

    def _hash(self, name: str) -> dict[str, int]:
        """The numbers of a hash that are not 0."""
        values: Mapping[bytes, bytes] = self._values.get(name, {})
        return {
            field.decode(): int(value)
            for field, value in values.items()
            if value.isdigit() or value[:1] == b"-"
            if int(value)
        }

    def _ids(self, *states: JobState) -> set[str]:
        return {job_id for job_id, seen in self.jobs.items() if seen.job.state in states}

    def _wrong_indexes(self) -> list[str]:
        jobs = [seen.job for seen in self.jobs.values()]
        wanted: dict[str, set[str]] = {
            keys.ALL: {job.job_id for job in jobs},
            keys.DELAYED: self._ids(JobState.SCHEDULED),
            keys.LEASES: self._ids(JobState.RUNNING),
            keys.ENDED: self._ids(*ENDED),
            keys.DEADLINES: {job.job_id for job in jobs if job.deadline_ms and job.state in WAITING},
        }
        for state in JobState:
            wanted[keys.by_state(state)] = self._ids(state)
        for job in jobs:
            for name in (
                keys.by_queue(job.queue),
                f"{keys.TAG}:idx:client:{job.client}",
                *([keys.queue_wait(job.queue)] if job.state == JobState.QUEUED else []),
                *([f"{keys.TAG}:q:{job.queue}:later"] if job.state == JobState.SCHEDULED else []),
                *([f"{keys.TAG}:wait:{job.priority}"] if job.state == JobState.QUEUED and not job.held else []),
                *([f"{keys.TAG}:held:{job.priority}:{job.queue}:{job.client}"] if job.held else []),
            ):
                wanted.setdefault(name, set()).add(job.job_id)
        prefixes = tuple(f"{keys.TAG}:{part}:" for part in ("idx", "wait", "held"))
        found = {name for name in self._values if name.startswith(prefixes) or name.endswith((":wait", ":later"))}
        problems = []
        for name in sorted({*wanted, *found}):
            here, there = self._members(name), wanted.get(name, set())
            if here != there:
                problems.append(f"{name} has {sorted(here - there)} too many, {sorted(there - here)} are missing")
        for name in self._values:
            owner = name.removeprefix(f"{keys.TAG}:job:").split(":")[0]
            if name.startswith(f"{keys.TAG}:job:") and owner not in self.jobs:
                problems.append(f"{name} is left of a job that is gone")
        return problems

    def _wrong_counts(self) -> list[str]:
        jobs = [seen.job for seen in self.jobs.values()]
        waiting = [job for job in jobs if job.state in WAITING]
        queued = [job for job in jobs if job.state == JobState.QUEUED]
        hashes: dict[str, Counter[str]] = {
            keys.LISTED: Counter(f"{job.priority}:{job.queue}:{job.client}" for job in queued if not job.held),
            keys.RUNNING: Counter(f"{job.queue}:{job.client}" for job in jobs if job.state == JobState.RUNNING),
            keys.BYTES: Counter(),
        }
        for seen in self.jobs.values():
            if not seen.job.ended and (size := int(seen.fields["bytes"])):
                for field in ("all", f"q:{seen.job.queue}", f"c:{seen.job.client}"):
                    hashes[keys.BYTES][field] += size
        problems = [
            f"{name} is {self._hash(name)} instead of {dict(counts)}"
            for name, counts in hashes.items()
            if self._hash(name) != dict(counts)
        ]
        for queue in self._members(keys.QUEUES):
            counts = Counter({state.value: 0 for state in JobState})
            counts.update(job.state.value for job in jobs if job.queue == queue)
            counts["HELD"] = sum(job.held for job in jobs if job.queue == queue)
            found = self._hash(keys.queue_counts(queue))
            problems += [
                f"{keys.queue_counts(queue)} counts {found.get(name, 0)} {name} instead of {number}"
                for name, number in counts.items()
                if found.get(name, 0) != number
            ]
        for name, group in (
            (keys.CLIENTS, waiting),
            *(
                (f"{keys.TAG}:q:{q}:clients", [job for job in waiting if job.queue == q])
                for q in self._members(keys.QUEUES)
            ),
        ):
            if self._members(name) != {job.client for job in group}:
                problems.append(f"{name} has {self._members(name)} instead of { ({job.client for job in group}) }")
        return problems

    def _wrong_messages(self, in_hand: Container[str]) -> list[str]:
        listed = {message for messages in self.lists.values() for message in messages}
        return [
            f"{job_id} is QUEUED, and nobody has its message {seen.message}"
            for job_id, seen in self.jobs.items()
            if seen.job.state == JobState.QUEUED
            and not seen.job.held
            and seen.message not in listed
            and seen.message not in in_hand
        ]

    def _wrong_histories(self) -> list[str]:
        problems = []
        for job_id, seen in self.jobs.items():
            told = seen.history
            # A deadline of 1 was set by the test, so that it has passed.
            deadline_ms = told[-1].deadline_ms if seen.job.deadline_ms == 1 else seen.job.deadline_ms
            if told[-1] != replace(seen.job, held=told[-1].held, deadline_ms=deadline_ms):
                problems.append(f"{job_id} is {seen.job}, its changes add up to {told[-1]}")
            if [job.revision for job in told] != list(range(told[0].revision, told[0].revision + len(told))):
                problems.append(f"{job_id} has the revisions {[job.revision for job in told]}")
            if told[0].revision == 1 and told[0].state not in FIRST:
                problems.append(f"{job_id} was born {told[0].state}")
            for before, after in pairwise(told):
                by_hand = before.state in RETRIED and after.state == JobState.QUEUED
                if not by_hand and after.state not in NEXT[before.state]:
                    problems.append(f"{job_id} went from {before.state} to {after.state}")
        return problems
