"""Streams of frames: each is answered in order, a bad one with its own error."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
from ai4thai.vision.v1 import detection_pb2, image_pb2
from ai4thai.vision.v1 import vision_service_pb2 as pb

from tests.end_to_end.calling import Server, detect_request, refusal, refused
from tests.end_to_end.pictures import Agreement, Picture, found, jpeg, unseen

FRAMES = 200
CORRUPT = {0, 41, 42, 150, 199}


def config(**fields: Any) -> pb.DetectStreamRequest:
    return pb.DetectStreamRequest(config=pb.StreamConfig(**fields))


def frame(frame_id: int, content: bytes) -> pb.DetectStreamRequest:
    return pb.DetectStreamRequest(frame=pb.Frame(frame_id=frame_id, image=image_pb2.Image(content=content)))


def small(count: int) -> list[Picture]:
    """Pictures of a quick size."""
    return [picture.fitted(320) for picture in unseen(count)]


def answers(vision: Server, requests: Sequence[pb.DetectStreamRequest]) -> list[pb.DetectStreamResponse]:
    return list(vision.vision.DetectStream(iter(requests), timeout=100))


def test_200_frames_with_5_corrupt_ones_give_195_results_and_5_errors_in_order(vision: Server) -> None:
    pictures = small(10)
    contents = [jpeg(picture.image) for picture in pictures]
    # Cut in half, no bytes, no image, no JPEG after its first bytes, noise.
    broken = dict(
        zip(
            sorted(CORRUPT),
            [contents[0][:1500], b"", b"not an image", b"\xff\xd8\xff\xe0" * 40, bytes(999)],
            strict=True,
        )
    )
    ids = [10_000 - 7 * number for number in range(FRAMES)]  # any numbers, as a caller may choose
    requests = [config()] + [frame(ids[n], broken.get(n, contents[n % 10])) for n in range(FRAMES)]
    *results, last = answers(vision, requests)

    assert [response.result.frame_id for response in results] == ids
    errors = {n for n, response in enumerate(results) if response.result.WhichOneof("outcome") == "error"}
    detected = {n for n, response in enumerate(results) if response.result.WhichOneof("outcome") == "detection"}
    assert errors == CORRUPT
    assert len(detected) == FRAMES - len(CORRUPT)
    for number in errors:
        said = refusal(results[number].result.error)
        assert said.code == "INVALID_ARGUMENT"
        assert said.reason == ("IMAGE_EMPTY" if broken[number] == b"" else "IMAGE_UNREADABLE")
        assert said.domain == "vision.ai4thai"
        assert said.message
    agreement = Agreement()
    for number in detected:
        agreement.add(results[number].result.detection.detections, pictures[number % 10].truth)
    assert agreement.recall >= 0.9, agreement

    summary = last.summary
    assert (summary.received_count, summary.detected_count) == (FRAMES, FRAMES - len(CORRUPT))
    assert (summary.error_count, summary.dropped_count) == (len(CORRUPT), 0)
    assert summary.duration.ToMilliseconds() > 0


def test_a_streams_results_are_those_of_single_calls(vision: Server) -> None:
    contents = [jpeg(picture.image) for picture in small(6)]
    options = detection_pb2.DetectOptions(min_confidence=0.4, max_detections=3)
    *results, _ = answers(vision, [config(options=options), *(frame(n, c) for n, c in enumerate(contents))])
    for response, content in zip(results, contents, strict=True):
        direct = vision.vision.Detect(detect_request(content, min_confidence=0.4, max_detections=3))
        streamed = found(response.result.detection.detections)
        assert [label for label, _, _ in streamed] == [label for label, _, _ in found(direct.detections)]
        for (_, sure, box), (_, other_sure, other_box) in zip(streamed, found(direct.detections), strict=True):
            assert sure == pytest.approx(other_sure, abs=1e-3)
            assert box == pytest.approx(other_box, abs=0.1)


def test_results_come_while_the_caller_still_sends(vision: Server) -> None:
    content = jpeg(small(1)[0].image)
    answered = threading.Semaphore(0)

    def frames() -> Iterator[pb.DetectStreamRequest]:
        yield config()
        for number in range(5):
            yield frame(number, content)
            assert answered.acquire(timeout=30), "the next frame is sent only once the one before is answered"

    numbers = []
    for response in vision.vision.DetectStream(frames(), timeout=60):
        if response.WhichOneof("message") == "result":
            numbers.append(response.result.frame_id)
            answered.release()
    assert numbers == list(range(5))


@pytest.mark.parametrize("in_flight", [1, 4])
def test_frames_in_flight_are_bounded_and_stay_in_order(vision: Server, in_flight: int) -> None:
    contents = [jpeg(picture.image) for picture in small(4)]
    requests = [config(max_in_flight=in_flight), *(frame(n, contents[n % 4]) for n in range(24))]
    *results, last = answers(vision, requests)
    assert [response.result.frame_id for response in results] == list(range(24))
    assert last.summary.detected_count == 24


def test_a_stream_without_frames_is_summed_up(vision: Server) -> None:
    (only,) = answers(vision, [config()])
    assert only.WhichOneof("message") == "summary"
    assert only.summary.received_count == 0


def test_several_streams_at_once_each_get_their_own_results(vision: Server) -> None:
    pictures = small(5)

    def one(caller: int) -> None:
        picture = pictures[caller]
        *results, last = answers(vision, [config(), *(frame(n, jpeg(picture.image)) for n in range(20))])
        assert [response.result.frame_id for response in results] == list(range(20))
        assert last.summary.detected_count == 20
        direct = vision.vision.Detect(detect_request(jpeg(picture.image)))
        for response in results:
            boxes = found(response.result.detection.detections)
            assert [label for label, _, _ in boxes] == [label for label, _, _ in found(direct.detections)]
            for (_, _, box), (_, _, wanted) in zip(boxes, found(direct.detections), strict=True):
                assert box == pytest.approx(wanted, abs=0.5)

    with ThreadPoolExecutor(5) as callers:
        list(callers.map(one, range(5)))


@pytest.mark.parametrize(
    ("requests", "code", "reason", "field"),
    [
        pytest.param([frame(1, b"x")], "INVALID_ARGUMENT", "WRONG_ORDER", "message", id="frame before config"),
        pytest.param([config(), config()], "INVALID_ARGUMENT", "WRONG_ORDER", "message", id="second config"),
        pytest.param([pb.DetectStreamRequest()], "INVALID_ARGUMENT", "WRONG_ORDER", "message", id="empty message"),
        pytest.param([], "INVALID_ARGUMENT", "WRONG_ORDER", "message", id="no message"),
        pytest.param(
            [config(options=detection_pb2.DetectOptions(min_confidence=2))],
            "INVALID_ARGUMENT",
            "INVALID_FIELD",
            "config.options.min_confidence",
            id="bad option",
        ),
        pytest.param(
            [config(options=detection_pb2.DetectOptions(model="nobody"))],
            "NOT_FOUND",
            "MODEL_NOT_FOUND",
            "config.options.model",
            id="unknown model",
        ),
        pytest.param([config(max_in_flight=-1)], "INVALID_ARGUMENT", "INVALID_FIELD", "config.max_in_flight", id="-1"),
        pytest.param([config(tracker=pb.TRACKER_BYTETRACK)], "UNIMPLEMENTED", "NOT_SERVED_YET", None, id="tracker"),
        pytest.param(
            [config(overflow=pb.OVERFLOW_DROP_OLDEST)], "UNIMPLEMENTED", "NOT_SERVED_YET", None, id="dropping"
        ),
    ],
)
def test_what_ends_a_stream_is_told(
    vision: Server, requests: list[pb.DetectStreamRequest], code: str, reason: str, field: str | None
) -> None:
    said = refused(lambda: answers(vision, requests))
    assert (said.code, said.reason) == (code, reason)
    if field is not None:
        assert said.field == field


def test_a_caller_who_leaves_frees_its_place(vision: Server) -> None:
    content = jpeg(small(1)[0].image)
    before = vision.vision_calls_in_flight

    def endless() -> Iterator[pb.DetectStreamRequest]:
        yield config()
        while True:
            yield frame(1, content)

    call = vision.vision.DetectStream(endless())
    for _ in range(3):
        next(call)
    call.cancel()
    with pytest.raises(grpc.RpcError):
        list(call)
    *results, last = answers(vision, [config(), frame(5, content)])
    assert results[0].result.frame_id == 5
    assert last.summary.detected_count == 1
    assert vision.vision_calls_in_flight <= before
