"""An upgrade and the way back: who leaves and who comes share one Redis and one edge, and no job, call or stream pays for it.

The rehearsal with two versions of the sources is `make rehearse`, which needs the repository's history. Here, where a clone may
have none, both are today's; what the versions meet over, the records in Redis, is tested with those that a release has left.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from ai4thai import QueueClient
from ai4thai.errors import AI4ThaiError
from ai4thai.job_results import JobState
from ai4thai.submissions import Submission

from benchmarks.processes import Measured
from benchmarks.rehearsal import Rehearsal, sources_of
from benchmarks.rehearsal_load import Door, Load
from benchmarks.rehearsal_parts import wait_until
from tests.delivery.fleet import Fleet
from tests.delivery.queues import QueueSide
from tests.delivery.records import RECORDS, image, restore


def test_workers_and_queue_servers_are_exchanged_and_back_with_jobs_in_flight(
    fleet: Fleet, queue_side: QueueSide
) -> None:
    fleet.wait_until_whole()
    door = Door(fleet.vision, fleet.queue, fleet.certificates.authority)
    load = Load(door, submitters=3, detectors=1, streams=1)
    with queue_side.running("old", 0) as old:
        new = queue_side.version("new", 1)
        rehearsal = Rehearsal(old, new, fleet.edge, door, load)
        try:
            # Given jobs, calls and streams that go on all the time, and jobs of one that wait for the other
            load.start()
            wait_until("jobs end", lambda: load.count("jobs") > 2, 90)
            kept = rehearsal.keep_jobs(5)
            # When workers and queue server are exchanged
            rehearsal.step("up: workers", lambda: rehearsal.roll_workers(old, new))
            rehearsal.step("up: queue", lambda: rehearsal.roll_queue(old, new))
            rehearsal.step("kept", lambda: rehearsal.do_kept(kept))
            rehearsal.step("read", lambda: rehearsal.read_all("new"))
            # And back
            kept = rehearsal.keep_jobs(5)
            rehearsal.step("back: queue", lambda: rehearsal.roll_queue(new, old))
            rehearsal.step("back: workers", lambda: rehearsal.roll_workers(new, old))
            rehearsal.step("kept again", lambda: rehearsal.do_kept(kept))
            load.stop()
            rehearsal.step("read again", lambda: rehearsal.read_all("old"))
        finally:
            load.stop()
            for part in (new.queue, *new.workers):
                part.kill()
    # Then every job has ended well, none is lost, and nobody who called has noticed
    assert load.faults == [] and rehearsal.faults == []
    assert rehearsal.reads["jobs read whole by old"] == len(load.job_ids) == load.count("jobs") > 5
    # And all left in order
    assert old.exit_codes == new.exit_codes == [0, 0]


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_jobs_that_a_release_has_left_in_redis_are_read_and_done(path: Path, tmp_path: Path) -> None:
    # Given a Redis as a release left it when its machine was cut off: jobs in every state
    kept: dict[str, Any] = json.loads(path.read_text())
    jobs: dict[str, str] = kept.pop("jobs")
    broker = Measured("queue_server.broker", "--port", "0", "--data-dir", str(tmp_path / "redis"), ready="ready")
    with broker, Measured("benchmarks.chaos_vision", "--port", "0") as vision:
        restore(broker.url, kept)
        env = {"REDIS_URL": broker.url, "QUEUE_WORKER_PORT": "0", "QUEUE_VISION_ADDRESS": vision.address}
        env |= {"QUEUE_OVERDUE_S": "2"}  # messages in the killed worker's hands are sent again so soon
        # When today's queue server and worker begin with it
        with (
            Measured("queue_server", env=env) as server,
            Measured("queue_server.worker", env=env, ready="working"),
            QueueClient(server.address) as queue,
        ):
            wait_until("it answers", lambda: queue.stats().queues, 60)
            # Then what had ended is as it was, result, error and history
            succeeded = queue.get(jobs["succeeded"])
            result: Any = succeeded.outcome()
            assert [len(item.detection.detections) for item in result.items] == [1, 1]
            assert succeeded.labels == {"name": "succeeded"} and succeeded.client == "somebody"
            states = [job.state for job in queue.watch(jobs["succeeded"])]
            assert states[0] is JobState.QUEUED and states[-1] is JobState.SUCCEEDED and JobState.RUNNING in states
            failed = queue.get(jobs["failed"])
            assert failed.state is JobState.FAILED and failed.error is not None and failed.attempt_count == 1
            bad: Any = queue.get(jobs["bad image"]).outcome()
            assert ["bad" in str(item.error) for item in bad.items] == [True, True]
            assert queue.get(jobs["cancelled"]).state is JobState.CANCELLED
            # And the same submission is still the same job, another with its name is refused
            again = [image(0, f"succeeded-{number}") for number in range(2)]
            name: dict[str, Any] = {"request_id": "request-succeeded", "client": "somebody"}
            same = queue.submit(Submission.detect(again, labels={"name": "succeeded"}, **name))
            assert same.job_id == jobs["succeeded"]
            with pytest.raises(AI4ThaiError, match="request_id"):
                queue.submit(Submission.detect(again[:1], **name))
            # And what had not ended is done: what waited, what was due later, what the killed worker had begun
            for name_, job_id in jobs.items():
                if name_.startswith("queued") or name_ in ("scheduled", "running"):
                    job = queue.wait(job_id, 60)
                    assert job.state is JobState.SUCCEEDED, (name_, job)
            assert [one.number for one in queue.get(jobs["running"]).attempts] == [1, 2]
            # And what its queue's pause holds back still waits for a person
            assert queue.get(jobs["held"]).held
            assert queue.wait(jobs["expiring"], 60).state is JobState.EXPIRED
            queue.resume("paused")
            assert queue.wait(jobs["held"], 60).state is JobState.SUCCEEDED
            assert queue.retry(jobs["cancelled"]).job_id == jobs["cancelled"]
            assert queue.wait(jobs["cancelled"], 60).state is JobState.SUCCEEDED
            assert queue.stats("paused").queues[0].depth == 0


def test_a_rehearsal_without_that_history_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"no commit 'v99\.9\.9' here.*--old.*git fetch --unshallow"):
        sources_of("v99.9.9", tmp_path)
