"""The edge, with the real Envoy and three vision servers: TLS, balancing, one killed or drained under load, its own end."""

from __future__ import annotations

import base64
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from ai4thai import VisionClient
from ai4thai.channel import open_channel
from ai4thai.vision.v1 import image_pb2, vision_service_pb2_grpc
from ai4thai.vision.v1 import vision_service_pb2 as pb
from grpc_health.v1 import health_pb2, health_pb2_grpc

from benchmarks.rehearsal_load import follow
from benchmarks.rehearsal_parts import EDGE, ROOT, Edge, Server, find_envoy, wait_until
from tests.delivery.composing import resolve
from tests.delivery.far_away import far_away
from tests.delivery.fleet import SCENE, Fleet, calling
from tests.ports import free_port
from tests.programs import needed

BIN = Path(sys.executable).parent
DETECT = "ai4thai.vision.v1.VisionService/Detect"


@pytest.fixture
def web(fleet: Fleet) -> Iterator[httpx.Client]:
    """The edge's vision door over HTTP/1.1."""
    trusted = ssl.create_default_context(cafile=str(fleet.certificates.authority))
    with httpx.Client(
        base_url=f"https://localhost:{fleet.edge.vision_port}", verify=trusted, timeout=60, trust_env=False
    ) as client:
        yield client


def streamed(door: str, fleet: Fleet, count: int, pause_s: float) -> tuple[list[int], int]:
    """The frames of a camera that were answered, and how often it had to move to another server."""
    with grpc.secure_channel(door.removeprefix("grpcs://"), fleet.credentials) as channel:
        return follow(channel, count, pause_s)


def streams_at(server: Server) -> int:
    """How many streams the server has."""
    metrics = httpx.get(f"http://{server.address}/metrics", trust_env=False, timeout=30).text
    (line,) = (line for line in metrics.splitlines() if line.startswith("ai4thai_streams "))
    return int(float(line.split()[1]))


def check(**env: str) -> subprocess.CompletedProcess[str]:
    """`edge.sh check`."""
    return subprocess.run(
        [EDGE, "check"], env={**os.environ, "ENVOY": find_envoy(), **env}, capture_output=True, text=True, timeout=60
    )


def test_the_committed_file_is_valid_with_its_own_addresses_and_with_others(tmp_path: Path) -> None:
    # Given nothing but a place to write, then addresses and ports
    others = {
        "EDGE_VISION": "10.0.0.1:2001,gpu-2.example:2001",
        "EDGE_QUEUE_PORT": "8443",
        "EDGE_MAX_CONNECTIONS": "99",
    }
    for env in ({}, others):
        # When Envoy reads it
        done = check(**{"EDGE_RUN_DIR": str(tmp_path)}, **env)
        # Then nothing is wrong with it, nor will be with the next version
        assert done.returncode == 0, done.stderr
        assert "OK" in done.stdout + done.stderr and "eprecated" not in done.stderr
    written = (tmp_path / "envoy.yaml").read_text()
    assert '{address: "gpu-2.example", port_value: 2001}' in written and "port_value: 8443" in written
    # And what cannot be meant is told by its name, before Envoy sees it
    for env in ({"EDGE_VISION": "vision"}, {"EDGE_QUEUE_PORT": "80 # x"}, {"EDGE_VISION": "b,a:1"}):
        refused = check(EDGE_RUN_DIR=str(tmp_path), **env)
        assert refused.returncode == 2 and next(iter(env.values())).split(",")[0] in refused.stderr


def test_the_same_calls_go_through_it_with_tls(fleet: Fleet, web: httpx.Client, tmp_path: Path) -> None:
    door, authority = f"localhost:{fleet.edge.vision_port}", str(fleet.certificates.authority)
    body = json.dumps({"image": {"content": base64.b64encode(SCENE.read_bytes()).decode()}})
    (tmp_path / "request.json").write_text(body)

    def said(*command: str, **env: str) -> str:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=60, env={**os.environ, **env}, input=body
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    # When grpcurl, curl (HTTP/2 and 1.1), the command line and the Python client call
    grpcurl = [str(BIN / "grpcurl"), "-cacert", authority]
    assert "ai4thai.vision.v1.VisionService" in said(*grpcurl, door, "list")
    assert '"star"' in said(*grpcurl, "-d", "@", door, DETECT)
    post = ["-H", "content-type: application/json", "-d", f"@{tmp_path / 'request.json'}"]
    for version in ("--http2", "--http1.1"):
        curl = [needed("curl"), "-sS", "--noproxy", "*", version, "--cacert", authority]
        assert "star" in said(*curl, *post, f"https://{door}/v1/vision:detect")
        assert json.loads(said(*curl, f"https://{door}/health"))["status"] == "SERVING"
    trusting = {"AI4THAI_VISION_ADDRESS": f"grpcs://{door}", "GRPC_DEFAULT_SSL_ROOTS_FILE_PATH": authority}
    assert "star" in said(str(BIN / "ai4thai"), "detect", str(SCENE), **trusting)
    # Then their ids and traces reach the server's log
    trace = "4bf92f3577b34da6a3ce929d0e0e4736"
    with VisionClient(fleet.vision, credentials=fleet.credentials) as client:
        assert {found.label for found in client.detect(SCENE).detections} >= {"star", "circle"}
    answer = web.post(
        "/v1/vision:detect",
        content=body,
        headers={"x-request-id": "mine-1", "traceparent": f"00-{trace}-00f067aa0ba902b7-01"},
    )
    assert answer.headers["x-request-id"] == "mine-1"

    def lines() -> list[dict[str, Any]]:
        return [line for one in fleet.servers for line in one.events("call ended", request_id="mine-1", trace_id=trace)]

    wait_until("the server's line", lambda: len(lines()) == 1)
    # And the edge's own line has who called, and which server answered
    wait_until("the edge's line", lambda: fleet.edge.events("call", request_id="mine-1"), 20)
    (line,) = fleet.edge.events("call", request_id="mine-1")
    assert line["server"] in {one.address for one in fleet.servers} and line["caller"].startswith("127.0.0.1:")
    assert line["status"] == 200 and trace in line["traceparent"]


def test_what_is_not_for_the_outside_stays_inside(fleet: Fleet, web: httpx.Client) -> None:
    # Given callers without TLS, and with another authority
    door = f"localhost:{fleet.edge.vision_port}"
    with pytest.raises(httpx.HTTPError):
        httpx.get(f"http://{door}/health", trust_env=False)
    with pytest.raises(httpx.ConnectError, match="certificate"):
        httpx.get(f"https://{door}/health", trust_env=False)
    old = ssl.create_default_context(cafile=str(fleet.certificates.authority))
    old.maximum_version = ssl.TLSVersion.TLSv1_1
    with socket.create_connection(("localhost", fleet.edge.vision_port)) as sock, pytest.raises(ssl.SSLError):
        old.wrap_socket(sock, server_hostname="localhost")
    # And one who asks for the servers' counters: the answer has the form of every error
    answer = web.get("/metrics")
    assert answer.status_code == 404 and answer.json()["error"]["status"] == "NOT_FOUND"
    # Then those inside get the edge's own, and whether it is ready
    inside = f"http://127.0.0.1:{fleet.edge.inside_port}"
    assert httpx.get(f"{inside}/ready", trust_env=False).status_code == 200
    assert (
        'envoy_cluster_membership_healthy{envoy_cluster_name="vision_grpc"} 3'
        in httpx.get(f"{inside}/metrics", trust_env=False).text
    )
    assert httpx.get(f"{inside}/quitquitquit", trust_env=False).status_code == 404


def composed(**env: str) -> dict[str, Any]:
    """The services of the platform's compose file with the edge's."""
    done = resolve("-f", "compose.yaml", "-f", "deploy/envoy/compose.yaml", environment=env)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout)["services"])


def test_the_container_add_on_takes_a_folder_beside_it_and_ports_from_the_platforms_settings() -> None:
    edge = composed(EDGE_TLS_DIR="tls", VISION_SERVICE_PORT="3001", QUEUE_WORKER_PORT="3003")["edge"]
    assert {(port["published"], port["target"]) for port in edge["ports"]} == {("3001", 2001), ("3003", 2003)}
    assert (edge["environment"]["EDGE_VISION"], edge["environment"]["EDGE_QUEUE"]) == ("vision:3001", "queue:3003")
    mounted = {volume["target"]: volume for volume in edge["volumes"]}["/etc/envoy/tls"]
    assert (mounted["type"], mounted["source"], mounted["read_only"]) == ("bind", str(ROOT / "tls"), True)


def test_the_container_add_on_publishes_the_edge_alone_and_its_health_check_works(fleet: Fleet) -> None:
    # Given the platform's compose file with the edge's
    services = composed(EDGE_TLS_DIR="/certificates")
    # Then only the edge's two doors are published, and it looks for servers where they are
    assert {
        name: [port["target"] for port in one.get("ports", [])] for name, one in services.items() if one.get("ports")
    } == {"edge": [2001, 2003]}
    assert services["edge"]["environment"]["EDGE_VISION"] == "vision:2001"
    # It is the version that is tested here
    version = subprocess.run([find_envoy(), "--version"], capture_output=True, text=True, check=True).stdout
    assert services["edge"]["image"].rpartition(":v")[2] in version
    # And its health check, run against this edge, tells the ready from those that are not
    kind, *command = services["edge"]["healthcheck"]["test"]
    assert kind == "CMD"
    for port, healthy in ((fleet.edge.inside_port, True), (fleet.edge.vision_port, False), (1, False)):
        asked = [part.replace("/9902", f"/{port}") for part in command]
        assert (subprocess.run(asked, capture_output=True, timeout=30).returncode == 0) is healthy


def test_three_servers_share_the_calls_and_nobody_there_is_told_at_once(fleet: Fleet) -> None:
    before = fleet.edge.served("vision_grpc")
    # When many call at once, over one connection
    with VisionClient(fleet.vision, credentials=fleet.credentials) as client, ThreadPoolExecutor(12) as pool:
        assert len(list(pool.map(client.detect, [SCENE] * 60))) == 60
    # Then each server had its part
    after = fleet.edge.served("vision_grpc")
    assert all(after[one.address] - before.get(one.address, 0) >= 10 for one in fleet.servers), (before, after)
    # And where no server is ready (no queue server runs), callers hear of it in their own language
    with grpc.secure_channel(f"localhost:{fleet.edge.queue_port}", fleet.credentials) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        with pytest.raises(grpc.RpcError) as refused:
            stub.Check(health_pb2.HealthCheckRequest(), timeout=30)
    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
    assert "no healthy upstream" in refused.value.details()
    trusted = ssl.create_default_context(cafile=str(fleet.certificates.authority))
    answer = httpx.get(f"https://localhost:{fleet.edge.queue_port}/queue/stats", verify=trusted, trust_env=False)
    assert answer.status_code == 503 and answer.json()["error"]["status"] == "UNAVAILABLE"


def test_a_message_that_is_too_large_is_refused_and_troubles_nobody(fleet: Fleet, web: httpx.Client) -> None:
    huge = bytes(66 << 20)
    with calling(fleet, clients=1, bare=1) as load:
        with grpc.secure_channel(
            f"localhost:{fleet.edge.vision_port}",
            fleet.credentials,
            options=[("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)],
        ) as channel:
            stub: Any = vision_service_pb2_grpc.VisionServiceStub(channel)
            with pytest.raises(grpc.RpcError) as refused:
                stub.Detect(pb.DetectRequest(image=image_pb2.Image(content=huge)), timeout=90)
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        answer = web.post("/v1/vision:detect", content=huge, headers={"content-type": "application/json"})
        assert answer.json()["error"]["status"] == "RESOURCE_EXHAUSTED"
        load.wait_for_more(4)
    assert not load.failures and not load.bare_failures
    # Refusals are no reason to put a server aside
    assert len(fleet.serving()) == 3


def test_a_caller_on_another_continent_connects_at_the_first_try(fleet: Fleet) -> None:
    # Given a line on which a TLS handshake takes well over half a second
    # When a client calls that repeats nothing
    with (
        far_away(fleet.edge.vision_port, one_way_s=0.2) as port,
        open_channel(f"grpcs://localhost:{port}", credentials=fleet.credentials, retries=False) as channel,
    ):
        stub: Any = vision_service_pb2_grpc.VisionServiceStub(channel)
        # Then its first call is answered
        assert stub.GetServerInfo(pb.GetServerInfoRequest(), timeout=60).version


def test_a_server_killed_under_load_costs_no_client_a_call(fleet: Fleet) -> None:
    fleet.wait_until_whole()
    victim = fleet.servers[0]
    bare_callers = 3
    with calling(fleet, clients=3, bare=bare_callers) as load:
        load.wait_for_more(20)
        # When it is killed in the middle
        victim.kill()
        # Then it gets no more calls, and the others are answered as before
        wait_until("it is put aside", lambda: victim.address not in fleet.serving())
        load.wait_for_more(20)
        # And when it is back it has its part again
        victim.start()
        victim.wait_until_ready()
        wait_until("it is back", lambda: victim.address in fleet.serving())
        before = fleet.edge.served("vision_grpc")[victim.address]
        wait_until("it gets calls", lambda: fleet.edge.served("vision_grpc")[victim.address] > before, 60)
    # The client's retries cover what was in flight; without them it is at most that, one call of each such caller
    assert load.failures == []
    assert len(load.bare_failures) <= bare_callers, load.bare_failures


def test_a_server_that_drains_answers_all_it_has_been_sent_and_leaves(fleet: Fleet) -> None:
    fleet.wait_until_whole()
    leaving = fleet.servers[1]
    with calling(fleet) as load, ThreadPoolExecutor(9) as pool:
        load.wait_for_more(10)
        # Given nine cameras, whose streams lie on all three servers
        streams = [pool.submit(streamed, fleet.vision, fleet, 40, 0.2) for _ in range(9)]
        wait_until("they run", lambda: sum(map(streams_at, fleet.servers)) == 9)
        # When one is told to stop
        began_s = time.monotonic()
        code = leaving.stop(90)
        took_s = time.monotonic() - began_s
        leaving.start()
        cameras = [stream.result(90) for stream in streams]
    # Then it has answered what it had been sent, and has not waited for those who only watch its health
    assert code == 0 and took_s < 25, f"it took {took_s:.0f} s of its 30: something was held open"
    assert all(answered == list(range(40)) for answered, _ in cameras)
    # Its cameras moved to others in order, the others never
    assert 1 <= sum(moves for _, moves in cameras) <= 6
    # And no caller has noticed
    assert load.failures == [] and load.bare_failures == []


def test_a_renewed_certificate_is_taken_up_without_a_restart(fleet: Fleet) -> None:
    trusted = ssl.create_default_context(cafile=str(fleet.certificates.authority))

    def subject() -> Any:
        with (
            socket.create_connection(("localhost", fleet.edge.vision_port)) as sock,
            trusted.wrap_socket(sock, server_hostname="localhost") as wrapped,
        ):
            return dict(pair[0] for pair in wrapped.getpeercert()["subject"])["commonName"]

    assert subject() == "edge"
    with calling(fleet, clients=1, bare=1) as load:
        # When a new one is moved into place
        fleet.certificates.renew(fleet.tls, "renewed")
        # Then new callers see it, and nobody is cut off
        wait_until("the new certificate", lambda: subject() == "renewed")
        load.wait_for_more(4)
    assert load.failures == [] and load.bare_failures == []


def test_an_edge_that_is_stopped_lets_running_calls_end(fleet: Fleet, tmp_path: Path) -> None:
    # Given a second edge before the same servers, with a stream through it
    other = Edge(
        tmp_path,
        fleet.tls,
        ports=[free_port() for _ in range(4)],
        vision=[one.address for one in fleet.servers],
        env={"EDGE_UNREADY_SECONDS": "4"},
    )
    other.start()
    try:
        wait_until("it has found a server", lambda: other.healthy("vision_grpc"))
        door = f"grpcs://localhost:{other.vision_port}"
        with ThreadPoolExecutor(1) as pool:
            stream = pool.submit(streamed, door, fleet, 25, 0.2)
            wait_until("the stream runs", lambda: other.count("http.vision.downstream_rq_active") >= 1)
            # When it is told to stop, then at first it says that it is not ready, and still takes calls
            ready = f"http://127.0.0.1:{other.inside_port}/ready"
            other.send(signal.SIGTERM)
            wait_until("it says so", lambda: httpx.get(ready, trust_env=False).status_code == 503)
            with grpc.secure_channel(door.removeprefix("grpcs://"), fleet.credentials) as channel:
                stub: Any = vision_service_pb2_grpc.VisionServiceStub(channel)
                assert stub.GetServerInfo(pb.GetServerInfoRequest(), timeout=60).version
            # Then the stream comes to its own end, and the edge leaves in order
            assert stream.result(60) == (list(range(25)), 0)
        assert other.wait(30) == 0
        assert "0 calls are cut" in other.text()
    finally:
        other.kill()
