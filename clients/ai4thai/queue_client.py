"""The client of a queue server; async_queue_client.py is the same for asyncio."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final, Self, Unpack

import grpc

from ai4thai import queue_answers, queue_wire
from ai4thai.channel import open_channel
from ai4thai.downloading import Download, DownloadTarget, run_download
from ai4thai.errors import AI4ThaiError, translated
from ai4thai.health import check_health
from ai4thai.job_results import Job, JobPage, JobState, Media, Stats, SubmitOutcome, Worker
from ai4thai.media_input import JobFileInput
from ai4thai.options import DetectOptions, Message, SubmitOptions, TextOptions
from ai4thai.queue.v1 import queue_service_pb2 as queue_pb2
from ai4thai.queue.v1 import queue_service_pb2_grpc
from ai4thai.server_info import Health
from ai4thai.submissions import Submission, Submitting
from ai4thai.uploading import OnProgress, Upload, UploadSource, run_upload
from ai4thai.watching import Watch

DEFAULT_ADDRESS: Final = "localhost:2003"
SERVICE_NAME: Final = "ai4thai.queue.v1.QueueService"
"""The health service that says whether the server takes jobs."""


class QueueClient:
    """Submits and follows jobs; safe to share between threads. Every method raises AI4ThaiError (see errors.py).

    Each submission carries a request_id, so that gRPC may repeat it without making a second job.
    """

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        *,
        timeout_s: float = 60.0,
        credentials: grpc.ChannelCredentials | None = None,
    ) -> None:
        """Remembers the server; nothing is sent before the first call.

        Args:
            address: `host:port`, or `grpcs://host:port` for TLS.
            timeout_s: what a call may take; watch and wait have limits of their own.
            credentials: TLS with these credentials.
        """
        self.address = address
        self._timeout_s = timeout_s
        self._channel = open_channel(address, credentials=credentials)
        self._queue = queue_service_pb2_grpc.QueueServiceStub(self._channel)

    def submit(self, submission: Submission, *, on_progress: OnProgress | None = None) -> Job:
        """Queues a job; large files are uploaded before, of which on_progress is told."""
        request = submission.write(self._upload_files(submission, on_progress))
        with translated(self.address):
            return queue_answers.read_job(self._queue.SubmitJob(request, timeout=self._timeout_s).job)

    def submit_detect(
        self, images: Iterable[JobFileInput], *, detect: DetectOptions | None = None, **submit: Unpack[SubmitOptions]
    ) -> Job:
        """Queues a job that finds the objects in 1 to 1000 images."""
        return self.submit(Submission.detect(images, detect=detect, **submit))

    def submit_generate(
        self, messages: Iterable[Message], *, text: TextOptions | None = None, **submit: Unpack[SubmitOptions]
    ) -> Job:
        """Queues a job that answers a conversation."""
        return self.submit(Submission.generate(messages, text=text, **submit))

    def submit_analyze(
        self,
        images: Iterable[JobFileInput],
        question: str,
        *,
        detect: DetectOptions | None = None,
        text: TextOptions | None = None,
        **submit: Unpack[SubmitOptions],
    ) -> Job:
        """Queues a job that finds the objects in 1 to 1000 images and answers a question about each."""
        return self.submit(Submission.analyze(images, question, detect=detect, text=text, **submit))

    def submit_video(
        self,
        video: JobFileInput,
        *,
        detect: DetectOptions | None = None,
        stride: int = 0,
        tracker: str = "",
        annotate: bool = False,
        max_frames: int = 0,
        on_progress: OnProgress | None = None,
        **submit: Unpack[SubmitOptions],
    ) -> Job:
        """Queues a job that finds and follows the objects of a video; the arguments are those of Submission.video."""
        submission = Submission.video(
            video,
            detect=detect,
            stride=stride,
            tracker=tracker,
            annotate=annotate,
            max_frames=max_frames,
            **submit,
        )
        return self.submit(submission, on_progress=on_progress)

    def submit_many(self, submissions: Sequence[Submission]) -> list[SubmitOutcome]:
        """Queues many jobs in as few calls as their size allows, and tells of each, in their order, what became of it.

        Nothing that a server says is raised: an outcome without a job has the error. To submit the same list again is safe, and
        gives those that were accepted their same jobs.
        """
        submitting = Submitting(submissions)
        for batch in submitting.batches():
            for place in batch:
                try:
                    submitting.add(place, submissions[place].write(self._upload_files(submissions[place])))
                except (AI4ThaiError, OSError) as error:
                    submitting.refuse(place, error)
            try:
                with translated(self.address):
                    if request := submitting.request():
                        submitting.take(self._queue.BatchSubmitJobs(request, timeout=self._timeout_s))
            except AI4ThaiError as error:
                submitting.fail(error)
        return submitting.outcomes()

    def get(self, job_id: str) -> Job:
        """The job as it stands, with its result."""
        with translated(self.address):
            return queue_answers.read_job(
                self._queue.GetJob(queue_pb2.GetJobRequest(job_id=job_id), timeout=self._timeout_s).job
            )

    def list(
        self,
        *,
        states: Iterable[JobState | str] = (),
        queue: str = "",
        kind: str = "",
        label: str = "",
        client: str = "",
        page_size: int = 0,
        page_token: str = "",
    ) -> JobPage:
        """Jobs without their results, the newest first; every filter may be left out, `label` is `key` or `key=value`."""
        request = queue_wire.write_list(states, queue, kind, label, client, page_size, page_token)
        with translated(self.address):
            return queue_answers.read_page(self._queue.ListJobs(request, timeout=self._timeout_s))

    def list_all(
        self,
        *,
        states: Iterable[JobState | str] = (),
        queue: str = "",
        kind: str = "",
        label: str = "",
        client: str = "",
        page_size: int = 200,
    ) -> Iterator[Job]:
        """Like list, through all pages: each is asked for when the one before has been looked at."""
        request = queue_wire.write_list(states, queue, kind, label, client, page_size, "")
        while True:
            with translated(self.address):
                page = queue_answers.read_page(self._queue.ListJobs(request, timeout=self._timeout_s))
            yield from page.jobs
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    def watch(self, job_id: str, after_revision: int = 0, *, timeout_s: float | None = None) -> Iterator[Job]:
        """Every change of a job after `after_revision`, once and in order, until it ends; mends broken connections itself.

        Raises:
            DeadlineExceeded: the job has not ended within timeout_s (absent: no limit).
        """
        watch = Watch(job_id, after_revision, timeout_s)
        while not watch.has_ended:
            failure: AI4ThaiError | None = None
            try:
                with translated(self.address):
                    call = self._queue.WatchJob(watch.request(), timeout=watch.remaining_s())
                    try:
                        for response in call:
                            job = watch.take(response)
                            if job is not None:
                                yield job
                    finally:
                        call.cancel()  # nobody listens any more when the caller stops iterating
            except AI4ThaiError as error:
                failure = error
            if not watch.has_ended:
                time.sleep(watch.delay_after(failure))

    def wait(
        self, job_id: str, timeout_s: float | None = None, *, on_change: Callable[[Job], None] | None = None
    ) -> Job:
        """Waits until the job has ended, however it ended; `job.outcome()` then gives its result or raises its error.

        Raises:
            DeadlineExceeded: it has not ended within timeout_s (absent: no limit); it goes on nevertheless.
        """
        for job in self.watch(job_id, timeout_s=timeout_s):
            if on_change is not None:
                on_change(job)
        return self.get(job_id)

    def cancel(self, job_id: str) -> Job:
        """Cancels a waiting job at once, a running one as soon as its worker has stopped it; an ended one stays as it is."""
        with translated(self.address):
            return queue_answers.read_job(
                self._queue.CancelJob(queue_pb2.CancelJobRequest(job_id=job_id), timeout=self._timeout_s).job
            )

    def retry(self, job_id: str) -> Job:
        """Queues a job again that FAILED, was CANCELLED or EXPIRED, with all its attempts before it.

        Raises:
            WrongMoment: it has not ended, or has succeeded.
            NotFound: there is no such job, or a file that it needs is no longer kept.
        """
        with translated(self.address):
            return queue_answers.read_job(
                self._queue.RetryJob(queue_pb2.RetryJobRequest(job_id=job_id), timeout=self._timeout_s).job
            )

    def delete(self, job_id: str) -> None:
        """Forgets an ended job and its result."""
        with translated(self.address):
            self._queue.DeleteJob(queue_pb2.DeleteJobRequest(job_id=job_id), timeout=self._timeout_s)

    def upload(
        self,
        source: UploadSource,
        *,
        content_type: str = "",
        on_progress: OnProgress | None = None,
        timeout_s: float | None = None,
    ) -> Media:
        """Stores a file, to be named in jobs by its media_id; what the server has already is not sent again.

        Args:
            source: a path, bytes, or a file opened for reading bytes.
            content_type: its media type. Empty: guessed from its name.
            on_progress: told the bytes sent and the bytes in all, from another thread.
            timeout_s: what all may take; None: no limit, as long as the server is not away for a minute.

        Raises:
            OSError: the file can't be read.
            InvalidInput: it is empty, larger than the server takes, or changed while it was sent.
            Busy: nothing more can be stored.
        """
        with Upload(source, content_type, on_progress, timeout_s) as upload:
            return run_upload(upload, self._queue, self.address)

    def download(
        self,
        media_id: str,
        target: DownloadTarget,
        *,
        on_progress: OnProgress | None = None,
        timeout_s: float | None = None,
    ) -> Media:
        """Fetches a stored file; goes on where it was when the connection breaks, and verifies the bytes by their id.

        Args:
            media_id: the file's id.
            target: a path, which gets the whole file or stays as it is; or a file opened for writing bytes.
            on_progress: told the bytes received and the bytes in all.
            timeout_s: what all may take; None: no limit, as long as the server is not away for a minute.

        Raises:
            OSError: the file can't be written.
            NotFound: it is not stored, or no longer.
            ServerFault: its bytes are not those that its id says.
        """
        with Download(media_id, target, on_progress, timeout_s) as download:
            return run_download(download, self._queue, self.address)

    def stats(self, queue: str = "") -> Stats:
        """The counts of one queue, or of all."""
        with translated(self.address):
            return queue_answers.read_stats(
                self._queue.GetQueueStats(queue_pb2.GetQueueStatsRequest(queue=queue), timeout=self._timeout_s)
            )

    def pause(self, queue: str) -> None:
        """Stops handing out a queue's jobs; those that run go on, new ones wait."""
        with translated(self.address):
            self._queue.PauseQueue(queue_pb2.PauseQueueRequest(queue=queue), timeout=self._timeout_s)

    def resume(self, queue: str) -> None:
        """Hands out a paused queue's jobs again, in their order."""
        with translated(self.address):
            self._queue.ResumeQueue(queue_pb2.ResumeQueueRequest(queue=queue), timeout=self._timeout_s)

    def purge(self, queue: str) -> int:
        """Cancels all jobs that wait in a queue, and says how many; those that run go on."""
        with translated(self.address):
            return self._queue.PurgeQueue(
                queue_pb2.PurgeQueueRequest(queue=queue), timeout=self._timeout_s
            ).cancelled_count

    def workers(self) -> tuple[Worker, ...]:
        """The workers that are alive."""
        with translated(self.address):
            answer = self._queue.ListWorkers(queue_pb2.ListWorkersRequest(), timeout=self._timeout_s)
        return tuple(queue_answers.read_worker(worker) for worker in answer.workers)

    def health(self, service: str = "", *, timeout_s: float | None = None) -> Health:
        """Whether the process lives (empty), or SERVICE_NAME takes jobs."""
        return check_health(self._channel, self.address, service, timeout_s or self._timeout_s)

    def close(self) -> None:
        """Ends what still runs."""
        self._channel.close()

    def _upload_files(self, submission: Submission, on_progress: OnProgress | None = None) -> dict[int, str]:
        return {
            place: self.upload(file.path or file.content, on_progress=on_progress).media_id
            for place, file in submission.uploads.items()
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
