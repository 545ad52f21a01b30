"""Some seconds of everything at once, as `make soak` does for minutes: nothing fails unexplained, nothing grows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ai4thai.vision.v1 import model_service_pb2

from benchmarks.processes import Usage
from benchmarks.soak import soak_server, weights_to_cycle
from tests.end_to_end.calling import Server

SEGMENTER = "shapes-segmenter"


def test_seconds_of_everything_leave_nothing_behind(vision: Server, data_dir: Path) -> None:
    # given the server of all tests, with a second model of another task
    vision.models.LoadModel(model_service_pb2.LoadModelRequest(name=SEGMENTER), timeout=60)

    def log() -> Sequence[Mapping[str, object]]:
        return tuple(vision.process.events)

    # when everybody does everything, three times with a rest
    soaked = soak_server(
        vision.address,
        Usage(vision.process.pid),
        log,
        ["shapes-detector", SEGMENTER],
        weights_to_cycle(data_dir),
        seconds=6,
        laps=3,
    )

    # then
    assert soaked.problems == []
    assert soaked.work.done.total() > 50
    vision.models.UnloadModel(model_service_pb2.UnloadModelRequest(name=SEGMENTER), timeout=60)
