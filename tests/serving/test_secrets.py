"""Secrets from files, /run/secrets/<variable in lower case> or in AI4THAI_SECRETS_DIR: never shown, never passed over."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from queue_server.redis_address import read_address, with_password
from queue_server.settings import QueueSettings, StoreSettings, WorkerSettings
from serving import settings as serving_settings
from serving.settings import describe, read
from tests.processes import ROOT, ServerProcess
from vision_server.settings import VisionSettings

AWKWARD = "p@:/ ?#%&é"
WEBHOOK_SECRET = "whsec_" + "bXkgMjQgYnl0ZXMgb2Ygc2VjcmV0ISEh"  # pragma: allowlist secret


@pytest.fixture
def secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that the servers look into."""
    folder = tmp_path / "secrets"
    folder.mkdir()
    monkeypatch.setenv("AI4THAI_SECRETS_DIR", str(folder))
    for variable in ("REDIS_PASSWORD", "REDIS_URL", "QUEUE_WEBHOOK_SECRET", "HF_TOKEN"):
        monkeypatch.delenv(variable, raising=False)
    return folder


def test_a_file_is_the_variable_and_the_line_end_of_an_editor_does_not_count(secrets: Path) -> None:
    (secrets / "redis_password").write_text(f"{AWKWARD}\r\n")
    (secrets / "queue_webhook_secret").write_text(f"{WEBHOOK_SECRET}\n")
    settings = read(QueueSettings)
    assert settings.redis_password.get_secret_value() == AWKWARD
    assert settings.webhook_secret.get_secret_value() == WEBHOOK_SECRET


def test_the_environment_wins(secrets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (secrets / "redis_password").write_text("from the file")
    monkeypatch.setenv("REDIS_PASSWORD", "from the environment")
    assert read(WorkerSettings).redis_password.get_secret_value() == "from the environment"


def test_the_usual_folder_is_looked_into_when_it_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AI4THAI_SECRETS_DIR", raising=False)
    monkeypatch.delenv("REDIS_PASSWORD", raising=False)
    monkeypatch.setattr(serving_settings, "SECRETS_DIR", tmp_path / "run-secrets")
    assert read(StoreSettings).redis_password.get_secret_value() == ""
    (tmp_path / "run-secrets").mkdir()
    (tmp_path / "run-secrets/redis_password").write_text("there\n")
    assert read(StoreSettings).redis_password.get_secret_value() == "there"


def test_kubernetes_links_are_followed(secrets: Path) -> None:
    # A mounted Secret: the file is a link to a link of a folder with a date in its name.
    (secrets / "..2026").mkdir()
    (secrets / "..2026/redis_password").write_text("linked")
    (secrets / "..data").symlink_to("..2026")
    (secrets / "redis_password").symlink_to("..data/redis_password")
    assert read(StoreSettings).redis_password.get_secret_value() == "linked"


@pytest.mark.parametrize(
    "url",
    [
        "",
        "redis://h:7000/3",
        "redis://someone@h/0",
        "rediss://h?ssl_cert_reqs=none",
        "unix:///run/redis.sock?db=1",
        "redis+sentinel://h1:26379,h2/mymaster/0?sentinel_password=watchman",
        "redis://[::1]:7000/0",
    ],
)
def test_the_password_completes_an_address_that_has_none(secrets: Path, url: str) -> None:
    (secrets / "redis_password").write_text(AWKWARD)
    (secrets / "redis_url").write_text(url)
    settings = read(StoreSettings)
    without, completed = read_address(url or "redis://127.0.0.1:6379/0"), read_address(settings.url)
    assert {**without.options, "password": AWKWARD} == completed.options
    assert (without.place, without.sentinels, without.sentinel_options) == (
        completed.place,
        completed.sentinels,
        completed.sentinel_options,
    )


@pytest.mark.parametrize(
    "url",
    ["redis://:own@h:1/0", "redis://u:own@h", "redis://h?password=own"],  # pragma: allowlist secret
)
def test_an_address_that_has_a_password_keeps_it(url: str) -> None:
    assert with_password(url, "another") == url
    assert with_password("redis://h", "") == "redis://h"


def test_nothing_of_a_secret_is_shown_not_even_by_a_server_that_starts(secrets: Path) -> None:
    (secrets / "redis_password").write_text("hidden-one\n")
    (secrets / "queue_webhook_secret").write_text(WEBHOOK_SECRET)
    (secrets / "hf_token").write_text("hidden-three")
    for settings in (read(QueueSettings), read(WorkerSettings), read(VisionSettings)):
        shown = f"{describe(settings)} {settings!r}"
        assert "hidden" not in shown and WEBHOOK_SECRET not in shown
    env = {"AI4THAI_SECRETS_DIR": str(secrets), "REDIS_PORT": "1", "QUEUE_WORKER_PORT": "0"}
    with ServerProcess("queue_server", env=env) as server:
        told = server.wait_for("starting")["settings"]
        assert told["redis_password"] == told["webhook_secret"] == "***"
        server.wait_for("listening")
    log = "".join(server.lines)
    assert "hidden-one" not in log and WEBHOOK_SECRET not in log


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        pytest.param(lambda path: path.mkdir(), "found a directory", id="the folder that Docker makes"),
        pytest.param(lambda path: path.symlink_to("/etc/hostname"), "resolves outside", id="a link that leads away"),
        pytest.param(lambda path: path.write_bytes(b"\xff\xfe"), "redis_password", id="not text"),
        pytest.param(lambda path: path.parent.rmdir(), "does not exist", id="no such folder"),
    ],
)
def test_a_secret_that_cannot_be_read_ends_the_start(
    secrets: Path, capsys: pytest.CaptureFixture[str], spoil: Callable[[Path], object], said: str
) -> None:
    spoil(secrets / "redis_password")
    with pytest.raises(SystemExit) as ended:
        read(StoreSettings)
    told = capsys.readouterr().err
    assert ended.value.code == 2
    assert said in told and str(secrets) in told and "chmod 644" in told


def test_a_file_of_another_user_ends_the_start(
    secrets: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (secrets / "redis_password").write_text("closed")
    (secrets / "redis_password").chmod(0)
    if os.access(
        secrets / "redis_password", os.R_OK
    ):  # root may read all: what another user is told is raised in its place
        read_text = Path.read_text

        def refusing(path: Path, *args: str, **options: str) -> str:
            if path.name == "redis_password":
                raise PermissionError(13, "Permission denied", str(path))
            return read_text(path, *args, **options)

        monkeypatch.setattr(Path, "read_text", refusing)
    with pytest.raises(SystemExit):
        read(StoreSettings)
    told = capsys.readouterr().err
    assert "Permission denied" in told and str(secrets / "redis_password") in told


def test_what_is_wrong_with_a_secret_is_told_without_the_secret(
    secrets: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (secrets / "queue_webhook_secret").write_text("not-a-signing-key")
    with pytest.raises(SystemExit):
        read(QueueSettings)
    told = capsys.readouterr().err
    assert told.startswith("QUEUE_WEBHOOK_SECRET is '***'")
    assert "not-a-signing-key" not in told


def test_json_that_cannot_be_read_is_told_as_what_it_is(
    secrets: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUEUE_MAX_ATTEMPTS_BY_KIND", "{video: 2")
    with pytest.raises(SystemExit):
        read(QueueSettings)
    told = capsys.readouterr().err
    assert "max_attempts_by_kind" in told and "chmod" not in told


def test_the_hub_is_asked_with_the_token_of_the_file(secrets: Path) -> None:
    (secrets / "hf_token").write_text("hf_of_the_file\n")
    program = (
        "import vision_server.__main__ as start; start.run = lambda *_: 0; start.main(); "
        "import huggingface_hub; print(huggingface_hub.get_token())"
    )
    paths = os.pathsep.join([str(ROOT / "clients"), str(ROOT)])
    env = {**os.environ, "PYTHONPATH": paths, "AI4THAI_DATA_DIR": str(secrets.parent), "HF_HOME": str(secrets.parent)}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "hf_of_the_file"
