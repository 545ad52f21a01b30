"""Models of the operator's own, by configuration alone: a YOLO file, and a describer in 4 bits."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from ai4thai.vision.v1 import model_service_pb2
from ai4thai.vision.v1 import vision_service_pb2 as pb

from tests.end_to_end.calling import Server, detect_request, generate_request, refused
from tests.end_to_end.conftest import TIMES, wait_until_ready
from tests.end_to_end.pictures import Agreement, jpeg, unseen
from tests.processes import ServerProcess
from vision_server.shapes.evaluate import DESCRIBER, DETECTOR
from vision_server.shapes.questions import KINDS, LANGUAGES, ask
from vision_server.weights import SHIPPED_DETECTOR

DETECTOR_NAME, DESCRIBER_NAME = "harbour-cameras.pt", "our-describer"
SCENES = 6


@pytest.fixture(scope="module")
def production(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server whose models lie in the operator's model directory."""
    data_dir: Path = tmp_path_factory.mktemp("production")
    (data_dir / "models").mkdir()
    shutil.copy(DETECTOR, data_dir / "models" / DETECTOR_NAME)
    shutil.copytree(DESCRIBER, data_dir / "models" / DESCRIBER_NAME)
    env = {
        **TIMES,
        "AI4THAI_DATA_DIR": str(data_dir),
        "VISION_SERVICE_PORT": "0",
        "VISION_DETECTOR": DETECTOR_NAME,
        "VISION_DESCRIBER": DESCRIBER_NAME,
        "VISION_QUANTIZATION": "nf4",
        "VISION_OFFLINE": "true",
    }
    with ServerProcess("vision_server", env=env) as process:
        wait_until_ready(process)
        server = Server(process)
        yield server
        server.close()


def test_the_models_are_listed_as_they_were_configured(production: Server) -> None:
    detector, describer, *others = production.models.ListModels(model_service_pb2.ListModelsRequest()).models
    assert (detector.name, describer.name) == (DETECTOR_NAME, DESCRIBER_NAME)
    assert (describer.precision, describer.engine) == ("nf4", "transformers")
    assert detector.engine == "openvino"  # the fastest one on a CPU
    assert list(detector.labels) == ["circle", "square", "triangle", "star"]
    assert all(
        model.is_default and model.state == model_service_pb2.MODEL_STATE_READY for model in (detector, describer)
    )
    # What is shipped can be loaded, and is not unless the operator or a caller says so.
    assert SHIPPED_DETECTOR in [model.name for model in others]
    assert all(model.state == model_service_pb2.MODEL_STATE_UNLOADED for model in others)


def test_the_detector_finds_what_the_shipped_one_finds(production: Server) -> None:
    agreement = Agreement()
    for picture in unseen(SCENES):
        answer = production.vision.Detect(detect_request(jpeg(picture.image)), timeout=30)
        assert answer.model == DETECTOR_NAME
        agreement.add(answer.detections, picture.truth)
    assert agreement.recall >= 0.9, agreement
    by_name = production.vision.Detect(detect_request(jpeg(picture.image), model=DETECTOR_NAME))
    assert [d.label for d in by_name.detections] == [d.label for d in answer.detections]


def test_the_describer_answers_sensibly_in_4_bits(production: Server) -> None:
    rng = np.random.default_rng(4)
    marks = []
    for picture in unseen(SCENES):
        for kind in KINDS:
            for language in LANGUAGES:
                if (pair := ask(rng, picture.shapes, kind, language)) is None:
                    continue
                request = generate_request(jpeg(picture.image), pair.question)
                *pieces, last = production.vision.Generate(request, timeout=60)
                assert "".join(piece.delta.text for piece in pieces) == last.summary.text
                assert last.summary.model == DESCRIBER_NAME
                marks.append(last.summary.text == pair.answer)
    # Four bits cost a small model more than a large one.
    assert sum(marks) / len(marks) >= 0.6, f"{sum(marks)} of {len(marks)} answers are right"


def test_the_shipped_models_answer_nobody_unless_configured(production: Server) -> None:
    request = detect_request(jpeg(unseen(1)[0].image), model=SHIPPED_DETECTOR)
    said = refused(lambda: production.vision.Detect(request, timeout=5))
    assert (said.code, said.reason) == ("FAILED_PRECONDITION", "MODEL_UNLOADED")
    assert production.vision.GetServerInfo(pb.GetServerInfoRequest()).ready
