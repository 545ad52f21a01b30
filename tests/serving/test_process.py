"""A server process from start to end: drains on SIGTERM, leaves at once on the second signal."""

from __future__ import annotations

import signal
import socket
import time
from pathlib import Path

import grpc
import httpx
import pytest
from ai4thai.vision.v1 import vision_service_pb2 as pb
from ai4thai.vision.v1 import vision_service_pb2_grpc as rpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from serving.settings import ServingSettings, describe
from tests.processes import ServerProcess


def test_sigterm_lets_a_running_stream_end_and_exits_0() -> None:
    with ServerProcess("tests.serving.echo_server", "0", env={"SERVING_UNREADY_SECONDS": "4"}) as server:
        with grpc.insecure_channel(server.address) as channel:
            request = pb.GenerateRequest()
            request.options.max_new_tokens = 100  # 5 s
            running = rpc.VisionServiceStub(channel).Generate(request)
            watch = health_pb2_grpc.HealthStub(channel).Watch(
                health_pb2.HealthCheckRequest(service="ai4thai.vision.v1.VisionService")
            )
            next(running)
            assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
            counting = {"options": {"max_new_tokens": 100}}
            with (
                httpx.Client(base_url=f"http://{server.address}") as client,
                client.stream("POST", "/v1/vision:generate", json=counting) as web,
            ):
                lines = web.iter_lines()
                next(lines)
                server.signal(signal.SIGTERM)
                # Not ready comes before not accepting.
                assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
                health = client.get("/health")
                assert (health.status_code, health.json()["why"]) == (503, ["The server is shutting down."])
                assert client.get("/health/live").status_code == 200
                assert list(running)[-1].summary.text == "สรุป 100"
                assert "สรุป 100" in list(lines)[-1]
        assert server.wait() == 0
    assert "stopped in order\n" in server.lines


def test_a_second_signal_leaves_at_once() -> None:
    with ServerProcess("tests.serving.echo_server", "0") as server, grpc.insecure_channel(server.address) as channel:
        request = pb.GenerateRequest()
        request.options.max_new_tokens = 600
        running = rpc.VisionServiceStub(channel).Generate(request)
        next(running)
        server.signal(signal.SIGTERM)
        server.wait_for("draining")
        began_s = time.monotonic()
        server.signal(signal.SIGTERM)
        assert server.wait() == 128 + signal.SIGTERM
        assert time.monotonic() - began_s < 5
        with pytest.raises(grpc.RpcError):
            list(running)


def test_a_process_that_cannot_go_on_ends_to_be_started_again() -> None:
    with ServerProcess("tests.serving.echo_server", "0") as server, grpc.insecure_channel(server.address) as channel:
        stub = rpc.VisionServiceStub(channel)
        running = stub.Generate(pb.GenerateRequest(options={"max_new_tokens": 20}), timeout=30)
        next(running)
        # When a fault has come that only a new process mends
        stub.Analyze(pb.AnalyzeRequest(question="lost"), timeout=30)
        # Then what runs comes to its end, and the exit code says that this was no wish of the operator
        assert list(running)[-1].summary.text == "สรุป 20"
        assert server.wait() == 1
    assert "stopped in order\n" in server.lines


def test_a_process_that_hangs_on_its_way_out_leaves_all_the_same() -> None:
    env = {"SERVING_UNREADY_SECONDS": "0", "SERVING_DRAIN_SECONDS": "1"}
    with (
        ServerProcess("tests.serving.echo_server", "0", env=env) as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        rpc.VisionServiceStub(channel).Analyze(pb.AnalyzeRequest(question="lost and stuck"), timeout=30)
        assert server.wait() == 1
    assert "stopped in order\n" not in server.lines
    assert any("echo_server.py" in line and "in stop" in line for line in server.lines), "what it hung in"


def test_a_taken_port_is_told_and_exits_1() -> None:
    with socket.create_server(("0.0.0.0", 0)) as taken:
        with ServerProcess("tests.serving.echo_server", str(taken.getsockname()[1])) as server:
            assert server.wait() == 1
        assert any("cannot listen" in line for line in server.lines)


def test_a_temporary_directory_with_too_long_a_path_is_told_and_exits_1(tmp_path: Path) -> None:
    long = tmp_path / ("x" * 100)
    long.mkdir()
    with ServerProcess("tests.serving.echo_server", "0", env={"TMPDIR": str(long)}) as server:
        assert server.wait() == 1
    assert any("too long for a Unix socket" in line and "Set TMPDIR" in line for line in server.lines)


def test_settings_are_shown_without_secrets() -> None:
    from pydantic import Field, SecretStr

    class Settings(ServingSettings):
        url: str = "redis://user:hunter2@host:6379/0"
        token: SecretStr = Field(SecretStr("hunter2"))

    shown = describe(Settings())
    assert shown["url"] == "redis://user:***@host:6379/0"
    assert shown["token"] == "***"
    assert "hunter2" not in str(shown)
