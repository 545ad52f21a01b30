"""Reads a job's record and its changes as Redis holds them.

A record is a hash of strings; a change is a JSON object with the fields that it set. A record's changing fields are what its
changes add up to, so that a watcher can tell the job as it was after each of them.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from queue_server.jobs import Attempt, Job, JobState, Priority, Progress, Webhook

Fields = Mapping[str, str]
"""The fields of a record's hash."""

# What a submission sets once; all other fields come from the changes.
BORN = (
    *("id", "kind", "queue", "priority", "labels", "request_id"),
    *("max_attempts", "created_ms", "client", "trace", "hook"),
)


@dataclass(frozen=True)
class Kept:
    """A record, what its changes that are no longer kept add up to, and those that are, oldest first."""

    fields: Fields
    base: Fields
    changes: Sequence[Fields]


def read_fields(reply: Mapping[bytes, bytes] | Sequence[bytes]) -> Fields:
    """The fields of a HGETALL, from the client (a mapping) or from a script (a flat list)."""
    pairs: Iterable[tuple[bytes, bytes]]
    pairs = reply.items() if isinstance(reply, Mapping) else zip(reply[::2], reply[1::2], strict=True)
    return {name.decode(): value.decode() for name, value in pairs}


def read_change(line: bytes) -> Fields:
    """One entry of a job's list of changes."""
    return {str(name): str(value) for name, value in json.loads(line).items()}


def read_job(fields: Fields) -> Job:
    """The job that a record's fields tell of."""

    def number(name: str) -> int:
        return int(fields.get(name) or 0)

    return Job(
        job_id=fields["id"],
        kind=fields["kind"],
        state=JobState(fields["state"]),
        queue=fields["queue"],
        priority=Priority(fields["priority"]),
        max_attempts=number("max_attempts"),
        create_ms=number("created_ms"),
        labels=json.loads(fields.get("labels") or "{}"),
        request_id=fields.get("request_id", ""),
        not_before_ms=number("not_before_ms"),
        deadline_ms=number("deadline_ms"),
        start_ms=number("started_ms"),
        end_ms=number("ended_ms"),
        expire_ms=number("expire_ms"),
        revision=number("rev"),
        attempt=number("attempt"),
        spent=number("spent"),
        cancel_requested=fields.get("cancel") == "1",
        progress=Progress(number("done"), number("total"), fields.get("msg", "")),
        attempts=_read_attempts(fields),
        error=base64.b64decode(fields.get("error", "")),
        client=fields.get("client", ""),
        held=fields.get("held") == "1" and fields["state"] == JobState.QUEUED,
        trace=fields.get("trace", ""),
        webhook=_read_webhook(fields),
    )


def history(kept: Kept) -> list[Job]:
    """The job after each change that is kept, oldest first."""
    fields = {**{name: kept.fields.get(name, "") for name in BORN}, **kept.base}
    jobs = []
    for change in kept.changes:
        fields.update(change)
        jobs.append(read_job(fields))
    return jobs


def write_status(status: bytes) -> str:
    """A serialised Status as it stands in a record."""
    return base64.b64encode(status).decode()


def _read_webhook(fields: Fields) -> Webhook | None:
    if not fields.get("hook"):
        return None
    return Webhook(
        fields["hook"],
        int(fields.get("hook_n") or 0),
        int(fields.get("hook_ms") or 0),
        base64.b64decode(fields.get("hook_error", "")),
    )


def _read_attempts(fields: Fields) -> tuple[Attempt, ...]:
    attempts = []
    for name, value in fields.items():
        # An empty one made room for a later one.
        if name.startswith("att:") and value:
            start_ms, end_ms, worker, error = json.loads(value)
            attempts.append(Attempt(int(name[4:]), int(start_ms), int(end_ms), worker, base64.b64decode(error)))
    return tuple(sorted(attempts, key=lambda attempt: attempt.number))
