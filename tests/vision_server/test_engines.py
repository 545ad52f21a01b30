"""The engines: the same answers from each, one face before all, and the right one for each file.

What they are held to, on the scenes of the training generator: the same objects, boxes, points and turned boxes within
0.01 px and 0.01 degrees, confidences within 0.0001 (measured: 0.0002 px, 0.0001 degrees, 0.000002).
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from importlib.machinery import ModuleSpec
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vision_server.detector import DetectItem, Detector
from vision_server.engines import choose, open_engine
from vision_server.engines.conversion import ConversionFailed, convert
from vision_server.engines.engine import EngineOptions, Traits, buckets
from vision_server.images import Image
from vision_server.requests import DetectOptions
from vision_server.results import Detection, Found
from vision_server.shapes.scenes import DETECTOR_STYLE, draw_scene
from vision_server.weights import (
    SHIPPED,
    SHIPPED_DESCRIBER,
    SHIPPED_DETECTOR,
    Available,
    UnreadableWeights,
    WeightsMissing,
    find_detector,
    list_models,
    model_name,
)

PLACE_TOLERANCE = 0.01
CONFIDENCE_TOLERANCE = 1e-4
PADDED_TOLERANCE = 1e-3
SIZES_PX = ((640, 480), (320, 320), (300, 900), (640, 360))
DETECTORS = [name for name in SHIPPED if name != SHIPPED_DESCRIBER]

Load = Callable[..., Detector]


@pytest.fixture(scope="module")
def images() -> list[Image]:
    rng = np.random.default_rng(20)
    scenes = [draw_scene(rng, *SIZES_PX[number % len(SIZES_PX)], DETECTOR_STYLE) for number in range(20)]
    return [Image(scene.image, scene.image.shape[1], scene.image.shape[0]) for scene in scenes]


@pytest.fixture(scope="module")
def exported(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A shipped model as .onnx; each is made once."""
    folder = tmp_path_factory.mktemp("exports")

    @cache
    def get(name: str) -> Path:
        return convert(SHIPPED[name], folder / f"{name}.onnx", "onnx")

    return get


@pytest.fixture(scope="module")
def load(engine_cache: Path, exported: Callable[[str], Path]) -> Load:
    """A shipped model on an engine; each is loaded once."""
    loaded: dict[tuple[str, str], Detector] = {}

    def get(name: str, engine: str) -> Detector:
        if (name, engine) not in loaded:
            path = exported(name) if engine == "onnxruntime" else SHIPPED[name]
            detector = Detector(path, "cpu", engine=engine, lanes=2, cache_dir=engine_cache)
            assert detector.load().engine == engine
            loaded[name, engine] = detector
        return loaded[name, engine]

    return get


def answers(detector: Detector, images: list[Image], options: DetectOptions | None = None) -> list[Found]:
    items = [DetectItem(detector.fit(image), options or DetectOptions()) for image in images]
    return told(detector.execute(items))


def told(outcomes: list[Found | Exception]) -> list[Found]:
    for outcome in outcomes:
        assert isinstance(outcome, Found), outcome
    return [replace(found, inference_ms=0, postprocess_ms=0) for found in outcomes if isinstance(found, Found)]


def assert_close(one: Found, other: Found, places: float, confidences: float) -> None:
    assert [c.label for c in one.classes] == [c.label for c in other.classes]
    assert [c.confidence for c in one.classes] == pytest.approx([c.confidence for c in other.classes], abs=confidences)
    assert [d.label for d in one.detections] == [d.label for d in other.detections]
    for mine, theirs in zip(one.detections, other.detections, strict=True):
        assert mine.confidence == pytest.approx(theirs.confidence, abs=confidences)
        assert numbers_of(mine) == pytest.approx(numbers_of(theirs), abs=places)
    if one.masks is not None and other.masks is not None:
        scale = np.abs(one.masks.coefficients).max(initial=1) * np.abs(one.masks.prototypes).max(initial=1)
        mine_, theirs_ = (np.tensordot(m.coefficients, m.prototypes, 1) for m in (one.masks, other.masks))
        assert np.abs(mine_ - theirs_).max(initial=0) <= confidences * scale
    else:
        assert one.masks is other.masks is None


def numbers_of(found: Detection) -> list[float]:
    box, turned = found.box, found.oriented_box
    points = [value for point in found.keypoints for value in (point.x_px, point.y_px)]
    return [
        *(box.x_min_px, box.y_min_px, box.x_max_px, box.y_max_px),
        *points,
        *((turned.center_x_px, turned.center_y_px, turned.width_px, turned.height_px) if turned else ()),
        # 89.99° and -90° are neighbours
        *((math.cos(math.radians(2 * turned.angle_degrees)) if turned else 0.0,)),
    ]


@pytest.mark.parametrize(
    ("name", "engine"),
    [(name, "openvino") for name in DETECTORS]
    # The exporter is the same for all tasks; a segmenter is the one whose network has two outputs.
    + [(SHIPPED_DETECTOR, "onnxruntime"), ("shapes-segmenter", "onnxruntime")],
)
def test_every_engine_gives_what_pytorch_gives(load: Load, images: list[Image], name: str, engine: str) -> None:
    if not SHIPPED[name].exists():
        pytest.fail(f"{name} is not shipped")
    reference = answers(load(name, "pytorch"), images)
    found = answers(load(name, engine), images)
    assert sum(len(one.detections) + len(one.classes) for one in reference) > 20
    for one, other in zip(reference, found, strict=True):
        assert_close(one, other, PLACE_TOLERANCE, CONFIDENCE_TOLERANCE)


def test_a_cpu_computes_the_shipped_models_on_openvino_by_default(detector: Detector) -> None:
    assert (detector.card.engine, detector.card.precision, detector.card.device) == ("openvino", "fp32", "cpu")


@pytest.mark.parametrize("engine", ["openvino", "onnxruntime", "pytorch"])
def test_on_a_cpu_no_batch_mate_changes_a_single_bit(load: Load, images: list[Image], engine: str) -> None:
    detector = load(SHIPPED_DETECTOR, engine)
    assert detector.batch_sizes == (1,)
    options = DetectOptions(min_confidence=0.01)
    items = [DetectItem(detector.fit(image), options) for image in images[:6]]
    alone = [told(detector.execute([item]))[0] for item in items]

    @settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
    @given(mix=st.lists(st.integers(0, len(items) - 1), min_size=1, max_size=9))
    def mixed(mix: list[int]) -> None:
        assert told(detector.execute([items[number] for number in mix])) == [alone[number] for number in mix]

    mixed()


@pytest.mark.parametrize("engine", ["openvino", "onnxruntime"])
def test_an_engine_of_fixed_batches_answers_any_number_within_a_thousandth(
    load: Load, exported: Callable[[str], Path], images: list[Image], tmp_path: Path, engine: str
) -> None:
    import onnx

    alone = load(SHIPPED_DETECTOR, engine)
    network = onnx.load(exported(SHIPPED_DETECTOR))
    network.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 4
    onnx.save(network, tmp_path / "fixed.onnx")
    fixed = Detector(tmp_path / "fixed.onnx", "cpu", engine=engine)
    fixed.load()
    assert fixed.batch_sizes == (4,)
    for count in (1, 3, 4, 6):
        for one, other in zip(answers(alone, images[:count]), answers(fixed, images[:count]), strict=True):
            assert_close(one, other, 0.1, PADDED_TOLERANCE)


@pytest.mark.parametrize("engine", ["openvino", "onnxruntime", "pytorch"])
def test_lanes_side_by_side_answer_as_one_alone(load: Load, images: list[Image], engine: str) -> None:
    detector = load("shapes-segmenter", engine)
    expected = answers(detector, images[:8])
    with ThreadPoolExecutor(4) as lanes:
        side_by_side = list(lanes.map(lambda image: answers(detector, [image])[0], images[:8] * 3))
    for one, other in zip(expected * 3, side_by_side, strict=True):
        assert_close(one, other, 0, 0)


def test_torchscript_goes_through_ultralytics_loader(load: Load, images: list[Image], tmp_path: Path) -> None:
    made = convert(SHIPPED["shapes-segmenter"], tmp_path / "a.torchscript", "torchscript")
    detector = Detector(made, "cpu")
    card = detector.load()
    assert (card.engine, card.labels) == ("pytorch", load("shapes-segmenter", "pytorch").card.labels)
    for one, other in zip(
        answers(load("shapes-segmenter", "pytorch"), images[:6]), answers(detector, images[:6]), strict=True
    ):
        assert_close(one, other, PLACE_TOLERANCE, CONFIDENCE_TOLERANCE)


class TestConversion:
    """A .pt file is converted for OpenVINO once."""

    def test_what_was_converted_is_kept_until_the_weights_change(
        self, engine_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        cache, weights = tmp_path / "cache", tmp_path / "mine.pt"
        shutil.copy(SHIPPED["shapes-classifier"], weights)
        options = EngineOptions(cache_dir=cache)
        open_engine(weights, "openvino", options).close()
        [kept] = cache.glob("mine/*_openvino_model")

        converted: list[Path] = []

        def counted(source: Path, target: Path, form: str, **wanted: int) -> Path:
            converted.append(target)
            return convert(source, target, form, **wanted)

        monkeypatch.setattr("vision_server.engines.openvino.convert", counted)
        open_engine(weights, "openvino", options).close()
        assert converted == []

        next(kept.glob("*.xml")).write_text("<net")  # such as a disk that was full leaves
        open_engine(weights, "openvino", options).close()
        assert converted == [kept]

        shutil.copy(SHIPPED[SHIPPED_DETECTOR], weights)
        assert open_engine(weights, "openvino", options).traits.task == "detect"
        assert len(converted) == 2 and not kept.exists() and converted[1].exists()

    def test_what_cannot_be_converted_is_served_by_pytorch_unless_openvino_was_asked_for(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fails(source: Path, *_: object, **__: object) -> Path:
            raise ConversionFailed(f"{source.name}: an operator that nobody knows")

        monkeypatch.setattr("vision_server.engines.openvino.convert", fails)
        weights = SHIPPED[SHIPPED_DETECTOR]
        assert Detector(weights, "cpu").load().engine == "pytorch"
        with pytest.raises(UnreadableWeights, match="nobody knows"):
            Detector(weights, "cpu", engine="openvino").load()

    def test_a_failed_export_leaves_nothing_behind(self, data_dir: Path, tmp_path: Path) -> None:
        (tmp_path / "bad.pt").write_bytes(b"no zip, no pickle")
        with pytest.raises(ConversionFailed, match=r"bad\.pt"):
            convert(tmp_path / "bad.pt", tmp_path / "out" / "bad.onnx", "onnx")
        assert list((tmp_path / "out").iterdir()) == []


def test_a_detector_can_be_closed_and_loaded_again(load: Load, images: list[Image], engine_cache: Path) -> None:
    detector = Detector(SHIPPED[SHIPPED_DETECTOR], "cpu", cache_dir=engine_cache)
    detector.load()
    before = answers(detector, images[:1])
    detector.close()
    with pytest.raises(RuntimeError, match="not loaded"):
        answers(detector, images[:1])
    detector.load()
    detector.warm_up()
    assert answers(detector, images[:1]) == before


def test_another_size_than_the_exports_is_refused_with_the_cure(data_dir: Path, tmp_path: Path) -> None:
    folder = convert(SHIPPED["shapes-classifier"], tmp_path / "a_openvino_model", "openvino", side_px=128)
    assert Detector(folder, "cpu").load().input_size_px == 128
    with pytest.raises(UnreadableWeights, match="--image-size 320"):
        Detector(folder, "cpu", input_px=320).load()


@pytest.mark.parametrize("engine", ["openvino", "onnxruntime"])
def test_an_onnx_file_takes_any_size(exported: Callable[[str], Path], engine: str) -> None:
    resized = Detector(exported(SHIPPED_DETECTOR), "cpu", input_px=200, engine=engine)
    assert resized.load().input_size_px == 224  # the next whole number of strides
    resized.warm_up()


@pytest.mark.parametrize("file_name", ["a.pt", "a.onnx", "a_openvino_model", "a.torchscript", "a_ncnn_model", "folder"])
def test_what_is_no_model_is_named(data_dir: Path, tmp_path: Path, file_name: str) -> None:
    path = tmp_path / file_name
    if "." in file_name:
        path.write_bytes(b"not a model")
    else:
        path.mkdir()
    with pytest.raises(UnreadableWeights, match=file_name):
        Detector(path, "cpu").load()


@pytest.mark.parametrize(("max_batch", "sizes"), [(1, (1,)), (2, (1, 2)), (8, (1, 2, 4, 8)), (9, (1, 2, 4, 8, 16))])
def test_buckets_hold_the_largest_batch(max_batch: int, sizes: tuple[int, ...]) -> None:
    assert buckets(max_batch) == sizes


def test_traits_are_read_from_strings_as_onnx_keeps_them() -> None:
    traits = Traits.of(
        {
            "task": "pose",
            "names": "{1: 'b', 0: 'a'}",
            "imgsz": "[320, 320]",
            "stride": "16",
            "kpt_shape": "[4, 3]",
            "kpt_names": "{0: ['top', 'right', 'bottom', 'left']}",
            "args": "{'nms': True, 'quantize': 16}",
            "end2end": "False",
        }
    )
    assert traits == Traits("pose", ("a", "b"), 320, 32, True, (4, 3), ("top", "right", "bottom", "left"), half=True)
    with pytest.raises(ValueError, match="class names"):
        Traits.of({"names": "__import__('os').abort()"})


def installed(*modules: str) -> Callable[[str], ModuleSpec | None]:
    return lambda name: ModuleSpec(name, None) if name in modules else None


EVERYTHING = ("torch", "openvino", "onnxruntime", "tensorrt")


@pytest.mark.parametrize(
    ("files", "engine", "device", "modules", "picked"),
    [
        ("a.pt", "auto", "cpu", EVERYTHING, ("a.pt", "openvino")),
        ("a.pt a.onnx a_openvino_model a.engine", "auto", "cpu", EVERYTHING, ("a_openvino_model", "openvino")),
        ("a.pt a.onnx a.engine", "auto", "cpu", EVERYTHING, ("a.pt", "openvino")),
        ("a.onnx", "auto", "cpu", EVERYTHING, ("a.onnx", "openvino")),
        ("a.pt a.onnx", "auto", "cpu", ("torch", "onnxruntime"), ("a.onnx", "onnxruntime")),
        ("a.pt a.onnx", "auto", "cpu", ("torch",), ("a.pt", "pytorch")),
        ("a.pt a.onnx a.engine", "auto", "cuda:0", EVERYTHING, ("a.engine", "tensorrt")),
        ("a.pt a.onnx a.engine", "auto", "cuda:0", ("torch", "onnxruntime"), ("a.pt", "pytorch")),
        ("a.onnx", "auto", "cuda:1", ("torch", "onnxruntime"), ("a.onnx", "onnxruntime")),
        ("a.pt a.onnx", "onnxruntime", "cpu", EVERYTHING, ("a.onnx", "onnxruntime")),
        ("a.pt a_openvino_model", "pytorch", "cpu", EVERYTHING, ("a.pt", "pytorch")),
        ("a.pt a.engine", "tensorrt", "cuda:0", EVERYTHING, ("a.engine", "tensorrt")),
        ("a_ncnn_model", "auto", "cpu", EVERYTHING, ("a_ncnn_model", "")),
    ],
)
def test_the_best_of_the_files_for_what_the_machine_has(
    monkeypatch: pytest.MonkeyPatch,
    files: str,
    engine: str,
    device: str,
    modules: tuple[str, ...],
    picked: tuple[str, str],
) -> None:
    monkeypatch.setattr(choose, "find_spec", installed(*modules))
    path, name = choose.pick([Path(file) for file in files.split()], engine, device)
    assert (str(path), name) == picked


@pytest.mark.parametrize(
    ("file", "engine", "device", "modules", "words"),
    [
        ("a.pt", "onnxruntime", "cpu", EVERYTHING, "ai4thai models export a --engine onnx"),
        ("a.pt", "tensorrt", "cuda:0", EVERYTHING, "ai4thai models export a --engine engine"),
        ("a.onnx", "pytorch", "cpu", EVERYTHING, "a.pt"),
        ("a.pt", "openvino", "cpu", ("torch",), "pip install openvino"),
        ("a.onnx", "auto", "cpu", ("torch",), "pip install openvino"),
        ("a.pt", "tensorrt", "cpu", EVERYTHING, "NVIDIA GPU"),
        ("a.pt", "openvino", "cuda:0", EVERYTHING, "VISION_DEVICE=cpu"),
        ("a.engine", "auto", "cpu", EVERYTHING, "tensorrt on an NVIDIA GPU"),
        ("a_openvino_model", "auto", "cuda:0", EVERYTHING, "openvino on the CPU"),
    ],
)
def test_an_engine_that_cannot_serve_a_file_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, file: str, engine: str, device: str, modules: tuple[str, ...], words: str
) -> None:
    monkeypatch.setattr(choose, "find_spec", installed(*modules))
    with pytest.raises(choose.NoEngine, match="a") as raised:
        choose.pick([Path(file)], engine, device)
    assert words in str(raised.value)


class TestFinding:
    """Models by their names."""

    def test_a_name_with_and_without_its_ending_is_the_same_model(self, tmp_path: Path) -> None:
        weights = self.put(tmp_path, "best.v2.pt", age_s=20)
        assert find_detector("best.v2", tmp_path, offline=True) == weights
        assert find_detector("best.v2.pt", tmp_path, offline=True) == weights
        assert {model_name(name) for name in ("best.v2", "best.v2.pt", "best.v2.onnx", "best.v2_openvino_model")} == {
            "best.v2"
        }

        export = self.put(tmp_path, "best.v2_openvino_model/model.xml").parent
        onnx = self.put(tmp_path, "best.v2.onnx")
        assert find_detector("best.v2", tmp_path, offline=True) == export
        assert find_detector("best.v2.pt", tmp_path, offline=True) == export
        assert find_detector("best.v2", tmp_path, offline=True, engine="pytorch") == weights
        assert find_detector("best.v2", tmp_path, offline=True, engine="onnxruntime") == onnx
        assert find_detector("best.v2.onnx", tmp_path, offline=True) == onnx
        assert find_detector("best.v2", tmp_path, offline=True, device="cuda:0") == weights

    def test_versions_are_files_of_their_own(self, tmp_path: Path) -> None:
        first, second = self.put(tmp_path, "cars@1.pt"), self.put(tmp_path, "cars@2.1.pt")
        assert find_detector("cars@1", tmp_path, offline=True) == first
        assert find_detector("cars@2.1", tmp_path, offline=True) == second
        with pytest.raises(WeightsMissing, match="cars"):
            find_detector("cars", tmp_path, offline=True)

    def test_a_shipped_model_may_be_exported_into_the_model_directory(self, tmp_path: Path) -> None:
        assert find_detector(SHIPPED_DETECTOR, tmp_path, offline=True) == SHIPPED[SHIPPED_DETECTOR]
        export = self.put(tmp_path, f"{SHIPPED_DETECTOR}_openvino_model/model.xml").parent
        assert find_detector(SHIPPED_DETECTOR, tmp_path, offline=True) == export

    def test_an_export_of_older_weights_is_passed_over(self, tmp_path: Path) -> None:
        weights = self.put(tmp_path, "a.pt")
        self.put(tmp_path, "a.onnx", age_s=60)
        self.put(tmp_path, "a_openvino_model/model.xml", age_s=60)
        assert find_detector("a", tmp_path, offline=True) == weights
        with pytest.raises(WeightsMissing, match="models export a --engine onnx"):
            find_detector("a", tmp_path, offline=True, engine="onnxruntime")

    def test_an_export_that_leads_out_of_the_model_directory_is_refused(self, tmp_path: Path) -> None:
        models = tmp_path / "models"
        self.put(models, "a.pt")
        (models / "a.onnx").symlink_to(self.put(tmp_path, "elsewhere.onnx"))
        with pytest.raises(WeightsMissing, match="model directory"):
            find_detector("a", models, offline=True)

    def test_models_are_listed_by_name_once_each(self, tmp_path: Path) -> None:
        for file in (
            "b.pt",
            "b.onnx",
            "b_openvino_model/model.xml",
            "b@2.pt",
            "c.engine",
            "notes.txt",
            ".exporting-x/m.pt",
        ):
            self.put(tmp_path, file)
        for folder in ("talks", "llava-hf/llava-1.5-7b-hf"):
            self.put(tmp_path, f"{folder}/config.json")
        shipped = {name for name, path in SHIPPED.items() if path.exists()}
        listed = list_models(tmp_path)
        assert {model.name for model in listed[: len(shipped)]} == shipped
        assert listed[len(shipped) :] == (
            Available("b", generates=False),
            Available("b@2", generates=False),
            Available("c", generates=False),
            Available("llava-hf/llava-1.5-7b-hf", generates=True),
            Available("talks", generates=True),
        )
        assert list_models(tmp_path / "none") == listed[: len(shipped)]

    @staticmethod
    def put(folder: Path, name: str, *, age_s: float = 0) -> Path:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"weights")
        then_s = path.stat().st_mtime - age_s
        os.utime(path, (then_s, then_s))
        return path
