"""The manifests render, fit the API's schemas and hold the rules, and the servers live on what they give them."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from deploy.kubernetes import check, objects, settings
from deploy.kubernetes.objects import HERE, Objects
from tests.delivery import composing
from tests.delivery.manifests import OVERLAYS, environment, of, rendered
from tests.end_to_end.conftest import wait_until
from tests.ports import free_port
from tests.processes import ROOT, ServerProcess


def test_the_overlays_are_those_that_are_spoken_of() -> None:
    assert objects.overlays() == OVERLAYS


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_overlay_is_in_order(overlay: str) -> None:
    assert check.findings(rendered(overlay)) == []


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_images_have_the_version_of_this_checkout(overlay: str) -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    ours = {
        one.container["image"].rpartition("/")[2] for one in rendered(overlay).workloads if one.component != "redis"
    }
    assert ours == {f"team10-vision:{version}", f"team10-queue:{version}"}


def test_redis_is_the_one_that_compose_has() -> None:
    redis = rendered("cpu").workload("redis")
    image = re.search(r"REDIS_IMAGE:-([^}]+)", (ROOT / "compose.yaml").read_text())
    assert redis and image and redis.container["image"] == image[1]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_each_part_can_be_applied_by_itself(overlay: str) -> None:
    # given what `kubectl apply -l app.kubernetes.io/component=…` goes by; the Namespace and who may speak to whom belong to all
    parts: dict[str, set[str]] = {}
    for document in rendered(overlay).documents:
        if document["kind"] not in ("Namespace", "NetworkPolicy"):
            part = document["metadata"].get("labels", {}).get(objects.COMPONENT)
            parts.setdefault(part, set()).add(document["kind"])
    assert set(parts) - {"redis"} == {"store", "vision", "queue", "worker"}
    for part in set(parts) - {"redis", "store"}:
        assert {"ConfigMap", "Deployment", "PodDisruptionBudget"} <= parts[part]


def test_what_an_overlay_is_for() -> None:
    def limits(overlay: str) -> dict[str, Any]:
        vision = rendered(overlay).workload("vision")
        assert vision
        return {key: value for key, value in vision.container["resources"]["limits"].items() if "nvidia" in key}

    assert limits("cpu") == {}
    assert limits("h100") == limits("production") == {"nvidia.com/gpu": 1}
    assert limits("mig") == {"nvidia.com/mig-1g.20gb": 1}
    assert [name for name in OVERLAYS if rendered(name).of("ScaledObject")] == ["production"]
    assert [name for name in OVERLAYS if not rendered(name).workload("redis")] == ["production"]


# ── A site's own kustomization on top ──


@contextmanager
def site(tmp_path: Path, text: str) -> Iterator[Path]:
    """A kustomization elsewhere on this machine; `@` stands for deploy/kubernetes, which kustomize wants as a relative path."""
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "kustomization.yaml").write_text(text.replace("@", os.path.relpath(HERE, folder.resolve())))
    yield folder


def test_the_site_of_the_readme(tmp_path: Path) -> None:
    [example] = re.findall(r"^```yaml\n(.+?)^```", (HERE / "README.md").read_text(), re.S | re.M)
    example = example.replace("deploy/kubernetes", "@")
    with site(tmp_path, example.replace("registry.example.com", "registry.site:5000")) as folder:
        found = objects.render(folder)
        (folder / "kustomization.yaml").write_text(
            (folder / "kustomization.yaml").read_text().replace("site:5000", "example.com")
        )
        as_it_is = check.findings(objects.render(folder))
    assert check.findings(found) == []
    vision = of(found, "vision")
    assert vision.container["image"] == "registry.site:5000/team10/vision:v1.4.0"
    assert found.environment(vision)["VISION_MAX_BATCH"] == "16"
    assert found.of("ScaledObject")
    # And whoever forgets the registry is told
    assert len(as_it_is) == 3 and all("only an example" in finding.wrong for finding in as_it_is)


def test_a_site_on_production_names_its_own_registry(tmp_path: Path) -> None:
    names = "".join(
        f"  - {{name: team10-{one}, newName: registry.site/{one}, newTag: v2}}\n" for one in ("vision", "queue")
    )
    with site(tmp_path, f'resources: ["@/overlays/production"]\nimages:\n{names}') as folder:
        found = objects.render(folder)
    images = {one.component: one.container["image"] for one in found.workloads}
    assert images == {
        "vision": "registry.site/vision:v2",
        **dict.fromkeys(("queue", "worker"), "registry.site/queue:v2"),
    }


def test_files_may_lie_in_a_shared_folder(tmp_path: Path) -> None:
    with site(tmp_path, 'resources: ["@/overlays/cpu"]\ncomponents: ["@/components/media-volume"]\n') as folder:
        found = objects.render(folder)
    assert check.findings(found) == []
    worker = of(found, "worker")
    assert settings.worker(found, worker).media_url == "file:///media"
    for one in (worker, of(found, "queue")):
        assert {"name": "media", "mountPath": "/media"} in one.container["volumeMounts"]


def test_the_command_tells_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    patch = """
resources: ["@/overlays/cpu"]
images: [{name: team10-vision, newTag: latest}]
"""
    with site(tmp_path, patch) as folder:
        assert check.main([str(folder)]) == 1
        said = capsys.readouterr().out
        assert (
            "✗ " in said
            and "Deployment ai4thai-vision: image team10-vision:latest is not pinned" in said
            and "→ " in said
        )
        (folder / "kustomization.yaml").write_text("resources: [nowhere.yaml]\n")
        assert check.main([str(folder)]) == 1
        assert "nowhere.yaml" in capsys.readouterr().out
        (folder / "kustomization.yaml").write_text("resources: {not: closed\n")
        assert check.main([str(folder)]) == 1
    assert check.main(["cpu"]) == 0
    assert capsys.readouterr().out.endswith("✓ cpu\n")


def test_the_command_says_that_it_needs_kubectl(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert check.main(["cpu"]) == 2
    assert "kubectl" in capsys.readouterr().err


# ── The servers live on what the manifests give them ──


def lay_secrets(folder: Path, **secrets: str) -> Path:
    """A secret's folder as Kubernetes mounts it: links into a folder that is swapped as a whole."""
    inside = folder / "..2026_11_28"
    inside.mkdir(parents=True)
    (folder / "..data").symlink_to(inside.name)
    for name, value in secrets.items():
        (inside / name).write_text(value)
        (folder / name).symlink_to(Path("..data") / name)
    return folder


def asked(address: str, probe: dict[str, Any]) -> int:
    """What a probe is told."""
    with grpc.insecure_channel(address) as channel:
        request = health_pb2.HealthCheckRequest(service=probe["grpc"]["service"])
        return int(health_pb2_grpc.HealthStub(channel).Check(request, timeout=60, wait_for_ready=True).status)


SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


def environ_of(found: Objects, component: str) -> dict[str, str]:
    return found.environment(of(found, component))


def health(server: ServerProcess) -> dict[str, str]:
    """Each check's word."""
    answer = httpx.get(f"http://{server.address}/health/detailed", trust_env=False, timeout=30).json()
    return {name: f"{one['status']} {one['detail']}" for name, one in answer["checks"].items()}


def module(found: Objects, component: str) -> str:
    """What the container runs: `python -m MODULE`."""
    *python, name = of(found, component).container["args"]
    assert python == ["python", "-m"]
    return str(name)


@contextmanager
def running(command: list[str], environ: dict[str, str], log: Path) -> Iterator[None]:
    """A program that is ended afterwards."""
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=environ, stdout=output, stderr=output)
    try:
        yield
    finally:
        process.kill()
        process.wait()


def test_redis_queue_and_worker_run_by_their_manifests(tmp_path: Path, short_folder: Path) -> None:
    # given the StatefulSet's own command and files, its paths moved here, with a password that no shell would like,
    # and around it what some editors write
    found, port = rendered("cpu"), free_port()
    secrets = lay_secrets(tmp_path / "secrets", redis_password="  a b\"$(x)\\c'\r\n")
    places = {"/opt/redis": "opt", "/etc/redis": "etc", "/data": "data"}
    for place in places.values():
        (tmp_path / place).mkdir(exist_ok=True)

    def moved(text: str) -> str:
        for place, here in places.items():
            text = text.replace(place, str(tmp_path / here))
        return text

    configuration = environment(found, "redis")["redis.conf"]
    (tmp_path / "etc" / "redis.conf").write_text(moved(configuration) + "bind 127.0.0.1\n")
    (tmp_path / "opt" / "redis.sh").write_text(environment(found, "redis-script")["redis.sh"])
    composing._tools(tmp_path / "bin")
    redis = of(found, "redis").container
    environ_redis = {
        **os.environ,
        **{one["name"]: one["value"] for one in redis["env"]},
        **{
            "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
            "REDIS_PORT": str(port),
            "AI4THAI_SECRETS_DIR": str(secrets),
        },
    }
    with running([moved(word) for word in redis["command"]], environ_redis, tmp_path / "redis.log"):
        probe = [moved(word) for word in redis["readinessProbe"]["exec"]["command"]]
        wait_until(
            "Redis' readiness probe",
            lambda: subprocess.run(probe, env=environ_redis, capture_output=True).returncode == 0,
        )

        # when the queue server and a worker begin with their own environments, the hosts' names mapped to this machine
        def environ(component: str) -> dict[str, str]:
            given = environ_of(found, component)
            return {
                **{name: value.replace("ai4thai-redis:6379", f"127.0.0.1:{port}") for name, value in given.items()},
                **{"AI4THAI_SECRETS_DIR": str(secrets), "QUEUE_WORKER_PORT": "0", "TMPDIR": str(short_folder)},
            }

        queue_pod = of(found, "queue").container
        with (
            ServerProcess(module(found, "queue"), env=environ("queue")) as queue,
            ServerProcess(module(found, "worker"), env=environ("worker")) as worker,
        ):
            # then the probes pass by the names they ask for
            assert asked(queue.address, queue_pod["startupProbe"]) == SERVING
            assert asked(queue.address, queue_pod["livenessProbe"]) == SERVING
            wait_until(
                "the queue's readiness", lambda: asked(queue.address, queue_pod["readinessProbe"]) == SERVING, 90
            )
            worker.wait_for("working", threads=8)
            wait_until("the worker to be seen", lambda: health(queue).get("workers", "").startswith("OK"), 90)
            # then Redis keeps what it accepts, without a warning
            wait_until("the word about Redis", lambda: health(queue)["redis"].startswith("OK"), 90)
            # then what KEDA asks is there: the path and the value of the ScaledObject
            trigger = rendered("production").of("ScaledObject")[0]["spec"]["triggers"][0]["metadata"]
            url = trigger["url"].replace("ai4thai-queue.ai4thai.svc:2003", queue.address)
            assert httpx.get(url, trust_env=False).json()[trigger["valueLocation"]] == 0
            # then the worker's probe passes while it beats, and it ends well within its grace
            program, *asks = of(found, "worker").container["livenessProbe"]["exec"]["command"]
            beats = subprocess.run(
                [Path(sys.executable).with_name(program), *asks],
                env={**os.environ, "TMPDIR": str(short_folder)},
                capture_output=True,
                text=True,
            )
            assert beats.returncode == 0, beats.stderr
            worker.signal(signal.SIGTERM)
            assert worker.wait(of(found, "worker").pod["terminationGracePeriodSeconds"]) == 0
            # the queue server would still answer for its 10 s: not waited for
            queue.process.kill()


def test_the_vision_server_is_alive_while_it_loads_and_ready_by_the_name_of_the_probe(tmp_path: Path) -> None:
    found = rendered("cpu")
    probes = of(found, "vision").container
    given = {**environ_of(found, "vision"), "AI4THAI_DATA_DIR": str(tmp_path), "VISION_SERVICE_PORT": "0"}
    with ServerProcess(module(found, "vision"), env={**given, "VISION_DETECTOR": "", "VISION_DESCRIBER": ""}) as vision:
        assert asked(vision.address, probes["livenessProbe"]) == SERVING
        assert asked(vision.address, probes["readinessProbe"]) == NOT_SERVING  # known by that name, and no model serves
        vision.process.kill()
