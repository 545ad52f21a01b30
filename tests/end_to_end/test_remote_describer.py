"""A vision server whose describer is another one, by its OpenAI face: the same answers, ends and errors through both."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
from ai4thai.vision.v1 import generation_pb2, image_pb2, model_service_pb2
from ai4thai.vision.v1 import vision_service_pb2 as pb
from grpc_health.v1 import health_pb2

from tests.end_to_end.calling import Server, generate_request, refused
from tests.end_to_end.conftest import wait_until, wait_until_ready
from tests.end_to_end.pictures import Picture, foreign, jpeg, unseen
from tests.end_to_end.slowing import slowed
from tests.ports import free_port
from tests.processes import ServerProcess
from vision_server.weights import SHIPPED_DESCRIBER

NAME = "far"
QUESTIONS = ("Describe the picture.", "อธิบายภาพนี้", "How many shapes are there?", "มีรูปทรงกี่รูป")
THAI_MARKS = "ัิีึืฺุู็่้๊๋์ํ๎"


class Peer:
    """The server with the model; it can be ended, and started again on its port."""

    def __init__(self, data_dir: Path) -> None:
        self.port = free_port()
        self._env = {"AI4THAI_DATA_DIR": str(data_dir), "VISION_SERVICE_PORT": str(self.port), "VISION_DETECTOR": ""}
        self.start()

    def start(self) -> None:
        self.process = ServerProcess("vision_server", env=self._env)
        self.process.__enter__()

    @cached_property
    def server(self) -> Server:
        return Server(self.process)

    def kill(self) -> None:
        self.process.signal(signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def peer(data_dir: Path) -> Iterator[Peer]:
    running = Peer(data_dir)
    yield running
    running.process.__exit__()


@pytest.fixture(scope="module")
def front(data_dir: Path, peer: Peer) -> Iterator[Server]:
    """The server that callers know, with the detector and no describer of its own; it starts while the peer does."""
    env = {
        "AI4THAI_DATA_DIR": str(data_dir),
        "VISION_SERVICE_PORT": "0",
        "VISION_DESCRIBER": f"{NAME}=openai+http://127.0.0.1:{peer.port}/v1",
        "NO_PROXY": "127.0.0.1",
    }
    with ServerProcess("vision_server", env=env) as process:
        wait_until_ready(process)
        server = Server(process)
        wait_until("the describer is there", lambda: state(server) == "MODEL_STATE_READY", 110)
        yield server
        server.close()


def model(server: Server) -> model_service_pb2.Model:
    return server.models.GetModel(model_service_pb2.GetModelRequest(name=NAME)).model


def state(server: Server) -> str:
    return model_service_pb2.ModelState.Name(model(server).state)


def is_well(server: Server) -> bool:
    """What grpc.health.v1 says of the describer."""
    answer = server.health.Check(health_pb2.HealthCheckRequest(service=f"model/{NAME}"))
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def generate(server: Server, request: pb.GenerateRequest) -> tuple[list[str], pb.GenerateSummary]:
    """The deltas' texts, then the summary."""
    *deltas, last = server.vision.Generate(request, timeout=60)
    return [delta.delta.text for delta in deltas], last.summary


def cancelled(server: Server) -> float:
    return server.metric("ai4thai_generations_total", finish_reason="cancelled")


@pytest.fixture(scope="module")
def crowded() -> Picture:
    """A scene of four shapes, so that its description is long."""
    return foreign(203, 4, 4)


def test_the_front_tells_what_its_describer_is(peer: Peer, front: Server) -> None:
    far = model(front)
    assert (far.engine, far.version, far.device, far.memory_bytes) == ("openai", SHIPPED_DESCRIBER, "remote", 0)
    assert is_well(front)
    assert front.metric("ai4thai_model_ready", model=NAME) == 1
    # Nothing of transformers is in its memory: this library comes with it.
    maps = [Path(f"/proc/{server.process.pid}/maps").read_text() for server in (peer.server, front)]
    assert ["tokenizers" in mapped for mapped in maps] == [True, False]


def test_the_same_questions_give_the_same_answers_through_both(peer: Peer, front: Server) -> None:
    pictures = [jpeg(picture.image) for picture in unseen(3)]
    asked = [(content, question) for content in pictures for question in QUESTIONS]

    def both(item: tuple[bytes, str]) -> tuple[pb.GenerateSummary, pb.GenerateSummary]:
        request = generate_request(*item)
        return generate(peer.server, request)[1], generate(front, request)[1]

    with ThreadPoolExecutor(6) as callers:
        answers = list(callers.map(both, asked))
    for there, here in answers:
        assert here.text == there.text != ""
        assert here.usage == there.usage
        assert here.finish_reason == there.finish_reason
        assert here.model == NAME


@pytest.mark.parametrize("question", QUESTIONS[:2])
def test_options_mean_the_same(peer: Peer, front: Server, crowded: Picture, question: str) -> None:
    content = jpeg(crowded.image)
    for options in (
        {"max_new_tokens": 5},
        {"stop": [" and ", " และ"]},
        {"temperature": 1.5, "top_p": 0.9, "seed": 17},
    ):
        request = generate_request(content, question, **options)
        there, here = generate(peer.server, request)[1], generate(front, request)[1]
        assert (here.text, here.finish_reason, here.usage) == (there.text, there.finish_reason, there.usage)


def test_thai_streams_in_whole_characters(front: Server, crowded: Picture) -> None:
    pieces, summary = generate(front, generate_request(jpeg(crowded.image), "อธิบายภาพนี้"))
    assert len(pieces) >= 5
    assert "".join(pieces) == summary.text
    assert not any(piece[0] in THAI_MARKS for piece in pieces)
    assert 0 < summary.timings.time_to_first_token_ms < summary.timings.total_ms


def test_a_conversation_of_several_turns_and_pictures_is_passed_on_whole(
    peer: Peer, front: Server, crowded: Picture
) -> None:
    def said(role: generation_pb2.Role.ValueType, *parts: bytes | str) -> generation_pb2.Message:
        return generation_pb2.Message(
            role=role,
            parts=[
                generation_pb2.MessagePart(text=part)
                if isinstance(part, str)
                else generation_pb2.MessagePart(image=image_pb2.Image(content=part))
                for part in parts
            ],
        )

    messages = [
        said(generation_pb2.ROLE_USER, jpeg(unseen(1)[0].image), "Describe the picture."),
        said(generation_pb2.ROLE_ASSISTANT, "There are shapes."),
        said(generation_pb2.ROLE_USER, jpeg(crowded.image), "How many ", "shapes are there?"),
    ]
    request = pb.GenerateRequest(messages=messages)
    there, here = generate(peer.server, request)[1], generate(front, request)[1]
    assert (here.text, here.usage) == (there.text, there.usage)


def test_analyze_detects_here_and_asks_there(front: Server, crowded: Picture) -> None:
    request = pb.AnalyzeRequest(image=image_pb2.Image(content=jpeg(crowded.image)), question="Describe the picture.")
    tokens = front.metric("ai4thai_generated_tokens_total", model=NAME)
    answer = front.vision.Analyze(request, timeout=60)
    assert len(answer.detection.detections) >= 3
    assert answer.text
    grown = front.metric("ai4thai_generated_tokens_total", model=NAME) - tokens
    assert grown == answer.usage.completion_tokens > 0


def test_when_the_caller_leaves_both_servers_stop(peer: Peer, front: Server, crowded: Picture) -> None:
    before = cancelled(front), cancelled(peer.server)
    with slowed(peer.process.pid, 20):
        call = front.vision.Generate(generate_request(jpeg(crowded.image), "อธิบายภาพนี้"), timeout=60)
        next(call)
        call.cancel()
        wait_until("the front has stopped", lambda: cancelled(front) == before[0] + 1)
    wait_until("the peer has stopped", lambda: cancelled(peer.server) == before[1] + 1)
    for server in (front, peer.server):
        assert server.metric("ai4thai_running_generations") == 0


def test_a_deadline_is_kept_through_both(peer: Peer, front: Server, crowded: Picture) -> None:
    before = cancelled(peer.server)
    with slowed(peer.process.pid, 20):
        call: Callable[[], Any] = lambda: list(  # noqa: E731
            front.vision.Generate(generate_request(jpeg(crowded.image), "อธิบายภาพนี้"), timeout=2.5)
        )
        assert refused(call).code == "DEADLINE_EXCEEDED"
    wait_until("the peer has stopped", lambda: cancelled(peer.server) == before + 1)


def test_what_the_peer_refuses_is_the_callers_fault_here_too(front: Server, crowded: Picture) -> None:
    long = generate_request(jpeg(crowded.image), "shape " * 5000)
    fault = refused(lambda: list(front.vision.Generate(long, timeout=60)))
    assert (fault.code, fault.field) == ("INVALID_ARGUMENT", "messages")
    assert "tokens" in fault.message


def test_a_peer_that_dies_is_told_of_and_found_when_it_is_back(peer: Peer, front: Server, crowded: Picture) -> None:
    request = generate_request(jpeg(crowded.image), "อธิบายภาพนี้")
    whole = generate(front, request)[1].text
    with slowed(peer.process.pid, 20):
        call = front.vision.Generate(request, timeout=60)
        next(call)
        peer.kill()
    in_the_middle = refused(lambda: list(call))
    assert (in_the_middle.code, in_the_middle.reason) == ("UNAVAILABLE", "MODEL_FAILED")
    assert in_the_middle.retry_after_s

    at_once = refused(lambda: list(front.vision.Generate(request, timeout=60)))
    assert (at_once.code, at_once.reason) == ("UNAVAILABLE", "MODEL_FAILED")
    wait_until("health tells it", lambda: not is_well(front))
    detect = pb.DetectRequest(image=image_pb2.Image(content=jpeg(crowded.image)))
    assert front.vision.Detect(detect, timeout=60).detections  # the detector serves on

    peer.start()
    wait_until_ready(peer.process)
    back_s = time.monotonic()
    wait_until("the describer is back", lambda: is_well(front), 30)
    assert time.monotonic() - back_s < 15
    assert generate(front, request)[1].text == whole
