"""Alerts and dashboard speak of metrics that exist, and Prometheus finds the servers in Compose and in Kubernetes."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.kubernetes import objects
from tests.delivery.composing import resolve
from tests.delivery.expressions import problems
from tests.processes import ROOT

PROMETHEUS, GRAFANA = ROOT / "deploy" / "prometheus", ROOT / "deploy" / "grafana"
COMPOSE = ("compose.yaml", "deploy/compose/monitoring.yaml")


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def alerts() -> Iterator[dict[str, Any]]:
    for group in read(PROMETHEUS / "alerts.yaml")["groups"]:
        yield from group["rules"]


DASHBOARD = json.loads((GRAFANA / "dashboards" / "ai4thai.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]


# ── Alerts ──


@pytest.mark.parametrize("alert", alerts(), ids=lambda alert: alert["alert"])
def test_an_alert_speaks_of_what_there_is(alert: dict[str, Any]) -> None:
    said = alert["annotations"]["summary"].replace("{{ $value", "")
    assert list(problems(alert["expr"], said)) == []


@pytest.mark.parametrize("alert", alerts(), ids=lambda alert: alert["alert"])
def test_an_alert_tells_whom_it_wakes_and_what_to_do(alert: dict[str, Any]) -> None:
    assert set(alert) <= {"alert", "expr", "for", "labels", "annotations"}
    assert alert["alert"].startswith("AI4Thai")
    assert alert["labels"]["severity"] in ("page", "ticket")
    assert alert["annotations"]["summary"].endswith(".") and alert["annotations"]["action"].endswith((".", "?"))


def test_each_alert_is_shown_firing() -> None:
    # given `promtool test rules`' own file: its bad night expects each alert once
    tests = {test["name"]: test for test in read(PROMETHEUS / "alerts-test.yaml")["tests"]}
    bad, good = tests["a bad night"], tests["a good night"]
    expected = [sample["labels"] for test in bad["promql_expr_test"] for sample in test["exp_samples"]]
    names = [alert["alert"] for alert in alerts()]
    assert sorted(expected) == sorted(f'{{alertname="{name}"}}' for name in names)
    assert len(set(names)) == len(names)
    assert all(test["exp_samples"] == [] for test in good["promql_expr_test"])


@pytest.mark.parametrize(
    ("expression", "said", "wrong"),
    [
        ("rate(ai4thai_image_total[5m])", "", "there is no metric ai4thai_image_total"),
        ('rate(ai4thai_images_total{result="OK"}[5m])', "", "there is no label result"),
        ('rate(ai4thai_images_total{outcome="FULL"}[5m])', "", "never has outcome='FULL'"),
        ('rate(grpc_server_handled_total{grpc_code="ERROR"}[5m])', "", "never has grpc_code='ERROR'"),
        ("rate(ai4thai_queue_depth[5m])", "", "is a gauge"),
        ("ai4thai_images_total > 5", "", "is a counter"),
        ("sum by (model) (rate(ai4thai_images_total[5m]))", "", "there is no label model"),
        ("histogram_quantile(0.9, sum by (model) (rate(ai4thai_inference_seconds_bucket[5m])))", "", "no label le"),
        ("sum by (queue) (ai4thai_queue_depth", "", "cannot be parsed"),
        ("sum by (queue) (ai4thai_queue_depth)", "{{ $labels.instance }}", "names instance"),
    ],
)
def test_a_wrong_expression_is_found_out(expression: str, said: str, wrong: str) -> None:
    assert any(wrong in problem for problem in problems(expression, said))


# ── Where Prometheus looks ──


def compose(**environment: str) -> dict[str, Any]:
    """Compose's own word about both files together."""
    done = resolve(*(part for name in COMPOSE for part in ("-f", name)), environment=environment)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


@pytest.fixture(scope="module")
def composed() -> dict[str, Any]:
    """The same with nothing set."""
    return compose()


@pytest.mark.parametrize("ports", [{}, {"VISION_SERVICE_PORT": "3001", "QUEUE_WORKER_PORT": "3003"}], ids=str)
def test_prometheus_scrapes_the_services_of_compose_on_the_ports_they_have(
    ports: dict[str, str], tmp_path: Path
) -> None:
    configuration, services = read(PROMETHEUS / "prometheus.yaml"), compose(**ports)["services"]
    assert [(PROMETHEUS / name).exists() for name in configuration["rule_files"]] == [True]
    # Given what the container runs, its /tmp moved here, with a program that says how it was called
    container = services["prometheus"]
    (tmp_path / "prometheus").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "prometheus").chmod(0o755)
    [script] = container["command"]
    command = [*container["entrypoint"], script.replace("$$", "$").replace("/tmp/", f"{tmp_path}/")]
    done = subprocess.run(
        command, env={"PATH": f"{tmp_path}:/usr/bin:/bin"}, capture_output=True, text=True, check=True
    )
    assert "--config.file=/etc/prometheus/prometheus.yaml" in done.stdout.split()
    # Then each job finds its server on the port that it has, in a network that both are in
    for job in configuration["scrape_configs"]:
        [name] = job["file_sd_configs"][0]["files"]
        [[target]] = [one["targets"] for one in json.loads((tmp_path / Path(name).name).read_text())]
        host, port = target.split(":")
        assert job["job_name"] == f"ai4thai-{host}"
        assert [port] == [str(one["target"]) for one in services[host]["ports"]]
        assert set(services[host]["networks"]) & set(container["networks"])


def test_prometheus_finds_the_pods_of_the_manifests() -> None:
    rendered = objects.render(objects.HERE / "overlays" / "cpu")
    for job in read(PROMETHEUS / "kubernetes.yaml")["scrape_configs"]:
        assert job["kubernetes_sd_configs"] == [{"role": "pod", "namespaces": {"names": ["ai4thai"]}}]
        [keep] = [one for one in job["relabel_configs"] if one.get("action") == "keep"]
        component, port = keep["regex"].split(";")
        # A pod by its name, which alerts go by; not one that has ended and is kept for its log
        assert {one["target_label"] for one in job["relabel_configs"] if "target_label" in one} == {"instance", "pod"}
        assert [one["regex"] for one in job["relabel_configs"] if one.get("action") == "drop"] == ["Failed|Succeeded"]
        workload = rendered.workload(component)
        assert workload and workload.document["metadata"]["namespace"] == "ai4thai"
        assert port in {one["name"] for one in workload.container["ports"]}
        assert job["job_name"] == f"ai4thai-{component}"


def test_what_watches_is_contained_as_well(composed: dict[str, Any]) -> None:
    for name in ("prometheus", "grafana"):
        service = composed["services"][name]
        assert service["read_only"] and service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert all(port["host_ip"] == "127.0.0.1" for port in service["ports"])
        tag = service["image"].partition(":")[2]
        assert tag and tag != "latest"
        assert service["deploy"]["resources"]["limits"]["memory"]
        for volume in service["volumes"]:
            assert volume["type"] == "volume" or Path(volume["source"]).is_dir()


def test_grafana_is_given_the_dashboard_and_its_source(composed: dict[str, Any]) -> None:
    grafana = composed["services"]["grafana"]
    mounted = {volume["target"]: volume.get("source") for volume in grafana["volumes"]}
    [provider] = read(GRAFANA / "provisioning" / "dashboards" / "ai4thai.yaml")["providers"]
    assert mounted[provider["options"]["path"]] == str(GRAFANA / "dashboards")
    assert mounted["/etc/grafana/provisioning"] == str(GRAFANA / "provisioning")
    [source] = read(GRAFANA / "provisioning" / "datasources" / "prometheus.yaml")["datasources"]
    assert source["url"] == "${PROMETHEUS_URL}" and grafana["environment"]["PROMETHEUS_URL"] == "http://prometheus:9090"


# ── The dashboard ──


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"].replace(" ", "-"))
def test_a_panel_speaks_of_what_there_is(panel: dict[str, Any]) -> None:
    assert panel["description"].endswith(".") and panel["targets"]
    for target in panel["targets"]:
        assert list(problems(target["expr"], target["legendFormat"])) == []
        assert target["datasource"] == {"type": "prometheus", "uid": "${datasource}"}


def test_the_panels_are_what_someone_on_call_wants() -> None:
    asked = " ".join(target["expr"] for panel in PANELS for target in panel["targets"])
    for metric in (
        *("up", "ai4thai_models", "grpc_server_handled_total", "grpc_server_handling_seconds_bucket"),
        *("ai4thai_batch_size_images_sum", "ai4thai_queue_depth", "ai4thai_queue_oldest_age_seconds"),
        *("ai4thai_model_memory_bytes", "ai4thai_queue_workers", "ai4thai_queue_redis_memory_bytes"),
    ):
        assert metric in asked
    assert "histogram_quantile(0.5," in asked and "histogram_quantile(0.99," in asked


def test_the_panels_lie_side_by_side() -> None:
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        assert place["x"] >= 0 and place["x"] + place["w"] <= 24
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & taken, panel["title"]
        taken |= cells
