from __future__ import annotations

import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from ai4thai import (
    AI4ThaiError,
    DeadlineExceeded,
    Health,
    InvalidInput,
    Job,
    JobState,
    Message,
    NotFound,
    QueueClient,
    Unavailable,
    WrongMoment,
)
from ai4thai.job_results import AnalyzeJobResult, DetectJobResult
from ai4thai.queue.v1 import job_pb2, queue_service_pb2
from ai4thai.results import Answer
from ai4thai.watching import Watch

from tests.clients.fake_servers import FakeQueue


def test_a_detect_job_runs_to_its_end(queue: QueueClient, image: Path) -> None:
    seen: list[JobState] = []

    job = queue.submit_detect([image, image], labels={"from": "test"})
    assert (job.state, job.labels, job.queue) == (JobState.QUEUED, {"from": "test"}, "default")
    job = queue.wait(job.job_id, timeout_s=20, on_change=lambda change: seen.append(change.state))

    assert seen == ["QUEUED", "RUNNING", "RUNNING", "SUCCEEDED"]
    result = job.outcome()
    assert isinstance(result, DetectJobResult)
    good, bad = result.items
    assert good.detection is not None and good.detection.detections[0].label == "star"
    assert isinstance(bad.error, InvalidInput) and bad.error.reason == "IMAGE_UNREADABLE"


def test_generate_and_analyze_jobs_bring_their_own_results(queue: QueueClient, image: Path) -> None:
    asked = queue.submit_generate([Message("user", [image, "What?"])], text={"max_new_tokens": 5})
    analyzed = queue.submit_analyze([image], "How many?")

    answer = queue.wait(asked.job_id, timeout_s=20).outcome()
    analysis = queue.wait(analyzed.job_id, timeout_s=20).outcome()

    assert isinstance(answer, Answer) and answer.text == "One star."
    assert isinstance(analysis, AnalyzeJobResult)
    [item] = analysis.items
    assert item.analysis is not None and item.analysis.text == "One star."


def test_everything_about_a_submission_arrives(queue: QueueClient, fake_queue: FakeQueue, image: Path) -> None:
    before = datetime.now(UTC).timestamp()

    queue.submit_detect(
        [image],
        detect={"min_confidence": 0.5, "labels": ["star"]},
        queue="night",
        priority="batch",
        delay_s=60,
        deadline_s=120,
        max_attempts=2,
        request_id="mine",
    )

    request = fake_queue.script.requests["SubmitJob"]
    assert (request.queue, request.priority, request.max_attempts) == ("night", job_pb2.PRIORITY_BATCH, 2)
    assert request.request_id == "mine"
    assert request.not_before_time.ToDatetime(UTC).timestamp() == pytest.approx(before + 60, abs=10)
    assert request.deadline.ToDatetime(UTC).timestamp() == pytest.approx(before + 120, abs=10)
    assert request.work.detect.images[0].content == image.read_bytes()
    assert list(request.work.detect.options.labels) == ["star"]


def test_each_submission_has_a_request_id_of_its_own(queue: QueueClient, fake_queue: FakeQueue, image: Path) -> None:
    ids = []
    for _ in range(2):
        queue.submit_detect([image])
        ids.append(fake_queue.script.requests["SubmitJob"].request_id)
    assert len(set(ids)) == 2 and all(ids)


def test_pixels_become_a_file_in_a_job(queue: QueueClient, fake_queue: FakeQueue) -> None:
    queue.submit_detect([np.zeros((2, 3, 3), np.uint8)])

    assert fake_queue.script.requests["SubmitJob"].work.detect.images[0].content.startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "error"),
    [({"priority": "urgent"}, ValueError), ({"colour": "red"}, TypeError)],
)
def test_nonsense_is_refused_before_anything_is_sent(
    queue: QueueClient, fake_queue: FakeQueue, image: Path, options: dict[str, str], error: type[Exception]
) -> None:
    with pytest.raises(error):
        queue.submit_detect([image], **options)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="into a list"):
        queue.submit_detect(str(image))
    assert fake_queue.script.calls == []


def test_a_watch_that_breaks_off_goes_on_where_it_was(queue: QueueClient, fake_queue: FakeQueue, image: Path) -> None:
    fake_queue.break_watch_at.extend([1, 3])
    job = queue.submit_detect([image])

    revisions = [change.revision for change in queue.watch(job.job_id, timeout_s=20)]

    assert revisions == [1, 2, 3, 4]  # each once, although the fake repeats the last one after a break
    assert fake_queue.script.calls.count("WatchJob") == 3


def test_a_watch_can_begin_in_the_middle(queue: QueueClient, image: Path) -> None:
    job = queue.submit_detect([image])
    assert [change.revision for change in queue.watch(job.job_id, after_revision=2)] == [3, 4]


def test_waiting_has_an_end_of_its_own(queue: QueueClient, image: Path) -> None:
    job = queue.submit_detect([image], labels={"pace": "slow"})

    with pytest.raises(DeadlineExceeded, match=r"has not ended within 0\.5 s"):
        queue.wait(job.job_id, timeout_s=0.5)

    assert queue.get(job.job_id).state is JobState.RUNNING


def test_a_running_job_is_cancelled(queue: QueueClient, image: Path) -> None:
    job = queue.submit_detect([image], labels={"pace": "slow"})
    states = []
    for change in queue.watch(job.job_id, timeout_s=20):
        states.append(change.state)
        if change.state is JobState.RUNNING:
            queue.cancel(job.job_id)

    assert states[-1] is JobState.CANCELLED
    with pytest.raises(WrongMoment, match="CANCELLED and has no result"):
        queue.get(job.job_id).outcome()


def test_jobs_are_listed_deleted_and_counted(queue: QueueClient, image: Path) -> None:
    first, second = queue.submit_detect([image]), queue.submit_detect([image])
    queue.wait(first.job_id, timeout_s=20)

    assert [job.job_id for job in queue.list().jobs] == [second.job_id, first.job_id]
    assert [job.job_id for job in queue.list(states=["succeeded"]).jobs] == [first.job_id]
    with pytest.raises(ValueError, match="'done'"):
        queue.list(states=["done"])
    queue.delete(first.job_id)
    with pytest.raises(NotFound):
        queue.delete(first.job_id)
    [counts] = queue.stats().queues
    assert (counts.depth, counts.oldest_age_s) == (2, None)
    [worker] = queue.workers()
    assert (worker.worker, worker.job_ids) == ("here-1", ("job-1",))
    assert queue.health("ai4thai.queue.v1.QueueService") is Health.SERVING


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def test_a_watch_gives_up_after_a_minute_without_a_server() -> None:
    clock = Clock()
    watch = Watch("job-1", clock=clock)
    error = Unavailable("away")
    delays = []
    while clock.now_s < 159:
        watch.request()
        delays.append(watch.delay_after(error))
        clock.now_s += delays[-1]
    clock.now_s = 161
    watch.request()

    assert max(delays) < 6.1 and delays[0] < 0.3
    with pytest.raises(Unavailable, match="away"):
        watch.delay_after(error)


def test_news_renew_a_watchs_patience() -> None:
    clock = Clock()
    watch = Watch("job-1", clock=clock)
    watch.delay_after(Unavailable("away"))
    clock.now_s += 50
    assert watch.take(queue_service_pb2.WatchJobResponse(job=job_pb2.Job(job_id="job-1", revision=1), revision=1))
    clock.now_s += 50

    assert watch.delay_after(None) < 1


def test_an_error_that_waiting_does_not_cure_ends_a_watch() -> None:
    with pytest.raises(NotFound):
        Watch("job-1").delay_after(NotFound("no such job"))
    with pytest.raises(AI4ThaiError, match="keeps breaking off"):
        clock = Clock()
        watch = Watch("job-1", clock=clock)
        watch.delay_after(None)
        clock.now_s += 61
        watch.request()
        watch.delay_after(None)


def test_a_watch_that_was_well_for_hours_has_its_whole_patience_when_it_breaks() -> None:
    # Given a job that waits for hours, so that nothing is sent, and a server that is restarted twice meanwhile
    clock = Clock()
    watch = Watch("job-1", clock=clock)
    for _ in range(2):
        watch.request()
        clock.now_s += 3600
        assert watch.delay_after(Unavailable("restarted")) < 1


def test_the_end_is_told_also_to_one_who_asks_from_its_revision() -> None:
    watch = Watch("job-1", after_revision=4)
    ended = job_pb2.Job(job_id="job-1", revision=4, state=job_pb2.JOB_STATE_SUCCEEDED)
    assert watch.take(queue_service_pb2.WatchJobResponse(job=ended, revision=4)) and watch.has_ended


def test_a_job_that_was_set_back_is_told_from_there() -> None:
    def news(revision: int) -> queue_service_pb2.WatchJobResponse:
        return queue_service_pb2.WatchJobResponse(job=job_pb2.Job(job_id="job-1", revision=revision), revision=revision)

    watch = Watch("job-1")
    taken = [watch.take(news(revision)) for revision in (4, 4, 2, 3)]
    assert [job and job.revision for job in taken] == [4, None, 2, 3]
    assert watch.delay_after(InvalidInput("later than the job's", reason="REVISION_OUT_OF_RANGE")) < 1
    assert watch.request().after_revision == 0

    with pytest.raises(InvalidInput):
        Watch("job-1", after_revision=9).delay_after(InvalidInput("later", reason="REVISION_OUT_OF_RANGE"))


def test_leaving_a_watch_leaves_no_call_behind(queue: QueueClient, fake_queue: FakeQueue, image: Path) -> None:
    job = queue.submit_detect([image], labels={"pace": "slow"})
    changes = queue.watch(job.job_id)
    for change in changes:
        if change.state is JobState.RUNNING:
            break
    changes.close()  # type: ignore[attr-defined]

    began_s = time.monotonic()
    fake_queue.jobs[job.job_id].state = job_pb2.JOB_STATE_SUCCEEDED  # lets the fake's handler end as well
    assert isinstance(queue.get(job.job_id), Job)
    assert time.monotonic() - began_s < 10
