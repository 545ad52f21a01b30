"""The client of a queue server, for threads and for asyncio."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from functools import cached_property
from typing import Final, Self, Unpack

import grpc
import grpc.aio

from ai4thai import queue_wire
from ai4thai.channel import open_async_channel, open_channel
from ai4thai.errors import AI4ThaiError, translated
from ai4thai.health import check_health, check_health_async
from ai4thai.image_input import ImageInput
from ai4thai.job_results import Job, JobPage, JobState, Stats, Worker
from ai4thai.options import DetectOptions, Message, SubmitOptions, TextOptions
from ai4thai.queue.v1 import queue_service_pb2 as queue_pb2
from ai4thai.queue.v1 import queue_service_pb2_grpc, work_pb2
from ai4thai.server_info import Health
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

    def submit_detect(
        self, images: Iterable[ImageInput], *, detect: DetectOptions | None = None, **submit: Unpack[SubmitOptions]
    ) -> Job:
        """Queues a job that finds the objects in 1 to 1000 images."""
        return self._submit(queue_wire.write_detect_work(images, detect or {}), submit)

    def submit_generate(
        self, messages: Iterable[Message], *, text: TextOptions | None = None, **submit: Unpack[SubmitOptions]
    ) -> Job:
        """Queues a job that answers a conversation."""
        return self._submit(queue_wire.write_generate_work(messages, text or {}), submit)

    def submit_analyze(
        self,
        images: Iterable[ImageInput],
        question: str,
        *,
        detect: DetectOptions | None = None,
        text: TextOptions | None = None,
        **submit: Unpack[SubmitOptions],
    ) -> Job:
        """Queues a job that finds the objects in 1 to 1000 images and answers a question about each."""
        return self._submit(queue_wire.write_analyze_work(images, question, detect or {}, text or {}), submit)

    def get(self, job_id: str) -> Job:
        """The job as it stands, with its result."""
        with translated(self.address):
            return queue_wire.read_job(
                self._queue.GetJob(queue_pb2.GetJobRequest(job_id=job_id), timeout=self._timeout_s).job
            )

    def list(
        self,
        *,
        states: Iterable[JobState | str] = (),
        queue: str = "",
        kind: str = "",
        label: str = "",
        page_size: int = 0,
        page_token: str = "",
    ) -> JobPage:
        """Jobs without their results, the newest first; every filter may be left out, `label` is `key` or `key=value`."""
        request = queue_wire.write_list(states, queue, kind, label, page_size, page_token)
        with translated(self.address):
            return queue_wire.read_page(self._queue.ListJobs(request, timeout=self._timeout_s))

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
            return queue_wire.read_job(
                self._queue.CancelJob(queue_pb2.CancelJobRequest(job_id=job_id), timeout=self._timeout_s).job
            )

    def delete(self, job_id: str) -> None:
        """Forgets an ended job and its result."""
        with translated(self.address):
            self._queue.DeleteJob(queue_pb2.DeleteJobRequest(job_id=job_id), timeout=self._timeout_s)

    def stats(self, queue: str = "") -> Stats:
        """The counts of one queue, or of all."""
        with translated(self.address):
            return queue_wire.read_stats(
                self._queue.GetQueueStats(queue_pb2.GetQueueStatsRequest(queue=queue), timeout=self._timeout_s)
            )

    def workers(self) -> tuple[Worker, ...]:
        """The workers that are alive."""
        with translated(self.address):
            answer = self._queue.ListWorkers(queue_pb2.ListWorkersRequest(), timeout=self._timeout_s)
        return tuple(queue_wire.read_worker(worker) for worker in answer.workers)

    def health(self, service: str = "", *, timeout_s: float | None = None) -> Health:
        """Whether the process lives (empty), or SERVICE_NAME takes jobs."""
        return check_health(self._channel, self.address, service, timeout_s or self._timeout_s)

    def close(self) -> None:
        """Ends what still runs."""
        self._channel.close()

    def _submit(self, work: work_pb2.Work, options: SubmitOptions) -> Job:
        request = queue_wire.write_submit(work, options)
        with translated(self.address):
            return queue_wire.read_job(self._queue.SubmitJob(request, timeout=self._timeout_s).job)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


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

    async def submit_detect(
        self, images: Iterable[ImageInput], *, detect: DetectOptions | None = None, **submit: Unpack[SubmitOptions]
    ) -> Job:
        """See QueueClient.submit_detect."""
        work = await asyncio.to_thread(queue_wire.write_detect_work, images, detect or {})  # may read files
        return await self._submit(work, submit)

    async def submit_generate(
        self, messages: Iterable[Message], *, text: TextOptions | None = None, **submit: Unpack[SubmitOptions]
    ) -> Job:
        """See QueueClient.submit_generate."""
        work = await asyncio.to_thread(queue_wire.write_generate_work, messages, text or {})
        return await self._submit(work, submit)

    async def submit_analyze(
        self,
        images: Iterable[ImageInput],
        question: str,
        *,
        detect: DetectOptions | None = None,
        text: TextOptions | None = None,
        **submit: Unpack[SubmitOptions],
    ) -> Job:
        """See QueueClient.submit_analyze."""
        work = await asyncio.to_thread(queue_wire.write_analyze_work, images, question, detect or {}, text or {})
        return await self._submit(work, submit)

    async def get(self, job_id: str) -> Job:
        """See QueueClient.get."""
        with translated(self.address):
            answer = await self._queue.GetJob(queue_pb2.GetJobRequest(job_id=job_id), timeout=self._timeout_s)
        return queue_wire.read_job(answer.job)

    async def list(
        self,
        *,
        states: Iterable[JobState | str] = (),
        queue: str = "",
        kind: str = "",
        label: str = "",
        page_size: int = 0,
        page_token: str = "",
    ) -> JobPage:
        """See QueueClient.list."""
        request = queue_wire.write_list(states, queue, kind, label, page_size, page_token)
        with translated(self.address):
            return queue_wire.read_page(await self._queue.ListJobs(request, timeout=self._timeout_s))

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
        return queue_wire.read_job(answer.job)

    async def delete(self, job_id: str) -> None:
        """See QueueClient.delete."""
        with translated(self.address):
            await self._queue.DeleteJob(queue_pb2.DeleteJobRequest(job_id=job_id), timeout=self._timeout_s)

    async def stats(self, queue: str = "") -> Stats:
        """See QueueClient.stats."""
        request = queue_pb2.GetQueueStatsRequest(queue=queue)
        with translated(self.address):
            return queue_wire.read_stats(await self._queue.GetQueueStats(request, timeout=self._timeout_s))

    async def workers(self) -> tuple[Worker, ...]:
        """See QueueClient.workers."""
        with translated(self.address):
            answer = await self._queue.ListWorkers(queue_pb2.ListWorkersRequest(), timeout=self._timeout_s)
        return tuple(queue_wire.read_worker(worker) for worker in answer.workers)

    async def health(self, service: str = "", *, timeout_s: float | None = None) -> Health:
        """See QueueClient.health."""
        return await check_health_async(self._channel, self.address, service, timeout_s or self._timeout_s)

    async def close(self) -> None:
        """Ends what still runs."""
        await self._channel.close()

    async def _submit(self, work: work_pb2.Work, options: SubmitOptions) -> Job:
        request = queue_wire.write_submit(work, options)
        with translated(self.address):
            answer = await self._queue.SubmitJob(request, timeout=self._timeout_s)
        return queue_wire.read_job(answer.job)

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
