"""Plain Dramatiq for comparison: its own broker, an actor that does nothing; `python -m benchmarks.queue_plain work|send`.

`work` is a worker process like those of the queue server, with as many threads; `send` enqueues, and tells how long that took.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import threading
import time
from typing import Any

import dramatiq
import redis
from dramatiq.brokers.redis import RedisBroker
from dramatiq.worker import Worker

QUEUE = "plain"


def declare(url: str) -> tuple[RedisBroker, Any]:
    """The broker as Dramatiq makes it, and the actor."""
    broker = RedisBroker(url=url)  # type: ignore[no-untyped-call]
    declare_actor: Any = dramatiq.actor

    def nothing(number: int) -> None:
        """Does nothing."""

    return broker, declare_actor(nothing, queue_name=QUEUE, broker=broker)


def waiting(client: redis.Redis) -> int:
    """Messages that were not dealt with yet."""
    count: Any = client.hlen(f"dramatiq:{QUEUE}.msgs")
    return int(count)


def work(url: str, threads: int) -> None:
    """Until SIGTERM."""
    broker, _ = declare(url)
    worker = Worker(broker, worker_threads=threads)
    worker.start()
    print(json.dumps({"event": "working"}), flush=True)
    signal.sigwait({signal.SIGTERM, signal.SIGINT})
    worker.stop()


def send(url: str, count: int, callers: int) -> None:
    """`count` messages from so many threads."""
    _, actor = declare(url)
    actor.broker.client.ping()

    def one(share: int) -> None:
        for number in range(share):
            actor.send(number)

    threads = [threading.Thread(target=one, args=(count // callers,)) for _ in range(callers)]
    began_s = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(json.dumps({"began_s": began_s, "seconds": time.monotonic() - began_s}), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=("work", "send"))
    parser.add_argument("--url", required=True)
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--count", type=int, default=0)
    parser.add_argument("--callers", type=int, default=1)
    arguments = parser.parse_args()
    if arguments.part == "work":
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
        work(arguments.url, arguments.threads)
    else:
        send(arguments.url, arguments.count, arguments.callers)
    return 0


if __name__ == "__main__":
    sys.exit(main())
