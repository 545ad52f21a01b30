"""The processes as an operator starts them: `python -m queue_server`, `.worker`, `.broker`."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import redis

from queue_server.broker import Broker, BrokerRefused
from tests.ports import free_port
from tests.queue_server.conftest import ROOT, worker_environment

HEAVY = ("torch", "torchvision", "transformers", "ultralytics", "bitsandbytes", "numpy", "cv2", "pynvml", "PIL")


def get(url: str, body: object = None) -> tuple[int, str]:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def wait_for(url: str, wanted: int, timeout_s: float = 15) -> str:
    until_s = time.monotonic() + timeout_s
    while True:
        try:
            status, text = get(url)
        except OSError as error:
            status, text = 0, str(error)
        if status == wanted:
            return text
        assert time.monotonic() < until_s, f"{url}: {status} {text}"
        time.sleep(0.1)


def test_no_gpu_library_is_imported() -> None:
    # Given everything of the queue server and the worker that can be imported
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in (ROOT / "queue_server").rglob("*.py")
        if path.name != "__main__.py"
    ]
    assert {"queue_server.worker", "queue_server.service", "queue_server.work.detect"} <= set(modules)
    code = f"import sys, {', '.join(modules)}; print([name for name in {HEAVY!r} if name in sys.modules])"
    environment = {"PYTHONPATH": "clients:.", "PATH": "/usr/bin:/bin"}
    printed = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True, timeout=60
    )
    # Then none of the libraries that belong to the GPU has come along
    assert printed.stdout.strip() == "[]"


def test_the_whole_by_http_and_its_end(redis_url, vision, start_process) -> None:
    # Given a queue server and a worker as processes
    port = free_port()
    server = start_process("queue_server", REDIS_URL=redis_url, QUEUE_WORKER_PORT=str(port))
    worker = start_process("queue_server.worker", **worker_environment(redis_url, vision))
    base = f"http://127.0.0.1:{port}"
    wait_for(f"{base}/health", 200)
    # When a job is submitted in JSON
    status, text = get(f"{base}/v1/jobs", {"work": {"detect": {"images": [{"content": "b2s="}]}}, "requestId": "mine"})
    assert status == 200
    job_id = json.loads(text)["job"]["job_id"]
    lines = get(f"{base}/v1/jobs/{job_id}:watch")[1].splitlines()
    # Then its life comes line by line, and it shows in the statistics, the metrics and the log
    assert json.loads(lines[-1])["job"]["state"] == "JOB_STATE_SUCCEEDED"
    (stats,) = json.loads(get(f"{base}/queue/stats")[1])["queues"]
    assert stats["queue"] == "default"
    (listed,) = json.loads(get(f"{base}/v1/workers")[1])["workers"]
    assert f"-{worker.popen.pid}-" in listed["worker"]
    until_s = time.monotonic() + 10
    while 'ai4thai_queue_jobs_ended_total{kind="detect",queue="default",state="SUCCEEDED"} 1.0' not in (
        metrics := get(f"{base}/metrics")[1]
    ):
        assert time.monotonic() < until_s, metrics
        time.sleep(0.2)
    for line in (
        'ai4thai_queue_attempts_total{kind="detect",queue="default"} 1.0',
        'ai4thai_queue_depth{queue="default"} 0.0',
        'ai4thai_queue_job_seconds_bucket{kind="detect",le="+Inf",queue="default"} 1.0',
        'ai4thai_queue_job_seconds_count{kind="detect",queue="default"} 1.0',
        "ai4thai_queue_workers 1.0",
    ):
        assert line in metrics, metrics
    status, text = get(f"{base}/v1/jobs", {"work": {"video": {}}})
    assert (status, "INVALID_FIELD" in text) == (400, True)
    # And both stop in order when they are told to
    for process in (server, worker):
        process.kill(signal.SIGTERM)
    assert (server.wait(), worker.wait()) == (0, 0)
    assert worker.popen.stderr is not None and server.popen.stderr is not None
    moves = [json.loads(line) for line in worker.popen.stderr.read().splitlines() if job_id in line]
    assert [move["event"] for move in moves] == ["job RUNNING", "job SUCCEEDED"]
    assert all(move["client_request_id"] == "mine" for move in moves)
    assert '"job QUEUED"' in server.popen.stderr.read()


def test_both_start_while_redis_is_away(start_process, vision, tmp_path) -> None:
    # Given no Redis, when both are started
    redis_port, port = free_port(), free_port()
    url = f"redis://:hunter2@127.0.0.1:{redis_port}/0"
    server = start_process("queue_server", REDIS_URL=url, QUEUE_WORKER_PORT=str(port))
    start_process("queue_server.worker", **worker_environment(url, vision))
    base = f"http://127.0.0.1:{port}"
    wait_for(f"{base}/health/live", 200)
    # Then the server lives, is not ready, and answers submissions with 503 at once
    assert "redis" in wait_for(f"{base}/health", 503)
    began_s = time.monotonic()
    status, text = get(f"{base}/v1/jobs", {"work": {"detect": {"images": [{"content": "b2s="}]}}})
    assert status == 503 and "STORE_UNAVAILABLE" in text and time.monotonic() - began_s < 10
    assert "hunter2" not in text
    # And the password is in no line of the log
    server.kill(signal.SIGTERM)
    assert server.wait() == 0
    assert server.popen.stderr is not None
    assert "hunter2" not in server.popen.stderr.read()


def test_the_broker_prints_its_url_and_keeps_what_it_was_given(start_process, tmp_path) -> None:
    # Given a broker process
    process = start_process("queue_server.broker", "--port", "0", "--data-dir", str(tmp_path), "--max-memory", "32mb")
    assert process.popen.stdout is not None
    url = process.popen.stdout.readline().strip()
    with redis.Redis.from_url(url) as client:
        assert client.config_get("maxmemory-policy")["maxmemory-policy"] == "noeviction"
        assert client.config_get("appendonly")["appendonly"] == "yes"
        assert client.config_get("maxmemory")["maxmemory"] == str(32 << 20)
        client.set("kept", "yes")
    # When it is stopped by SIGTERM, and another one started in the same directory
    process.kill(signal.SIGTERM)
    assert process.wait() == 0
    with pytest.raises(redis.ConnectionError):
        redis.Redis.from_url(url).ping()
    broker = Broker(tmp_path, 0, "32mb")
    # Then what was written is there
    with redis.Redis.from_url(broker.start().url) as client:
        assert client.get("kept") == b"yes"
    broker.stop()


def test_one_directory_has_one_server(start_process, tmp_path) -> None:
    first = Broker(tmp_path, 0, "32mb")
    url = first.start().url
    try:
        # A second launcher uses the server that runs, and leaves it running
        process = start_process("queue_server.broker", "--port", "0", "--data-dir", str(tmp_path))
        assert process.popen.stdout is not None
        assert process.popen.stdout.readline().strip() == url
        process.kill(signal.SIGTERM)
        assert process.wait() == 0
        assert redis.Redis.from_url(url).ping()
        # Unless another port is wanted
        with pytest.raises(BrokerRefused, match="runs already"):
            Broker(tmp_path, free_port(), "32mb").start()
    finally:
        first.stop()


def test_a_server_that_outlived_its_launcher_is_adopted(start_process, tmp_path) -> None:
    # Given a launcher that was killed
    process = start_process("queue_server.broker", "--port", "0", "--data-dir", str(tmp_path))
    assert process.popen.stdout is not None
    url = process.popen.stdout.readline().strip()
    process.kill(signal.SIGKILL)
    process.wait()
    assert redis.Redis.from_url(url).ping()
    # When another is started, then it takes over the server and stops it at its own end
    broker = Broker(tmp_path, 0, "32mb")
    assert broker.start().url == url and broker.adopted and broker.owned
    broker.stop()
    with pytest.raises(redis.ConnectionError):
        redis.Redis.from_url(url).ping()


def test_a_taken_port_is_refused_with_a_cure(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(BrokerRefused, match="REDIS_URL"):
            Broker(tmp_path, other.getsockname()[1], "32mb").start()
    # And the directory is free again
    broker = Broker(tmp_path, 0, "32mb")
    broker.start()
    broker.stop()
