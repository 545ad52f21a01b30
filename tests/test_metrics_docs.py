"""docs/metrics.md tells every metric of both servers, with its true type and labels, and no other."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import pytest
from prometheus_client.metrics import MetricWrapperBase

from queue_server.connection import Connection
from queue_server.lost import LostJobs
from queue_server.metrics import JobMetrics
from serving import telemetry
from vision_server import metrics

DOCS = Path(__file__).resolve().parents[1] / "docs" / "metrics.md"
# What the Prometheus client tells of the process by itself; the page names them by these beginnings.
OF_THE_PROCESS = ("process_", "python_")
ROW = re.compile(
    r"^\| `(?P<name>\w+)` \| (?P<kind>\w+) \| (?P<labels>[^|]*)\| (?P<unit>[^|]*)\| (?P<meaning>[^|]+)\|$", re.M
)


class Told(NamedTuple):
    kind: str
    labels: tuple[str, ...]


def documented() -> dict[str, Told]:
    return {
        row["name"]: Told(row["kind"], tuple(re.findall(r"`(\w+)`", row["labels"])))
        for row in ROW.finditer(DOCS.read_text())
    }


def exposed() -> dict[str, Told]:
    lost = LostJobs(Connection("redis://nowhere", 1.0, {}), lambda _: None)
    collectors = [*telemetry.REGISTRY._collector_to_names, JobMetrics(), lost._counter]
    found = {}
    for collector in collectors:
        if isinstance(collector, MetricWrapperBase):
            families: Iterable = [(collector._name, collector._type, collector._labelnames)]
        else:
            families = [(one.name, one.type, getattr(one, "_labelnames", ())) for one in collector.collect()]
        for name, kind, labels in families:
            if not name.startswith(OF_THE_PROCESS):
                found[f"{name}_total" if kind == "counter" else name] = Told(kind, tuple(labels))
    return found


def test_the_page_and_the_code_tell_the_same_metrics() -> None:
    assert documented() == exposed()


def test_names_say_their_unit() -> None:
    for row in ROW.finditer(DOCS.read_text()):
        name, unit = row["name"].removesuffix("_total"), row["unit"].strip()
        if unit in ("seconds", "bytes", "ratio"):
            assert name.endswith(f"_{unit}"), name
        else:
            assert not name.endswith(("_seconds", "_bytes", "_ratio", "_ms")), name
        assert row["meaning"].strip().endswith("."), name


@pytest.mark.parametrize("beginning", OF_THE_PROCESS)
def test_what_is_left_out_is_named(beginning: str) -> None:
    assert f"`{beginning}…`" in DOCS.read_text()


def test_expressions_speak_of_metrics_that_exist() -> None:
    expressions = "\n".join(re.findall(r"^\| [^|`]+ \| `([^`]+)`.*\|$", DOCS.read_text(), re.M))
    named = set(re.findall(r"\b(?:ai4thai|grpc_server)_\w+", expressions))
    assert len(named) > 5
    parts = {
        f"{name}{part}"
        for name, told in documented().items()
        for part in (("_bucket", "_sum", "_count") if told.kind == "histogram" else ("",))
    }
    assert named <= parts


def test_each_model_state_is_explained() -> None:
    [row] = [row for row in ROW.finditer(DOCS.read_text()) if row["name"] == "ai4thai_models"]
    assert set(re.findall(r"`(\w+)`", row["meaning"])) == {state.value for state in metrics.ModelState}
