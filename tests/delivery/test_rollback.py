"""deploy.sh and rollback.sh: which version is gone back to, what is kept on the host (test_pipeline.py has real versions)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.delivery.docker_engine import Image, Version
from tests.delivery.hosts import REGISTRY, Host, recording_host


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    with recording_host(tmp_path) as host:
        yield host


def test_again_and_it_goes_one_further_back_until_there_is_none(host: Host) -> None:
    for tag in ("v1", "v2", "v3"):
        assert host.deploy(tag).returncode == 0
    assert host.verified() == ["v1", "v2", "v3"]

    listed = host.rollback("--list")
    back = [host.rollback() for _ in range(3)]

    assert "Runs in production: v3." in listed.stdout and listed.stdout.split()[-3:] == ["v3", "v2", "v1"]
    assert [one.returncode for one in back] == [0, 0, 1]
    assert "v2 is live in production, and verified" in back[0].stdout
    assert "There is nothing to go back to: v1 runs in production" in back[2].stderr
    assert host.engine.live == ["v1", "v2", "v3", "v2", "v1"]
    assert (host.running(), host.verified()) == ("v1", ["v1"])


def test_a_bad_version_is_never_gone_back_to(host: Host) -> None:
    host.deploy("v1")
    host.deploy("v2")
    host.is_bad("v3")

    failed = host.deploy("v3")

    assert failed.returncode == 1
    assert "v3 is not good: going back to v2." in failed.stderr
    assert host.engine.live == ["v1", "v2", "v3", "v2"]
    assert (host.running(), host.verified()) == ("v2", ["v1", "v2"])
    assert host.rollback().returncode == 0
    assert host.running() == "v1"


def test_what_was_taken_back_is_not_gone_back_to_when_the_next_one_fails(host: Host) -> None:
    for tag in ("v1", "v2"):
        host.deploy(tag)
    host.rollback()
    host.is_bad("v3")
    assert host.deploy("v3").returncode == 1
    assert host.engine.live[-2:] == ["v3", "v1"]


def test_a_deployment_that_was_cut_off_is_not_taken_for_good(host: Host) -> None:
    host.deploy("v1")
    (host.state / "production/running").write_text("v2\n")  # written before anything is started
    back = host.rollback()
    assert back.returncode == 0 and "Going back from v2 to v1" in back.stdout


def test_when_the_version_before_is_bad_too_a_person_is_called_and_can_go_further_back(host: Host) -> None:
    for tag in ("v1", "v2"):
        host.deploy(tag)
    host.is_bad("v2", "v3")

    failed = host.deploy("v3")
    further = host.rollback()

    assert failed.returncode == 3
    assert "v2 is not good either: the cause may be this host" in failed.stderr
    assert further.returncode == 0
    assert host.engine.live == ["v1", "v2", "v3", "v2", "v1"]


def test_forward_the_old_worker_is_stopped_first_back_it_is_replaced_last(host: Host) -> None:
    host.deploy("v1")
    host.deploy("v2")
    host.engine.did.clear()
    host.is_bad("v3")
    host.deploy("v3")
    servers, worker = "up redis vision queue", "up worker"
    assert host.engine.did == ["stop worker", servers, worker, servers, worker]


def test_the_first_version_is_left_to_be_looked_at(host: Host) -> None:
    host.is_bad("v1")
    failed = host.deploy("v1")
    assert failed.returncode == 1
    assert "nothing was verified in production before" in failed.stderr
    assert host.rollback().returncode == 1


def test_a_container_that_ends_again_and_again_is_not_waited_for(host: Host) -> None:
    host.deploy("v1")
    (host.root / "deploy/verify.sh").write_text("#!/bin/bash\nexec sleep 90\n")
    host.engine.restarts = 1
    failed = host.deploy("v2")
    assert failed.returncode in (1, 3)
    assert "containers have ended and been started again" in failed.stdout
    assert "    team10-vision | ImportError: last words" in failed.stdout


class TestByName:
    def test_to_a_version_that_was_verified(self, host: Host) -> None:
        for tag in ("v1", "v2", "v3"):
            host.deploy(tag)
        assert host.rollback("v1").returncode == 0
        assert (host.running(), host.verified()) == ("v1", ["v1"])

    def test_to_one_that_was_gone_back_from_by_mistake(self, host: Host) -> None:
        for tag in ("v1", "v2"):
            host.deploy(tag)
        host.rollback()
        listed = host.rollback("--list").stdout

        again = host.rollback("v2")

        assert listed.split("by name):")[1].split() == ["v2"]
        assert again.returncode == 0, again.stderr
        assert (host.running(), host.verified()) == ("v2", ["v1", "v2"])
        assert "Gone back from" not in host.rollback("--list").stdout

    def test_not_to_one_that_was_not(self, host: Host) -> None:
        host.deploy("v1")
        refused = host.rollback("v2")
        assert refused.returncode == 2
        assert "v2 was not verified in production" in refused.stderr
        assert host.engine.live == ["v1"]


class TestWhatARelease:
    def test_brings_back_its_settings_but_no_old_password(self, host: Host, tmp_path: Path) -> None:
        password = tmp_path / "password"
        password.write_text("old")
        given = {"REDIS_PASSWORD_FILE": str(password)}
        host.deploy("v1", VISION_DETECTOR="first.pt", **given)
        password.write_text("new")
        host.deploy("v1", VISION_DETECTOR="second.pt", **given)
        assert host.verified() == ["v1", "v1+2"]

        assert host.rollback().returncode == 0

        release = (host.state / "production/current/release.env").read_text()
        assert "VISION_DETECTOR='first.pt'" in release and "VISION_SERVICE_PORT='2001'" in release
        kept = host.state / "production/secrets/redis_password"
        assert f"REDIS_PASSWORD_FILE='{kept}'" in release
        assert kept.read_text() == "new"
        # The containers' users read it, through a folder that nobody else on the host may enter.
        assert (kept.stat().st_mode & 0o777, kept.parent.stat().st_mode & 0o777) == (0o644, 0o700)

    def test_is_the_same_when_nothing_has_changed(self, host: Host) -> None:
        host.deploy("v1")
        host.deploy("v1")
        assert host.verified() == ["v1"]

    def test_keeps_what_was_set_to_nothing(self, host: Host) -> None:
        host.deploy("v1", VISION_DESCRIBER="")
        environment = host.plain_compose("production")["services"]["vision"]["environment"]
        assert (environment["VISION_DETECTOR"], environment["VISION_DESCRIBER"]) == ("shapes-detector", "")

    def test_built_on_this_host_is_by_its_content_too(self, host: Host) -> None:
        for number, tag in ((0, "v0"), (1, "v1"), (2, "v1")):
            for name in ("vision", "queue"):
                host.engine.host[f"team10-{name}:{tag}"] = Image(f"sha256:{number}{'0' * 63}", {})
            if number == 2:
                host.bad.write_text(f"team10-vision:{number}{'0' * 11}\n")
            done = host.deploy(tag, CI_REGISTRY_IMAGE="")
        assert done.returncode == 1, done.stdout + done.stderr
        # Built again by the same name, it is another release, and the one before is the first of that name.
        assert host.engine.live == ["v0", "v1", "v1+2", "v1"]
        release = (host.state / "production/current/release.env").read_text()
        assert f"VISION_IMAGE='team10-vision:1{'0' * 11}'" in release

    def test_that_is_deployed_again_and_is_not_good_is_not_gone_back_to(self, host: Host) -> None:
        for tag in ("v1", "v2"):
            host.deploy(tag)
        host.is_bad("v2")
        assert host.deploy("v2").returncode == 1
        assert host.engine.live == ["v1", "v2", "v2", "v1"]

    def test_has_what_the_edge_and_monitoring_start_with(self, host: Host) -> None:
        host.deploy("v1", EDGE_TLS_DIR="/etc/tls")
        current = host.state / "production/current"
        assert (current / "deploy/prometheus/alerts.yaml").exists() and (current / "deploy/grafana/dashboards").is_dir()
        added = host.plain_compose("production", "deploy/envoy/compose.yaml", "deploy/compose/monitoring.yaml")
        assert [one["source"] for one in added["services"]["edge"]["volumes"]] == [
            str(current / "deploy/envoy"),
            "/etc/tls",
        ]
        assert not added["services"]["vision"].get("ports")

    def test_is_by_digest_whatever_becomes_of_the_tag(self, host: Host) -> None:
        host.deploy("v1")
        before = (host.state / "production/current/release.env").read_text()
        host.engine.push(REGISTRY, "v1", Version(vision="moved", queue="moved"))
        host.deploy("v1")
        host.rollback()
        assert (host.state / "production/current/release.env").read_text() == before

    def test_is_what_plain_compose_means_in_its_folder(self, host: Host, tmp_path: Path) -> None:
        password = tmp_path / "password"
        password.write_text("secret")
        given = {"REDIS_PASSWORD_FILE": str(password), "COMPOSE_PROFILES": "gpu", "CUDA_VISIBLE_DEVICES": "7"}
        host.deploy("v1", **given)
        # A name that a person has in .env for something else is not the environment's.
        host.deploy("v2", "staging", COMPOSE_PROJECT_NAME="mine")

        production, staging = host.plain_compose("production"), host.plain_compose("staging")

        assert (production["name"], staging["name"]) == ("team10", "team10-staging")
        assert production["services"]["vision"]["container_name"] == "team10-vision"
        assert staging["services"]["vision"]["container_name"] == "team10-staging-vision"
        (device,) = production["services"]["vision"]["deploy"]["resources"]["reservations"]["devices"]
        assert device["device_ids"] == ["7"]
        assert "reservations" not in staging["services"]["vision"]["deploy"]["resources"]
        for environment, tag, model in (("production", "v1", production), ("staging", "v2", staging)):
            digest = host.engine.registry[f"{REGISTRY}/queue:{tag}"].digest
            assert model["services"]["queue"]["image"] == f"{REGISTRY}/queue@{digest}", environment
        kept = host.state / "production/secrets/redis_password"
        assert production["secrets"]["redis_password"]["file"] == str(kept)
        # Found again wherever the host's folder is copied to.
        assert (host.state / "production/current/.env").readlink() == Path("release.env")

    def test_has_the_picture_that_it_is_verified_with(self, host: Host, tmp_path: Path) -> None:
        picture = tmp_path / "picture.jpg"
        picture.write_bytes(b"ours")
        host.deploy("v1", VERIFY_IMAGE=str(picture))
        picture.unlink()
        assert "--image" not in host.deploy("v2").stdout

        back = host.rollback()

        kept = host.state / "production/releases/v1/verify-image"
        assert back.returncode == 0 and f"--image {kept}" in back.stdout
        assert kept.read_bytes() == b"ours"

    def test_can_be_left_without_a_checkout(self, host: Host) -> None:
        host.deploy("v1")
        host.deploy("v2")
        script = host.state / "production/current/deploy/rollback.sh"
        assert host.rollback("--environment", "production", script=script).returncode == 0
        assert host.running() == "v1"

    def test_is_forgotten_with_its_images_after_some_others(self, host: Host) -> None:
        host.deploy("v1", DEPLOY_KEEP="2")
        first = host.engine.registry[f"{REGISTRY}/vision:v1"].digest
        for tag in ("v2", "v3"):
            host.deploy(tag, DEPLOY_KEEP="2")
        assert host.verified() == ["v2", "v3"]
        assert sorted(path.name for path in (host.state / "production/releases").iterdir()) == ["v2", "v3"]
        assert not [name for name, image in host.engine.host.items() if image.digest == first], "a name keeps the image"
        assert {name for name in host.engine.host if "@" not in name} == {
            f"{REGISTRY}/{name}:{tag}" for name in ("vision", "queue") for tag in ("v2", "v3")
        }

    def test_leaves_an_image_that_another_has_by_another_name(self, host: Host) -> None:
        # Built on this host, so known by its tags; both versions have the same image of the queue server.
        for tag in ("v1", "v2", "v3"):
            for name in ("vision", "queue"):
                content = "b" if name == "queue" else tag[1:]
                host.engine.host[f"team10-{name}:{tag}"] = Image(f"sha256:{content:0<64}", {})
        host.engine.used = ["team10-vision:v2"]
        for tag in ("v1", "v2", "v3"):
            assert host.deploy(tag, CI_REGISTRY_IMAGE="", DEPLOY_KEEP="1").returncode == 0
        tags = [name for name in host.engine.host if ":v" in name]
        assert {name for name in tags if "vision" in name} == {"team10-vision:v2", "team10-vision:v3"}
        assert {name for name in tags if "queue" in name} == {f"team10-queue:v{number}" for number in (1, 2, 3)}

    def test_is_kept_as_long_as_a_container_has_its_files(self, host: Host) -> None:
        host.deploy("v1", DEPLOY_KEEP="1")
        script = host.state / "production/releases/v1/deploy/compose/redis.sh"
        host.engine.mounts = [str(script)]
        host.deploy("v2", DEPLOY_KEEP="1")
        assert script.exists() and host.verified() == ["v2"]
        host.engine.mounts = []
        host.deploy("v3", DEPLOY_KEEP="1")
        assert not script.exists()

    def test_of_staging_lives_beside_production(self, host: Host) -> None:
        host.deploy("v1")
        host.deploy("v2", "staging")
        assert (host.running(), host.running("staging")) == ("v1", "v2")
        projects = [call[call.index("--project-name") + 1] for call in host.engine.told("compose") if "up" in call]
        assert projects == ["team10", "team10", "team10-staging", "team10-staging"]
        release = (host.state / "staging/current/release.env").read_text()
        assert "VISION_SERVICE_PORT='3001'" in release and "CONTAINER_PREFIX='team10-staging'" in release


class TestAnotherPassword:
    """Compose does not see it, and would leave a Redis running that has the old one."""

    @pytest.fixture
    def password(self, host: Host, tmp_path: Path) -> Path:
        password = tmp_path / "password"
        password.write_text("old")
        assert host.deploy("v1", REDIS_PASSWORD_FILE=str(password)).returncode == 0
        assert host.deploy("v2", REDIS_PASSWORD_FILE=str(password)).returncode == 0
        host.engine.recreated.clear()
        password.write_text("new")
        return password

    def test_makes_all_containers_anew_once(self, host: Host, password: Path) -> None:
        assert host.deploy("v3", REDIS_PASSWORD_FILE=str(password)).returncode == 0
        assert host.engine.recreated == ["v3"]
        host.rollback()
        assert (host.running(), host.engine.recreated) == ("v2", ["v3"])

    def test_also_when_it_goes_back(self, host: Host, password: Path) -> None:
        host.is_bad("v3")
        assert host.deploy("v3", REDIS_PASSWORD_FILE=str(password)).returncode == 1
        assert host.engine.recreated == ["v3", "v2"]
        host.is_bad()
        host.deploy("v3", REDIS_PASSWORD_FILE=str(password))
        assert host.engine.recreated == ["v3", "v2"]

    def test_also_when_the_deployment_that_brought_it_was_cut_off(self, host: Host, password: Path) -> None:
        (host.state / "production/secrets/redis_password").write_text("new")
        assert host.rollback("v1").returncode == 0
        assert host.engine.recreated == ["v1"]
