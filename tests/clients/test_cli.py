from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from ai4thai.cli import app
from ai4thai.vision.v1 import detection_pb2
from PIL import Image
from typer.testing import CliRunner, Result

from serving.errors import Code, ServiceError
from tests.clients.fake_servers import BROKEN, FakeQueue, FakeServer, FakeVision

Run = Callable[..., Result]


@pytest.fixture
def run(vision_server: FakeServer, queue_server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("AI4THAI_VISION_ADDRESS", vision_server.address)
    monkeypatch.setenv("AI4THAI_QUEUE_ADDRESS", queue_server.address)
    monkeypatch.setenv("COLUMNS", "240")
    return lambda *arguments: CliRunner().invoke(app, [str(argument) for argument in arguments])


def lines_of(result: Result) -> list[Any]:
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_detect_prints_a_table_and_saves_the_picture(run: Run, image: Path, tmp_path: Path) -> None:
    result = run("detect", image, "--save", tmp_path / "out.jpg", "--min-confidence", 0.5, "--label", "star")

    assert result.exit_code == 0, result.output
    assert "star" in result.stdout and "0.75" in result.stdout and "10, 20 – 50, 80" in result.stdout
    assert (tmp_path / "out.jpg").read_bytes() == b"\xff\xd8 drawn"
    assert "saved" in result.stderr


def test_detect_shows_what_a_model_tells_beyond_the_box(run: Run, image: Path, fake_vision: FakeVision) -> None:
    found = detection_pb2.Detection(
        label="star",
        confidence=0.9,
        track_id=7,
        oriented_box=detection_pb2.OrientedBox(width_px=30, height_px=20, angle_degrees=-15),
        keypoints=[detection_pb2.Keypoint(name="top", x_px=3, y_px=4, confidence=1)],
        mask=detection_pb2.Mask(rle=detection_pb2.RunLengths(height_px=2, width_px=2, counts=[1, 2, 1])),
    )
    fake_vision.found = [found]

    result = run("detect", image, "--masks", "--mask-form", "rle", "--priority", "interactive")

    assert result.exit_code == 0, result.output
    assert "#7 star" in result.stdout
    assert "30 × 20 turned by -15°; mask of 2 px²; top 3, 4" in result.stdout
    asked = fake_vision.script.requests["Detect"]
    assert (asked.options.masks, asked.options.mask_form) == (True, detection_pb2.MASK_FORM_RLE)
    assert asked.priority == detection_pb2.PRIORITY_INTERACTIVE
    [line] = lines_of(run("detect", image, "--json"))
    assert line["detections"][0]["mask"] == {"height_px": 2, "width_px": 2, "counts": [1, 2, 1]}


@pytest.mark.parametrize("command", [["detect"], ["analyze"]])
def test_a_picture_is_not_saved_under_another_formats_name(
    run: Run, image: Path, fake_vision: FakeVision, tmp_path: Path, command: list[str]
) -> None:
    question = [] if command == ["detect"] else ["What?"]
    result = run(*command, image, *question, "--save", tmp_path / "out.png")

    assert result.exit_code == 1
    assert result.stderr == "Error: The picture is a JPEG: call it out.jpg, not out.png.\n"
    assert not fake_vision.script.calls and not (tmp_path / "out.png").exists()


def test_detect_prints_json_for_programs(run: Run, image: Path) -> None:
    [found] = lines_of(run("detect", image, "--json"))

    assert found["image"] == str(image)
    assert found["detections"][0]["box"] == {"x_min_px": 10, "y_min_px": 20, "x_max_px": 50, "y_max_px": 80}


def test_of_several_images_a_bad_one_does_not_stop_the_others(run: Run, image: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(BROKEN)

    result = run("detect", bad, image, "--save", tmp_path / "drawn")

    assert result.exit_code == 1
    assert result.stderr.count("Error:") == 1 and "no image" in result.stderr
    assert [path.name for path in (tmp_path / "drawn").iterdir()] == ["scene.jpg"]
    refused, answered = lines_of(run("detect", bad, image, "--json"))
    assert refused["error"]["reason"] == "IMAGE_UNREADABLE" and answered["detections"]


@pytest.mark.parametrize("command", [["detect"], ["ask"], ["analyze"]])
def test_a_missing_file_is_one_line(run: Run, command: list[str]) -> None:
    question = [] if command == ["detect"] else ["What?"]
    result = run(*command, "nowhere.jpg", *question)

    assert result.exit_code == 1
    assert result.stderr == "Error: There is no file nowhere.jpg.\n"


def test_errors_are_one_line_with_the_servers_words(run: Run, image: Path, fake_vision: FakeVision) -> None:
    fake_vision.script.fail_next("Detect", ServiceError(Code.NOT_FOUND, "MODEL_NOT_FOUND", "There is no model 'x[y]'."))

    result = run("detect", image, "--model", "x[y]")

    assert (result.exit_code, result.stderr) == (1, "Error: There is no model 'x[y]'.\n")


@pytest.mark.usefixtures("quick_retries")
def test_nobody_there_tells_how_to_start_one(run: Run, image: Path) -> None:
    result = run("detect", image, "--vision", "localhost:1")

    assert result.exit_code == 1
    assert "No server answers at localhost:1" in result.stderr and "ai4thai up" in result.stderr


@pytest.mark.parametrize(
    "arguments", [["detect"], ["stream"], ["detect", "--nonsense"], ["jobs", "--limit", "0"], ["fly"]]
)
def test_usage_errors_exit_with_2(run: Run, arguments: list[str]) -> None:
    assert run(*arguments).exit_code == 2


def test_wrong_values_exit_with_1(run: Run, image: Path) -> None:
    for arguments in (
        ["detect", image, "--vision", "localhost"],
        ["jobs", "--state", "done"],
        ["submit", "detect", image, "--priority", "urgent"],
        ["detect", image, "--priority", "urgent"],
        ["ask", image, "What?", "--priority", "urgent"],
        ["detect", image, "--mask-form", "circle"],
        ["submit", "detect", image, "--label", "colour"],
    ):
        result = run(*arguments)
        assert result.exit_code == 1 and result.stderr.startswith("Error: "), result.output
        assert len(result.stderr.splitlines()) == 1


def test_stream_of_a_folder(run: Run, image: Path, tmp_path: Path) -> None:
    (tmp_path / "b.png").write_bytes(BROKEN)
    (tmp_path / "notes.txt").write_text("no picture")

    result = run("stream", tmp_path)

    assert result.exit_code == 0, result.output
    assert "1 images answered, 1 with an error" in result.stdout and "images/s): star" in result.stdout
    assert "b.png" in result.stderr
    lines = lines_of(run("stream", tmp_path, "--json"))
    assert [line.get("image") for line in lines] == ["b.png", "scene.jpg", None]
    assert lines[0]["error"]["reason"] == "IMAGE_UNREADABLE"
    assert lines[2]["summary"]["received_count"] == 2


def test_stream_of_a_video(run: Run, fake_vision: FakeVision, tmp_path: Path) -> None:
    video = tmp_path / "clip.avi"
    writer = cv2.VideoWriter(str(video), cv2.VideoWriter_fourcc(*"MJPG"), 10, (64, 48))
    for _ in range(6):
        writer.write(np.full((48, 64, 3), (255, 0, 0), np.uint8))  # blue, in OpenCV's order
    writer.release()

    lines = lines_of(run("stream", video, "--stride", 2, "--json"))

    assert [line.get("image") for line in lines] == ["frame 0", "frame 2", "frame 4", None]
    assert len(lines_of(run("stream", video, "--limit", 1, "--json"))) == 2


def test_streams_that_make_no_sense(run: Run, tmp_path: Path) -> None:
    assert "has no images" in run("stream", tmp_path).stderr
    assert "There is no folder or video" in run("stream", tmp_path / "nowhere.mp4").stderr
    (tmp_path / "clip.mp4").write_bytes(b"no video")
    assert "is no video" in run("stream", tmp_path / "clip.mp4").stderr


def test_ask_prints_the_words_alone_on_stdout(run: Run, image: Path, fake_vision: FakeVision) -> None:
    result = run("ask", image, "มีดาวกี่ดวง", "--priority", "batch")

    assert (result.exit_code, result.stdout) == (0, "มีดาวหนึ่งดวง\n")
    assert "3 tokens" in result.stderr
    assert fake_vision.script.requests["Generate"].priority == detection_pb2.PRIORITY_BATCH
    assert lines_of(run("ask", image, "What?", "--json"))[0]["text"] == "มีดาวหนึ่งดวง"


def test_analyze(run: Run, image: Path, fake_vision: FakeVision) -> None:
    result = run("analyze", image, "How many?", "--priority", "interactive")

    assert result.exit_code == 0 and "One star." in result.stdout and "0.75" in result.stdout
    assert fake_vision.script.requests["Analyze"].priority == detection_pb2.PRIORITY_INTERACTIVE


def test_a_job_from_submission_to_its_result(run: Run, image: Path) -> None:
    submitted = run("submit", "detect", image, "--label", "from=test")
    job_id = submitted.stdout.strip()

    watched = run("watch", job_id)

    assert (submitted.exit_code, watched.exit_code) == (0, 1), watched.output  # one of its images failed
    assert f"ai4thai watch {job_id}" in submitted.stderr
    assert "image 1" in watched.stdout and "star" in watched.stdout
    assert "SUCCEEDED" in watched.stderr
    assert "image 2: " in watched.stderr  # the fake's second item is an error
    listed = run("jobs")
    assert job_id in listed.stdout and "SUCCEEDED" in listed.stdout
    assert "deleted" in run("delete", job_id).stdout
    assert run("watch", job_id).exit_code == 1


def test_a_job_is_asked_for_with_a_detections_options(run: Run, image: Path, fake_queue: FakeQueue) -> None:
    result = run("submit", "detect", image, "--only", "star", "--max-detections", 3, "--mask-form", "rle")

    assert result.exit_code == 0, result.output
    asked = fake_queue.script.requests["SubmitJob"].work.detect.options
    assert (list(asked.labels), asked.max_detections) == (["star"], 3)
    assert (asked.masks, asked.mask_form) == (True, detection_pb2.MASK_FORM_RLE)


def test_other_jobs_and_waiting_for_them(run: Run, image: Path) -> None:
    asked = run("submit", "ask", image, "What?", "--wait")
    analyzed = run("submit", "analyze", image, "--question", "How many?", "--wait", "--json")

    assert (asked.exit_code, asked.stdout) == (0, "One star.\n")
    assert [line["state"] for line in lines_of(analyzed)] == ["QUEUED", "RUNNING", "RUNNING", "SUCCEEDED"]


def test_cancel_and_the_exit_code_of_a_job_without_result(run: Run, image: Path) -> None:
    job_id = run("submit", "detect", image, "--label", "pace=slow").stdout.strip()

    assert "CANCELLED" in run("cancel", job_id).stdout
    assert run("watch", job_id).exit_code == 1


def test_no_jobs(run: Run) -> None:
    assert run("jobs").stdout == "no jobs\n"


def test_health_exits_with_0_only_when_both_are_ready(run: Run, queue_server: FakeServer) -> None:
    assert run("health").exit_code == 0
    queue_server.report("ai4thai.queue.v1.QueueService", serving=False)
    result = run("health", "--json")
    assert result.exit_code == 1
    assert {name: answer["health"] for name, answer in lines_of(result)[0].items()} == {
        "vision": "SERVING",
        "queue": "NOT_SERVING",
    }
    assert "UNREACHABLE" in run("health", "--vision", "localhost:1").stdout


def test_info_and_stats(run: Run) -> None:
    told = run("info").stdout
    assert "vision server 9.9" in told and "fake-detector" in told and "A fake CPU" in told
    assert lines_of(run("info", "--json"))[0]["server"]["models"][0]["state"] == "READY"
    counted = run("stats").stdout
    assert "default" in counted and "here-1" in counted
    assert lines_of(run("stats", "--json"))[0]["stats"]["worker_count"] == 1


def test_help_and_version(run: Run) -> None:
    told = run("--help").stdout
    for command in (
        "up",
        "demo",
        "detect",
        "stream",
        "ask",
        "chat",
        "analyze",
        "submit",
        "jobs",
        "watch",
        "cancel",
        "health",
    ):
        assert command in told
    assert run("--version").stdout.startswith("ai4thai ")
    assert run("detect", "-h").exit_code == 0
    for command in ("detect", "ask", "chat", "bench", "up"):
        assert "[default: " in run(command, "-h").stdout
    assert "[default: 256]" in run("chat", "-h").stdout


def test_ctrl_c_stops_the_server_and_exits_with_130(
    image: Path, vision_server: FakeServer, fake_vision: FakeVision
) -> None:
    command = [sys.executable, "-m", "ai4thai.cli", "ask", str(image), "forever", "--vision", vision_server.address]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.read(5) == b"more "
        process.send_signal(signal.SIGINT)
        deadline_s = time.monotonic() + 20
        while process.poll() is None and time.monotonic() < deadline_s:
            process.stdout.read(65536)
        assert process.wait(5) == 130
        assert b"Traceback" not in process.stderr.read()
    assert fake_vision.left.wait(10)


def test_pixels_of_a_gif_are_read_like_any_file(run: Run, tmp_path: Path, fake_queue: FakeQueue) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.gif")
    assert run("submit", "detect", tmp_path / "a.gif").exit_code == 0
    assert fake_queue.script.requests["SubmitJob"].work.detect.images[0].content.startswith(b"GIF")
