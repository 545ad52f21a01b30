"""`ai4thai doctor` about what a machine talks to: ports, servers, clocks, secrets, models (Redis: test_doctor_redis.py)."""

from __future__ import annotations

import os
import socket
import time
from contextlib import ExitStack
from email.utils import formatdate
from pathlib import Path

import pytest
from ai4thai.doctor import examination, servers

from tests.clients.asking_doctor import TOKEN, Ask, ask
from tests.clients.doctor_doubles import health_of, web_server
from tests.ports import free_port
from tests.queue_server.redis_servers import Server, make_certificates

__all__ = ["ask"]  # a fixture
VISION = "ai4thai.vision.v1.VisionService"
QUEUE = "ai4thai.queue.v1.QueueService"


# ---- ports and servers


def ports(**taken: int) -> dict[str, str]:
    names = {"vision": "VISION_SERVICE_PORT", "queue": "QUEUE_WORKER_PORT", "redis": "REDIS_PORT"}
    return {"SERVING_HOST": "127.0.0.1"} | {names[name]: str(taken.get(name) or free_port()) for name in names}


def test_free_ports(ask: Ask) -> None:
    told = ask("ports", **ports())
    assert [one["level"] for one in told.findings] == ["ok"] * 3 and told.exit_code == 0


def test_a_port_that_a_stranger_has(ask: Ask) -> None:
    with socket.create_server(("127.0.0.1", 0)) as stranger:
        port = int(stranger.getsockname()[1])
        told = ask("ports", **ports(vision=port))
        told.failure("ports", f"{port} (vision): taken by process {os.getpid()} (", "VISION_SERVICE_PORT")
        assert len([one for one in told.findings if one["level"] == "ok"]) == 2
        ask("ports", **ports(redis=port)).failure("ports", f"{port} (redis): taken by process", "REDIS_PORT")


def test_a_port_that_is_none(ask: Ask) -> None:
    ask("ports", **ports(queue=99999)).failure(
        "ports", "99999 (queue): is no port", "Set QUEUE_WORKER_PORT to 1024 – 65535"
    )


def test_ports_that_are_ours(ask: Ask, tmp_path: Path) -> None:
    answers = {"/health/detailed": (200, {}, health_of(QUEUE))}
    with web_server(answers) as ours, ExitStack() as stack:
        redis = Server(tmp_path / "redis", "--requirepass", "s3cret")
        stack.callback(redis.stop)
        port = int(ours.rpartition(":")[2])
        told = ask("ports", **ports(queue=port, redis=redis.port))
        told.ok("ports", f"{port} (queue): ours listens there")
        told.ok("ports", f"{redis.port} (redis): ours listens there")
        ask("ports", **ports(vision=port)).failure(
            "ports", f"{port} (vision): taken by our queue server", "another port"
        )


def test_a_server_that_loads_and_one_that_is_ready(ask: Ask) -> None:
    models = [
        {"name": "yolo11s.pt", "state": "MODEL_STATE_READY", "load_progress": 1.0},
        {"name": "llava", "state": "MODEL_STATE_LOADING", "load_progress": 0.4},
    ]
    answers = {
        "/health/detailed": (503, {}, health_of(VISION, "NOT_SERVING", why=["models: loading: llava"])),
        "/info": (200, {}, {"models": models}),
    }
    with web_server(answers) as address:
        told = ask("servers", "--vision", address)
        told.warning("servers", "loading llava (40%)", "5 to 10 minutes")
        assert told.exit_code == 0
    with web_server({"/health/detailed": (200, {}, health_of(VISION))}) as address:
        ask("servers", "--vision", address).ok("servers", f"vision {address}: SERVING")


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tls")
    make_certificates(folder)
    return folder


def test_the_certificate_of_an_edge(ask: Ask, certificates: Path) -> None:
    health = {"/health/detailed": (200, {}, health_of(VISION))}
    with web_server(health, certificate=certificates / "server") as place:
        address = f"grpcs://{place.replace('localhost', '127.0.0.1')}"
        told = ask("servers", "--vision", address)
        told.failure("servers", "the certificate is refused: unable to get local issuer", "SSL_CERT_FILE")
        told = ask("servers", "--vision", address, GRPC_DEFAULT_SSL_ROOTS_FILE_PATH=str(certificates / "ca.pem"))
        told.warning("servers", "the certificate ends in 2 days", "Renew it now")
        told.ok("servers", f"{address}: SERVING")
    with web_server(health) as place:
        ask("servers", "--vision", f"grpcs://{place}").failure("servers", "no TLS", "grpc:// (plain)")


def test_a_server_that_does_not_serve_says_why(ask: Ask) -> None:
    why = ["redis: Redis answers nothing"]
    loaded = {"name": "yolo", "state": "MODEL_STATE_FAILED", "is_default": True, "state_reason": "no such file"}
    answers = {
        "/health/detailed": (503, {}, health_of(VISION, "NOT_SERVING", why=why)),
        "/info": (200, {}, {"models": [loaded, {"name": "llava", "state": "MODEL_STATE_LOADING"}]}),
    }
    with web_server(answers) as address:
        told = ask("servers", "--vision", address)
        told.failure("servers", "NOT_SERVING: redis: Redis answers nothing", "docs/operations.md")
        told = ask("servers", "--queue", address)
        told.failure("servers", "it is not the queue server that answers there", "AI4THAI_QUEUE_ADDRESS")


def test_a_server_that_warns_or_is_stopping(ask: Ask) -> None:
    checks = {
        "workers": {"status": "WARNING", "detail": "no worker is alive"},
        "media": {"status": "NOT_OK", "detail": "no such bucket"},
    }
    with web_server({"/health/detailed": (200, {}, health_of(QUEUE, checks=checks))}) as address:
        told = ask("servers", "--queue", address)
        told.warning("servers", "no worker is alive", "As it says")
        told.warning("servers", "its check media: no such bucket", "As it says")
        assert told.exit_code == 0
    with web_server({"/health/detailed": (503, {}, health_of(QUEUE, "NOT_SERVING", draining=True))}) as address:
        ask("servers", "--queue", address).warning("servers", "it is stopping", "Wait")


def test_a_server_that_was_named_and_does_not_answer(ask: Ask) -> None:
    port = free_port()
    told = ask("servers", "--queue", f"localhost:{port}")
    told.failure("servers", f"queue localhost:{port}", "AI4THAI_QUEUE_ADDRESS")
    told = ask("servers", QUEUE_VISION_ADDRESS=f"localhost:{port}")
    told.failure("servers", f"vision localhost:{port}", "QUEUE_VISION_ADDRESS")
    ask("servers", "--queue", "http://here").failure("servers", "begins with http://", "AI4THAI_QUEUE_ADDRESS")
    ask("servers", "--queue", "unix:/tmp/queue.sock").ok("servers", "no address for HTTP")


@pytest.fixture
def nobody_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever runs on this machine, the usual addresses are free."""
    real = servers.ask_health

    def ask_health(url: str) -> servers.Answer:
        return servers.Answer(problem="refused", is_away=True) if url[-5:] in (":2001", ":2003") else real(url)

    monkeypatch.setattr(servers, "ask_health", ask_health)
    monkeypatch.setattr(examination, "CHECKS", {"servers": servers.check_servers})


@pytest.mark.usefixtures("nobody_here")
def test_a_server_that_is_away_where_nobody_said_that_it_is_there(ask: Ask) -> None:
    told = ask()
    told.ok("servers", "vision localhost:2001: nothing answers; none is started here")
    told.ok("servers", "queue localhost:2003: nothing answers; none is started here")
    with web_server({"/health/detailed": (200, {}, health_of(VISION))}) as vision:
        told = ask("servers", QUEUE_VISION_ADDRESS=vision)
    told.ok("servers", f"vision {vision}: SERVING")
    told.ok("servers", "queue localhost:2003: nothing answers")


@pytest.mark.usefixtures("nobody_here")
def test_a_server_that_was_asked_for_is_to_be_there_at_the_usual_address_too(ask: Ask) -> None:
    told = ask("servers")
    told.failure("servers", "vision localhost:2001: refused", "AI4THAI_VISION_ADDRESS")
    told.failure("servers", "queue localhost:2003: refused", "AI4THAI_QUEUE_ADDRESS")
    ask(AI4THAI_QUEUE_ADDRESS="localhost:2003").failure("servers", "queue localhost:2003: refused", "ai4thai up")
    ask("--vision", "localhost:2001").failure("servers", "vision localhost:2001: refused", "ai4thai up")
    ask(QUEUE_VISION_ADDRESS="localhost:2001").failure("servers", "vision localhost:2001: refused", "ai4thai up")


# ---- clock


def test_a_clock_that_a_server_does_not_share(ask: Ask) -> None:
    answers = {"/health/detailed": (200, {"date": formatdate(time.time() + 30, usegmt=True)}, health_of(VISION))}
    with web_server(answers) as address:
        ask("clock", "--vision", address).warning("clock", "s ahead of this machine's", "set-ntp")


# ---- secrets


def test_secrets_that_cannot_be_used(ask: Ask, tmp_path: Path) -> None:
    missing = str(tmp_path / "nowhere")
    ask("secrets", AI4THAI_SECRETS_DIR=missing).failure("secrets", "no directory", "unset AI4THAI_SECRETS_DIR")
    (tmp_path / "hf_token").mkdir()
    (tmp_path / "redis_password").write_text("")
    told = ask("secrets", AI4THAI_SECRETS_DIR=str(tmp_path), QUEUE_WEBHOOK_SECRET="s3cret")
    told.failure("secrets", "hf_token cannot be read", "chmod")
    told.ok("secrets", "redis_password (empty)")
    told.failure("secrets", "QUEUE_WEBHOOK_SECRET is not `whsec_`", "openssl rand -base64 32")


# ---- models


def test_models_that_are_here(ask: Ask, tmp_path: Path) -> None:
    models = tmp_path / "data" / "models"
    (models / "typhoon").mkdir(parents=True)
    (models / "cams.pt").write_text("")
    (tmp_path / "hub/hub/models--llava-hf--llava/snapshots/1").mkdir(parents=True)
    (tmp_path / "hub/hub/models--llava-hf--llava/snapshots/1/config.json").write_text("{}")

    told = ask("models", "disk", VISION_DETECTOR="cams.pt, shapes-detector", VISION_DESCRIBER="typhoon,llava-hf/llava")

    told.ok("models", f"cams.pt: in {models}")
    told.ok("models", "shapes-detector: included")
    told.ok("models", f"typhoon: in {models}")
    told.ok("models", "llava-hf/llava: in the hub's cache")
    told.ok("disk", "the hub's cache")


def test_models_that_are_not_here_and_may_not_be_fetched(ask: Ask) -> None:
    told = ask("models", VISION_DETECTOR="yolo11s.pt", VISION_DESCRIBER="a/b", VISION_OFFLINE="true")
    told.failure("models", "yolo11s.pt: not in", "Put its file into")
    told.failure("models", "a/b: not on this machine, and VISION_OFFLINE is set", "Unset VISION_OFFLINE")
    told = ask("models", VISION_DESCRIBER="a/b", HF_HUB_OFFLINE="1")
    told.failure("models", "a/b: not on this machine, and HF_HUB_OFFLINE is set", "Unset HF_HUB_OFFLINE")


def test_the_hub_is_asked_with_the_token(ask: Ask, tmp_path: Path) -> None:
    asked: list[tuple[str, dict[str, str]]] = []
    answers = {
        "/a/public/resolve/main/config.json": (307, {"location": "/elsewhere"}, {}),
        "/a/gated/resolve/main/config.json": (401, {"x-error-code": "GatedRepo"}, {}),
        "/a/typo/resolve/main/config.json": (401, {"x-error-code": "RepoNotFound"}, {}),
    }
    with web_server(answers, asked) as hub:
        names = {"VISION_DESCRIBER": "a/public,a/gated,a/typo", "HF_ENDPOINT": f"http://{hub}"}
        told = ask("models", **names, HF_TOKEN=TOKEN)
        told.ok("models", "a token from HF_TOKEN")
        told.ok("models", f"a/public: on http://{hub}")
        told.failure("models", "a/gated: gated", f"Accept its terms at http://{hub}/a/gated")
        told.failure("models", "a/typo: there is no such model", "Look at the name")
        assert {headers["authorization"] for _, headers in asked} == {f"Bearer {TOKEN}"}

        told = ask("models", **names, HF_TOKEN_PATH=str(tmp_path / "nowhere"))
        told.failure("models", f"HF_TOKEN_PATH is {tmp_path / 'nowhere'}", "Correct it")
        told.failure("models", "a/gated: gated", "set HF_TOKEN")


def test_a_hub_that_cannot_be_reached(ask: Ask) -> None:
    told = ask("models", VISION_DESCRIBER="a/b", HF_ENDPOINT=f"http://127.0.0.1:{free_port()}")
    told.failure("models", "cannot be reached", "hf download a/b")
    told.ok("models", "no HF_TOKEN")


def test_a_describer_on_another_server(ask: Ask) -> None:
    answers = {"/v1/models": (200, {}, {"data": []}), "/closed/models": (401, {}, {})}
    with web_server(answers) as other:
        names = f"openai+http://{other}/v1,closed=openai+http://{other}/closed#m,no=openai+http://{other}"
        told = ask("models", VISION_DESCRIBER=names)
        told.ok("models", f"openai+http://{other}/v1: answers")
        told.failure("models", "it refuses the key", "VISION_REMOTE_API_KEY")
        told.failure("models", "answers HTTP 404", "/v1")
