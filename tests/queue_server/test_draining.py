"""A queue server that is told to stop does not wait for those who watch."""

from __future__ import annotations

import signal
import time

import grpc
import pytest
from ai4thai.queue.v1 import queue_service_pb2 as pb
from ai4thai.queue.v1 import queue_service_pb2_grpc as rpc

from tests.processes import ServerProcess


def test_a_watch_ends_when_draining_begins_and_goes_on_at_the_next_server(redis_url: str) -> None:
    env = {"REDIS_URL": redis_url, "QUEUE_WORKER_PORT": "0", "SERVING_DRAIN_SECONDS": "60"}
    request = pb.SubmitJobRequest()
    request.work.detect.images.add(content=b"never looked at: there is no worker")
    with ServerProcess("queue_server", env=env) as server:
        server.wait_for("health check passes", check="redis")
        with grpc.insecure_channel(server.address) as channel:
            stub = rpc.QueueServiceStub(channel)
            job_id = stub.SubmitJob(request, timeout=10).job.job_id
            watch = stub.WatchJob(pb.WatchJobRequest(job_id=job_id))
            first = next(watch)
            began_s = time.monotonic()
            server.signal(signal.SIGTERM)
            with pytest.raises(grpc.RpcError) as ended:
                next(watch)
            assert ended.value.code() == grpc.StatusCode.UNAVAILABLE
            assert server.wait(30) == 0
            assert time.monotonic() - began_s < 30  # not the 60 s that a running call would be given
    with ServerProcess("queue_server", env=env) as server, grpc.insecure_channel(server.address) as channel:
        server.wait_for("health check passes", check="redis")
        stub = rpc.QueueServiceStub(channel)
        watch = stub.WatchJob(pb.WatchJobRequest(job_id=job_id, after_revision=first.revision))
        stub.CancelJob(pb.CancelJobRequest(job_id=job_id))
        assert next(watch).revision == first.revision + 1


def test_a_setting_that_cannot_be_is_told_by_its_name() -> None:
    with ServerProcess("queue_server", env={"QUEUE_MAX_DEPTH": "-1"}) as server:
        assert server.wait() == 2
    text = "".join(server.lines)
    assert "QUEUE_MAX_DEPTH is '-1'" in text
    assert "Traceback" not in text
