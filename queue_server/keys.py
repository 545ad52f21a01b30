"""The names of everything in Redis.

One hash tag, `{vq}`, so that a Redis Cluster keeps all of it on one node and a script may touch it together.
scripts/record.lua builds the same names; tests/queue_server/test_layout.py compares.

    {vq}:job:<id>            hash: the record            {vq}:job:<id>:ev      list: its changes, one JSON object each
    {vq}:job:<id>:work       the Work, serialised        {vq}:job:<id>:res     the JobResult, serialised
    {vq}:job:<id>:media      set: the files it needs, pinned until it ends
    {vq}:job:<id>:files      set: its result's files, pinned until it is forgotten
    {vq}:job:<id>:base       hash: what the changes that are no longer kept add up to, in jobs of very many changes
    {vq}:media:<media_id>    hash: size, type, place (`redis`, `object`), object (its name), stored_ms, until_ms; no
                             end while a job needs it
    {vq}:media:<media_id>:jobs   set: the jobs that need it
    {vq}:blob:<media_id>     its bytes, when they lie in Redis
    {vq}:part:<upload>       the bytes of a file that is still being written to Redis; 5 min
    {vq}:objects             zset: what lies in the object store, by when to look at it: `<name>` (being written),
                             `<name> <media_id>`, `<name> -` (to be deleted)
    {vq}:idem:<client>:<request_id>   hash: job, fingerprint; 24 h
    {vq}:idx:all, :idx:state:<state>, :idx:queue:<queue>, :idx:client:<client>   zsets, score 0: ids by creation
    {vq}:delayed             zset: SCHEDULED, by the time they are due
    {vq}:leases              zset: RUNNING, by the end of their lease
    {vq}:deadlines           zset: not begun, by deadline
    {vq}:ended               zset: by the time their record is deleted
    {vq}:wait:<priority>     zset: QUEUED with a message in the broker, by the time it was sent
    {vq}:held:<priority>:<queue>:<client>   zset: QUEUED without a message (paused, or the client has its share), by the same time
    {vq}:listed              hash: jobs in {vq}:wait:… by `<priority>:<queue>:<client>`
    {vq}:running             hash: RUNNING by `<queue>:<client>`
    {vq}:queues              set: queues that have had a job            {vq}:paused   set: queues that are paused
    {vq}:clients, {vq}:q:<queue>:clients   zsets: clients by how many of their jobs wait
    {vq}:bytes               hash: bytes of jobs that have not ended: `all`, `q:<queue>`, `c:<client>`
    {vq}:q:<queue>:later     zset: SCHEDULED, by creation
    {vq}:hooks               zset: ended jobs whose webhook is to be called, by when
    {vq}:q:<queue>:wait      zset: QUEUED, by the time they were queued: depth and oldest age
    {vq}:hooks:n             hash: tries of webhooks by outcome
    {vq}:q:<queue>:n         hash: jobs by state, HELD, and counters `attempts:<kind>`, `outcome:<kind>:<outcome>` (of attempts),
                             `ended:<kind>:<state>`
    {vq}:q:<queue>:times:<kind>   hash: histograms, `<name>:<bound>` and `<name>:ms` (their sum), of `total`, `wait`, `run`
    {vq}:q:<queue>:slot:<n>  hash: what ended within one slot of SLOT_S seconds, for throughput and quantiles; 10 min
    {vq}:lost:<id>           the request_id of a job that Redis came back without; 24 h
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
PAUSED = f"{TAG}:paused"
LISTED = f"{TAG}:listed"
RUNNING = f"{TAG}:running"
CLIENTS = f"{TAG}:clients"
BYTES = f"{TAG}:bytes"
HOOKS = f"{TAG}:hooks"
HOOK_COUNTS = f"{TAG}:hooks:n"
OBJECTS = f"{TAG}:objects"
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


def lost(job_id: str) -> str:
    """The request_id of a job that was accepted and lost."""
    return f"{TAG}:lost:{job_id}"


def work(job_id: str) -> str:
    """The serialised Work."""
    return f"{TAG}:job:{job_id}:work"


def result(job_id: str) -> str:
    """The serialised JobResult."""
    return f"{TAG}:job:{job_id}:res"


def blob(media_id: str) -> str:
    """The bytes of a stored file."""
    return f"{TAG}:blob:{media_id}"


def part(upload: str) -> str:
    """The bytes of a file that is still being written."""
    return f"{TAG}:part:{upload}"


def by_state(state: str) -> str:
    """The index of the jobs in one state."""
    return f"{TAG}:idx:state:{state}"


def by_queue(queue: str) -> str:
    """The index of the jobs of one queue."""
    return f"{TAG}:idx:queue:{queue}"


def by_client(client: str) -> str:
    """The index of the jobs of one client."""
    return f"{TAG}:idx:client:{client}"


def queue_clients(queue: str) -> str:
    """The clients that have jobs waiting in one queue, by how many."""
    return f"{TAG}:q:{queue}:clients"


def media(media_id: str) -> str:
    """What is known of a stored file."""
    return f"{TAG}:media:{media_id}"


def held(priority: str, queue: str, client: str) -> str:
    """The jobs of one client that are held."""
    return f"{TAG}:held:{priority}:{queue}:{client}"


def queue_wait(queue: str) -> str:
    """The QUEUED jobs of one queue."""
    return f"{TAG}:q:{queue}:wait"


def queue_counts(queue: str) -> str:
    """The counts of one queue."""
    return f"{TAG}:q:{queue}:n"


def queue_slot(queue: str, slot: int) -> str:
    """What ended in one queue within one slot of time."""
    return f"{TAG}:q:{queue}:slot:{slot}"


def queue_times(queue: str, kind: str) -> str:
    """The histograms of one queue and kind."""
    return f"{TAG}:q:{queue}:times:{kind}"


def worker(name: str) -> str:
    """The hash of a worker."""
    return f"{TAG}:worker:{name}"


def dramatiq_list(priority: str) -> str:
    """Dramatiq's list of message ids that wait."""
    return f"{DRAMATIQ_NAMESPACE}:{priority}"


def dramatiq_messages(priority: str) -> str:
    """Dramatiq's hash of messages."""
    return f"{DRAMATIQ_NAMESPACE}:{priority}.msgs"
