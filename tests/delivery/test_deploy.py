"""deploy.sh and rollback.sh when something is in the way: what is refused at once, a full disk, an end in between."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.delivery.hosts import VERIFY, Host, recording_host
from tests.end_to_end.conftest import wait_until


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    with recording_host(tmp_path) as host:
        yield host


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

    def test_a_secret_is_kept_only_with_a_release_that_is_taken(self, host: Host, tmp_path: Path) -> None:
        password = tmp_path / "password"
        password.write_text("old")
        given = {"REDIS_PASSWORD_FILE": str(password)}
        host.deploy("v1", **given)
        password.write_text("new")
        for wrong in ({"VISION_DETECTOR": "it's"}, {"COMPOSE_PROFILES": ""}):
            assert host.deploy("v1", **given | wrong).returncode == 2
        assert (host.state / "production/secrets/redis_password").read_text() == "old"
        assert not (host.state / "production/secrets.new").exists()

    @pytest.mark.parametrize("command", ["deploy", "rollback"])
    def test_behind_the_edge_which_has_the_ports(self, host: Host, command: str) -> None:
        for tag in ("v1", "v2"):
            host.deploy(tag)
        host.engine.live.clear()
        host.engine.edge = "team10-edge"
        kept = host.kept()
        done = host.deploy("v3") if command == "deploy" else host.rollback()
        self.refused(host, done, "docker rm --force team10-edge")
        assert host.kept() == kept
        assert host.deploy("v3", "staging").returncode == 0, "staging has ports of its own"

    @pytest.mark.parametrize("program", ["curl", "flock"])
    def test_without_a_program_that_it_will_need(self, host: Host, tmp_path: Path, program: str) -> None:
        for tag in ("v1", "v2"):
            host.deploy(tag)
        host.engine.live.clear()
        few = tmp_path / "few"
        few.mkdir()
        for name in {"bash", "dirname", "curl", "python3", "base64", "flock"} - {program}:
            (few / name).symlink_to(shutil.which(name) or name)
        path = f"{host.engine.path}:{few}"
        for done in (host.rollback(PATH=path), host.deploy("v3", PATH=path)):
            self.refused(host, done, f"{program} is missing on this machine.")

    def test_a_version_that_this_host_no_longer_has(self, host: Host) -> None:
        for tag in ("v1", "v2"):
            host.deploy(tag)
        host.engine.live.clear()
        image = next(name for name in host.engine.host if "vision@" in name)
        del host.engine.host[image]
        host.engine.away = True
        self.refused(host, host.rollback(), f"docker login; docker pull {image}; then")
        shutil.rmtree(host.state / "production/releases/v1")
        self.refused(host, host.rollback(), "v1 is gone: v1 cannot be brought back.")
        assert host.running() == "v2"

    def test_a_release_that_cannot_be_written(self, host: Host) -> None:
        (host.root / "clients").unlink()
        self.refused(host, host.deploy("v1"), "scene-01.jpg")

    def test_two_at_once(self, host: Host) -> None:
        home = host.state / "production"
        home.mkdir(parents=True)
        with (home / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self.refused(host, host.deploy("v1"), "Somebody else deploys or rolls back production")
            assert host.rollback("--list").returncode == 0, "looking is always allowed"

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


class TestAFullDisk:
    """/dev/full in place of a file is one that has no room."""

    def full(self, host: Host, name: str) -> None:
        (host.state / "production" / f"{name}.new").symlink_to("/dev/full")

    def test_leaves_the_list_of_good_versions_as_it_was(self, host: Host) -> None:
        for tag in ("v1", "v2"):
            host.deploy(tag)
        self.full(host, "verified")
        back = host.rollback()
        assert (back.returncode, host.running(), host.verified()) == (0, "v1", ["v1", "v2"])
        assert "verified could not be written; it is as it was. Is the disk full?" in back.stderr

    def test_does_not_make_a_good_version_one_that_was_gone_back_from(self, host: Host) -> None:
        host.deploy("v1")
        self.full(host, "verified")
        done = host.deploy("v2")
        assert (done.returncode, host.verified()) == (3, ["v1"])
        assert "v2 is live in production and good" in done.stderr

    def test_is_met_before_a_container_is_touched(self, host: Host) -> None:
        for tag in ("v1", "v2"):
            host.deploy(tag)
        host.engine.live.clear()
        self.full(host, "running")
        assert host.rollback().returncode == 3
        assert (host.engine.live, host.running()) == ([], "v2")


class TestCutOff:
    """A job that is cancelled or takes too long, Ctrl-C: what is live then, nobody has verified."""

    @pytest.mark.parametrize("ends", [signal.SIGINT, signal.SIGTERM])
    def test_is_told_and_leaves_nothing_running(self, host: Host, tmp_path: Path, ends: signal.Signals) -> None:
        host.deploy("v1")
        began = tmp_path / "began"
        (host.root / "deploy/verify.sh").write_text(
            f"#!/bin/bash\necho $$ >{began}.new; mv {began}.new {began}\nexec sleep 60\n"
        )
        with subprocess.Popen(
            [host.root / "deploy/deploy.sh", "production", "v2"],
            env=host.env(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        ) as deployment:
            wait_until("it verifies", began.exists, 60)
            os.killpg(deployment.pid, ends)
            output, _ = deployment.communicate(timeout=60)

        assert deployment.returncode == 3, output
        assert "Cut off while v2 was put live in production: it is not verified. deploy/rollback.sh" in output
        assert " cut-off   v2 " in (host.state / "production/log").read_text()
        verifying = Path(f"/proc/{began.read_text().strip()}")
        wait_until("verify.sh is gone", lambda: not verifying.exists(), 20)
        assert host.rollback().returncode == 0
        assert host.running() == "v1"


def test_what_cannot_be_verified_is_not_called_bad(host: Host) -> None:
    host.deploy("v1")
    (host.root / "deploy/verify.sh").write_text(VERIFY.replace("! grep", "exit 2; ! grep"))
    done = host.deploy("v2")
    back = host.rollback("v1", script=host.root / "deploy/rollback.sh")
    assert done.returncode == 3
    assert "v2 runs in production, and could not be verified" in done.stderr
    assert (host.running(), back.returncode) == ("v1", 0)
