"""Tells health and metrics how the models are."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial

from serving.health import Health
from vision_server import metrics
from vision_server.names import Names, ServedModel
from vision_server.results import ModelState

READY_NAME = "ai4thai.vision.v1.VisionService"


class Reports:
    """Each model is the check and the health name `model/NAME`, all of them together `models`, which is the server's readiness.

    `starting` are the names that the server was told to serve and has not tried to load yet.
    """

    def __init__(self, health: Health, names: Names, starting: Collection[str]) -> None:
        self._health = health
        self._names = names
        self._starting = starting

    def begin(self) -> None:
        """The server is ready when its models are."""
        self._health.expose(READY_NAME, "models")
        self._tell_together()

    def begin_model(self, model: ServedModel) -> None:
        """A model is to be loaded."""
        self._health.expose(_check(model), _check(model))
        metrics.WAITING_REQUESTS.labels(model.name).set_function(partial(getattr, model, "depth"))

    def tell(self, model: ServedModel) -> None:
        """How a model is now; one that has no name any more is forgotten."""
        state = model.state
        is_ready = state is ModelState.READY
        is_known = self._names.exactly(model.name) is model
        if is_known:
            self._health.report(_check(model), is_ready, model.why if state is ModelState.FAILED else state.value)
        else:
            self._health.forget(_check(model))
        if is_known and state is not ModelState.UNLOADED:
            metrics.MODEL_READY.labels(model.name).set(is_ready)
        else:
            metrics.forget_model(model.name)
        self._tell_together()

    def fail_for_good(self, why: str) -> None:
        """Nothing helps but to start the process again."""
        self._health.fail_for_good(why)

    def _tell_together(self) -> None:
        """The server is ready once all that it was told to load has been tried, and as long as something serves."""
        loading = [model.name for model in self._names if model.name in self._starting]
        if loading:
            self._health.report("models", False, f"loading: {', '.join(loading)}")
            return
        served = [model.name for model in self._names if model.state is ModelState.READY]
        failed = [f"{model.name}: {model.why}" for model in self._names if model.state is ModelState.FAILED]
        detail = "; ".join([f"serving {', '.join(served)}"] * bool(served) + failed)
        self._health.report("models", bool(served), detail or "no model is loaded")


def _check(model: ServedModel) -> str:
    return f"model/{model.name}"
