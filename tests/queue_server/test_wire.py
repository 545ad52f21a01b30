"""Reading submissions and telling statistics, by property."""

from __future__ import annotations

import contextlib
import hashlib
import math

from ai4thai.queue.v1 import queue_service_pb2 as pb
from ai4thai.queue.v1 import work_pb2
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from queue_server import wire
from queue_server.ids import JobIds
from queue_server.jobs import Submission
from queue_server.settings import QueueSettings
from queue_server.statistics import quantile
from queue_server.work import KINDS
from serving.errors import Code, ServiceError
from tests.queue_server.conftest import detect

SETTINGS = QueueSettings(max_image_bytes=1000)
IMAGES = st.lists(st.binary(min_size=1, max_size=30), min_size=1, max_size=6)


def read(request: pb.SubmitJobRequest) -> Submission:
    return wire.read_submission(request, "0" * 32, wire.Caller(), SETTINGS)


@given(IMAGES)
def test_images_are_taken_out_and_named_by_what_they_are(images: list[bytes]) -> None:
    submission = read(pb.SubmitJobRequest(work=detect(*images)))
    ids = ["sha256:" + hashlib.sha256(image).hexdigest() for image in images]
    kept = work_pb2.Work.FromString(submission.work)
    assert [source.media_id for source in kept.detect.images] == ids
    assert submission.blobs == dict(zip(ids, images, strict=True))
    assert set(submission.media_ids) == set(ids) and len(submission.media_ids) == len(set(ids))
    assert not any(source.content for source in kept.detect.images)
    assert submission.item_count == len(images)


@given(IMAGES, st.data())
def test_the_fingerprint_is_of_the_body_alone(images: list[bytes], data: st.DataObject) -> None:
    by_content = read(pb.SubmitJobRequest(request_id="a", work=detect(*images)))
    # By id or by content, under whatever request_id, it is the same body
    mixed = work_pb2.Work()
    for image in images:
        if data.draw(st.booleans()):
            mixed.detect.images.add(content=image)
        else:
            mixed.detect.images.add(media_id="sha256:" + hashlib.sha256(image).hexdigest())
    assert read(pb.SubmitJobRequest(request_id="b", work=mixed)).fingerprint == by_content.fingerprint
    # Whatever else differs, it is another
    others = [
        pb.SubmitJobRequest(work=detect(*images, b"more")),
        pb.SubmitJobRequest(work=detect(*images), queue="q"),
        pb.SubmitJobRequest(work=detect(*images), priority=1),
        pb.SubmitJobRequest(work=detect(*images), max_attempts=2),
        pb.SubmitJobRequest(work=detect(*images), labels={"a": "b"}),
    ]
    fingerprints = {read(other).fingerprint for other in others}
    assert len(fingerprints) == len(others) and by_content.fingerprint not in fingerprints


@given(st.binary(max_size=300))
def test_any_bytes_are_a_submission_or_a_clear_error(data: bytes) -> None:
    request = pb.SubmitJobRequest()
    with contextlib.suppress(DecodeError):
        request.ParseFromString(data)
    try:
        submission = read(request)
    except ServiceError as error:
        assert error.code in (Code.INVALID_ARGUMENT, Code.UNIMPLEMENTED)
        assert error.field or error.code == Code.UNIMPLEMENTED
    else:
        assert submission.kind in KINDS and submission.queue


@given(st.lists(st.integers(1, 3_600_000), min_size=1, max_size=200), st.sampled_from([0.5, 0.95]))
def test_quantiles_are_within_a_tenth(latencies_ms: list[int], share: float) -> None:
    # Given latencies, sorted into steps as scripts/record.lua does
    steps: dict[int, int] = {}
    for latency_ms in latencies_ms:
        step = int(math.log(latency_ms) / math.log(1.1))
        steps[step] = steps.get(step, 0) + 1
    exact_s = sorted(latencies_ms)[math.ceil(len(latencies_ms) * share) - 1] / 1000
    found_s = quantile(steps, share)
    assert found_s is not None and exact_s / 1.1 <= found_s <= exact_s * 1.1
    assert quantile({}, share) is None


def test_the_names_of_jobs_grow() -> None:
    ids = JobIds()
    names = [ids.new() for _ in range(10_000)]
    assert names == sorted(names) and len(set(names)) == len(names)
    assert all(wire.read_job_id(name) == name for name in names)


def test_the_table_has_every_kind_of_the_contract() -> None:
    for message, oneof in ((work_pb2.Work, "work"), (work_pb2.JobResult, "result")):
        assert set(KINDS) == {field.name for field in message.DESCRIPTOR.oneofs_by_name[oneof].fields}
