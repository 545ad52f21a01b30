from __future__ import annotations

import threading
from pathlib import Path

import grpc
import pytest
from ai4thai import Busy, NotFound, QueueClient, ServerFault, Unavailable, VisionClient
from ai4thai.channel import SERVICE_CONFIG, channel_target, open_channel
from ai4thai.vision.v1 import vision_service_pb2, vision_service_pb2_grpc

from serving.errors import Code, ServiceError
from tests.clients.fake_servers import FakeQueue, FakeServer, FakeVision
from tests.ports import free_port

LOADING = ServiceError(Code.UNAVAILABLE, "MODEL_LOADING", "The model is loading.", retry_after_s=7)
AWAY = grpc.ChannelConnectivity.TRANSIENT_FAILURE
FULL = ServiceError(Code.RESOURCE_EXHAUSTED, "QUEUE_FULL", "256 images wait; the limit is 256.", retry_after_s=2)


@pytest.mark.parametrize("failure", [LOADING, FULL, grpc.StatusCode.UNAVAILABLE])
def test_a_call_that_fails_twice_is_repeated_until_it_is_answered(
    vision: VisionClient, fake_vision: FakeVision, image: Path, failure: ServiceError | grpc.StatusCode
) -> None:
    fake_vision.script.fail_next("Detect", failure, failure)

    assert vision.detect(image).detections[0].label == "star"
    assert fake_vision.script.calls == ["Detect"] * 3


def test_a_text_that_has_not_begun_is_repeated_too(vision: VisionClient, fake_vision: FakeVision, image: Path) -> None:
    fake_vision.script.fail_next("Generate", FULL)

    assert vision.ask(image, "What?").text
    assert fake_vision.script.calls == ["Generate"] * 2


def test_after_five_attempts_the_server_is_believed(vision: VisionClient, fake_vision: FakeVision, image: Path) -> None:
    fake_vision.script.fail_next("Detect", *[FULL] * 9)

    with pytest.raises(Busy, match="256 images wait") as caught:
        vision.detect(image)

    assert (caught.value.reason, caught.value.retry_after_s, caught.value.request_id) == ("QUEUE_FULL", 2.0, "call-7")
    assert fake_vision.script.calls == ["Detect"] * 5


def test_what_the_caller_did_wrong_is_not_repeated(queue: QueueClient, fake_queue: FakeQueue) -> None:
    with pytest.raises(NotFound, match="'nobody'"):
        queue.get("nobody")
    assert fake_queue.script.calls == ["GetJob"]


def test_a_fault_of_the_server_is_not_repeated(vision: VisionClient, fake_vision: FakeVision, image: Path) -> None:
    fake_vision.script.fail_next(
        "Detect", ServiceError(Code.INTERNAL, "INTERNAL", "The server met a fault of its own.")
    )

    with pytest.raises(ServerFault, match="fault of its own") as caught:
        vision.detect(image)
    assert caught.value.request_id == "call-7"
    assert fake_vision.script.calls == ["Detect"]


def test_a_lost_answer_to_a_submission_makes_no_second_job(
    queue: QueueClient, fake_queue: FakeQueue, image: Path
) -> None:
    fake_queue.lose_after_store = 1

    job = queue.submit_detect([image])

    assert fake_queue.script.calls == ["SubmitJob"] * 2
    assert [job.job_id] == list(fake_queue.jobs)


@pytest.mark.usefixtures("quick_retries")
def test_nobody_there_is_said_with_the_address(image: Path) -> None:
    port = free_port()
    with (
        VisionClient(f"localhost:{port}", timeout_s=20) as client,
        pytest.raises(Unavailable, match=f"localhost:{port}") as caught,
    ):
        client.detect(image)
    assert "Socket" not in str(caught.value) and "ipv4" not in str(caught.value)


def test_a_server_that_comes_while_the_client_tries_is_found(image: Path) -> None:
    port = free_port()
    late = FakeServer(FakeVision())
    late.server.add_insecure_port(f"127.0.0.1:{port}")
    timer = threading.Timer(0.5, late.server.start)
    timer.start()
    try:
        with VisionClient(f"localhost:{port}", timeout_s=20) as client:
            assert client.detect(image).detections
    finally:
        timer.join()
        late.server.stop(0).wait()


@pytest.mark.usefixtures("quick_retries")
def test_a_process_that_says_it_stops_gets_no_more_calls(
    vision_server: FakeServer, fake_vision: FakeVision, image: Path
) -> None:
    with VisionClient(f"127.0.0.1:{vision_server.port}", timeout_s=20) as vision:
        vision.detect(image)
        heard = threading.Event()
        vision._channel.subscribe(lambda state: state is AWAY and heard.set())
        vision_server.report("", serving=False)
        assert heard.wait(20)  # the news travels over the health watch

        with pytest.raises(Unavailable, match="doesn't serve at this moment"):
            vision.detect(image)
    assert fake_vision.script.calls == ["Detect"]


def test_messages_of_a_photograph_in_raw_pixels_pass(vision: VisionClient, fake_vision: FakeVision) -> None:
    vision.detect(b"x" * 30_000_000)
    assert len(fake_vision.script.requests["Detect"].image.content) == 30_000_000


def test_retries_can_be_switched_off(vision_server: FakeServer, fake_vision: FakeVision) -> None:
    fake_vision.script.fail_next("Detect", FULL)
    with open_channel(vision_server.address, retries=False) as channel:
        stub = vision_service_pb2_grpc.VisionServiceStub(channel)
        with pytest.raises(grpc.RpcError):
            stub.Detect(vision_service_pb2.DetectRequest(), timeout=20)
    assert fake_vision.script.calls == ["Detect"]


def test_every_method_that_is_repeated_exists() -> None:
    from ai4thai.queue.v1 import queue_service_pb2
    from ai4thai.vision.v1 import device_service_pb2, model_service_pb2

    services = {
        service.full_name: service
        for module in (vision_service_pb2, model_service_pb2, device_service_pb2, queue_service_pb2)
        for service in module.DESCRIPTOR.services_by_name.values()
    }
    for name in SERVICE_CONFIG["methodConfig"][0]["name"]:
        method = services[name["service"]].methods_by_name[name["method"]]
        assert not method.client_streaming


@pytest.mark.parametrize(
    ("address", "target"),
    [
        ("localhost:2001", ("dns:///localhost:2001", False)),
        ("grpc://vision.example:2001", ("dns:///vision.example:2001", False)),
        ("grpcs://vision.example:443", ("dns:///vision.example:443", True)),
        ("127.0.0.1:2001", ("ipv4:127.0.0.1:2001", False)),
        ("[::1]:2001", ("ipv6:[::1]:2001", False)),
        ("unix:/run/vision", ("unix:/run/vision", False)),
        ("dns:///vision:2001", ("dns:///vision:2001", False)),
    ],
)
def test_addresses(address: str, target: tuple[str, bool]) -> None:
    assert channel_target(address) == target


@pytest.mark.parametrize(
    "address", ["localhost", "", ":2001", "http://localhost:2001", "localhost:port", "localhost:99999"]
)
def test_addresses_that_make_no_sense_are_refused(address: str) -> None:
    with pytest.raises(ValueError, match="Write host:port"):
        channel_target(address)
