"""Looks, after each test that did harm, whether the servers are as they were before."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import psutil
import pytest
from ai4thai.queue.v1 import queue_service_pb2 as queue_pb
from ai4thai.queue.v1 import work_pb2
from ai4thai.vision.v1 import detection_pb2

from tests.end_to_end.calling import Server, detect_request, refused
from tests.end_to_end.pictures import foreign, jpeg

GROWTH_BYTES = 300_000_000
GOOD = jpeg(foreign(3, 3, 3).image)


def memory_bytes(server: Server) -> int:
    return psutil.Process(server.process.pid).memory_info().rss


def detecting(*contents: bytes) -> work_pb2.Work:
    return work_pb2.Work(
        detect=work_pb2.DetectWork(images=[work_pb2.MediaSource(content=content) for content in contents])
    )


@dataclass(frozen=True)
class Before:
    """How things were before anybody did harm."""

    detections: Sequence[detection_pb2.Detection]
    vision_bytes: int
    queue_bytes: int


def refuse_a_large_message(vision: Server, queue: Server) -> None:
    large = bytes(50_000_000)
    assert refused(lambda: vision.vision.Detect(detect_request(large), timeout=30)).reason == "IMAGE_TOO_LARGE"
    request = queue_pb.SubmitJobRequest(work=detecting(large))
    said = refused(lambda: queue.queue.SubmitJob(request, timeout=30))
    assert said.field.startswith("work.detect.images[0]")


@pytest.fixture(scope="module")
def before(vision: Server, queue: Server) -> Before:
    """The right answer, and the memory in use once the allocator has at hand what a large message needs for a moment."""
    for _ in range(2):
        refuse_a_large_message(vision, queue)
    detections = vision.vision.Detect(detect_request(GOOD)).detections
    return Before(detections, memory_bytes(vision), memory_bytes(queue))


@pytest.fixture
def served_as_before(vision: Server, queue: Server, before: Before) -> Iterator[None]:
    """After every test: the same processes give the same answers, over gRPC and HTTP, in about the same memory."""
    yield
    again = vision.vision.Detect(detect_request(GOOD), timeout=30).detections
    assert [(d.label, d.box) for d in again] == [(d.label, d.box) for d in before.detections]
    assert queue.queue.ListJobs(queue_pb.ListJobsRequest(), timeout=30) is not None
    for server in (vision, queue):
        assert server.web.get("/health").json() == {"status": "SERVING"}
        assert server.process.process.poll() is None
    assert memory_bytes(vision) < before.vision_bytes + GROWTH_BYTES
    assert memory_bytes(queue) < before.queue_bytes + GROWTH_BYTES
