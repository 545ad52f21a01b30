"""Answers the calls of ai4thai.queue.v1.QueueService."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from typing import Any

import grpc
from ai4thai.queue.v1 import queue_service_pb2 as pb
from ai4thai.queue.v1 import queue_service_pb2_grpc
from starlette.routing import BaseRoute

from queue_server import wire
from queue_server.connection import Connection, place
from queue_server.errors import DOMAIN, InvalidField
from queue_server.ids import JobIds
from queue_server.jobs import Submission
from queue_server.metrics import JobMetrics
from queue_server.settings import QueueSettings
from queue_server.statistics import Statistics
from queue_server.store import Store
from queue_server.sweeper import Sweeper
from queue_server.watch import Watches
from serving.errors import not_served_yet
from serving.health import Health
from serving.logs import get_logger
from serving.telemetry import REGISTRY

NAME = "ai4thai.queue.v1.QueueService"
# A submission larger than this is read on a thread: hashing 1 MB takes about a millisecond, which the event loop has not.
READ_ON_LOOP_BYTES = 64 << 10

_log = get_logger("service")


class QueueService(queue_service_pb2_grpc.QueueServiceServicer):
    """The queue server, as serving.process.run takes it."""

    name = "queue_server"
    domain = DOMAIN
    service_names: Sequence[str] = (NAME,)
    ready_name = NAME

    def __init__(self, settings: QueueSettings, version: str) -> None:
        self.version = version
        self._settings = settings
        self._ids = JobIds()
        self._connection = Connection(settings.url, settings.store_timeout_s)
        self._store = Store(self._connection, settings)
        self._statistics = Statistics(self._connection)
        self._watches = Watches(self._store, self._connection, settings.max_watchers)
        self._metrics = JobMetrics()
        self._sweeper = Sweeper(self._store, self._statistics, self._metrics, settings)

    # ---- life

    def add_to(self, server: grpc.aio.Server) -> None:
        """Adds the methods below to the server."""
        queue_service_pb2_grpc.add_QueueServiceServicer_to_server(self, server)

    def routes(self) -> Sequence[BaseRoute]:
        """No routes beside those of the contract."""
        return ()

    async def start(self, health: Health) -> None:
        """Returns at once; Redis may be away, health tells."""
        await self._connection.start()
        health.add_probe("redis", self._store.check, interval_s=1.0, timeout_s=self._settings.store_timeout_s + 0.5)
        health.expose(NAME, "redis")
        self._metrics.register(REGISTRY)
        await self._watches.start()
        await self._sweeper.start()
        _log.info("jobs are kept in Redis", address=place(self._settings.url))

    def drain(self) -> None:
        """Ends the watches, which else would last as long as their jobs."""
        self._watches.drain()

    async def stop(self) -> None:
        """Backwards."""
        await self._sweeper.stop()
        await self._watches.stop()
        self._metrics.unregister(REGISTRY)
        await self._connection.stop()

    # ---- jobs

    async def SubmitJob(self, request: pb.SubmitJobRequest, context: Any) -> pb.SubmitJobResponse:
        """Saved before it is sent, both in one script: what was answered is kept."""
        submission = await self._read(request)
        job, created = await self._store.submit(submission)
        _log.info(
            f"job {job.state}" if created else "job asked for again",
            job_id=job.job_id,
            client_request_id=job.request_id,
            kind=job.kind,
            queue=job.queue,
            priority=job.priority.value,
        )
        return pb.SubmitJobResponse(job=wire.write_job(job), created=created)

    async def GetJob(self, request: pb.GetJobRequest, context: Any) -> pb.GetJobResponse:
        """With the result, when there is one."""
        job, result = await self._store.job_with_result(wire.read_job_id(request.job_id))
        return pb.GetJobResponse(job=wire.write_job(job, result))

    async def ListJobs(self, request: pb.ListJobsRequest, context: Any) -> pb.ListJobsResponse:
        """The newest first; a page may be short, or empty, while next_page_token is set."""
        wanted, page_size, cursor = wire.read_list(request)
        page = await self._store.list_jobs(wanted, page_size, cursor)
        return pb.ListJobsResponse(jobs=[wire.write_job(job) for job in page.jobs], next_page_token=page.cursor)

    async def WatchJob(self, request: pb.WatchJobRequest, context: Any) -> AsyncIterator[pb.WatchJobResponse]:
        """The last message carries the result."""
        job_id = wire.read_job_id(request.job_id)
        if request.after_revision < 0:
            raise InvalidField("after_revision", f"after_revision is {request.after_revision}; it begins at 0.")
        async with aclosing(self._watches.watch(job_id, request.after_revision)) as jobs:
            async for job in jobs:
                result = None
                if job.ended:
                    job, result = await self._store.job_with_result(job_id)
                yield pb.WatchJobResponse(job=wire.write_job(job, result), revision=job.revision)

    async def CancelJob(self, request: pb.CancelJobRequest, context: Any) -> pb.CancelJobResponse:
        """A waiting job is CANCELLED in the answer; a running one has cancel_requested set."""
        job = await self._store.cancel(wire.read_job_id(request.job_id))
        _log.info(
            f"job {job.state}: cancel requested",
            job_id=job.job_id,
            client_request_id=job.request_id,
        )
        return pb.CancelJobResponse(job=wire.write_job(job))

    async def DeleteJob(self, request: pb.DeleteJobRequest, context: Any) -> pb.DeleteJobResponse:
        """Only jobs that have ended."""
        await self._store.delete(wire.read_job_id(request.job_id))
        _log.info("job deleted", job_id=request.job_id)
        return pb.DeleteJobResponse()

    # ---- the operator's view

    async def GetQueueStats(self, request: pb.GetQueueStatsRequest, context: Any) -> pb.GetQueueStatsResponse:
        """All queues that have had a job, or the one asked for."""
        queues = await self._statistics.queues(wire.read_queue(request.queue, "queue"))
        workers = await self._statistics.workers()
        return pb.GetQueueStatsResponse(queues=[wire.write_queue(one) for one in queues], worker_count=len(workers))

    async def ListWorkers(self, request: pb.ListWorkersRequest, context: Any) -> pb.ListWorkersResponse:
        """Those that were heard of within a lease."""
        return pb.ListWorkersResponse(workers=[wire.write_worker(one) for one in await self._statistics.workers()])

    # ---- in the contract, to come

    async def BatchSubmitJobs(self, request: pb.BatchSubmitJobsRequest, context: Any) -> pb.BatchSubmitJobsResponse:
        """Not served yet."""
        raise not_served_yet("BatchSubmitJobs")

    async def RetryJob(self, request: pb.RetryJobRequest, context: Any) -> pb.RetryJobResponse:
        """Not served yet."""
        raise not_served_yet("RetryJob")

    async def UploadMedia(
        self, request_iterator: AsyncIterator[pb.UploadMediaRequest], context: Any
    ) -> pb.UploadMediaResponse:
        """Not served yet."""
        raise not_served_yet("UploadMedia")

    async def GetMedia(self, request: pb.GetMediaRequest, context: Any) -> AsyncIterator[pb.GetMediaResponse]:
        """Not served yet."""
        raise not_served_yet("GetMedia")
        yield  # makes it the stream that the contract says

    async def PauseQueue(self, request: pb.PauseQueueRequest, context: Any) -> pb.PauseQueueResponse:
        """Not served yet."""
        raise not_served_yet("PauseQueue")

    async def ResumeQueue(self, request: pb.ResumeQueueRequest, context: Any) -> pb.ResumeQueueResponse:
        """Not served yet."""
        raise not_served_yet("ResumeQueue")

    async def PurgeQueue(self, request: pb.PurgeQueueRequest, context: Any) -> pb.PurgeQueueResponse:
        """Not served yet."""
        raise not_served_yet("PurgeQueue")

    async def _read(self, request: pb.SubmitJobRequest) -> Submission:
        job_id = self._ids.new()
        if request.ByteSize() > READ_ON_LOOP_BYTES:
            return await asyncio.to_thread(wire.read_submission, request, job_id, self._settings)
        return wire.read_submission(request, job_id, self._settings)
