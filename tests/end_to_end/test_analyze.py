"""Analyze: boxes and words about one picture at once, the words grounded in the boxes."""

from __future__ import annotations

import time

import pytest
from ai4thai.vision.v1 import generation_pb2, image_pb2
from ai4thai.vision.v1 import vision_service_pb2 as pb

from tests.end_to_end.calling import Server, detect_request, generate_request, refused
from tests.end_to_end.conftest import wait_until
from tests.end_to_end.pictures import Picture, assert_all_found, foreign, jpeg, unseen
from tests.end_to_end.slowing import slowed
from vision_server.grounding import ground
from vision_server.results import Box, Detection
from vision_server.shapes.questions import LANGUAGES, answer

DESCRIBE = {"en": "Describe the picture.", "th": "อธิบายภาพนี้"}
SCENES = 8


def analyze_request(content: bytes, question: str) -> pb.AnalyzeRequest:
    return pb.AnalyzeRequest(image=image_pb2.Image(content=content), question=question)


def grounded(question: str, said: pb.DetectResponse) -> str:
    """The question as a caller would ground it who had asked Detect first."""
    found = [
        Detection(
            d.label, d.class_id, d.confidence, Box(d.box.x_min_px, d.box.y_min_px, d.box.x_max_px, d.box.y_max_px)
        )
        for d in said.detections
    ]
    return ground(question, found, width_px=said.width_px, height_px=said.height_px)


def generate(vision: Server, request: pb.GenerateRequest) -> pb.GenerateSummary:
    *_, last = vision.vision.Generate(request, timeout=60)
    summary: pb.GenerateSummary = last.summary
    return summary


@pytest.fixture(scope="module")
def crowded() -> Picture:
    """A scene of four shapes."""
    return foreign(203, 4, 4)


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("side_px", [640, 1600])
def test_the_words_are_those_about_the_whole_picture_with_what_was_found_before_the_question(
    vision: Server, crowded: Picture, language: str, side_px: int
) -> None:
    # Given a picture that is decoded as a whole for the detector too, or (the larger one) reduced for it,
    content = jpeg(crowded.fitted(side_px).image)
    # when it is analyzed,
    said = vision.vision.Analyze(analyze_request(content, DESCRIBE[language]), timeout=60)
    # then the boxes are the detector's,
    detected = vision.vision.Detect(detect_request(content))
    assert list(said.detection.detections) == list(detected.detections)
    assert_all_found(said.detection.detections, crowded.fitted(side_px))
    # and the words those of who asks the describer about all of it, labels, counts and positions included.
    asked = grounded(DESCRIBE[language], detected)
    assert asked.startswith("Detected objects: ")
    assert asked.count(", y ") == len(crowded.shapes)
    expected = generate(vision, generate_request(content, asked))
    assert (said.text, said.usage) == (expected.text, expected.usage)
    assert said.finish_reason == generation_pb2.FINISH_REASON_STOP


def test_most_thai_counts_are_right(vision: Server) -> None:
    right = 0
    for picture in unseen(SCENES):
        said = vision.vision.Analyze(analyze_request(jpeg(picture.image), "มีรูปทรงกี่ชิ้น"), timeout=60)
        right += said.text == answer("total", "th", picture.shapes)
    assert right >= SCENES - 1


def test_the_describer_reads_the_picture_once(vision: Server) -> None:
    def features(outcome: str) -> float:
        return vision.metric("ai4thai_image_features_total", outcome=outcome)

    # Given a picture that the describer has never met, and that is reduced for the detector,
    content = jpeg(foreign(977, 2, 3).fitted(1600).image)
    missed, hit = features("miss"), features("hit")
    # when it is analyzed, then what the look ahead has made of it is there when its question is read.
    vision.vision.Analyze(analyze_request(content, "What is there?"), timeout=60)
    assert features("miss") == missed + 1
    assert features("hit") == hit + 1


def test_when_the_caller_leaves_nothing_goes_on(vision: Server, crowded: Picture) -> None:
    request = analyze_request(jpeg(crowded.fitted(1600).image), DESCRIBE["th"])
    whole = vision.vision.Analyze(request, timeout=60)
    # Given callers that leave at every stage of it,
    with slowed(vision.process.pid, 4):
        calls = [vision.vision.Analyze.future(request, timeout=60) for _ in range(6)]
        for call in (calls[0], calls[1], calls[3], calls[4]):
            call.cancel()
            time.sleep(0.05)
        stayed = [call.result() for call in calls[2::3]]
    # then those who stay have the same answer as ever, and nothing is left at work.
    assert [one.text for one in stayed] == [whole.text] * len(stayed)
    wait_until("all calls have ended", lambda: vision.vision_calls_in_flight == 0)
    wait_until("no generation runs", lambda: vision.metric("ai4thai_running_generations") == 0)


def test_a_picture_that_cannot_be_read_is_refused_as_by_detect(vision: Server, crowded: Picture) -> None:
    broken = jpeg(crowded.fitted(1600).image)[:-4000]
    detecting = refused(lambda: vision.vision.Detect(detect_request(broken), timeout=20))
    analyzing = refused(lambda: vision.vision.Analyze(analyze_request(broken, "What is this?"), timeout=20))
    assert (analyzing.code, analyzing.reason) == ("INVALID_ARGUMENT", "IMAGE_UNREADABLE")
    assert analyzing == detecting
