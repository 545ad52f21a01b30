from __future__ import annotations

import time

import pytest
from prometheus_client import CollectorRegistry

from serving.telemetry import REGISTRY
from vision_server import metrics
from vision_server.metrics import DetectorMeters, ModelGauges, ModelReading
from vision_server.results import Found, ModelState


def value(name: str, **labels: str) -> float | None:
    return REGISTRY.get_sample_value(name, labels)


def test_a_batch_is_counted_once_whatever_its_size() -> None:
    meters = DetectorMeters("of-batches")

    def execute(items: object) -> list[Found | Exception]:
        return [ValueError("bad"), Found(inference_ms=20.0), Found(inference_ms=20.0)]

    assert len(meters.counting(execute)([1, 2, 3])) == 3

    assert value("ai4thai_batch_size_images_count", model="of-batches") == 1
    assert value("ai4thai_batch_size_images_sum", model="of-batches") == 3
    assert value("ai4thai_inference_seconds_sum", model="of-batches") == pytest.approx(0.02)
    for _ in range(3):
        meters.count_image(queue_ms=5.0, postprocess_ms=1.0)
    assert value("ai4thai_model_wait_seconds_count", model="of-batches") == 3
    assert value("ai4thai_postprocess_seconds_sum", model="of-batches") == pytest.approx(0.003)


def test_a_batch_without_an_answer_counts_for_nothing_and_errors_pass_through() -> None:
    meters = DetectorMeters("broken")
    meters.counting(lambda items: [ValueError("bad")])([1])

    def raises(items: object) -> list[Found | Exception]:
        raise RuntimeError("no memory")

    with pytest.raises(RuntimeError, match="no memory"):
        meters.counting(raises)([1])
    assert value("ai4thai_batch_size_images_count", model="broken") == 0


def test_a_model_that_went_leaves_no_series() -> None:
    DetectorMeters("gone").count_image(queue_ms=1, postprocess_ms=1)
    metrics.MODEL_READY.labels("gone").set(1)
    metrics.GENERATIONS.labels("gone", "stop").inc()

    metrics.forget_model("gone")

    left = [sample for family in REGISTRY.collect() for sample in family.samples if "gone" in sample.labels.values()]
    assert left == []
    metrics.forget_model("never was")


def test_models_are_read_at_each_scrape(monkeypatch: pytest.MonkeyPatch) -> None:
    # given a model that has computed 3 of the last 4 seconds on a device
    now_s = time.perf_counter()
    monkeypatch.setattr(time, "perf_counter", lambda: now_s)
    gauges, registry = ModelGauges(), CollectorRegistry()
    registry.register(gauges)
    readings = [
        ModelReading("cams", ModelState.READY, {"cpu": 1000}, {"cpu": 10.0}),
        ModelReading("words", ModelState.FAILED, {}, {}),
    ]
    gauges.read_from(lambda: readings)
    now_s += 4
    registry.collect()
    list(gauges.collect())
    readings[0] = ModelReading("cams", ModelState.READY, {"cpu": 1000}, {"cpu": 13.0})
    now_s += 4

    # when it is scraped, twice at once
    for _ in range(2):
        assert registry.get_sample_value(
            "ai4thai_model_busy_ratio", {"model": "cams", "device": "cpu"}
        ) == pytest.approx(0.75)

    # then the rest is told too
    assert registry.get_sample_value("ai4thai_model_busy_seconds_total", {"model": "cams", "device": "cpu"}) == 13
    assert registry.get_sample_value("ai4thai_model_memory_bytes", {"model": "cams", "device": "cpu"}) == 1000
    assert registry.get_sample_value("ai4thai_models", {"state": "ready"}) == 1
    assert registry.get_sample_value("ai4thai_models", {"state": "failed"}) == 1
    assert registry.get_sample_value("ai4thai_models", {"state": "pending"}) == 0
    # and what was loaded anew counts from 0 again, what is unloaded is gone
    readings[:] = [ModelReading("cams", ModelState.READY, {"cpu": 1000}, {"cpu": 0.5})]
    now_s += 4
    assert registry.get_sample_value("ai4thai_model_busy_ratio", {"model": "cams", "device": "cpu"}) == 0
    readings.clear()
    assert registry.get_sample_value("ai4thai_model_memory_bytes", {"model": "cams", "device": "cpu"}) is None
