"""`ai4thai bench` against the real server: what it counts is what the server counts."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from ai4thai.cli import app
from typer.testing import CliRunner

from tests.end_to_end.calling import Server

Measure = Callable[..., dict]


@pytest.fixture
def measure(vision: Server) -> Measure:
    def run(*arguments: object) -> dict:
        command = ["bench", "--vision", vision.process.address, "--warm-up", 0, "--json", *arguments]
        result = CliRunner().invoke(app, [str(argument) for argument in command])
        assert result.exit_code == 0, result.output
        report = json.loads(result.stdout)["report"]
        assert report["sent_count"] == report["answered_count"] == sum(report["batch_images"].values()) > 0
        return report

    return run


def test_callers_count_what_the_server_counts(vision: Server, measure: Measure) -> None:
    before = vision.metric("ai4thai_images_total", outcome="OK")

    report = measure("--callers", 3, "--seconds", 1)

    # one more asks at the beginning whether somebody is there
    assert vision.metric("ai4thai_images_total", outcome="OK") - before == report["sent_count"] + 1
    steps = report["steps"]
    assert min(steps["decode_ms"], steps["inference_ms"], steps["outside_ms"]) > 0
    assert sum(steps.values()) == pytest.approx(report["latency"]["mean_ms"], rel=0.01)
    assert len(report["images_by_caller"]) == 3


def test_streams_at_a_fixed_rate(vision: Server, measure: Measure) -> None:
    report = measure("--stream", "--callers", 2, "--rate", 6, "--seconds", 1)

    assert report["sent_count"] == 6 and report["unsent_count"] == 0
