"""The vision server's Prometheus metrics, all in one place; docs/metrics.md explains them, and a test compares the two."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from prometheus_client import Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from serving.telemetry import REGISTRY
from vision_server.results import Found, ModelState

Item = TypeVar("Item")

# 0.5 ms to 10 s: a batch on a fast GPU and a queue behind a slow CPU both find their bucket.
_STEP_BUCKETS_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)

DECODE_SECONDS = Histogram(
    "ai4thai_decode_seconds",
    "Decoding an image and fitting it to the model.",
    buckets=_STEP_BUCKETS_S,
    registry=REGISTRY,
)
QUEUE_SECONDS = Histogram(
    "ai4thai_model_wait_seconds",
    "An image's wait for the model, until its batch began.",
    ["model"],
    buckets=_STEP_BUCKETS_S,
    registry=REGISTRY,
)
INFERENCE_SECONDS = Histogram(
    "ai4thai_inference_seconds",
    "A batch's forward pass; once for each batch.",
    ["model"],
    buckets=_STEP_BUCKETS_S,
    registry=REGISTRY,
)
POSTPROCESS_SECONDS = Histogram(
    "ai4thai_postprocess_seconds",
    "Turning the model's numbers into an image's detections, drawing included.",
    ["model"],
    buckets=_STEP_BUCKETS_S,
    registry=REGISTRY,
)
BATCH_SIZE = Histogram(
    "ai4thai_batch_size_images",
    "Images that shared a forward pass; once for each batch.",
    ["model"],
    buckets=(1, 2, 4, 8, 16, 32, 64),
    registry=REGISTRY,
)
IMAGES = Counter(
    "ai4thai_images", "Images answered, by outcome (`OK` or the error's reason).", ["outcome"], registry=REGISTRY
)
ADMITTED_IMAGES = Gauge("ai4thai_admitted_images", "Images being worked on.", registry=REGISTRY)
ADMITTED_BYTES = Gauge(
    "ai4thai_admitted_image_bytes",
    "Bytes of the images being worked on: their files, and their pixels once decoded.",
    registry=REGISTRY,
)
STREAMS = Gauge("ai4thai_streams", "DetectStream calls that are open.", registry=REGISTRY)
STREAM_FRAMES = Counter(
    "ai4thai_stream_frames",
    "Frames of streams answered, by outcome (`detected`, `error`, `dropped`).",
    ["outcome"],
    registry=REGISTRY,
)
WAITING_REQUESTS = Gauge(
    "ai4thai_model_waiting_requests", "Images or generations that wait for a model.", ["model"], registry=REGISTRY
)
MODEL_READY = Gauge("ai4thai_model_ready", "1 while a model serves, else 0.", ["model"], registry=REGISTRY)

RUNNING_GENERATIONS = Gauge(
    "ai4thai_running_generations", "Generations that run side by side.", ["model"], registry=REGISTRY
)
GENERATED_TOKENS = Counter("ai4thai_generated_tokens", "Tokens generated.", ["model"], registry=REGISTRY)
GENERATIONS = Counter(
    "ai4thai_generations",
    "Generations ended, by how (`stop`, `length`, `cancelled`, `error`).",
    ["model", "finish_reason"],
    registry=REGISTRY,
)
GENERATED_PIECES = Counter(
    "ai4thai_generated_pieces", "Pieces of text handed to callers.", ["model"], registry=REGISTRY
)
STEP_SECONDS = Histogram(
    "ai4thai_generation_step_seconds",
    "A step of the running generations: one more token for each.",
    ["model"],
    buckets=_STEP_BUCKETS_S,
    registry=REGISTRY,
)
STEP_ROWS = Histogram(
    "ai4thai_generation_step_rows",
    "Generations that shared a step; once for each step.",
    ["model"],
    buckets=(1, 2, 4, 8, 16, 32, 64, 128),
    registry=REGISTRY,
)
IMAGE_FEATURES = Counter(
    "ai4thai_image_features",
    "Pictures that a describer needed, by whether what its vision tower makes of them was kept (`hit`, `miss`).",
    ["model", "outcome"],
    registry=REGISTRY,
)
IMAGE_FEATURE_BYTES = Gauge(
    "ai4thai_image_feature_bytes", "Bytes of pictures' features that are kept.", ["model"], registry=REGISTRY
)
FIRST_TOKEN_SECONDS = Histogram(
    "ai4thai_time_to_first_token_seconds", "From the request to its first token.", ["model"], registry=REGISTRY
)


class DetectorMeters:
    """The metrics of one detector, looked up once; made when it is loaded."""

    def __init__(self, model: str) -> None:
        self._queue_seconds = QUEUE_SECONDS.labels(model)
        self._postprocess_seconds = POSTPROCESS_SECONDS.labels(model)
        self._inference_seconds = INFERENCE_SECONDS.labels(model)
        self._batch_size = BATCH_SIZE.labels(model)

    def count_image(self, *, queue_ms: float, postprocess_ms: float) -> None:
        """An image was answered."""
        self._queue_seconds.observe(queue_ms / 1000)
        self._postprocess_seconds.observe(postprocess_ms / 1000)

    def counting(
        self, execute: Callable[[Sequence[Item]], list[Found | Exception]]
    ) -> Callable[[Sequence[Item]], list[Found | Exception]]:
        """`execute`, with each batch that it computes counted; one whose items all failed had no forward pass worth timing."""

        def counted(items: Sequence[Item]) -> list[Found | Exception]:
            outcomes = execute(items)
            found = next((outcome for outcome in outcomes if isinstance(outcome, Found)), None)
            if found is not None:
                self._batch_size.observe(len(items))
                self._inference_seconds.observe(found.inference_ms / 1000)
            return outcomes

        return counted


def forget_model(model: str) -> None:
    """Names that came and went leave no series behind."""
    for metric in _OF_MODELS:
        metric.remove_by_labels({"model": model})


_OF_MODELS = (
    *(QUEUE_SECONDS, INFERENCE_SECONDS, POSTPROCESS_SECONDS, BATCH_SIZE, WAITING_REQUESTS, MODEL_READY),
    *(RUNNING_GENERATIONS, GENERATED_TOKENS, GENERATIONS, FIRST_TOKEN_SECONDS, GENERATED_PIECES),
    *(STEP_SECONDS, STEP_ROWS, IMAGE_FEATURES, IMAGE_FEATURE_BYTES),
)


@dataclass(frozen=True, slots=True)
class ModelReading:
    """A model at this moment. `memory_bytes` and `busy_s` (seconds computed since it was loaded) are by device."""

    model: str
    state: ModelState
    memory_bytes: Mapping[str, int]
    busy_s: Mapping[str, float]


class ModelGauges(Collector):
    """Reads the models at each scrape, so that what has been unloaded is gone from the scrape too."""

    def __init__(self) -> None:
        self._read: Callable[[], Iterable[ModelReading]] = tuple
        self._last_s = time.perf_counter()
        self._last_busy_s: Mapping[tuple[str, str], float] = {}
        self._ratios: Mapping[tuple[str, str], float] = {}

    def read_from(self, read: Callable[[], Iterable[ModelReading]]) -> None:
        """From now on `read` tells of the models."""
        self._read = read

    def collect(self) -> Iterator[Metric]:
        """Called at each scrape."""
        readings = tuple(self._read())
        states = GaugeMetricFamily("ai4thai_models", "Models, by where they are in their life.", labels=["state"])
        for state in ModelState:
            states.add_metric([state.value], sum(reading.state is state for reading in readings))
        memory = GaugeMetricFamily(
            "ai4thai_model_memory_bytes", "About what a loaded model takes on a device.", labels=["model", "device"]
        )
        busy_seconds = CounterMetricFamily(
            "ai4thai_model_busy_seconds",
            "Time in which a model has computed on a device since it was loaded.",
            labels=["model", "device"],
        )
        busy_ratio = GaugeMetricFamily(
            "ai4thai_model_busy_ratio",
            "Share of the time since the last scrape (at least a second ago) in which a model computed on a device, 0 to 1.",
            labels=["model", "device"],
        )
        busy_s = {(r.model, device): seconds for r in readings for device, seconds in r.busy_s.items()}
        self._update_ratios(busy_s)
        for reading in readings:
            for device, size_bytes in reading.memory_bytes.items():
                memory.add_metric([reading.model, device], size_bytes)
        for (model, device), seconds in busy_s.items():
            busy_seconds.add_metric([model, device], seconds)
            busy_ratio.add_metric([model, device], self._ratios.get((model, device), 0.0))
        yield from (states, memory, busy_seconds, busy_ratio)

    def _update_ratios(self, busy_s: Mapping[tuple[str, str], float]) -> None:
        now_s = time.perf_counter()
        passed_s = now_s - self._last_s
        if passed_s < 1.0:
            return  # two scrapers at once see the same ratios
        # What was loaded anew meanwhile counts from 0 again.
        self._ratios = {
            key: min(1.0, max(0.0, seconds - self._last_busy_s.get(key, 0.0)) / passed_s)
            for key, seconds in busy_s.items()
        }
        self._last_s, self._last_busy_s = now_s, busy_s


MODELS = ModelGauges()
REGISTRY.register(MODELS)
