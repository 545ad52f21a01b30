"""The commands about videos, files and queues, as a person or a script sees them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from ai4thai.cli import app
from ai4thai.cli_options import parse_moment
from ai4thai.queue.v1 import job_pb2
from typer.testing import CliRunner, Result

from serving.errors import Code, ServiceError
from tests.clients.fake_servers import FakeQueue, FakeServer
from tests.terminal import Terminal

Run = Callable[..., Result]


@pytest.fixture
def run(queue_server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("AI4THAI_QUEUE_ADDRESS", queue_server.address)
    monkeypatch.setenv("COLUMNS", "240")
    monkeypatch.delenv("AI4THAI_CLIENT", raising=False)
    return lambda *arguments, **more: CliRunner().invoke(app, [str(argument) for argument in arguments], **more)


@pytest.fixture
def video(tmp_path: Path) -> Path:
    path = tmp_path / "คลิป [1].mp4"
    path.write_bytes(bytes(5_000_000))
    return path


def lines_of(result: Result) -> list[Any]:
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_a_video_job_saves_what_it_brings(run: Run, fake_queue: FakeQueue, video: Path, tmp_path: Path) -> None:
    result = run(
        "submit", "video", video, "--stride", 3, "--annotate", "--tracker", "botsort", "--out", tmp_path / "ผล"
    )

    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in (tmp_path / "ผล").iterdir()) == [
        "คลิป [1].annotated.mp4",
        "คลิป [1].tracks.json",
    ]
    assert json.loads((tmp_path / "ผล" / "คลิป [1].tracks.json").read_text()) == {"frames": []}
    assert "640 x 360 px · 3.0 s · 90 frames, 30 looked at" in result.stdout
    assert "#1" in result.stdout and "ดาว" in result.stdout and "0.50 – 2.00 s" in result.stdout
    assert "sha256:" in result.stdout
    assert "SUCCEEDED" in result.stderr and result.stderr.count("saved") == 2
    assert "1 frame without an answer" in result.stderr
    work = fake_queue.script.requests["SubmitJob"].work.video
    assert (work.stride, work.annotate, work.video.media_id in fake_queue.media) == (3, True, True)


def test_a_video_job_that_nobody_waits_for(run: Run, video: Path) -> None:
    job_id = run("submit", "video", video, "--client", "team-a").stdout.strip()
    watched = run("watch", job_id, "--json")
    assert lines_of(watched)[-1]["result"]["tracks"][0]["label"] == "ดาว"
    listed = run("jobs", "--client", "team-a")
    assert job_id in listed.stdout and "client team-a" in listed.stdout
    assert run("jobs", "--client", "team-b").stdout == "no jobs\n"


def test_how_a_job_is_queued(run: Run, image: Path, fake_queue: FakeQueue, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AI4THAI_CLIENT", "from-env")
    begun = datetime.now(UTC)
    hook = "https://example.com/hook"
    result = run(
        "submit", "detect", image, "--webhook", hook, "--deadline", "2h", "--not-before", "2030-01-31T18:00+07:00"
    )

    assert result.exit_code == 0, result.output
    request = fake_queue.script.requests["SubmitJob"]
    assert (request.client, request.webhook.url) == ("from-env", hook)
    assert request.not_before_time.ToDatetime(UTC) == datetime(2030, 1, 31, 11, tzinfo=UTC)
    deadline = request.deadline.ToDatetime(UTC)
    assert timedelta(0) <= deadline - begun - timedelta(hours=2) < timedelta(minutes=1)
    wrong = run("submit", "detect", image, "--deadline", "soon")
    assert wrong.exit_code == 2 and "neither a time from now" in wrong.stderr.replace("\n", " ")


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("10m", 600), ("1.5h", 5400), ("1d", 86400), ("2min", 120)])
def test_moments_from_now(text: str, seconds: int) -> None:
    ahead_s = (parse_moment(text) - datetime.now(UTC)).total_seconds()
    assert seconds - 5 < ahead_s <= seconds
    assert parse_moment("2030-01-31T18:00").tzinfo is not None


def test_files_up_and_down(run: Run, fake_queue: FakeQueue, video: Path, tmp_path: Path) -> None:
    put = run("media", "put", video)
    media_id = put.stdout.strip()
    assert (put.exit_code, media_id) == (0, f"sha256:{hashlib.sha256(video.read_bytes()).hexdigest()}")
    assert "5,000,000 bytes" in put.stderr and "คลิป [1].mp4" in put.stderr
    assert lines_of(run("media", "put", video, "--json"))[0]["content_type"] == "video/mp4"
    piped = run("media", "put", "-", "--content-type", "text/plain", input="คำ")
    assert fake_queue.media[piped.stdout.strip()] == ("คำ".encode(), "text/plain")

    got = run("media", "get", media_id, "-o", tmp_path / "สำเนา.mp4")
    assert (got.exit_code, got.stdout) == (0, "") and "saved" in got.stderr
    assert (tmp_path / "สำเนา.mp4").read_bytes() == video.read_bytes()
    assert run("media", "get", piped.stdout.strip(), "-o", "-").stdout == "คำ"

    missing = run("media", "get", "sha256:" + 64 * "0", "-o", tmp_path / "none")
    assert (missing.exit_code, missing.stderr) == (1, "Error: There is no such file.\n")
    assert run("media", "put", tmp_path / "nowhere.mp4").stderr == f"Error: There is no file {tmp_path}/nowhere.mp4.\n"
    assert "is no media_id" in run("media", "get", "x", "-o", tmp_path / "none").stderr


def test_a_progress_bar_is_for_terminals_only(queue_server: FakeServer, video: Path) -> None:
    env = {"AI4THAI_QUEUE_ADDRESS": queue_server.address}
    with Terminal("ai4thai.cli", "media", "put", str(video), env=env, columns=60) as terminal:
        terminal.wait_for("sha256:")
        assert terminal.wait() == 0
        assert "uploading คลิป [1].mp4" in terminal.text and "5.0/5.0 MB" in terminal.text


def test_queues_are_paused_emptied_and_counted(run: Run, image: Path, fake_queue: FakeQueue) -> None:
    assert "default is paused" in run("queue", "pause", "default").stdout
    job_id = run("submit", "detect", image).stdout.strip()
    assert "held" in run("jobs").stdout
    counted = run("queue", "stats", "default").stdout
    assert "default: paused, 1 held, 3.0 MB, waiting by client: team-a 2" in counted

    refused = run("queue", "purge", "default", input="n\n")
    assert refused.exit_code == 1 and "PurgeQueue" not in fake_queue.script.calls
    assert run("queue", "purge", "default", input="y\n").stdout.endswith("1 job cancelled\n")
    assert lines_of(run("queue", "purge", "default", "--yes", "--json")) == [{"cancelled_count": 0}]

    assert "QUEUED" in run("retry", job_id).stdout
    assert "goes on" in run("queue", "resume", "default").stdout
    assert fake_queue.paused == set()
    fake_queue.jobs[job_id].state = job_pb2.JOB_STATE_SUCCEEDED
    again = run("retry", job_id)
    assert (again.exit_code, again.stderr) == (1, "Error: The job has succeeded.\n")


def test_a_narrow_terminal_shows_a_queues_counts_whole(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    told = run("queue", "stats").stdout
    header = told.splitlines()[0].split()
    assert header == ["queue", "queued", "scheduled", "running", "failed", "oldest", "jobs/s", "p50", "p95"]
    assert "…" not in told and max(len(line) for line in told.splitlines()) <= 80


def test_of_many_jobs_only_as_many_as_asked_for(run: Run, image: Path) -> None:
    for _ in range(3):
        run("submit", "detect", image)
    listed = run("jobs", "--limit", 2)
    assert listed.stdout.count("QUEUED") == 2 and "There are more" in listed.stderr
    assert len(lines_of(run("jobs", "--limit", 2, "--json"))) == 2
    assert "There are more" not in run("jobs", "--limit", 3).stderr


def test_a_lost_job_says_what_to_do(run: Run, fake_queue: FakeQueue) -> None:
    lost = ServiceError(Code.NOT_FOUND, "JOB_LOST", "Redis came back without the job.", cure="Submit it again.")
    fake_queue.script.fail_next("WatchJob", lost)
    result = run("watch", "job-9")
    assert (result.exit_code, result.stderr) == (1, "Error: Redis came back without the job. Submit it again.\n")


def test_the_new_commands_explain_themselves(run: Run) -> None:
    told = run("--help").stdout
    for command in ("media", "queue", "retry"):
        assert command in told
    assert "video" in run("submit", "--help").stdout
    for command in (["media", "put"], ["media", "get"], ["queue", "purge"], ["submit", "video"], ["retry"]):
        assert run(*command, "-h").exit_code == 0
