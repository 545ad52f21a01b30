"""Every task that is shipped, through every way in: masks, turned boxes, named points and classes match the truth."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from ai4thai.vision.v1 import detection_pb2, image_pb2, model_service_pb2
from ai4thai.vision.v1 import vision_service_pb2 as pb
from google.protobuf import json_format
from numpy.typing import NDArray
from PIL import Image

from tests.end_to_end.calling import Server, detect_request
from tests.end_to_end.conftest import TIMES, wait_until_ready
from tests.end_to_end.pictures import Agreement, found, jpeg
from tests.processes import ServerProcess
from vision_server.shapes.held_out import HeldOutScene, foreign_scenes, foreign_singles
from vision_server.shapes.scenes import Shape
from vision_server.shapes.task_truth import POINT_NAMES, mask, named_points, turned_box

SEED = 9_300_000
SCENES = 6
BY_TASK = {
    "DETECT": "shapes-detector",
    "SEGMENT": "shapes-segmenter",
    "ORIENTED_BOXES": "shapes-oriented",
    "POSE": "shapes-pose",
    "CLASSIFY": "shapes-classifier",
}
SEGMENTER = BY_TASK["SEGMENT"]

Pixels = NDArray[np.bool_]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of all shipped detectors and no describer."""
    data_dir: Path = tmp_path_factory.mktemp("tasks")
    env = {
        **TIMES,
        "AI4THAI_DATA_DIR": str(data_dir),
        "VISION_SERVICE_PORT": "0",
        "VISION_DETECTOR": ",".join(BY_TASK.values()),
        "VISION_DESCRIBER": "",
        # Converting five models for OpenVINO takes a minute on two busy cores; that engines agree is tested elsewhere.
        "VISION_ENGINE": "pytorch",
    }
    with ServerProcess("vision_server", env=env) as process:
        wait_until_ready(process)
        server = Server(process)
        yield server
        server.close()


@dataclass(frozen=True)
class Asked:
    """One scene, its JPEG, and what the server said about it."""

    scene: HeldOutScene
    answer: Any

    def pairs(self) -> list[tuple[Any, Shape]]:
        """Each detection that hits a true shape, with the shape."""
        pairs = []
        for one in self.answer.detections:
            for shape in self.scene.shapes:
                agreement = Agreement()
                agreement.add([one], [(shape.label, shape.box)])
                if agreement.hit_count:
                    pairs.append((one, shape))
                    break
        return pairs


SCENES_DRAWN = [scene for scene in foreign_scenes(SCENES * 3, SEED) if scene.shapes][:SCENES]


def content(scene: HeldOutScene) -> bytes:
    return jpeg(Image.fromarray(scene.image))


def ask_all(server: Server, **options: Any) -> list[Asked]:
    """Every scene asked about."""
    return [
        Asked(scene, server.vision.Detect(detect_request(content(scene), **options), timeout=60))
        for scene in SCENES_DRAWN
    ]


def pixels(said: detection_pb2.Mask, width_px: int, height_px: int) -> Pixels:
    """What a mask of either form covers."""
    if said.WhichOneof("form") == "rle":
        assert (said.rle.width_px, said.rle.height_px) == (width_px, height_px)
        inside = np.arange(len(said.rle.counts)) % 2 == 1
        return np.repeat(inside, said.rle.counts).reshape(width_px, height_px).T
    drawn = np.zeros((height_px, width_px), np.uint8)
    points = np.array([(point.x_px, point.y_px) for point in said.polygon.points]) - 0.5
    cv2.fillPoly(drawn, [np.round(points * 16).astype(np.int32)], (1,), shift=4)
    return drawn.astype(bool)


def overlap(one: Pixels, other: Pixels) -> float:
    return float((one & other).sum() / (one | other).sum())


def test_the_models_tell_their_tasks(tasks: Server) -> None:
    models = tasks.models.ListModels(model_service_pb2.ListModelsRequest()).models
    told = {model_service_pb2.Task.Name(model.task).removeprefix("TASK_"): model for model in models}
    assert {task: told[task].name for task in BY_TASK} == BY_TASK
    assert tuple(told["POSE"].keypoint_names) == POINT_NAMES
    assert not told["DETECT"].keypoint_names


@pytest.mark.parametrize("form", [detection_pb2.MASK_FORM_POLYGON, detection_pb2.MASK_FORM_RLE])
def test_masks_cover_the_shapes(tasks: Server, form: int) -> None:
    overlaps = []
    for asked in ask_all(tasks, model=SEGMENTER, masks=True, mask_form=form):
        height_px, width_px = asked.scene.image.shape[:2]
        for one, shape in asked.pairs():
            covered = pixels(one.mask, width_px, height_px)
            overlaps.append(overlap(covered, mask(shape, width_px, height_px)))
            rows, columns = np.nonzero(covered)
            assert one.box.x_min_px - 1 <= columns.min() and columns.max() <= one.box.x_max_px + 1
            assert one.box.y_min_px - 1 <= rows.min() and rows.max() <= one.box.y_max_px + 1
    assert len(overlaps) >= SCENES
    assert np.median(overlaps) > 0.9, sorted(overlaps)
    assert np.mean(overlaps) > 0.85, sorted(overlaps)


def test_masks_come_only_when_asked_for_and_only_from_segmenters(tasks: Server) -> None:
    picture = content(SCENES_DRAWN[0])
    plain = tasks.vision.Detect(detect_request(picture, model=SEGMENTER))
    assert plain.detections and not any(one.HasField("mask") for one in plain.detections)
    for model in (BY_TASK["DETECT"], BY_TASK["POSE"], BY_TASK["ORIENTED_BOXES"], BY_TASK["CLASSIFY"]):
        answer = tasks.vision.Detect(detect_request(picture, model=model, masks=True))
        assert answer.detections or answer.classes
        assert not any(one.HasField("mask") for one in answer.detections)


def test_oriented_boxes_lie_around_the_shapes(tasks: Server) -> None:
    overlaps = []
    for asked in ask_all(tasks, model=BY_TASK["ORIENTED_BOXES"]):
        for one, shape in asked.pairs():
            turned = one.oriented_box
            assert -90 <= turned.angle_degrees < 90
            said = cv2.boxPoints(
                ((turned.center_x_px, turned.center_y_px), (turned.width_px, turned.height_px), turned.angle_degrees)
            )
            truth = turned_box(shape).astype(np.float32)
            shared, _ = cv2.intersectConvexConvex(said, truth)
            overlaps.append(shared / (cv2.contourArea(said) + cv2.contourArea(truth) - shared))
            # The upright box goes around it, within the image.
            edges = np.array([asked.answer.width_px, asked.answer.height_px])
            upright = [*said.min(0).clip(0, edges), *said.max(0).clip(0, edges)]
            assert found([one])[0][2] == pytest.approx(upright, abs=0.5)
    assert len(overlaps) >= SCENES
    assert np.median(overlaps) > 0.8, sorted(overlaps)


def test_named_points_lie_on_the_shapes(tasks: Server) -> None:
    distances = []
    for asked in ask_all(tasks, model=BY_TASK["POSE"]):
        for one, shape in asked.pairs():
            assert tuple(point.name for point in one.keypoints) == POINT_NAMES
            assert all(0 <= point.confidence <= 1 for point in one.keypoints)
            side = max(shape.box[2] - shape.box[0], shape.box[3] - shape.box[1])
            said = np.array([(point.x_px, point.y_px) for point in one.keypoints])
            distances += (np.hypot(*(said - named_points(shape)).T) / side).tolist()
    assert len(distances) >= 4 * SCENES
    assert np.median(distances) < 0.1, np.median(distances)


def test_classes_are_right_best_first_and_add_up_to_one(tasks: Server) -> None:
    scenes = foreign_singles(12, SEED + 1)
    right = 0
    for scene in scenes:
        answer = tasks.vision.Detect(detect_request(content(scene), model=BY_TASK["CLASSIFY"]))
        assert not answer.detections
        confidences = [one.confidence for one in answer.classes]
        assert confidences == sorted(confidences, reverse=True)
        assert sum(confidences) == pytest.approx(1, abs=1e-3)
        right += answer.classes[0].label == scene.shapes[0].label
    assert right >= 0.75 * len(scenes)
    one = tasks.vision.Detect(detect_request(content(scenes[0]), model=BY_TASK["CLASSIFY"], max_detections=1))
    assert len(one.classes) == 1
    only = tasks.vision.Detect(detect_request(content(scenes[0]), model=BY_TASK["CLASSIFY"], labels=["star", "circle"]))
    assert {one.label for one in only.classes} == {"star", "circle"}


# ---- the same through every way in, whoever shares the batch


def essence(answer: pb.DetectResponse) -> list[tuple[Any, ...]]:
    """What an answer says, without times."""
    said: list[tuple[Any, ...]] = [
        (
            one.label,
            round(one.confidence, 2),
            tuple(round(edge) for edge in box),
            one.mask.WhichOneof("form"),
            len(one.keypoints),
            one.HasField("oriented_box"),
        )
        for one, (_, _, box) in zip(answer.detections, found(answer.detections), strict=True)
    ]
    return said + [(one.label, round(one.confidence, 2)) for one in answer.classes]


def alike(one: Sequence[tuple[Any, ...]], other: Sequence[tuple[Any, ...]]) -> bool:
    """The same but for the last bits, which may round to the other side."""
    return len(one) == len(other) and all(
        a[0] == b[0]
        and abs(a[1] - b[1]) <= 0.011
        and a[3:] == b[3:]
        and (len(a) < 3 or np.abs(np.subtract(a[2], b[2])).max() <= 1)
        for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("task", BY_TASK)
def test_streams_and_http_say_what_detect_says(tasks: Server, task: str) -> None:
    picture = content(SCENES_DRAWN[0])
    options = detection_pb2.DetectOptions(model=BY_TASK[task], masks=True, annotate=True)
    request = pb.DetectRequest(image=image_pb2.Image(content=picture), options=options)
    direct = tasks.vision.Detect(request)
    assert Image.open(io.BytesIO(direct.annotated_image)).size == (direct.width_px, direct.height_px)

    frames = [
        pb.DetectStreamRequest(config=pb.StreamConfig(options=options)),
        *(pb.DetectStreamRequest(frame=pb.Frame(frame_id=n, image=request.image)) for n in range(3)),
    ]
    *results, last = tasks.vision.DetectStream(iter(frames), timeout=60)
    assert last.summary.detected_count == 3
    for result in results:
        assert alike(essence(result.result.detection), essence(direct))
        assert result.result.detection.annotated_image

    body = {
        "image": {"content": base64.b64encode(picture).decode()},
        "options": {"model": BY_TASK[task], "masks": True, "maskForm": "MASK_FORM_POLYGON"},
    }
    answered = tasks.web.post("/v1/vision:detect", json=body)
    assert answered.status_code == 200, answered.text
    told = json_format.ParseDict(answered.json(), pb.DetectResponse())
    assert alike(essence(told), essence(direct))


def test_each_image_of_a_shared_batch_has_its_own_options(tasks: Server) -> None:
    """Triton's and Ultralytics' batches have one set of options for all; ours do not notice each other."""
    picture = content(max(SCENES_DRAWN, key=lambda scene: len(scene.shapes)))
    alone = tasks.vision.Detect(detect_request(picture, model=SEGMENTER))
    assert len(alone.detections) >= 3
    label = alone.detections[-1].label
    wanted: list[dict[str, Any]] = [
        {},
        {"masks": True},
        {"masks": True, "mask_form": detection_pb2.MASK_FORM_RLE},
        {"annotate": True},
        {"labels": [label]},
        {"max_detections": 1},
        {"min_confidence": alone.detections[0].confidence - 1e-3},
        {"min_confidence": 1.0},
    ]
    with ThreadPoolExecutor(len(wanted) * 2) as callers:
        answers = list(
            callers.map(
                lambda options: tasks.vision.Detect(detect_request(picture, model=SEGMENTER, **options), timeout=60),
                wanted * 2,
            )
        )
    for options, answer in zip(wanted * 2, answers, strict=True):
        expected = [one for one in alone.detections if one.label == label or "labels" not in options]
        expected = [one for one in expected if one.confidence >= options.get("min_confidence", 0)]
        expected = expected[: options.get("max_detections", 300)]
        assert [one.label for one in answer.detections] == [one.label for one in expected], options
        form = {None: None, 0: "polygon", detection_pb2.MASK_FORM_RLE: "rle"}[
            options.get("mask_form", 0) if options.get("masks") else None
        ]
        assert {one.mask.WhichOneof("form") for one in answer.detections} <= {form}
        assert bool(answer.annotated_image) == bool(options.get("annotate"))


def test_the_picture_shows_masks_and_names_whether_or_not_masks_are_written(tasks: Server) -> None:
    scene = SCENES_DRAWN[0]
    answer = tasks.vision.Detect(detect_request(content(scene), model=SEGMENTER, annotate=True, masks=True))
    without = tasks.vision.Detect(detect_request(content(scene), model=SEGMENTER, annotate=True))
    assert without.annotated_image == answer.annotated_image
    drawn = np.array(Image.open(io.BytesIO(answer.annotated_image)).convert("RGB"), np.int16)
    surest = answer.detections[0]
    inside = pixels(surest.mask, answer.width_px, answer.height_px)
    inside = cv2.erode(inside.astype(np.uint8), np.ones((9, 9), np.uint8)).astype(bool)
    assert inside.any()
    assert np.abs(drawn - scene.image)[inside].max(1).mean() > 15
