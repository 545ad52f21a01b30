"""`ai4thai doctor` about what a machine talks to: ports, servers, Redis, clocks, secrets, models."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from email.utils import formatdate
from pathlib import Path

import pytest

from tests.clients.asking_doctor import TOKEN, Ask, ask
from tests.clients.doctor_doubles import bulk, health_of, redis_in_shape, web_server
from tests.queue_server.redis_servers import Server, free_port, make_certificates

__all__ = ["ask"]  # a fixture
VISION = "ai4thai.vision.v1.VisionService"
QUEUE = "ai4thai.queue.v1.QueueService"
KEPT = ("--appendonly", "yes", "--appendfsync", "everysec", "--maxmemory", "64mb", "--save", "")


@contextmanager
def redis_server(folder: Path, *arguments: str) -> Iterator[Server]:
    server = Server(folder / f"redis-{free_port()}", *arguments)
    try:
        yield server
    finally:
        server.stop()


def url_of(server: Server, userinfo: str = "") -> str:
    return f"redis://{userinfo}127.0.0.1:{server.port}/0"


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
    with web_server(answers) as ours, redis_server(tmp_path, "--requirepass", "s3cret") as redis:
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


# ---- Redis


def test_a_redis_as_it_should_be(ask: Ask, tmp_path: Path) -> None:
    with redis_server(tmp_path, *KEPT, "--requirepass", "s3cret") as server:
        told = ask("redis", "clock", REDIS_URL=url_of(server), REDIS_PASSWORD="s3cret")
        told.ok("redis", f"127.0.0.1:{server.port}/0: Valkey")
        told.ok("redis", "noeviction")
        told.ok("redis", "append-only file on, appendfsync everysec")
        told.ok("clock", "as that of Redis")
        assert told.exit_code == 0

        secrets = tmp_path / "secrets"
        secrets.mkdir()
        (secrets / "redis_password").write_text("s3cret\n")
        told = ask("redis", "secrets", REDIS_URL=url_of(server), AI4THAI_SECRETS_DIR=str(secrets))
        told.ok("secrets", "redis_password")
        assert told.exit_code == 0

        wrong = ask("redis", REDIS_URL=url_of(server, ":s3cretly@"))
        wrong.failure("redis", "the password is wrong", "REDIS_PASSWORD")
        ask("redis", REDIS_URL=url_of(server)).failure(
            "redis", "it wants a password, and none is set", "redis_password"
        )


def test_a_redis_that_keeps_nothing_and_throws_jobs_away(ask: Ask, tmp_path: Path) -> None:
    with redis_server(tmp_path, "--save", "", "--maxmemory-policy", "allkeys-lru") as server:
        told = ask("redis", REDIS_URL=url_of(server))
        told.failure("redis", "maxmemory-policy is allkeys-lru", "maxmemory-policy noeviction")
        told.warning("redis", "appendonly is no: it keeps nothing on disk", "appendonly yes")
        told.warning("redis", "no maxmemory", "maxmemory 4gb")


def test_a_redis_whose_memory_is_full_or_that_is_a_replica(ask: Ask, tmp_path: Path) -> None:
    with redis_server(tmp_path, *KEPT) as server, server.client() as client:
        client.eval("for i = 1, 200 do redis.call('set', i, string.rep('x', 50000)) end", 0)
        client.config_set("maxmemory", int(client.info()["used_memory"] * 1.05))
        client.config_set("appendfsync", "no")
        told = ask("redis", REDIS_URL=url_of(server))
        told.failure("redis", "new jobs are refused", "ai4thai queue purge")
        told.warning("redis", "appendfsync is no", "appendfsync everysec")
        client.replicaof("127.0.0.1", str(free_port()))
        ask("redis", REDIS_URL=url_of(server)).failure("redis", "it is a replica of 127.0.0.1:", "redis+sentinel://")


def test_no_redis(ask: Ask) -> None:
    port = free_port()
    ask("redis", REDIS_PORT=str(port)).ok("redis", "nothing answers; ai4thai up brings its own")
    told = ask("redis", REDIS_URL=f"redis://user:s3cret@127.0.0.1:{port}/0")
    told.failure("redis", "Connection refused", "docker compose ps redis")
    ask("redis", REDIS_URL="redis://:a/b@host").failure("redis", "cannot be read", "%2F for /")


def test_a_redis_that_hangs(ask: Ask, tmp_path: Path) -> None:
    with redis_server(tmp_path) as server:
        os.kill(server.process.pid, signal.SIGSTOP)
        try:
            told = ask("redis", REDIS_URL=url_of(server))
        finally:
            os.kill(server.process.pid, signal.SIGCONT)
        told.failure("redis", "takes connections, but does not answer", "docker compose restart redis")


def test_an_old_redis_with_another_clock_that_cannot_write(ask: Ask) -> None:
    info = "redis_version:5.0.7\r\nrole:master\r\naof_enabled:1\r\naof_last_write_status:err\r\nrdb_last_bgsave_status:err\r\n"
    behind_s = int(time.time()) - 600
    replies = {
        "INFO": bulk(info),
        "PING": b"+PONG\r\n",
        "TIME": b"*2\r\n" + bulk(str(behind_s)) + bulk("0"),
        "CONFIG": b"-NOPERM this user has no permissions\r\n",
    }
    with redis_in_shape(replies) as port:
        told = ask("redis", "clock", REDIS_URL=f"redis://127.0.0.1:{port}/0?protocol=2")
        told.failure("redis", "Redis 5.0.7 is too old", "6.2 or newer")
        told.failure("redis", "it cannot write its append-only file", "df -h")
        told.failure("redis", "its last snapshot failed", "BGSAVE")
        told.failure("clock", "s behind this machine's", "set-ntp true")


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
