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
from queue_server.checks import add_checks
from queue_server.connection import Connection, place
from queue_server.depth import depth_route
from queue_server.errors import DOMAIN, InvalidField
from queue_server.ids import JobIds
from queue_server.jobs import Job, JobState, Submission
from queue_server.lines import of_job, of_row
from queue_server.listing import Listing
from queue_server.lost import LostJobs
from queue_server.media.calls import MediaCalls
from queue_server.media.routes import media_routes
from queue_server.media.sweep import ObjectSweep
from queue_server.metrics import JobMetrics
from queue_server.queues import Queues
from queue_server.settings import QueueSettings
from queue_server.statistics import Statistics
from queue_server.store import Store
from queue_server.sweeper import Sweeper
from queue_server.watch import Watches
from queue_server.webhooks import Webhooks
from serving.errors import ServiceError
from serving.health import Health
from serving.logs import get_logger
from serving.status import to_status
from serving.telemetry import REGISTRY

NAME = "ai4thai.queue.v1.QueueService"
# A submission larger than this is read on a thread: hashing 1 MB takes about a millisecond, which the event loop has not.
READ_ON_LOOP_BYTES = 64 << 10
# Of a batch so many outcomes are written and logged before other callers get their turn: some milliseconds.
TOLD_AT_ONCE = 50

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
        self._connection = Connection(settings.url, settings.store_timeout_s, settings.terms)
        self._store = Store(self._connection, settings)
        self._listing = Listing(self._connection)
        self._queues = Queues(self._connection, settings)
        self._statistics = Statistics(self._connection)
        self._watches = Watches(self._store, self._connection, settings.max_watchers)
        self._lost = LostJobs(self._connection, self._watches.ring)
        self._webhooks = Webhooks(self._connection, settings)
        self._metrics = JobMetrics(lambda: self._watches.count)
        self._sweeper = Sweeper(self._store, self._statistics, self._metrics, settings)
        self._media = MediaCalls(self._store.files, settings.upload_idle_s)
        self._objects = ObjectSweep(self._connection, self._store.files.objects, settings)

    # ---- life

    def add_to(self, server: grpc.aio.Server) -> None:
        """Adds the methods below to the server."""
        queue_service_pb2_grpc.add_QueueServiceServicer_to_server(self, server)

    def routes(self) -> Sequence[BaseRoute]:
        """Files as they are, and a queue's depth for scalers, beside the contract's JSON."""
        return [depth_route(self._statistics.depth, wire.read_queue), *media_routes()]

    async def start(self, health: Health) -> None:
        """Returns at once; Redis may be away, health tells."""
        await self._connection.start()
        health.add_probe("redis", self._check_redis, interval_s=1.0, timeout_s=self._settings.store_timeout_s + 0.5)
        health.expose(NAME, "redis")
        self._metrics.register(REGISTRY)
        self._lost.register(REGISTRY)
        await self._watches.start()
        await self._sweeper.start()
        await self._webhooks.start()
        add_checks(
            health,
            self._statistics,
            self._sweeper,
            self._webhooks,
            sweep_s=self._settings.sweep_s,
            timeout_s=self._settings.store_timeout_s + 0.5,
        )
        if self._settings.media_url:
            health.add_probe("media", self._store.files.objects.check, interval_s=10.0, timeout_s=30.0)
            self._objects.start()
        _log.info("jobs are kept in Redis", address=place(self._settings.url))

    async def _check_redis(self) -> str:
        detail = await self._store.check()
        await self._lost.look()
        return detail

    def drain(self) -> None:
        """Ends the watches, which else would last as long as their jobs."""
        self._watches.drain()

    async def stop(self) -> None:
        """Backwards."""
        await self._objects.stop()
        await self._webhooks.stop()
        await self._sweeper.stop()
        await self._watches.stop()
        self._lost.unregister(REGISTRY)
        self._metrics.unregister(REGISTRY)
        await self._connection.stop()

    # ---- jobs

    async def SubmitJob(self, request: pb.SubmitJobRequest, context: Any) -> pb.SubmitJobResponse:
        """Saved before it is sent, both in one script: what was answered is kept."""
        with self._metrics.refusals():
            submission = await self._read(request, wire.read_caller(context.invocation_metadata()))
            job, created = await self._store.submit(submission)
        self._lost.accepted(job.job_id, job.request_id)
        _log_submitted(job, created)
        return pb.SubmitJobResponse(job=wire.write_job(job), created=created)

    async def BatchSubmitJobs(self, request: pb.BatchSubmitJobsRequest, context: Any) -> pb.BatchSubmitJobsResponse:
        """What is wrong with one, or finds no room, is that one's outcome."""
        caller = wire.read_caller(context.invocation_metadata())
        requests = wire.read_batch(request)
        job_ids = [self._ids.new() for _ in requests]
        read = await asyncio.to_thread(self._read_many, requests, job_ids, caller)
        accepted = iter(await self._store.submit_many([one for one in read if isinstance(one, Submission)]))
        response = pb.BatchSubmitJobsResponse()
        for number, submission in enumerate(read):
            if number % TOLD_AT_ONCE == 0:
                await asyncio.sleep(0)
            outcome = next(accepted) if isinstance(submission, Submission) else submission
            if isinstance(outcome, ServiceError):
                self._metrics.count_refused(outcome)
                response.items.add(error=to_status(outcome, DOMAIN))
            else:
                job, created = outcome
                self._lost.accepted(job.job_id, job.request_id)
                _log_submitted(job, created)
                response.items.add(accepted=pb.SubmitJobResponse(job=wire.write_job(job), created=created))
        return response

    async def GetJob(self, request: pb.GetJobRequest, context: Any) -> pb.GetJobResponse:
        """With the result, when there is one."""
        async with self._lost.told():
            job, result = await self._store.job_with_result(wire.read_job_id(request.job_id))
        return pb.GetJobResponse(job=wire.write_job(job, result))

    async def ListJobs(self, request: pb.ListJobsRequest, context: Any) -> pb.ListJobsResponse:
        """The newest first; a page may be short, or empty, while next_page_token is set."""
        wanted, page_size, cursor = wire.read_list(request)
        page = await self._listing.list_jobs(wanted, page_size, cursor)
        return pb.ListJobsResponse(jobs=[wire.write_job(job) for job in page.jobs], next_page_token=page.cursor)

    async def WatchJob(self, request: pb.WatchJobRequest, context: Any) -> AsyncIterator[pb.WatchJobResponse]:
        """The last message carries the result."""
        job_id = wire.read_job_id(request.job_id)
        if request.after_revision < 0:
            raise InvalidField("after_revision", f"after_revision is {request.after_revision}; it begins at 0.")
        async with self._lost.told(), aclosing(self._watches.watch(job_id, request.after_revision)) as jobs:
            async for job in jobs:
                result = None
                if job.ended:
                    latest, found = await self._store.job_with_result(job_id)
                    # Not of an end that RetryJob has led on from.
                    if latest.revision == job.revision:
                        job, result = latest, found
                yield pb.WatchJobResponse(job=wire.write_job(job, result), revision=job.revision)

    async def CancelJob(self, request: pb.CancelJobRequest, context: Any) -> pb.CancelJobResponse:
        """A waiting job is CANCELLED in the answer; a running one has cancel_requested set."""
        async with self._lost.told():
            before = await self._store.request_cancel(wire.read_job_id(request.job_id))
            job = await self._store.job(request.job_id)
        if before == JobState.RUNNING:
            _log.info("job RUNNING: its worker is asked to stop", **of_job(job))
        elif before is not None:
            _log.info("job CANCELLED: it had not begun", **of_job(job))
        return pb.CancelJobResponse(job=wire.write_job(job))

    async def RetryJob(self, request: pb.RetryJobRequest, context: Any) -> pb.RetryJobResponse:
        """The same job, with all its attempts before it."""
        async with self._lost.told():
            job = await self._store.retry(wire.read_job_id(request.job_id))
        _log.info("job QUEUED: tried again by hand", **of_job(job))
        return pb.RetryJobResponse(job=wire.write_job(job))

    async def DeleteJob(self, request: pb.DeleteJobRequest, context: Any) -> pb.DeleteJobResponse:
        """Only jobs that have ended."""
        async with self._lost.told():
            job = await self._store.job(wire.read_job_id(request.job_id))
            await self._store.delete(job.job_id)
        self._lost.deleted(request.job_id)
        _log.info("job forgotten: it was deleted", **of_job(job))
        return pb.DeleteJobResponse()

    # ---- the operator's view and hand

    async def GetQueueStats(self, request: pb.GetQueueStatsRequest, context: Any) -> pb.GetQueueStatsResponse:
        """All queues that have had a job, or the one asked for."""
        queues = await self._statistics.queues(wire.read_queue(request.queue, "queue"))
        workers = await self._statistics.workers()
        return pb.GetQueueStatsResponse(queues=[wire.write_queue(one) for one in queues], worker_count=len(workers))

    async def ListWorkers(self, request: pb.ListWorkersRequest, context: Any) -> pb.ListWorkersResponse:
        """Those that were heard of within a lease."""
        return pb.ListWorkersResponse(workers=[wire.write_worker(one) for one in await self._statistics.workers()])

    async def PauseQueue(self, request: pb.PauseQueueRequest, context: Any) -> pb.PauseQueueResponse:
        """What runs goes on; what comes is accepted and held."""
        await self._queues.pause(_needed_queue(request.queue))
        _log.warning("queue paused", queue=request.queue)
        return pb.PauseQueueResponse()

    async def ResumeQueue(self, request: pb.ResumeQueueRequest, context: Any) -> pb.ResumeQueueResponse:
        """The held jobs go on, in their order."""
        await self._queues.resume(_needed_queue(request.queue))
        _log.warning("queue resumed", queue=request.queue)
        return pb.ResumeQueueResponse()

    async def PurgeQueue(self, request: pb.PurgeQueueRequest, context: Any) -> pb.PurgeQueueResponse:
        """Jobs submitted meanwhile stay."""
        count = 0
        async for row in self._queues.purge(_needed_queue(request.queue)):
            count += 1
            _log.info("job CANCELLED: its queue was purged", **of_row(row))
        _log.warning("queue purged", queue=request.queue, cancelled_count=count)
        return pb.PurgeQueueResponse(cancelled_count=count)

    # ---- files

    async def UploadMedia(
        self, request_iterator: AsyncIterator[pb.UploadMediaRequest], context: Any
    ) -> pb.UploadMediaResponse:
        """The same bytes are stored once. The initial metadata says whether the chunks are wanted."""
        return await self._media.upload(request_iterator, context.send_initial_metadata)

    async def GetMedia(self, request: pb.GetMediaRequest, context: Any) -> AsyncIterator[pb.GetMediaResponse]:
        """As fast as the caller takes it."""
        async with aclosing(self._media.get(request)) as responses:
            async for response in responses:
                yield response

    def _read_many(
        self, requests: Sequence[pb.SubmitJobRequest], job_ids: Sequence[str], caller: wire.Caller
    ) -> list[Submission | ServiceError]:
        read: list[Submission | ServiceError] = []
        for request, job_id in zip(requests, job_ids, strict=True):
            try:
                read.append(wire.read_submission(request, job_id, caller, self._settings))
            except ServiceError as error:
                read.append(error)
        return read

    async def _read(self, request: pb.SubmitJobRequest, caller: wire.Caller) -> Submission:
        job_id = self._ids.new()
        if request.ByteSize() > READ_ON_LOOP_BYTES:
            return await asyncio.to_thread(wire.read_submission, request, job_id, caller, self._settings)
        return wire.read_submission(request, job_id, caller, self._settings)


def _needed_queue(name: str) -> str:
    if not name:
        raise InvalidField("queue", "queue is empty.", cure="GetQueueStats tells which there are.")
    return wire.read_queue(name, "queue")


def _log_submitted(job: Job, created: bool) -> None:
    _log.info(
        f"job {job.state}" if created else "job asked for again",
        **of_job(job),
        client=job.client,
        kind=job.kind,
        queue=job.queue,
        priority=job.priority.value,
    )
