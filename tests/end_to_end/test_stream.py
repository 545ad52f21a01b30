"""Streams of frames: each is answered in order, a bad one with its own error, a late one dropped; none takes what others need."""

from __future__ import annotations

import asyncio
import signal
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import numpy as np
import pytest
from ai4thai.vision.v1 import detection_pb2, image_pb2, vision_service_pb2_grpc
from ai4thai.vision.v1 import vision_service_pb2 as pb
from PIL import Image

from tests.end_to_end.calling import Server, detect_request, refusal, refused
from tests.end_to_end.conftest import wait_until, wait_until_ready
from tests.end_to_end.pictures import Agreement, Picture, as_raw, found, jpeg, unseen
from tests.end_to_end.unharmed import memory_bytes
from tests.processes import ServerProcess

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
        pytest.param([config(tracker=99)], "INVALID_ARGUMENT", "INVALID_FIELD", "config.tracker", id="tracker"),
        pytest.param([config(overflow=99)], "INVALID_ARGUMENT", "INVALID_FIELD", "config.overflow", id="overflow"),
        pytest.param([config(priority=99)], "INVALID_ARGUMENT", "INVALID_FIELD", "config.priority", id="priority"),
    ],
)
def test_what_ends_a_stream_is_told(
    vision: Server, requests: list[pb.DetectStreamRequest], code: str, reason: str, field: str | None
) -> None:
    said = refused(lambda: answers(vision, requests))
    assert (said.code, said.reason) == (code, reason)
    if field is not None:
        assert said.field == field


def left_behind(vision: Server) -> dict[str, float]:
    """What a stream holds while it lives."""
    names = ("ai4thai_streams", "ai4thai_admitted_image_bytes", "ai4thai_model_waiting_requests")
    return {name: vision.metric(name) for name in names} | {"calls": vision.vision_calls_in_flight}


@pytest.mark.parametrize("overflow", [pb.OVERFLOW_BLOCK, pb.OVERFLOW_DROP_OLDEST])
def test_a_caller_who_leaves_in_the_middle_frees_all_that_it_held(
    vision: Server, overflow: pb.Overflow.ValueType
) -> None:
    content = jpeg(small(1)[0].image)
    before = left_behind(vision)

    def endless() -> Iterator[pb.DetectStreamRequest]:
        yield config(overflow=overflow, tracker=pb.TRACKER_BOTSORT)
        while True:
            yield frame(1, content)

    call = vision.vision.DetectStream(endless())
    for _ in range(3):
        next(call)
    assert left_behind(vision)["ai4thai_streams"] == before["ai4thai_streams"] + 1
    call.cancel()
    with pytest.raises(grpc.RpcError):
        list(call)
    wait_until("all is free again", lambda: left_behind(vision) == before)
    *results, last = answers(vision, [config(), frame(5, content)])
    assert results[0].result.frame_id == 5
    assert last.summary.detected_count == 1


def test_the_latest_frame_wins_and_the_dropped_ones_are_told_and_counted(vision: Server) -> None:
    pictures = small(4)
    dropped_before = vision.metric("ai4thai_stream_frames_total", outcome="dropped")
    requests = [frame(number, jpeg(pictures[number % 4].image)) for number in range(150)]
    *results, last = answers(vision, [config(overflow=pb.OVERFLOW_DROP_OLDEST, max_in_flight=1), *requests])

    assert [response.result.frame_id for response in results] == list(range(150))
    outcomes = Counter(response.result.WhichOneof("outcome") for response in results)
    assert outcomes["dropped"] > 0, "150 frames at once are more than can be answered as they come"
    assert outcomes["error"] == 0
    for number in (0, 149):
        assert results[number].result.WhichOneof("outcome") == "detection", f"frame {number} had nobody after it"
    agreement = Agreement()
    for number, response in enumerate(results):
        if response.result.WhichOneof("outcome") == "detection":
            agreement.add(response.result.detection.detections, pictures[number % 4].truth)
    assert agreement.recall >= 0.9, agreement
    summary = last.summary
    assert (summary.received_count, summary.error_count) == (150, 0)
    assert (summary.detected_count, summary.dropped_count) == (outcomes["detection"], outcomes["dropped"])
    assert vision.metric("ai4thai_stream_frames_total", outcome="dropped") == dropped_before + outcomes["dropped"]


def test_a_camera_that_is_slower_than_the_model_loses_no_frame(vision: Server) -> None:
    content = jpeg(small(1)[0].image)
    answered = threading.Semaphore(1)

    def camera() -> Iterator[pb.DetectStreamRequest]:
        yield config(overflow=pb.OVERFLOW_DROP_OLDEST, max_in_flight=2)
        for number in range(20):
            assert answered.acquire(timeout=30)
            yield frame(number, content)

    dropped = 0
    for response in vision.vision.DetectStream(camera(), timeout=60):
        answered.release()
        dropped += response.WhichOneof("message") == "result" and response.result.WhichOneof("outcome") == "dropped"
    assert dropped == 0


@pytest.mark.parametrize("overflow", [pb.OVERFLOW_BLOCK, pb.OVERFLOW_DROP_OLDEST])
def test_a_reader_that_stalls_holds_nobody_up_and_its_memory_is_bounded(
    vision: Server, overflow: pb.Overflow.ValueType
) -> None:
    frames = 400
    noise = np.random.default_rng(1).integers(0, 256, (480, 640, 3), np.uint8)
    raw = as_raw(Image.fromarray(noise))
    before = left_behind(vision)
    sent = 0
    gone = threading.Event()

    def endless() -> Iterator[pb.DetectStreamRequest]:
        nonlocal sent
        options = detection_pb2.DetectOptions(
            annotate=True
        )  # so that the answers are large, and fill what lies between
        yield config(options=options, overflow=overflow, max_in_flight=4)
        for number in range(frames):
            yield pb.DetectStreamRequest(frame=pb.Frame(frame_id=number, image=raw))
            sent = number
        gone.wait(60)

    def given_back() -> bool:
        """Whether the server holds no frame any more: what it has answered is not counted."""
        return left_behind(vision)["ai4thai_admitted_image_bytes"] == before["ai4thai_admitted_image_bytes"]

    def held_up() -> bool:
        """Whether nothing has been sent for a moment, and not because the server computes, which may take longer."""
        now = sent
        time.sleep(0.5)
        return given_back() and sent == now > 0

    other = jpeg(small(1)[0].image)
    memory = memory_bytes(vision)
    call = vision.vision.DetectStream(endless())
    try:
        if overflow == pb.OVERFLOW_BLOCK:
            wait_until("the sender is held up", held_up)
            assert sent < frames - 1, "the reader's slowness reaches the sender"
        else:
            # What is dropped is known by its number alone.
            wait_until("all is sent", lambda: sent == frames - 1, 60)
            wait_until("what is answered is given back", given_back)
        assert memory_bytes(vision) < memory + 100_000_000, f"{frames} frames of 0.9 MB were sent"
        *_, last = answers(vision, [config(), *(frame(number, other) for number in range(40))])
        assert last.summary.detected_count == 40
    finally:
        gone.set()
        call.cancel()
    wait_until("all is free again", lambda: left_behind(vision) == before)


STREAMS = 32
FRAMES_EACH = 6


def test_32_streams_share_the_model_fairly_though_one_is_greedy(vision: Server) -> None:
    """One has 16 frames at the server, 31 have 2: first come, first served would give it eight times what the others get."""
    content = jpeg(small(1)[0].image)
    answered: Counter[int] = Counter()
    settled: list[Counter[int]] = []

    async def endless(in_flight: int) -> AsyncIterator[pb.DetectStreamRequest]:
        yield config(max_in_flight=in_flight)
        while True:
            yield frame(1, content)

    async def camera(stub: Any, stream: int, all_run: asyncio.Barrier, enough: asyncio.Event) -> None:
        responses = aiter(stub.DetectStream(endless(16 if stream == 0 else 2)))
        await anext(responses)
        await all_run.wait()
        async for _ in responses:
            answered[stream] += 1
            if not settled and len(answered) == STREAMS and min(answered.values()) == 2:
                settled.append(answered.copy())  # what lay at the server when the last stream came has been answered
            if settled and answered.total() >= settled[0].total() + STREAMS * FRAMES_EACH:
                enough.set()

    async def run() -> None:
        all_run, enough = asyncio.Barrier(STREAMS), asyncio.Event()
        async with grpc.aio.insecure_channel(vision.address) as channel:
            stub = vision_service_pb2_grpc.VisionServiceStub(channel)
            cameras = [asyncio.create_task(camera(stub, stream, all_run, enough)) for stream in range(STREAMS)]
            await asyncio.wait_for(enough.wait(), 100)
            for one in cameras:
                one.cancel()
            await asyncio.gather(*cameras, return_exceptions=True)

    asyncio.run(run())
    answered.subtract(settled[0])
    assert answered[0] <= 2 * FRAMES_EACH, answered
    assert min(answered[stream] for stream in range(STREAMS)) >= FRAMES_EACH // 2, answered


@pytest.fixture(scope="module")
def small_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of its own, the detector alone, that lets two streams in and takes its time to leave."""
    env = {
        "AI4THAI_DATA_DIR": str(tmp_path_factory.mktemp("small")),
        "VISION_SERVICE_PORT": "0",
        "VISION_DESCRIBER": "",
        "VISION_MAX_STREAMS": "2",
        "SERVING_UNREADY_SECONDS": "0",
        "SERVING_DRAIN_SECONDS": "60",
    }
    with ServerProcess("vision_server", env=env) as process:
        wait_until_ready(process)
        server = Server(process)
        yield server
        server.close()


class Camera:
    """A stream that goes on until it is told otherwise; one frame at once."""

    def __init__(self, server: Server, content: bytes) -> None:
        self._content = content
        self._off = threading.Event()
        self.sent = 0
        self.call = server.vision.DetectStream(self._requests(), timeout=100)

    def _requests(self) -> Iterator[pb.DetectStreamRequest]:
        yield config(tracker=pb.TRACKER_BYTETRACK)
        while not self._off.wait(0.02):
            yield frame(self.sent, self._content)
            self.sent += 1

    def switch_off(self) -> None:
        self._off.set()


def test_more_streams_than_allowed_are_refused_until_one_ends(small_server: Server) -> None:
    content = jpeg(small(1)[0].image)
    cameras = [Camera(small_server, content) for _ in range(2)]
    for camera in cameras:
        next(camera.call)
    said = refused(lambda: answers(small_server, [config(), frame(1, content)]))
    assert (said.code, said.reason) == ("RESOURCE_EXHAUSTED", "QUEUE_FULL")
    assert said.retry_after_s is not None
    assert "VISION_MAX_STREAMS" in said.message
    assert small_server.vision.GetServerInfo(pb.GetServerInfoRequest()).limits.max_streams == 2
    small_server.vision.Detect(detect_request(content), timeout=30)  # no stream, and let in

    cameras[0].switch_off()
    assert list(cameras[0].call)[-1].WhichOneof("message") == "summary"
    *_, last = answers(small_server, [config(), frame(1, content)])
    assert last.summary.detected_count == 1
    cameras[1].switch_off()
    assert list(cameras[1].call)[-1].WhichOneof("message") == "summary"


def test_a_stream_without_end_ends_when_the_server_leaves(small_server: Server) -> None:
    """The last test of small_server, which is gone afterwards."""
    camera = Camera(small_server, jpeg(small(1)[0].image))
    numbers = [next(camera.call).result.frame_id for _ in range(3)]
    small_server.process.signal(signal.SIGTERM)

    def rest() -> None:
        for response in camera.call:
            assert response.result.WhichOneof("outcome") == "detection"
            numbers.append(response.result.frame_id)

    began_s = time.monotonic()
    said = refused(rest)
    assert (said.code, said.reason) == ("UNAVAILABLE", "DRAINING")
    assert said.retry_after_s is not None
    assert numbers == list(range(len(numbers))), "what was read is answered, in order"
    assert small_server.process.wait(30) == 0
    assert time.monotonic() - began_s < 30, "well before the drain's own end"
