"""Reads Prometheus' expressions and tells which of them speak of what no server of ours has."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import promql_parser as promql

from queue_server.jobs import JobState
from tests.test_metrics_docs import DOCS, ROW, Told, documented

# Of Prometheus itself, and what its client tells of any process (docs/metrics.md names them by their beginnings).
OF_OTHERS = {
    "up": Told("gauge", ("pod",)),  # the pod: by deploy/prometheus/kubernetes.yaml
    "process_resident_memory_bytes": Told("gauge", ()),
    "process_open_fds": Told("gauge", ()),
    "process_max_fds": Told("gauge", ()),
    "process_cpu_seconds_total": Told("counter", ()),
}
OF_THE_SCRAPE = {"job", "instance"}
COUNTED = {"rate", "increase", "irate"}


def metrics() -> dict[str, Told]:
    """Every series by its name, the parts of histograms too."""
    found = dict(OF_OTHERS)
    for name, told in documented().items():
        if told.kind == "histogram":
            found[f"{name}_bucket"] = Told("counter", (*told.labels, "le"))
            found |= {f"{name}_{part}": Told("counter", told.labels) for part in ("sum", "count")}
        else:
            found[name] = told
    return found


def values() -> dict[str, set[str]]:
    """The values that labels may have, by the metric: those that its row of docs/metrics.md names, and those of the contracts."""
    rows = {row["name"]: set(re.findall(r"`(\w+)`", row["meaning"])) for row in ROW.finditer(DOCS.read_text())}
    contracts = "".join(path.read_text() for path in Path(DOCS.parents[1] / "protos" / "ai4thai").rglob("*.proto"))
    of_all = {code.name for code in grpc.StatusCode} | {state.value for state in JobState}
    of_all |= set(re.findall(r"\brpc (\w+)\(", contracts))
    return {name: named | of_all for name, named in rows.items()}


@dataclass
class Reader:
    """Walks one expression; `problems` grows."""

    metrics: Mapping[str, Told]
    values: Mapping[str, set[str]]
    problems: list[str] = field(default_factory=list)

    def labels(self, expression: Any, *, counted: bool = False) -> set[str]:
        """The labels that the expression's result has."""
        match expression:
            case promql.VectorSelector():
                return self._of_series(expression, counted=counted)
            case promql.MatrixSelector():
                return self.labels(expression.vector_selector, counted=counted)
            case promql.AggregateExpr():
                inner = self.labels(expression.expr)
                kept = set(expression.modifier.labels) if expression.modifier else set()
                self._expect(kept, inner, f"{expression.op} by")
                return kept
            case promql.Call():
                return self._of_call(expression)
            case promql.BinaryExpr():
                left, right = self.labels(expression.lhs), self.labels(expression.rhs)
                return left if not isinstance(expression.lhs, promql.NumberLiteral) else right
            case promql.ParenExpr() | promql.UnaryExpr():
                return self.labels(expression.expr)
            case promql.NumberLiteral() | promql.StringLiteral():
                return set()
        raise AssertionError(f"{type(expression).__name__} is not read here")

    def _of_call(self, call: Any) -> set[str]:
        name = call.func.name
        inner = set().union(*(self.labels(part, counted=name in COUNTED) for part in call.args))
        if name == "histogram_quantile":
            self._expect({"le"}, inner, name)
            return inner - {"le"}
        if name == "absent":
            return {one.name for one in call.args[0].matchers.matchers}
        return inner

    def _of_series(self, selector: Any, *, counted: bool) -> set[str]:
        told = self.metrics.get(selector.name)
        if told is None:
            self.problems.append(f"there is no metric {selector.name}")
            return set(OF_THE_SCRAPE)
        if counted != (told.kind == "counter"):
            self.problems.append(
                f"{selector.name} is a {told.kind}: rate() is for counters, and counters are for rate()"
            )
        labels = {*told.labels, *OF_THE_SCRAPE}
        for one in selector.matchers.matchers:
            self._expect({one.name}, labels, selector.name)
            known = self.values.get(selector.name)
            if known is not None and one.name not in OF_THE_SCRAPE:
                for value in one.value.split("|"):
                    if value not in known:
                        self.problems.append(f"{selector.name} never has {one.name}={value!r}")
        return labels

    def _expect(self, wanted: set[str], there: set[str], where: str) -> None:
        for label in sorted(wanted - there):
            self.problems.append(f"{where}: there is no label {label}, only {sorted(there)}")


def problems(text: str, told_by: str = "") -> Iterator[str]:
    """What is wrong with an expression, and with the labels that `told_by` ({{ $labels.x }} or {{x}}) names."""
    try:
        expression = promql.parse(text.replace("$__rate_interval", "5m"))
    except ValueError as error:
        yield f"{text!r} cannot be parsed: {error}"
        return
    reader = Reader(metrics(), values())
    labels = reader.labels(expression)
    yield from reader.problems
    for label in re.findall(r"\{\{\s*(?:\$labels\.)?(\w+)", told_by):
        if label not in labels:
            yield f"{told_by!r} names {label}, and the result has {sorted(labels)}"
