"""The store against a model in memory: every transition of the table and no other, whatever comes in whatever order.

More and longer runs: QUEUE_TEST_EXAMPLES=2000 QUEUE_TEST_STEPS=100 (the defaults are for CI).
"""

from __future__ import annotations

import asyncio
import os
import random
import threading
from contextlib import suppress

import redis
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from queue_server import keys
from queue_server.actors import build_broker
from queue_server.connection import Connection
from queue_server.errors import JobNotFound, WrongState
from queue_server.jobs import ENDED, JobState, Priority, Progress, Submission
from queue_server.queues import Queues
from queue_server.store import Store
from queue_server.worker_store import Claim, Outcome, WorkerStore
from tests.queue_server.conftest import queue_settings, worker_settings
from tests.queue_server.consistency import Everything
from tests.queue_server.store_machine import OUTCOME_STATES, SHARE, StoreMachine, read_message

EXAMPLES = int(os.environ.get("QUEUE_TEST_EXAMPLES", "25"))
STEPS = int(os.environ.get("QUEUE_TEST_STEPS", "40"))


def test_the_store_behaves_as_the_model(redis_url: str) -> None:
    StoreMachine.url = redis_url
    run_state_machine_as_test(
        StoreMachine,
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=STEPS,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            print_blob=True,
        ),
    )


# ---- all at once


async def test_concurrent_clients_leave_it_consistent(redis_url: str) -> None:
    asked = queue_settings(redis_url, **SHARE)
    connection = Connection(redis_url, 10.0, asked.terms)
    await connection.start()
    store, queues = Store(connection, asked), Queues(connection, asked)
    client = redis.Redis.from_url(redis_url)
    stopping, settled = threading.Event(), threading.Event()
    broken: list[BaseException] = []
    accepted: list[str] = []

    async def submit_and_meddle(seed: int) -> None:
        """Submits, cancels, retries, deletes, pauses; sweeps as often."""
        chance = random.Random(seed)
        for number in range(40):
            queue, name = chance.choice(["default", "reports"]), chance.choice(["ann", "bob"])
            job, _ = await store.submit(
                Submission(
                    job_id=f"s{seed}n{number:04}",
                    request_id=chance.choice(["", "r1"]),
                    fingerprint="same",
                    queue=queue,
                    priority=chance.choice(list(Priority)),
                    not_before_ms=0,
                    deadline_ms=0,
                    max_attempts=3,
                    labels={},
                    kind="detect",
                    item_count=1,
                    work=b"work",
                    blobs={},
                    media_ids=(),
                    client=name,
                )
            )
            accepted.append(job.job_id)
            one = chance.choice(accepted)
            with suppress(JobNotFound, WrongState):
                match chance.randrange(8):
                    case 0:
                        await store.cancel(one)
                    case 1:
                        await store.retry(one)
                    case 2 if chance.random() < 0.3:
                        await store.delete(one)
                    case 3:
                        await queues.pause(queue)
                    case 4:
                        await queues.resume(queue)
                    case 5:
                        await store.sweep("sweep_due")
                        await store.sweep("sweep_lost", errors={"w": "bG9zdA=="})
                        await store.sweep(
                            "sweep_overdue", priorities=[priority.value for priority in Priority], overdue_ms=100
                        )

    def work(seed: int) -> None:
        """Takes messages, works, stalls for longer than its lease, dies with messages in its hands."""
        chance = random.Random(seed)
        worker = WorkerStore(worker_settings(redis_url, "nowhere:1", lease_s=0.05, **SHARE))
        worker.start()
        broker = build_broker(worker.client)
        try:
            while not stopping.is_set():
                for priority in Priority:
                    for data in broker.do_fetch(priority.value, 2):
                        if data is None or (chance.random() < 0.05 and not settled.is_set()):
                            continue
                        job_id, number = read_message(data)
                        claim = worker.claim(job_id, number, f"{seed}.{chance.random()}", "w", b"")
                        if isinstance(claim, Claim):
                            worker.renew(claim, Progress(1, 2, ""))
                            if chance.random() < 0.1:
                                stopping.wait(0.1)
                            state = JobState.SUCCEEDED if settled.is_set() else chance.choice(OUTCOME_STATES)
                            worker.finish(claim, Outcome(state, delay_s=0.01, error=b"x"))
                        broker.do_ack(priority.value, f"{job_id}.{number}")
                stopping.wait(0.005)
        except BaseException as error:
            broken.append(error)
        finally:
            worker.stop()

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    await asyncio.gather(*(submit_and_meddle(seed) for seed in range(4)))
    settled.set()
    # Then everything ends once nobody meddles any more
    for queue in ("default", "reports"):
        await queues.resume(queue)
    async with asyncio.timeout(20):
        while any(client.zcard(keys.by_state(state)) for state in JobState if state not in ENDED):
            for script in ("sweep_due", "sweep_lost", "sweep_overdue"):
                await store.sweep(
                    script,
                    errors={"w": "bG9zdA=="},
                    priorities=[priority.value for priority in Priority],
                    overdue_ms=200,
                )
            await store.release_held()
            await asyncio.sleep(0.05)
    stopping.set()
    for thread in threads:
        await asyncio.to_thread(thread.join)
    everything = Everything(client)
    assert broken == [] and everything.problems() == []
    assert len(everything.jobs) > 60 and all(seen.job.ended for seen in everything.jobs.values())
    client.close()
    await connection.stop()
