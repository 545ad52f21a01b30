"""deploy.sh and rollback.sh: which version is gone back to, what is kept on the host, what is refused before anything is touched.

The versions' processes are left out here (test_pipeline.py deploys and takes back real ones): docker only records, and the
verify.sh that is deployed along says what the test says of the version.
"""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests import programs
from tests.delivery.docker_engine import Engine, Image, Version
from tests.processes import ROOT

REGISTRY = "registry.example/team10"
VERIFY = """\
#!/bin/bash
source "$(dirname "$0")/../release.env"
echo "verifying $VISION_IMAGE $*"
! grep -qxF "${VISION_IMAGE##*@}" "$BAD_VERSIONS"
"""


class RecordingEngine(Engine):
    """Docker without processes: `compose up` is recorded, with the images that the release names."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.live: list[str] = []
        self.recreated: list[str] = []
        """The releases for which every container was made anew, changed or not."""
        self.restarts = 0
        """By how many each look at a container finds it started again."""
        self._looks = 0

    def _compose(self, words: list[str], told: dict[str, Any]) -> str:
        release = Path(words[words.index("--env-file") + 1])
        if "up" in words and "worker" not in words:
            self.live.append(release.parent.name)
        if "--force-recreate" in words and "worker" in words:
            self.recreated.append(release.parent.name)
        return "team10-vision | ImportError: last words\n" if "logs" in words else ""

    def _inspect(self, words: list[str], told: dict[str, Any]) -> str:
        if "Mounts" in words[1]:
            return super()._inspect(words, told)
        self._looks += self.restarts
        return f"{self._looks}\n"


@dataclass
class Host:
    """A host to deploy to, from a checkout of its own."""

    engine: RecordingEngine
    root: Path
    state: Path
    bad: Path
    environment: dict[str, str] = field(default_factory=dict)

    def deploy(self, tag: str, environment: str = "production", **variables: str) -> subprocess.CompletedProcess[str]:
        return self._run("deploy.sh", environment, tag, **variables)

    def rollback(self, *arguments: str, script: Path | None = None) -> subprocess.CompletedProcess[str]:
        return self._run(script or "rollback.sh", *arguments)

    def built(self, *tags: str) -> None:
        for tag in tags:
            self.engine.push(REGISTRY, tag, Version(vision=tag, queue=tag))

    def is_bad(self, *tags: str) -> None:
        digests = [self.engine.registry[f"{REGISTRY}/vision:{tag}"].digest for tag in tags]
        self.bad.write_text("".join(f"{digest}\n" for digest in digests))

    def _run(self, script: str | Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        path = [self.engine.path, "/usr/bin", "/bin", Path(sys.executable).parent]
        env = {
            "PATH": os.pathsep.join(map(str, path)),
            "HOME": str(self.state),
            "AI4THAI_STATE_DIR": str(self.state),
            "CI_REGISTRY_IMAGE": REGISTRY,
            "COMPOSE_PROFILES": "cpu",
            "BAD_VERSIONS": str(self.bad),
            **variables,
        }
        command = [self.root / "deploy" / script, *arguments]
        return subprocess.run(command, env=env, cwd="/", capture_output=True, text=True, timeout=100, check=False)

    def plain_compose(self, environment: str) -> dict[str, Any]:
        """What the real compose makes of the release that is live, in its folder and told nothing."""
        current = self.state / environment / "current"
        command = [str(Path(sys.executable).with_name("docker-compose")), "config", "--format", "json"]
        env = {"PATH": "/usr/bin:/bin", "HOME": "/nonexistent", "PWD": str(current)}
        done = subprocess.run(command, cwd=current, env=env, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        return dict(json.loads(done.stdout))

    def verified(self, environment: str = "production") -> list[str]:
        return (self.state / environment / "verified").read_text().split()

    def running(self, environment: str = "production") -> str:
        return (self.state / environment / "running").read_text().strip()


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    programs.needed("curl")
    root = tmp_path / "checkout"
    (root / "deploy").mkdir(parents=True)
    for name in ("compose.yaml", "clients"):
        (root / name).symlink_to(ROOT / name)
    for name in ("compose", "ci", "deploy.sh", "rollback.sh"):
        (root / "deploy" / name).symlink_to(ROOT / "deploy" / name)
    (root / "deploy/verify.sh").write_text(VERIFY)
    (root / "deploy/verify.sh").chmod(0o755)
    (tmp_path / "bad").write_text("")
    with RecordingEngine(tmp_path / "engine") as engine:
        host = Host(engine, root, tmp_path / "state", tmp_path / "bad")
        host.built("v1", "v2", "v3")
        yield host
        assert engine.faults == []


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

    def test_not_to_one_that_was_not(self, host: Host) -> None:
        host.deploy("v1")
        refused = host.rollback("v2")
        assert refused.returncode == 2
        assert "v2 was never verified in production" in refused.stderr
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
                host.engine.host[f"team10-{name}:{tag}"] = Image(f"sha256:{name if name == 'queue' else tag}", {})
        host.engine.used = ["team10-vision:v2"]
        for tag in ("v1", "v2", "v3"):
            assert host.deploy(tag, CI_REGISTRY_IMAGE="", DEPLOY_KEEP="1").returncode == 0
        assert {name for name in host.engine.host if "vision" in name} == {"team10-vision:v2", "team10-vision:v3"}
        assert {name for name in host.engine.host if "queue" in name} == {
            f"team10-queue:v{number}" for number in (1, 2, 3)
        }

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


class TestRefused:
    """Before anything is touched: exit code 2."""

    def refused(self, host: Host, done: subprocess.CompletedProcess[str], words: str) -> None:
        assert done.returncode == 2, done.stdout + done.stderr
        assert words in done.stderr
        assert host.engine.live == []

    def test_an_image_that_was_not_pushed(self, host: Host) -> None:
        self.refused(host, host.deploy("v9"), "vision:v9 cannot be pulled: is it pushed, is this host logged in")

    def test_a_secret_that_is_no_file(self, host: Host) -> None:
        done = host.deploy("v1", REDIS_PASSWORD_FILE="the-password-itself")
        self.refused(host, done, "In GitLab its type must be File.")
        assert "the-password-itself" not in done.stdout + done.stderr

    def test_a_deployment_without_settings(self, host: Host) -> None:
        done = host.deploy("v1", COMPOSE_PROFILES="")
        self.refused(
            host, done, "COMPOSE_PROFILES is not set (cpu or gpu). By hand, settings come from the environment"
        )
        assert host.engine.calls == []

    def test_a_picture_that_is_not_there(self, host: Host) -> None:
        self.refused(
            host, host.deploy("v1", VERIFY_IMAGE="no.jpg"), "The picture no.jpg (VERIFY_IMAGE) cannot be read."
        )

    def test_a_setting_that_cannot_be_kept(self, host: Host) -> None:
        self.refused(host, host.deploy("v1", VISION_DETECTOR="it's"), "VISION_DETECTOR holds a quote")

    def test_two_at_once(self, host: Host) -> None:
        home = host.state / "production"
        home.mkdir(parents=True)
        with (home / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self.refused(host, host.deploy("v1"), "Somebody else deploys or rolls back production")

    @pytest.mark.parametrize("arguments", [("Production!", "v1"), ("production", "v1;rm"), ("production", "")])
    def test_odd_words(self, host: Host, arguments: tuple[str, str]) -> None:
        assert host.deploy(arguments[1], arguments[0]).returncode == 2
        assert host.engine.calls == []

    def test_a_state_folder_that_cannot_be_written(self, host: Host) -> None:
        host.state.write_text("a file in its place")
        self.refused(host, host._run("rollback.sh", HOME="/"), "Once, as root: install -d")

    def test_a_state_folder_of_somebody_else(self, host: Host) -> None:
        host.state.mkdir()
        (host.state / "production").write_text("no folder, so that nobody can write there")
        owner = host.state.owner()
        self.refused(host, host._run("rollback.sh", HOME="/"), f"belongs to {owner}; run it as {owner}: sudo -i")
