"""Jobs of a release as Redis holds them, in a file: `python -m tests.delivery.records FILE`, run from that release's sources.

Every state is among them, also a job that was running when its worker was killed. Restored, their times are moved so that the
moment of the recording is now.
"""

from __future__ import annotations

import base64
import json
import re
import socket
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import redis
from ai4thai import QueueClient
from ai4thai.job_results import JobState
from ai4thai.options import Message
from ai4thai.submissions import Submission

from benchmarks.chaos_vision import write_image
from benchmarks.processes import Measured
from benchmarks.rehearsal_parts import wait_until

RECORDS = tuple(sorted((Path(__file__).parent / "records").glob("*.json")))
MILLISECONDS = re.compile(rb"(?<![0-9.])1[7-9][0-9]{11}(?![0-9.])")
"""A time in a record or a change: 13 digits that stand alone."""

WORKER = re.compile(re.escape(socket.gethostname().encode()) + rb"-[0-9]+-[0-9a-f]{4}(?![0-9a-f])")
"""A worker's name, which has its machine's."""


def record(url: str) -> dict[str, Any]:
    """Everything in Redis, by key: its type and its content, bytes in base64."""
    client = redis.Redis.from_url(url)

    def b(content: bytes) -> str:
        return base64.b64encode(WORKER.sub(b"worker-1", content)).decode()

    kept: dict[str, Any] = {"taken_ms": int(time.time() * 1000), "keys": {}}
    for key in sorted(client.keys("*")):
        match client.type(key):
            case b"string":
                content: Any = b(client.get(key))
            case b"hash":
                content = {b(name): b(value) for name, value in client.hgetall(key).items()}
            case b"list":
                content = [b(one) for one in client.lrange(key, 0, -1)]
            case b"set":
                content = sorted(b(one) for one in client.smembers(key))
            case b"zset":
                content = [[b(one), score] for one, score in client.zrange(key, 0, -1, withscores=True)]
            case _:
                continue  # the stream of changes: watchers of that moment alone
        name = WORKER.sub(b"worker-1", key).decode()
        kept["keys"][name] = [client.type(key).decode(), max(0, client.pttl(key)), content]
    return kept


def restore(url: str, kept: dict[str, Any]) -> None:
    """Writes it into an empty Redis, its times moved to now."""
    client = redis.Redis.from_url(url)
    later_ms = int(time.time() * 1000) - kept["taken_ms"]

    def b(text: str) -> bytes:
        return base64.b64decode(text)

    def moved(text: str) -> bytes:
        return MILLISECONDS.sub(lambda found: str(int(found[0]) + later_ms).encode(), b(text))

    for key, (kind, ttl_ms, content) in kept["keys"].items():
        match kind:
            case "string":
                client.set(key, b(content))
            case "hash":
                client.hset(key, mapping={b(name): moved(value) for name, value in content.items()})
            case "list":
                client.rpush(key, *(moved(one) for one in content))
            case "set":
                client.sadd(key, *(b(one) for one in content))
            case "zset":
                client.zadd(key, {b(one): score + later_ms if score > 1.6e12 else score for one, score in content})
        if ttl_ms:
            client.pexpire(key, ttl_ms)


def image(seconds: float, name: str, *, good: bool = True) -> bytes:
    """A picture for the stand-in vision server."""
    return write_image(seconds, good=good, filling=name.encode())


def make_jobs(url: str) -> dict[str, str]:
    """Has this release's own servers bring jobs into every state; their ids by a name that says which."""
    with ExitStack() as running, tempfile.TemporaryDirectory() as folder:
        vision = running.enter_context(Measured("benchmarks.chaos_vision", "--port", "0"))
        env = {"REDIS_URL": url, "QUEUE_WORKER_PORT": "0", "QUEUE_VISION_ADDRESS": vision.address, "TMPDIR": folder}
        env |= {"QUEUE_LEASE_S": "4", "QUEUE_RENEW_S": "0.5"}
        server = running.enter_context(Measured("queue_server", env=env))
        worker = running.enter_context(Measured("queue_server.worker", env=env, ready="working"))
        queue = running.enter_context(QueueClient(server.address))

        def submit(name: str, seconds: float = 0.0, *, good: bool = True, **more: Any) -> str:
            images = [image(seconds, f"{name}-{number}", good=good) for number in range(2)]
            return queue.submit(Submission.detect(images, labels={"name": name}, **more)).job_id

        jobs = {
            "succeeded": submit("succeeded", request_id="request-succeeded", client="somebody"),
            "bad image": submit("bad image", good=False),
            "failed": queue.submit(Submission.generate([Message("user", "Who is there?")], max_attempts=1)).job_id,
        }
        for name in jobs:
            queue.wait(jobs[name], 60)
        queue.pause("paused")
        jobs["held"] = submit("held", queue="paused")
        jobs["cancelled"] = queue.cancel(submit("cancelled", queue="paused")).job_id
        jobs["scheduled"] = submit("scheduled", delay_s=5.0)
        jobs["expiring"] = submit("expiring", queue="paused", deadline_s=5.0)
        jobs["running"] = submit("running", 3.0)
        wait_until("it runs", lambda: queue.get(jobs["running"]).state is JobState.RUNNING)
        worker._process.kill()
        for priority in ("interactive", "standard", "batch"):
            jobs[f"queued, {priority}"] = submit(priority, priority=priority)
        server._process.kill()
        return jobs


def main() -> int:
    """Makes the jobs, writes the file."""
    with (
        tempfile.TemporaryDirectory() as folder,
        Measured("queue_server.broker", "--port", "0", "--data-dir", folder, ready="ready") as broker,
    ):
        jobs = make_jobs(broker.url)
        Path(sys.argv[1]).write_text(json.dumps({"jobs": jobs, **record(broker.url)}, indent=1) + "\n")
    print(f"{len(jobs)} jobs")
    return 0


if __name__ == "__main__":
    sys.exit(main())
