"""The vision server's Prometheus metrics, all in one place."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

from serving.telemetry import REGISTRY

_STEP_BUCKETS_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)

DECODE_SECONDS = Histogram(
    "ai4thai_decode_seconds",
    "Decoding an image and fitting it to the model.",
    buckets=_STEP_BUCKETS_S,
    registry=REGISTRY,
)
QUEUE_SECONDS = Histogram(
    "ai4thai_model_wait_seconds", "Waiting for the model.", ["model"], buckets=_STEP_BUCKETS_S, registry=REGISTRY
)
INFERENCE_SECONDS = Histogram(
    "ai4thai_inference_seconds", "A batch's forward pass.", ["model"], buckets=_STEP_BUCKETS_S, registry=REGISTRY
)
POSTPROCESS_SECONDS = Histogram(
    "ai4thai_postprocess_seconds",
    "Turning an image's numbers into detections.",
    ["model"],
    buckets=_STEP_BUCKETS_S,
    registry=REGISTRY,
)
BATCH_SIZE = Histogram(
    "ai4thai_batch_size_images",
    "Images that shared a forward pass.",
    ["model"],
    buckets=(1, 2, 4, 8, 16, 32, 64),
    registry=REGISTRY,
)
IMAGES = Counter(
    "ai4thai_images", "Images answered, by outcome (`OK` or the error's reason).", ["outcome"], registry=REGISTRY
)
WAITING_REQUESTS = Gauge(
    "ai4thai_model_waiting_requests", "Requests that wait for a model.", ["model"], registry=REGISTRY
)
STREAMS = Gauge("ai4thai_streams", "DetectStream calls that are open.", registry=REGISTRY)
ADMITTED_BYTES = Gauge("ai4thai_admitted_image_bytes", "Bytes of the images being worked on.", registry=REGISTRY)
MODEL_READY = Gauge("ai4thai_model_ready", "1 while a model serves.", ["model"], registry=REGISTRY)

RUNNING_GENERATIONS = Gauge(
    "ai4thai_running_generations", "Generations that run side by side.", ["model"], registry=REGISTRY
)
GENERATED_TOKENS = Counter("ai4thai_generated_tokens", "Tokens generated.", ["model"], registry=REGISTRY)
GENERATIONS = Counter(
    "ai4thai_generations",
    "Generations ended: stop, length, cancelled, error.",
    ["model", "finish_reason"],
    registry=REGISTRY,
)
FIRST_TOKEN_SECONDS = Histogram(
    "ai4thai_time_to_first_token_seconds", "From the request to its first token.", ["model"], registry=REGISTRY
)
