"""The names of everything in Redis.

One hash tag, `{vq}`, so that a Redis Cluster keeps all of it on one node and a script may touch it together.
scripts/record.lua builds the same names; tests/queue_server/test_layout.py compares.

    {vq}:job:<id>            hash: the record            {vq}:job:<id>:ev      list: its changes, one JSON object each
    {vq}:job:<id>:work       the Work, serialised        {vq}:job:<id>:res     the JobResult, serialised
    {vq}:job:<id>:media      set: the images it needs, until it ends
    {vq}:job:<id>:base       hash: what the changes that are no longer kept add up to, in jobs of very many changes
    {vq}:blob:<media_id>     an image                    {vq}:blob:<media_id>:jobs   set: the jobs that need it
    {vq}:idem:<request_id>   hash: job, fingerprint; 24 h
    {vq}:idx:all, :idx:state:<state>, :idx:queue:<queue>   zsets, score 0: ids in the order of their creation
    {vq}:delayed             zset: SCHEDULED, by the time they are due
    {vq}:leases              zset: RUNNING, by the end of their lease
    {vq}:deadlines           zset: not begun, by deadline
    {vq}:ended               zset: by the time their record is deleted
    {vq}:wait:<priority>     zset: QUEUED, by the time their message was sent
    {vq}:queues              set: queues that have had a job
    {vq}:q:<queue>:wait      zset: QUEUED, by the time they were queued: depth and oldest age
    {vq}:q:<queue>:n         hash: jobs by state, and counters `attempts:<kind>`, `ended:<kind>:<state>`
    {vq}:q:<queue>:lat:<kind>   hash: the cumulative latency histogram
    {vq}:q:<queue>:slot:<n>  hash: what ended within one slot of SLOT_S seconds, for throughput and quantiles; 10 min
    {vq}:workers             zset: by the time they were last heard of    {vq}:worker:<name>   hash
    {vq}:door                stream: the ids of jobs that changed, for watchers
    {vq}:d:…                 Dramatiq's own: lists of message ids, hashes of messages, acks, heartbeats
"""

from __future__ import annotations

TAG = "{vq}"
DRAMATIQ_NAMESPACE = f"{TAG}:d"
SLOT_S = 10

DELAYED = f"{TAG}:delayed"
LEASES = f"{TAG}:leases"
DEADLINES = f"{TAG}:deadlines"
ENDED = f"{TAG}:ended"
QUEUES = f"{TAG}:queues"
WORKERS = f"{TAG}:workers"
DOOR = f"{TAG}:door"
ALL = f"{TAG}:idx:all"


def job(job_id: str) -> str:
    """The hash of a record."""
    return f"{TAG}:job:{job_id}"


def changes(job_id: str) -> str:
    """The list of a job's changes."""
    return f"{TAG}:job:{job_id}:ev"


def base(job_id: str) -> str:
    """What the changes that are no longer kept add up to."""
    return f"{TAG}:job:{job_id}:base"


def work(job_id: str) -> str:
    """The serialised Work."""
    return f"{TAG}:job:{job_id}:work"


def result(job_id: str) -> str:
    """The serialised JobResult."""
    return f"{TAG}:job:{job_id}:res"


def blob(media_id: str) -> str:
    """The bytes of an image."""
    return f"{TAG}:blob:{media_id}"


def by_state(state: str) -> str:
    """The index of the jobs in one state."""
    return f"{TAG}:idx:state:{state}"


def by_queue(queue: str) -> str:
    """The index of the jobs of one queue."""
    return f"{TAG}:idx:queue:{queue}"


def queue_wait(queue: str) -> str:
    """The QUEUED jobs of one queue."""
    return f"{TAG}:q:{queue}:wait"


def queue_counts(queue: str) -> str:
    """The counts of one queue."""
    return f"{TAG}:q:{queue}:n"


def queue_slot(queue: str, slot: int) -> str:
    """What ended in one queue within one slot of time."""
    return f"{TAG}:q:{queue}:slot:{slot}"


def queue_latency(queue: str, kind: str) -> str:
    """The latency histogram of one queue and kind."""
    return f"{TAG}:q:{queue}:lat:{kind}"


def worker(name: str) -> str:
    """The hash of a worker."""
    return f"{TAG}:worker:{name}"


def dramatiq_list(priority: str) -> str:
    """Dramatiq's list of message ids that wait."""
    return f"{DRAMATIQ_NAMESPACE}:{priority}"


def dramatiq_messages(priority: str) -> str:
    """Dramatiq's hash of messages."""
    return f"{DRAMATIQ_NAMESPACE}:{priority}.msgs"
