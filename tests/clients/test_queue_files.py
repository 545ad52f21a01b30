"""Files up and down, and the submissions that carry them: against a fake that breaks off when told to."""

from __future__ import annotations

import io
import os
import threading
from pathlib import Path
from typing import Any

import pytest
from ai4thai import (
    AsyncQueueClient,
    Busy,
    DeadlineExceeded,
    InvalidInput,
    JobLost,
    Media,
    Message,
    NotFound,
    QueueClient,
    ServerFault,
    Submission,
    WrongMoment,
)
from ai4thai.job_results import VideoJobResult
from ai4thai.submissions import MAX_BATCH_JOBS, MAX_INLINE_BYTES, MAX_INLINE_FILE_BYTES

from serving.errors import Code, ServiceError
from tests.clients.fake_servers import FakeQueue

LARGE = bytes(range(256)) * (20 << 10)  # 5 MiB
TOO_LARGE = ServiceError(Code.RESOURCE_EXHAUSTED, "MEDIA_INVALID", "The file has 5 GB; the limit is 2 GB.")
FULL = ServiceError(Code.RESOURCE_EXHAUSTED, "QUEUE_FULL", "Redis is full.", retry_after_s=0.1)


@pytest.fixture
def video(tmp_path: Path) -> Path:
    path = tmp_path / "วิดีโอ หน้าบ้าน.mp4"
    path.write_bytes(LARGE)
    return path


# ---- up


def test_an_upload_goes_on_until_it_is_stored(queue: QueueClient, fake_queue: FakeQueue, video: Path) -> None:
    fake_queue.break_upload_at.extend([2 << 20, 1 << 20])
    fake_queue.script.fail_next("UploadMedia", FULL)
    told: list[tuple[int, int]] = []

    media = queue.upload(video, on_progress=lambda done, whole: told.append((done, whole)))

    assert (media.size_bytes, media.content_type) == (len(LARGE), "video/mp4")
    assert fake_queue.media[media.media_id] == (LARGE, "video/mp4")
    assert len(fake_queue.uploads) == 3
    assert told == sorted(set(told)) and told[-1] == (len(LARGE), len(LARGE))
    assert media.expire_time is not None


def test_what_the_server_has_is_not_sent_again(queue: QueueClient, fake_queue: FakeQueue, video: Path) -> None:
    first = queue.upload(LARGE, content_type="video/mp4")
    told: list[tuple[int, int]] = []

    second = queue.upload(video, on_progress=lambda done, whole: told.append((done, whole)))

    assert first.media_id == second.media_id and fake_queue.uploads == [len(LARGE), 0]
    assert told[-1] == (len(LARGE), len(LARGE))


def test_files_may_be_bytes_open_files_and_pipes(queue: QueueClient, fake_queue: FakeQueue, video: Path) -> None:
    fake_queue.break_upload_at.append(1)
    with video.open("rb") as file:
        file.seek(len(LARGE) - 10)
        tail = queue.upload(file)
    reading, writing = os.pipe()
    threading.Thread(target=lambda: (os.write(writing, b"piped"), os.close(writing))).start()
    with os.fdopen(reading, "rb") as pipe:
        piped = queue.upload(pipe)
    held = queue.upload(memoryview(b"held"))

    assert [fake_queue.media[media.media_id] for media in (tail, piped, held)] == [
        (LARGE[-10:], "video/mp4"),
        (b"piped", ""),
        (b"held", ""),
    ]


def test_uploads_that_make_no_sense(queue: QueueClient, fake_queue: FakeQueue, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        queue.upload(tmp_path / "nowhere.mp4")
    with pytest.raises(InvalidInput, match="is empty"):
        queue.upload(b"")
    with pytest.raises(TypeError, match="not int"):
        queue.upload(7)  # type: ignore[arg-type]
    assert fake_queue.script.calls == []
    fake_queue.script.fail_next("UploadMedia", TOO_LARGE)
    with pytest.raises(Busy, match="the limit is 2 GB"):
        queue.upload(b"x")
    assert fake_queue.script.calls == ["UploadMedia"]  # waiting would not make it smaller


def test_a_file_that_cannot_be_read_any_more_says_so_itself(queue: QueueClient) -> None:
    class Failing(io.BytesIO):
        reads = 0

        def read(self, size: int | None = -1, /) -> bytes:
            self.reads += 1
            if self.reads > 8:  # six for the digest
                raise OSError("the disk is gone")
            return super().read(size)

    with pytest.raises(OSError, match="the disk is gone"):
        queue.upload(Failing(LARGE))


def test_an_upload_has_an_end_of_its_own(queue: QueueClient, fake_queue: FakeQueue) -> None:
    fake_queue.script.fail_next("UploadMedia", *[FULL] * 20)
    with pytest.raises(DeadlineExceeded, match=r"not stored within 0\.5 s"):
        queue.upload(b"x", timeout_s=0.5)


# ---- down


def test_a_download_goes_on_where_it_broke_off(queue: QueueClient, fake_queue: FakeQueue, tmp_path: Path) -> None:
    media_id = fake_queue.keep(LARGE, "video/mp4")
    fake_queue.break_download_at.extend([1_000_000, 1_000_000, 3_000_000])
    target = tmp_path / ("ภ" * 84)  # 252 bytes: hardly longer names exist
    target.write_bytes(b"old")
    told: list[tuple[int, int]] = []

    media = queue.download(media_id, target, on_progress=lambda done, whole: told.append((done, whole)))

    assert (media.size_bytes, media.content_type) == (len(LARGE), "video/mp4")
    assert target.read_bytes() == LARGE
    assert fake_queue.offsets == [0, 1_000_000, 1_000_000, 3_000_000]
    assert told == sorted(told) and told[-1] == (len(LARGE), len(LARGE))
    assert list(tmp_path.iterdir()) == [target]


def test_a_download_into_an_open_file(queue: QueueClient, fake_queue: FakeQueue) -> None:
    file = io.BytesIO()
    queue.download(fake_queue.keep(b"words", "text/plain"), file)
    assert file.getvalue() == b"words"


def test_damaged_bytes_do_not_replace_a_file(queue: QueueClient, fake_queue: FakeQueue, tmp_path: Path) -> None:
    media_id = fake_queue.keep(b"right", "")
    fake_queue.media[media_id] = (b"wrong", "")
    target = tmp_path / "file"
    target.write_bytes(b"old")

    with pytest.raises(ServerFault, match="another digest"):
        queue.download(media_id, target)

    assert target.read_bytes() == b"old" and list(tmp_path.iterdir()) == [target]


def test_downloads_that_make_no_sense(queue: QueueClient, fake_queue: FakeQueue, tmp_path: Path) -> None:
    unknown = "sha256:" + 64 * "0"
    with pytest.raises(NotFound):
        queue.download(unknown, tmp_path / "file")
    with pytest.raises(IsADirectoryError):
        queue.download(unknown, tmp_path)
    with pytest.raises(ValueError, match="is no media_id"):
        queue.download("sha256:0", tmp_path / "file")
    assert list(tmp_path.iterdir()) == [] and fake_queue.script.calls == ["GetMedia"]


# ---- submissions


def test_a_video_is_uploaded_and_its_result_read(queue: QueueClient, fake_queue: FakeQueue, video: Path) -> None:
    job = queue.submit_video(
        video, detect={"labels": ["ดาว"]}, stride=3, tracker="botsort", annotate=True, max_frames=9, client="team-a"
    )
    work = fake_queue.script.requests["SubmitJob"].work.video

    assert fake_queue.media[work.video.media_id][0] == LARGE
    assert (work.stride, work.annotate, work.max_frames, work.options.labels) == (3, True, 9, ["ดาว"])
    assert job.client == "team-a" and not job.held
    result = queue.wait(job.job_id, timeout_s=20).outcome()
    assert isinstance(result, VideoJobResult)
    assert (result.duration_s, result.detected_frame_count, result.tracks[0].label) == (3, 30, "ดาว")
    assert (result.tracks[0].first_s, result.tracks[0].last_s) == (0.5, 2)


def test_stored_files_are_named_and_small_ones_travel_inside(queue: QueueClient, fake_queue: FakeQueue) -> None:
    stored = queue.upload(b"stored")
    queue.submit_detect([stored, stored.media_id, b"small", LARGE])
    images = fake_queue.script.requests["SubmitJob"].work.detect.images

    assert [image.WhichOneof("source") for image in images] == ["media_id", "media_id", "content", "media_id"]
    assert images[0].media_id == images[1].media_id == stored.media_id
    assert fake_queue.media[images[3].media_id][0] == LARGE
    queue.submit_generate([Message("user", [stored, "What is it?"])])
    parts = fake_queue.script.requests["SubmitJob"].work.generate.messages[0].parts
    assert (parts[0].image.media_id, parts[1].text) == (stored.media_id, "What is it?")


def test_many_files_travel_inside_as_long_as_they_fit(tmp_path: Path) -> None:
    path = tmp_path / "image.jpg"
    path.write_bytes(bytes(MAX_INLINE_FILE_BYTES))
    submission = Submission.detect([path] * 8 + [b"x" * 1000])
    assert len(submission.uploads) == 8 - (MAX_INLINE_BYTES - 1000) // MAX_INLINE_FILE_BYTES
    assert submission.inline_bytes < MAX_INLINE_BYTES + 10_000


def test_many_at_once_each_with_its_own_outcome(queue: QueueClient, fake_queue: FakeQueue, tmp_path: Path) -> None:
    lost = tmp_path / "lost.jpg"
    lost.write_bytes(b"image")
    submissions = [Submission.detect([b"image"], labels={"number": str(n)}) for n in range(MAX_BATCH_JOBS + 3)]
    submissions[1] = Submission.detect([b"image"], labels={"refuse": "yes"})
    submissions[2] = Submission.detect([lost])
    submissions[3] = Submission.detect([LARGE, b"image"])
    lost.unlink()
    fake_queue.script.fail_next("BatchSubmitJobs", FULL)  # repeated by itself

    outcomes = queue.submit_many(submissions)

    assert fake_queue.batch_sizes == [MAX_BATCH_JOBS - 1, 3]  # one had no file
    assert [outcome.error is not None for outcome in outcomes[:4]] == [False, True, True, False]
    assert isinstance(outcomes[1].error, InvalidInput) and outcomes[1].error.reason == "IMAGE_UNREADABLE"
    assert "lost.jpg" in str(outcomes[2].error)
    for number, outcome in enumerate(outcomes[4:], start=4):
        assert outcome.created and outcome.job is not None and outcome.job.labels == {"number": str(number)}
    again = queue.submit_many(submissions)
    assert [outcome.job and outcome.job.job_id for outcome in again] == [
        outcome.job and outcome.job.job_id for outcome in outcomes
    ]
    assert not any(outcome.created for outcome in again)


def test_many_large_ones_go_in_several_calls(queue: QueueClient, fake_queue: FakeQueue) -> None:
    outcomes = queue.submit_many([Submission.detect([bytes(MAX_INLINE_FILE_BYTES)]) for _ in range(7)])
    assert fake_queue.batch_sizes == [5, 2]
    assert all(outcome.created for outcome in outcomes)
    assert queue.submit_many([]) == []


@pytest.mark.usefixtures("quick_retries")
def test_a_server_that_goes_away_is_an_outcome_too(queue: QueueClient, fake_queue: FakeQueue) -> None:
    away = ServiceError(Code.UNAVAILABLE, "DRAINING", "The server is shutting down.")
    fake_queue.script.fail_next("BatchSubmitJobs", *[away] * 9)
    submissions = [Submission.detect([bytes(MAX_INLINE_FILE_BYTES)]) for _ in range(15)]

    outcomes = queue.submit_many(submissions)

    assert {outcome.error and outcome.error.reason for outcome in outcomes} == {"DRAINING"}
    assert fake_queue.script.calls == ["BatchSubmitJobs"] * 5  # the first call's repetitions, and no further one


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"delay_s": 3, "not_before": 1}, "same thing twice"),
        ({"deadline": "naive"}, "has no time zone"),
    ],
)
def test_moments_that_make_no_sense(options: dict[str, Any], error: str) -> None:
    from datetime import UTC, datetime

    moments = {1: datetime.now(UTC), "naive": datetime(2030, 1, 1)}
    given = {name: moments.get(value, value) for name, value in options.items()}
    with pytest.raises(ValueError, match=error):
        Submission.detect([b"x"], **given)


# ---- the rest of the contract


def test_jobs_of_a_client_through_all_pages(queue: QueueClient) -> None:
    ids = [queue.submit_detect([b"x"], client=f"team-{number % 2}").job_id for number in range(7)]
    assert [job.job_id for job in queue.list_all(page_size=2)] == ids[::-1]
    assert [job.job_id for job in queue.list(client="team-1").jobs] == ids[1::2][::-1]
    assert len(list(queue.list_all(client="team-0", page_size=3))) == 4


def test_an_operators_hand(queue: QueueClient, fake_queue: FakeQueue) -> None:
    queue.pause("night")
    job = queue.submit_detect([b"x"], queue="night", webhook_url="https://example.com/hook")
    assert job.held
    assert fake_queue.script.requests["SubmitJob"].webhook.url == "https://example.com/hook"
    with pytest.raises(WrongMoment):
        queue.retry(job.job_id)
    assert queue.purge("night") == 1
    assert queue.retry(job.job_id).state == "QUEUED"
    queue.resume("night")
    assert fake_queue.paused == set()
    [counts] = queue.stats().queues
    assert (counts.held, counts.size_bytes, counts.clients[0].client) == (1, 3_000_000, "team-a")


def test_a_lost_job_says_so(queue: QueueClient, fake_queue: FakeQueue) -> None:
    fake_queue.script.fail_next("GetJob", ServiceError(Code.NOT_FOUND, "JOB_LOST", "Redis lost it; submit it again."))
    with pytest.raises(JobLost, match="submit it again"):
        queue.get("job-1")


async def test_all_of_it_for_asyncio(async_queue: AsyncQueueClient, fake_queue: FakeQueue, tmp_path: Path) -> None:
    fake_queue.break_upload_at.append(2 << 20)
    media = await async_queue.upload(LARGE, content_type="video/mp4")
    assert isinstance(media, Media) and fake_queue.media[media.media_id] == (LARGE, "video/mp4")
    fake_queue.break_download_at.append(1_000_000)
    await async_queue.download(media.media_id, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == LARGE and fake_queue.offsets == [0, 1_000_000]

    submissions = [Submission.detect([b"x"], labels={"refuse": "yes"}), Submission.detect([LARGE])]
    refused, accepted = await async_queue.submit_many(submissions)
    assert refused.error is not None and accepted.job is not None
    video = await async_queue.submit_video(LARGE, client="team-a", queue="night")
    assert isinstance((await async_queue.wait(video.job_id, timeout_s=20)).result, VideoJobResult)
    assert [job.job_id async for job in async_queue.list_all(client="team-a", page_size=1)] == [video.job_id]
    await async_queue.pause("night")
    waiting = await async_queue.submit_detect([b"x"], queue="night")
    assert await async_queue.purge("night") >= 1
    assert (await async_queue.retry(waiting.job_id)).state == "QUEUED"
    await async_queue.resume("night")
    with pytest.raises(NotFound):
        await async_queue.download("sha256:" + 64 * "0", tmp_path / "none")
