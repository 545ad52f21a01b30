"""Alerts and dashboard speak of metrics that exist, and Prometheus finds the servers in Compose and in Kubernetes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.kubernetes import objects
from deploy.validation import tools
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
    [bad, good] = read(PROMETHEUS / "alerts-test.yaml")["tests"]
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


@pytest.fixture(scope="module")
def composed() -> dict[str, Any]:
    """Compose's own word about both files together."""
    files = [part for name in COMPOSE for part in ("-f", name)]
    command = [tools.find("docker-compose"), *files, "config", "--format", "json"]
    done = tools.run(command, ROOT, environment={"COMPOSE_PROFILES": "cpu"})
    assert done.returncode == 0, done.stderr
    model: dict[str, Any] = json.loads(done.stdout)
    return model


def test_prometheus_scrapes_the_services_of_compose(composed: dict[str, Any]) -> None:
    configuration, services = read(PROMETHEUS / "prometheus.yaml"), composed["services"]
    assert [(PROMETHEUS / name).exists() for name in configuration["rule_files"]] == [True]
    jobs = {job["job_name"]: job["static_configs"][0]["targets"] for job in configuration["scrape_configs"]}
    assert jobs == {"ai4thai-vision": ["vision:2001"], "ai4thai-queue": ["queue:2003"]}
    for target in (target for targets in jobs.values() for target in targets):
        host, port = target.split(":")
        assert port in {str(one["target"]) for one in services[host]["ports"]}
        assert set(services[host]["networks"]) & set(services["prometheus"]["networks"])


def test_prometheus_finds_the_pods_of_the_manifests() -> None:
    rendered = objects.render(objects.HERE / "overlays" / "cpu")
    for job in read(PROMETHEUS / "kubernetes.yaml")["scrape_configs"]:
        assert job["kubernetes_sd_configs"] == [{"role": "pod", "namespaces": {"names": ["ai4thai"]}}]
        [keep] = [one for one in job["relabel_configs"] if one.get("action") == "keep"]
        component, port = keep["regex"].split(";")
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
    assert "--config.file=/etc/prometheus/prometheus.yaml" in composed["services"]["prometheus"]["command"]


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
        *("up", "ai4thai_model_ready", "grpc_server_handled_total", "grpc_server_handling_seconds_bucket"),
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
