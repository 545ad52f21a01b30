"""Keeps what the vision tower made of the last pictures, so that a picture that comes again is not read again."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from vision_server import metrics


@dataclass(frozen=True, slots=True)
class Features:
    """A picture as the language model reads it: what the model's get_image_features() answers, on the model's device.

    `pooled` has one tensor for each picture, tokens × width; `deepstack` (Qwen3-VL) the same for each early layer, else empty.
    """

    pooled: tuple[Any, ...]
    deepstack: tuple[tuple[Any, ...], ...] = ()

    @property
    def tokens(self) -> int:
        """Tokens of the prompt that it fills."""
        return sum(int(tensor.shape[0]) for tensor in self.pooled)

    @property
    def size_bytes(self) -> int:
        """Bytes that it takes."""
        tensors = (*self.pooled, *(tensor for layer in self.deepstack for tensor in layer))
        return sum(int(tensor.numel() * tensor.element_size()) for tensor in tensors)


class FeatureCache:
    """The latest used features, `max_bytes` of them; 0 keeps none. Belongs to one thread."""

    def __init__(self, model: str, max_bytes: int) -> None:
        self._model = model
        self._max_bytes = max_bytes
        self._kept: OrderedDict[bytes, Features] = OrderedDict()
        self.size_bytes = 0

    def get(self, key: bytes) -> Features | None:
        """The features of that content; None: not kept (any more)."""
        found = self._kept.get(key)
        if found is not None:
            self._kept.move_to_end(key)
        metrics.IMAGE_FEATURES.labels(self._model, "miss" if found is None else "hit").inc()
        return found

    def put(self, key: bytes, features: Features) -> None:
        """Keeps them until others are used more recently; one that is larger than the whole cache is not kept."""
        size_bytes = features.size_bytes
        if size_bytes > self._max_bytes:
            return
        if (old := self._kept.pop(key, None)) is not None:
            self.size_bytes -= old.size_bytes
        self._kept[key] = features
        self.size_bytes += size_bytes
        while self.size_bytes > self._max_bytes:
            _, oldest = self._kept.popitem(last=False)
            self.size_bytes -= oldest.size_bytes
        metrics.IMAGE_FEATURE_BYTES.labels(self._model).set(self.size_bytes)
