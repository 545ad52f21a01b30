"""compose.yaml: what Compose makes of it, what it refuses, and the whole platform started, used, hurt and stopped as it says."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from ai4thai import QueueClient, VisionClient
from check_jsonschema.builtin_schemas import get_builtin_schema
from jsonschema import Draft7Validator

from tests.delivery.composing import Composition, Refused, resolve, seconds
from tests.ports import free_port
from tests.processes import ROOT

SAMPLES = ROOT / "clients/ai4thai/samples"
# All that a shell or a configuration file might take for something else; blanks and line ends around it do not count.
PASSWORD = "a\"b\\ $(id) 'é %41 #"  # pragma: allowlist secret
SERVICES = ("redis", "vision", "queue", "worker")


def model(*arguments: str, **environment: str) -> dict[str, Any]:
    """What Compose makes of the file."""
    done = resolve(*arguments, environment=environment)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def eventually(what: str, holds: Callable[[], object], timeout_s: float = 60) -> None:
    until_s = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < until_s, f"{what}: not within {timeout_s:g} s"
        time.sleep(0.05)


@pytest.fixture
def password_file(tmp_path: Path) -> Path:
    path = tmp_path / "password"
    path.write_text(f"  {PASSWORD}\r\n")
    return path


@pytest.fixture
def ports() -> dict[str, str]:
    """Free ones, by the names of .env."""
    return {name: str(free_port()) for name in ("VISION_SERVICE_PORT", "QUEUE_WORKER_PORT", "REDIS_PORT")}


@pytest.fixture
def gpu(password_file: Path, ports: dict[str, str]) -> dict[str, str]:
    """The profile gpu on a machine that has none."""
    return {
        **ports,
        "COMPOSE_PROFILES": "gpu",
        "REDIS_PASSWORD_FILE": str(password_file),
        "VISION_DEVICE": "cpu",
        "VISION_DESCRIBER": "",  # it would load for some seconds, and is not asked
    }


@pytest.fixture(params=["cpu", "gpu"])
def services(request: pytest.FixtureRequest, password_file: Path) -> dict[str, Any]:
    """The services in both profiles."""
    found = model(COMPOSE_PROFILES=request.param, REDIS_PASSWORD_FILE=str(password_file))["services"]
    return dict(found)


@pytest.mark.parametrize("file", ["compose.yaml", "deploy/compose/cpu.yaml", "deploy/compose/gpu.yaml"])
def test_the_files_follow_composes_schema(file: str) -> None:
    schema = get_builtin_schema("vendor.compose-spec")
    Draft7Validator(schema).validate(yaml.safe_load((ROOT / file).read_text()))


def test_without_env_file_and_profile_it_is_the_cpu_with_four_containers() -> None:
    services = model()["services"]
    assert {one["container_name"] for one in services.values()} == {f"team10-{name}" for name in SERVICES}
    assert services["vision"]["build"] | {"context": ""} == {
        "context": "",
        "dockerfile": "Dockerfile",
        "target": "production",
        "args": {"ACCELERATOR": "cpu", "PREFETCH_MODELS": ""},
        "secrets": [{"source": "hf_token"}],
    }
    assert "reservations" not in services["vision"]["deploy"]["resources"]


def test_the_profile_gpu_reserves_the_gpu_that_is_named_and_never_goes_on_without(password_file: Path) -> None:
    environment = {"REDIS_PASSWORD_FILE": str(password_file), "BUILD_TARGET": "h100-optimized"}
    vision = model(COMPOSE_PROFILES="gpu", CUDA_VISIBLE_DEVICES="MIG-7", **environment)["services"]["vision"]
    (device,) = vision["deploy"]["resources"]["reservations"]["devices"]
    assert (device["driver"], device["device_ids"]) == ("nvidia", ["MIG-7"])
    assert vision["environment"]["VISION_DEVICE"] == "cuda"
    assert (vision["build"]["target"], vision["build"]["args"]["ACCELERATOR"]) == ("h100-optimized", "gpu")


def test_outside_the_profile_cpu_a_password_is_asked_for_before_anything_is_built() -> None:
    done = resolve(environment={"COMPOSE_PROFILES": "gpu"})
    assert done.returncode != 0
    assert (
        "Redis needs a password outside the profile cpu. Write one (mkdir -pm 700 secrets; openssl rand -hex 32"
        in done.stderr
    )


def test_the_flag_which_the_file_cannot_see_is_refused_rather_than_run_on_the_cpu() -> None:
    done = resolve("--profile", "gpu")
    assert done.returncode != 0
    assert "Say COMPOSE_PROFILES=gpu docker compose up" in done.stderr
    assert model("--profile", "cpu")["services"].keys() == set(SERVICES)


def test_the_example_of_env_names_every_variable_and_is_one_that_works(tmp_path: Path) -> None:
    added = ("monitoring.yaml", "../envoy/compose.yaml")
    files = [ROOT / "compose.yaml", *(ROOT / "deploy/compose" / name for name in ("cpu.yaml", "gpu.yaml", *added))]
    read = set().union(*(re.findall(r"\$\{(\w+)", path.read_text()) for path in files))
    example = re.findall(r"^#(\w+=.*)$", (ROOT / ".env.example").read_text(), re.MULTILINE)
    assert {line.partition("=")[0] for line in example} >= read
    env = tmp_path / "env"
    env.write_text("\n".join(example))
    resolved = model("--env-file", str(env))
    assert resolved["name"] == "team10-staging"
    assert resolved["services"]["vision"]["environment"]["VISION_DETECTOR"] == "yolo11s.pt"
    assert resolved["services"].keys() == {"preflight", *SERVICES}


def test_every_container_is_confined(services: dict[str, Any]) -> None:
    for name, service in services.items():
        assert service["read_only"] and service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service["user"] in ("10001:10001", "999:999"), name
        assert "privileged" not in service and "cap_add" not in service, name
        assert set(service["deploy"]["resources"]["limits"]) == {"cpus", "memory", "pids"}, name
        assert {"max-size", "max-file"} <= set(service["logging"]["options"]), name
        assert service["restart"] == ("no" if name == "preflight" else "unless-stopped"), name


def test_only_the_two_ports_are_published_and_redis_is_reached_from_inside_alone(services: dict[str, Any]) -> None:
    published = {name: [port["published"] for port in service.get("ports", ())] for name, service in services.items()}
    assert {name: found for name, found in published.items() if found} == {"vision": ["2001"], "queue": ["2003"]}
    assert model()["networks"]["internal"]["internal"] is True
    assert set(services["redis"]["networks"]) == set(services["worker"]["networks"]) == {"internal"}


def test_a_container_has_longer_to_stop_than_it_drains(services: dict[str, Any]) -> None:
    for name in ("vision", "queue"):
        drain_s = float(services[name]["environment"]["SERVING_DRAIN_SECONDS"])
        assert seconds(services[name]["stop_grace_period"]) > drain_s + 5, name
    for name in SERVICES:
        check = services[name]["healthcheck"]
        assert 0 < seconds(check["timeout"]) <= 15 and check["retries"] >= 3, name


def test_no_secret_stands_in_a_variable_or_on_a_command_line(services: dict[str, Any]) -> None:
    assert PASSWORD not in json.dumps(services)
    assert {name for name, one in services.items() if "redis_password" in str(one.get("secrets"))} >= {
        "redis",
        "queue",
        "worker",
    }


@pytest.mark.parametrize(
    ("write", "said"),
    [
        pytest.param(lambda path: path.write_text(" \n\n"), "its password is empty", id="empty"),
        pytest.param(lambda path: path.write_text("one\ntwo\n"), "several lines", id="several lines"),
    ],
)
def test_a_password_that_is_none_stops_the_start_before_redis(
    tmp_path: Path, gpu: dict[str, str], password_file: Path, write: Callable[[Path], object], said: str
) -> None:
    write(password_file)
    with Composition(tmp_path / "machine", gpu) as composition:
        with pytest.raises(Refused) as refused:
            composition.up()
        assert said in str(refused.value)
        assert [name for name, one in composition.containers.items() if one.starts] == ["preflight"]


def test_the_profile_cpu_goes_without_a_password(tmp_path: Path, ports: dict[str, str]) -> None:
    with Composition(tmp_path / "machine", ports) as composition:
        composition.up("redis", "queue")
        composition.wait_healthy(["redis", "queue"])
        with QueueClient(f"localhost:{ports['QUEUE_WORKER_PORT']}") as jobs:
            assert jobs.submit_detect([SAMPLES / "scene-01.jpg"]).state == "QUEUED"


def test_a_queue_with_another_password_than_redis_is_not_ready_and_says_so(
    tmp_path: Path, gpu: dict[str, str], ports: dict[str, str]
) -> None:
    with Composition(tmp_path / "machine", gpu) as composition:
        composition.up("redis")
        composition.wait_healthy(["redis"])
        wrong = Path(composition.containers["queue"].environment["AI4THAI_SECRETS_DIR"]) / "redis_password"
        wrong.write_text("an older one\n")
        composition.up("queue")
        url = f"http://127.0.0.1:{ports['QUEUE_WORKER_PORT']}/health"

        def why() -> str:
            try:
                return httpx.get(url, trust_env=False).text
            except httpx.TransportError:
                return ""

        eventually("the queue says what is wrong", lambda: "password" in why())
        assert composition.containers["queue"].health != "healthy"
        log = composition.containers["queue"].log.read_text()
        assert "an older one" not in log and PASSWORD not in log


@pytest.fixture
def started_aside() -> Iterator[ThreadPoolExecutor]:
    """Runs what blocks while the test goes on."""
    pool = ThreadPoolExecutor(1)
    yield pool
    pool.shutdown(wait=False)


@pytest.mark.timeout(300)
def test_the_platform_starts_in_order_works_mends_itself_and_stops_with_nothing_lost(
    tmp_path: Path, gpu: dict[str, str], ports: dict[str, str], started_aside: ThreadPoolExecutor
) -> None:
    machine = tmp_path / "machine"
    with Composition(machine, gpu) as composition:
        redis, vision, queue, worker = (composition.containers[name] for name in SERVICES)
        starting = started_aside.submit(composition.up, timeout_s=200)

        # While models load (as slowly as can be: the process is held), jobs are accepted, and no worker is there yet.
        eventually("vision is started", lambda: vision.starts)
        assert vision.process is not None
        vision.process.send_signal(signal.SIGSTOP)
        composition.wait_healthy(["queue"])
        with QueueClient(f"localhost:{ports['QUEUE_WORKER_PORT']}") as jobs:
            early = jobs.submit_detect([SAMPLES / "scene-01.jpg"]).job_id
            assert (vision.health, worker.starts) == ("starting", [])
            vision.process.send_signal(signal.SIGCONT)

            starting.result(200)
            composition.wait_healthy(SERVICES)
            preflight = composition.containers["preflight"]
            assert preflight.starts[0] < redis.starts[0] < redis.healthy_s < vision.starts[0] < queue.starts[0]
            assert max(vision.healthy_s, queue.healthy_s) < worker.starts[0]

            # What was asked for, through both published ports.
            with VisionClient(f"localhost:{ports['VISION_SERVICE_PORT']}") as detector:
                assert {one.label for one in detector.detect(SAMPLES / "scene-01.jpg").detections} >= {"star"}
            assert jobs.wait(early, timeout_s=60).outcome().items[0].detection

            # Redis and the worker die, and come back with what they had.
            for container in (redis, worker):
                assert container.process is not None
                command_line = Path(f"/proc/{container.process.pid}/cmdline").read_bytes()
                assert PASSWORD.encode() not in command_line
                container.process.send_signal(signal.SIGKILL)
            eventually("they were started again", lambda: len(redis.starts) == len(worker.starts) == 2)
            composition.wait_healthy(SERVICES)
            late = jobs.submit_detect([SAMPLES / "scene-02.jpg"]).job_id
            assert jobs.wait(late, timeout_s=60).outcome().items[0].detection
            assert jobs.get(early).state == "SUCCEEDED"

            # Stopped in the middle of a job: each within its time (down() asserts it), and the job waits for the next start.
            unfinished = jobs.submit_detect([SAMPLES / "scene-01.jpg"] * 300).job_id
            eventually("it runs", lambda: jobs.get(unfinished).state == "RUNNING")
        assert list(composition.down()) == [
            f"team10-{name}" for name in ("worker", "queue", "vision", "redis", "preflight")
        ]

    with Composition(machine, gpu) as again:
        again.up("redis", "queue")
        again.wait_healthy(["redis", "queue"])
        with QueueClient(f"localhost:{ports['QUEUE_WORKER_PORT']}") as jobs:
            assert (jobs.get(early).state, jobs.get(unfinished).state) == ("SUCCEEDED", "QUEUED")
        logs = "".join(path.read_text() for path in machine.glob("*/log"))
        assert PASSWORD not in logs and os.fsencode(PASSWORD).hex() not in logs
