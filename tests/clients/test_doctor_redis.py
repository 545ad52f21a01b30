"""`ai4thai doctor` about Redis: whether it is there, whether it lets us in, and what it keeps."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from ai4thai.doctor import examination, redis_server

from tests.clients.asking_doctor import Ask, ask
from tests.clients.doctor_doubles import bulk, health_of, redis_in_shape, web_server
from tests.ports import free_port
from tests.queue_server.redis_servers import Server

__all__ = ["ask"]  # a fixture
QUEUE = "ai4thai.queue.v1.QueueService"
KEPT = ("--appendonly", "yes", "--appendfsync", "everysec", "--maxmemory", "64mb", "--save", "")


@contextmanager
def running(folder: Path, *arguments: str) -> Iterator[Server]:
    server = Server(folder / f"redis-{free_port()}", *arguments)
    try:
        yield server
    finally:
        server.stop()


def url_of(server: Server, userinfo: str = "") -> str:
    return f"redis://{userinfo}127.0.0.1:{server.port}/0"


def test_a_redis_as_it_should_be(ask: Ask, tmp_path: Path) -> None:
    with running(tmp_path, *KEPT, "--requirepass", "s3cret") as server:
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
    with running(tmp_path, "--save", "", "--maxmemory-policy", "allkeys-lru") as server:
        told = ask("redis", REDIS_URL=url_of(server))
        told.failure("redis", "maxmemory-policy is allkeys-lru", "maxmemory-policy noeviction")
        told.warning("redis", "appendonly is no: it keeps nothing on disk", "appendonly yes")
        told.warning("redis", "no maxmemory", "maxmemory 4gb")


def test_a_redis_whose_memory_is_full_or_that_is_a_replica(ask: Ask, tmp_path: Path) -> None:
    with running(tmp_path, *KEPT) as server, server.client() as client:
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
    told = ask("redis", REDIS_URL=f"redis://user:s3cret@127.0.0.1:{port}/0")
    told.failure("redis", "Connection refused", "docker compose ps redis")
    ask("redis", REDIS_URL="redis://:a/b@host").failure("redis", "cannot be read", "%2F for /")


@pytest.fixture
def unnamed_redis(monkeypatch: pytest.MonkeyPatch) -> None:
    """The address that nobody names is one where nobody is, and Redis is all that is looked at."""
    port = free_port()
    monkeypatch.setattr(redis_server, "DEFAULT_PORT", port)
    monkeypatch.setattr(examination, "CHECKS", {"redis": redis_server.check_redis})


@pytest.mark.usefixtures("unnamed_redis")
def test_no_redis_where_none_was_named(ask: Ask) -> None:
    away = ("--queue", f"localhost:{free_port()}")
    ask(*away).ok("redis", "nothing answers; ai4thai up brings its own")
    ask(*away, "redis").failure("redis", "Connection refused", "docker compose up -d redis")
    invented = {"REDIS_PASSWORD": "s3cret"}  # pragma: allowlist secret
    ask(*away, **invented).failure("redis", "Connection refused", "set REDIS_URL")
    ask(*away, REDIS_PORT=str(free_port())).failure("redis", "Connection refused", "set REDIS_URL")


@pytest.mark.usefixtures("unnamed_redis")
@pytest.mark.parametrize("names", [(), ("redis",)])
def test_the_queue_servers_word_counts_where_its_redis_is_not_published(ask: Ask, names: tuple[str, ...]) -> None:
    checks = {"redis": {"status": "WARNING", "detail": "Valkey"}}
    with web_server({"/health/detailed": (200, {}, health_of(QUEUE, checks=checks))}) as queue:
        told = ask(*names, "--queue", queue, REDIS_PASSWORD="s3cret")
        told.ok("redis", f"the queue server at {queue} reaches its own")
        assert told.exit_code == 0
    checks = {"redis": {"status": "NOT_OK", "detail": "no answer"}}
    with web_server({"/health/detailed": (503, {}, health_of(QUEUE, "NOT_SERVING", checks=checks))}) as queue:
        ask(*names, "--queue", queue).failure("redis", "Connection refused", "docker compose ps redis")


def test_a_redis_whose_packets_are_dropped(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redis_server, "_ASK_S", 0.2)
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full:
        port = full.getsockname()[1]
        # Nobody accepts them: who comes next knocks in vain, as at a closed security group.
        with socket.create_connection(("127.0.0.1", port)):
            told = ask("redis", REDIS_URL=f"redis://127.0.0.1:{port}/0")
    told.failure("redis", f"127.0.0.1:{port}/0: Timeout connecting to server", "REDIS_URL right")


def test_sentinels_without_a_port(ask: Ask) -> None:
    told = ask("redis", REDIS_URL="redis+sentinel://:s3cret@127.0.0.1,[::1]:1/no-such-service")
    told.failure("redis", "No master found for 'no-such-service'", "docker compose ps redis")
    assert "ConnectionPool" not in told.output
    ask("redis", REDIS_URL="redis+sentinel://h1:port/mymaster").failure("redis", "cannot be read", "docs/queue.md")


@pytest.mark.parametrize("used", [75, 71, 60, 50])
def test_how_full_redis_may_be_is_what_the_queue_server_says(ask: Ask, used: int) -> None:
    info = f"redis_version:7.2.0\r\nrole:master\r\nused_memory:{used}\r\nmaxmemory:100\r\n"
    with redis_in_shape({"INFO": bulk(info)}) as port:
        url = f"redis://127.0.0.1:{port}/0?protocol=2"
        strict, usual = ask("redis", REDIS_URL=url, QUEUE_MAX_MEMORY_SHARE="0.7"), ask("redis", REDIS_URL=url)
    told = f"used ({used}%)"
    if used > 70:
        strict.failure("redis", f"{told}, ?: new jobs are refused", "More maxmemory")
    elif used > 59:
        strict.warning("redis", f"{told}, ?: at 70% new jobs are refused", "More maxmemory")
    else:
        strict.ok("redis", told)
    if used == 75:
        usual.warning("redis", f"{told}, ?: at 90% new jobs are refused", "More maxmemory")
    else:
        usual.ok("redis", told)


def test_a_redis_that_hangs(ask: Ask, tmp_path: Path) -> None:
    with running(tmp_path) as server:
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
