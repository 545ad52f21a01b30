"""Whether everything in Redis agrees with the jobs' records once all have ended: looked at key by key, by nobody's scripts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import redis

from queue_server.jobs import ENDED, JobState, Priority
from queue_server.keys import (
    ALL,
    DRAMATIQ_NAMESPACE,
    TAG,
    by_queue,
    by_state,
    dramatiq_list,
    dramatiq_messages,
    queue_counts,
)

# Sets, lists and hashes that a job is in only while it has not ended: where all have, there is nothing.
EMPTY = (
    *("leases", "delayed", "deadlines", "running", "listed", "clients", "bytes"),
    *("wait:*", "held:*", "q:*:wait", "q:*:later", "q:*:clients", "media:*:jobs", "blob:*:jobs"),
)


def inconsistencies(client: redis.Redis) -> list[str]:
    """A line for each thing that does not fit; empty: all fits."""
    records = dict(_records(client))
    found = [f"{job_id} is {one['state']}" for job_id, one in records.items() if one["state"] not in ENDED]
    for pattern in EMPTY:
        for name in client.scan_iter(f"{TAG}:{pattern}"):
            found.append(f"{name.decode()} still holds something")
    for priority in Priority:
        if client.exists(dramatiq_list(priority)):
            found.append(f"{dramatiq_list(priority)} still holds messages")
        # Dramatiq keeps those that killed workers had in hand until it looks for them, some time after their last heartbeat.
        names = client.scan_iter(f"{DRAMATIQ_NAMESPACE}:__acks__.*.{priority}")
        in_hand = {message for name in names for message in _set(client, name)}
        for message in _fields(client, dramatiq_messages(priority)) - in_hand:
            found.append(f"message {message.decode()} is in no list and in nobody's hand")
    found += _compare("idx:all", _members(client, ALL), set(records))
    for state in JobState:
        expected = {job_id for job_id, one in records.items() if one["state"] == state}
        found += _compare(f"idx:state:{state}", _members(client, by_state(state)), expected)
    for queue in sorted({one["queue"] for one in records.values()}):
        mine = {job_id: one for job_id, one in records.items() if one["queue"] == queue}
        found += _compare(f"idx:queue:{queue}", _members(client, by_queue(queue)), set(mine))
        found += _check_counts(client, queue, mine)
    for pattern in ("media:*", "blob:*"):
        for name in client.scan_iter(f"{TAG}:{pattern}"):
            if client.ttl(name) == -1 and not name.endswith(b":jobs"):
                found.append(f"{name.decode()} would be kept for ever")
    return found


def _check_counts(client: redis.Redis, queue: str, records: dict[str, dict[str, str]]) -> list[str]:
    counts: Any = client.hgetall(queue_counts(queue))
    by_state_now = Counter(one["state"] for one in records.values())
    ends = Counter((one["kind"], one["state"]) for one in records.values() if one["state"] in ENDED)
    found = []
    for state in JobState:
        count = int(counts.get(state.encode(), 0))
        if count != by_state_now[state]:
            found.append(f"queue {queue} counts {count} jobs {state}, there are {by_state_now[state]}")
    if int(counts.get(b"HELD", 0)) != 0:
        found.append(f"queue {queue} counts {int(counts[b'HELD'])} held jobs")
    for name, value in counts.items():
        match name.decode().split(":"):
            case ["ended", kind, state] if int(value) != ends[kind, state]:
                found.append(
                    f"queue {queue} has counted {int(value)} ends {state} of {kind}, there were {ends[kind, state]}"
                )
    return found


def _records(client: redis.Redis) -> Iterator[tuple[str, dict[str, str]]]:
    for name in client.scan_iter(f"{TAG}:job:*", _type="hash"):
        job_id = name.decode().removeprefix(f"{TAG}:job:")
        if ":" not in job_id:
            values: Any = client.hmget(name, ["state", "queue", "kind"])
            state, queue, kind = ((value or b"").decode() for value in values)
            yield job_id, {"state": state, "queue": queue, "kind": kind}


def _set(client: redis.Redis, name: bytes) -> set[bytes]:
    members: Any = client.smembers(name)
    return set(members)


def _fields(client: redis.Redis, name: str) -> set[bytes]:
    fields: Any = client.hkeys(name)
    return set(fields)


def _members(client: redis.Redis, name: str) -> set[str]:
    members: Any = client.zrange(name, 0, -1)
    return {member.decode() for member in members}


def _compare(name: str, listed: set[str], expected: set[str]) -> list[str]:
    return [
        *(f"{name} lists {job_id}, which is not so" for job_id in sorted(listed - expected)),
        *(f"{name} lacks {job_id}" for job_id in sorted(expected - listed)),
    ]
