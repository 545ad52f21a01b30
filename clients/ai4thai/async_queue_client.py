"""The client of a queue server for asyncio: QueueClient with await."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from functools import cached_property
from typing import Self, Unpack

import grpc
import grpc.aio

from ai4thai import queue_answers, queue_wire
from ai4thai.channel import open_async_channel
from ai4thai.downloading import Download, DownloadTarget, run_download_async
from ai4thai.errors import AI4ThaiError, translated
from ai4thai.health import check_health_async
from ai4thai.job_results import Job, JobPage, JobState, Media, Stats, SubmitOutcome, Worker
from ai4thai.media_input import JobFileInput
from ai4thai.options import DetectOptions, Message, SubmitOptions, TextOptions
from ai4thai.queue.v1 import queue_service_pb2 as queue_pb2
from ai4thai.queue.v1 import queue_service_pb2_grpc
from ai4thai.queue_client import DEFAULT_ADDRESS
from ai4thai.server_info import Health
from ai4thai.submissions import Submission, Submitting
from ai4thai.uploading import OnProgress, Upload, UploadSource, run_upload_async
from ai4thai.watching import Watch


class AsyncQueueClient:
    """QueueClient for asyncio; use it within one running loop."""

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        *,
        timeout_s: float = 60.0,
        credentials: grpc.ChannelCredentials | None = None,
    ) -> None:
        """Like QueueClient; the channel is opened by the first call."""
        self.address = address
        self._timeout_s = timeout_s
        self._credentials = credentials

    async def submit(self, submission: Submission, *, on_progress: OnProgress | None = None) -> Job:
        """See QueueClient.submit."""
        media_ids = await self._upload_files(submission, on_progress)
        request = await asyncio.to_thread(submission.write, media_ids)  # may read files
        with translated(self.address):
            answer = await self._queue.SubmitJob(request, timeout=self._timeout_s)
        return queue_answers.read_job(answer.job)

    async def submit_detect(
        self, images: Iterable[JobFileInput], *, detect: DetectOptions | None = None, **submit: Unpack[SubmitOptions]
    ) -> Job:
        """See QueueClient.submit_detect."""
        # Pixels become PNG files: in a thread, as is all that takes long or reads files.
        return await self.submit(await asyncio.to_thread(Submission.detect, images, detect=detect, **submit))

    async def submit_generate(
        self, messages: Iterable[Message], *, text: TextOptions | None = None, **submit: Unpack[SubmitOptions]
    ) -> Job:
        """See QueueClient.submit_generate."""
        return await self.submit(await asyncio.to_thread(Submission.generate, messages, text=text, **submit))

    async def submit_analyze(
        self,
        images: Iterable[JobFileInput],
        question: str,
        *,
        detect: DetectOptions | None = None,
        text: TextOptions | None = None,
        **submit: Unpack[SubmitOptions],
    ) -> Job:
        """See QueueClient.submit_analyze."""
        submission = await asyncio.to_thread(Submission.analyze, images, question, detect=detect, text=text, **submit)
        return await self.submit(submission)

    async def submit_video(
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
        """See QueueClient.submit_video."""
        submission = await asyncio.to_thread(
            Submission.video,
            video,
            detect=detect,
            stride=stride,
            tracker=tracker,
            annotate=annotate,
            max_frames=max_frames,
            **submit,
        )
        return await self.submit(submission, on_progress=on_progress)

    async def submit_many(self, submissions: Sequence[Submission]) -> list[SubmitOutcome]:
        """See QueueClient.submit_many."""
        submitting = Submitting(submissions)
        for batch in submitting.batches():
            for place in batch:
                try:
                    media_ids = await self._upload_files(submissions[place])
                    submitting.add(place, await asyncio.to_thread(submissions[place].write, media_ids))
                except (AI4ThaiError, OSError) as error:
                    submitting.refuse(place, error)
            try:
                with translated(self.address):
                    if request := submitting.request():
                        submitting.take(await self._queue.BatchSubmitJobs(request, timeout=self._timeout_s))
            except AI4ThaiError as error:
                submitting.fail(error)
        return submitting.outcomes()

    async def get(self, job_id: str) -> Job:
        """See QueueClient.get."""
        with translated(self.address):
            answer = await self._queue.GetJob(queue_pb2.GetJobRequest(job_id=job_id), timeout=self._timeout_s)
        return queue_answers.read_job(answer.job)

    async def list(
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
        """See QueueClient.list."""
        request = queue_wire.write_list(states, queue, kind, label, client, page_size, page_token)
        with translated(self.address):
            return queue_answers.read_page(await self._queue.ListJobs(request, timeout=self._timeout_s))

    async def list_all(
        self,
        *,
        states: Iterable[JobState | str] = (),
        queue: str = "",
        kind: str = "",
        label: str = "",
        client: str = "",
        page_size: int = 200,
    ) -> AsyncIterator[Job]:
        """See QueueClient.list_all."""
        request = queue_wire.write_list(states, queue, kind, label, client, page_size, "")
        while True:
            with translated(self.address):
                page = queue_answers.read_page(await self._queue.ListJobs(request, timeout=self._timeout_s))
            for job in page.jobs:
                yield job
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    async def watch(
        self, job_id: str, after_revision: int = 0, *, timeout_s: float | None = None
    ) -> AsyncIterator[Job]:
        """See QueueClient.watch."""
        watch = Watch(job_id, after_revision, timeout_s)
        while not watch.has_ended:
            failure: AI4ThaiError | None = None
            try:
                with translated(self.address):
                    call = self._queue.WatchJob(watch.request(), timeout=watch.remaining_s())
                    try:
                        async for response in call:
                            job = watch.take(response)
                            if job is not None:
                                yield job
                    finally:
                        call.cancel()
            except AI4ThaiError as error:
                failure = error
            if not watch.has_ended:
                await asyncio.sleep(watch.delay_after(failure))

    async def wait(
        self, job_id: str, timeout_s: float | None = None, *, on_change: Callable[[Job], None] | None = None
    ) -> Job:
        """See QueueClient.wait."""
        async for job in self.watch(job_id, timeout_s=timeout_s):
            if on_change is not None:
                on_change(job)
        return await self.get(job_id)

    async def cancel(self, job_id: str) -> Job:
        """See QueueClient.cancel."""
        with translated(self.address):
            answer = await self._queue.CancelJob(queue_pb2.CancelJobRequest(job_id=job_id), timeout=self._timeout_s)
        return queue_answers.read_job(answer.job)

    async def retry(self, job_id: str) -> Job:
        """See QueueClient.retry."""
        with translated(self.address):
            answer = await self._queue.RetryJob(queue_pb2.RetryJobRequest(job_id=job_id), timeout=self._timeout_s)
        return queue_answers.read_job(answer.job)

    async def delete(self, job_id: str) -> None:
        """See QueueClient.delete."""
        with translated(self.address):
            await self._queue.DeleteJob(queue_pb2.DeleteJobRequest(job_id=job_id), timeout=self._timeout_s)

    async def upload(
        self,
        source: UploadSource,
        *,
        content_type: str = "",
        on_progress: OnProgress | None = None,
        timeout_s: float | None = None,
    ) -> Media:
        """See QueueClient.upload."""
        with Upload(source, content_type, on_progress, timeout_s) as upload:
            return await run_upload_async(upload, self._queue, self.address)

    async def download(
        self,
        media_id: str,
        target: DownloadTarget,
        *,
        on_progress: OnProgress | None = None,
        timeout_s: float | None = None,
    ) -> Media:
        """See QueueClient.download."""
        with Download(media_id, target, on_progress, timeout_s) as download:
            return await run_download_async(download, self._queue, self.address)

    async def stats(self, queue: str = "") -> Stats:
        """See QueueClient.stats."""
        request = queue_pb2.GetQueueStatsRequest(queue=queue)
        with translated(self.address):
            return queue_answers.read_stats(await self._queue.GetQueueStats(request, timeout=self._timeout_s))

    async def pause(self, queue: str) -> None:
        """See QueueClient.pause."""
        with translated(self.address):
            await self._queue.PauseQueue(queue_pb2.PauseQueueRequest(queue=queue), timeout=self._timeout_s)

    async def resume(self, queue: str) -> None:
        """See QueueClient.resume."""
        with translated(self.address):
            await self._queue.ResumeQueue(queue_pb2.ResumeQueueRequest(queue=queue), timeout=self._timeout_s)

    async def purge(self, queue: str) -> int:
        """See QueueClient.purge."""
        with translated(self.address):
            answer = await self._queue.PurgeQueue(queue_pb2.PurgeQueueRequest(queue=queue), timeout=self._timeout_s)
        return answer.cancelled_count

    async def workers(self) -> tuple[Worker, ...]:
        """See QueueClient.workers."""
        with translated(self.address):
            answer = await self._queue.ListWorkers(queue_pb2.ListWorkersRequest(), timeout=self._timeout_s)
        return tuple(queue_answers.read_worker(worker) for worker in answer.workers)

    async def health(self, service: str = "", *, timeout_s: float | None = None) -> Health:
        """See QueueClient.health."""
        return await check_health_async(self._channel, self.address, service, timeout_s or self._timeout_s)

    async def close(self) -> None:
        """Ends what still runs."""
        await self._channel.close()

    async def _upload_files(self, submission: Submission, on_progress: OnProgress | None = None) -> dict[int, str]:
        return {
            place: (await self.upload(file.path or file.content, on_progress=on_progress)).media_id
            for place, file in submission.uploads.items()
        }

    @cached_property
    def _channel(self) -> grpc.aio.Channel:
        return open_async_channel(self.address, credentials=self._credentials)

    @cached_property
    def _queue(self) -> queue_service_pb2_grpc.QueueServiceAsyncStub:
        return queue_service_pb2_grpc.QueueServiceStub(self._channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()
