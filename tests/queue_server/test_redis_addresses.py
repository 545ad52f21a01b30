"""Redis wherever it is: the forms of REDIS_URL, TLS, sockets, a user with the least rights that work, a failover by Sentinel."""

from __future__ import annotations

import asyncio
import re
import signal
import socket
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import dramatiq
import grpc
import pytest
import redis
from ai4thai.queue.v1 import queue_service_pb2 as pb
from hypothesis import given
from hypothesis import strategies as st

from queue_server import scripts
from queue_server.connection import place
from queue_server.redis_address import read_address
from queue_server.settings import StoreSettings
from serving.settings import describe, read
from tests.queue_server.conftest import ROOT, Front, queue_settings, serve, state
from tests.queue_server.redis_servers import Cluster, Server, TlsFront, cluster, make_certificates
from tests.queue_server.test_failover import serving
from tests.queue_server.test_submit import refusal

# ---- reading


@pytest.mark.parametrize(
    ("url", "where", "options"),
    [
        ("redis://broker", "broker:6379", {"host": "broker", "port": 6379}),
        ("redis://", "localhost:6379", {"host": "localhost", "port": 6379}),
        ("redis://[::1]:7000/2", "[::1]:7000", {"host": "::1", "port": 7000, "db": 2}),
        ("redis://:p%40ss@broker:7/0", "broker:7", {"host": "broker", "port": 7, "db": 0, "password": "p@ss"}),
        (
            "rediss://me:secret@broker?ssl_cert_reqs=none&ssl_check_hostname=false",
            "broker:6379",
            {
                **{"host": "broker", "port": 6379, "username": "me", "password": "secret"},
                **{"ssl_cert_reqs": "none", "ssl_check_hostname": False},
            },
        ),
        ("unix:///run/redis.sock?db=3", "/run/redis.sock", {"path": "/run/redis.sock", "db": 3}),
        (
            "redis+sentinel://me:secret@one,two:7/jobs/1?sentinel_username=s&sentinel_password=hush",
            "jobs, which the sentinels at one:26379, two:7 know",
            {"username": "me", "password": "secret", "db": 1},
        ),
    ],
)
def test_every_form_is_read(url: str, where: str, options: dict[str, object]) -> None:
    address = read_address(url)
    assert (address.place, dict(address.options)) == (where, options)
    assert place(url) == where
    assert address.tls == url.startswith("rediss")
    assert "secret" not in repr(address) and "hush" not in repr(address)


def test_a_sentinels_form_names_its_sentinels() -> None:
    address = read_address("redis+sentinel://one,two:7/jobs?sentinel_password=hush&ssl=true&ssl_cert_reqs=none")
    assert address.sentinels == (("one", 26379), ("two", 7)) and address.service == "jobs" and address.tls
    assert dict(address.sentinel_options) == {"password": "hush", "ssl_cert_reqs": "none"}
    assert read_address("rediss+sentinel://one/jobs").tls


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("broker:6379", "begins with none of redis://"),
        ("http://broker", "begins with none of redis://"),
        ("redis://broker/first", "'first'; it is a number"),
        ("redis://broker:99999", "no host and port"),
        ("redis://broker?sockettimeout=3", "'sockettimeout' is no option"),
        ("redis://broker?ssl_cert_reqs=none", "begin with rediss://"),
        ("rediss://broker?ssl_cert_reqs=maybe", "required, optional or none"),
        ("rediss://broker?ssl_ca_certs=/no/such.pem", "no such file"),
        ("unix://", "names no socket"),
        ("redis+sentinel://one,two", "names no service"),
        ("redis+sentinel://one/jobs?ssl=perhaps", "true or false"),
        ("redis://:pa/ss@broker", "%2F for /"),
        ("redis://:12/ss@broker", "%2F for /"),
        ("redis://:pa?ss@broker", "%3F for ?"),
        ("redis://:pa#ss@broker", "%23 for #"),
    ],
)
def test_what_is_wrong_with_an_address_is_told_and_no_password(url: str, why: str) -> None:
    with pytest.raises(ValueError, match=re.escape(why)) as caught:
        read_address(url)
    assert "ss@" not in str(caught.value)


@pytest.mark.parametrize("password", ["pa/ss", "12/ss", "pa?ss", "pa#ss", "p@ss/x"])
def test_a_process_ends_at_once_and_names_the_variable_but_no_password(password: str, monkeypatch, capsys) -> None:
    monkeypatch.setenv("REDIS_URL", f"redis://me:{password}@broker")
    with pytest.raises(SystemExit) as ended:
        read(StoreSettings)
    assert ended.value.code == 2
    printed = capsys.readouterr().err
    assert printed.startswith("REDIS_URL is 'redis://me:***@broker'") and "%2F for /" in printed


@given(st.text(min_size=1, max_size=40))
def test_a_password_is_never_shown(password: str) -> None:
    secret = f"Zq7{password}Kv9"
    try:
        shown = repr(read_address(f"redis://me:{secret}@broker/0"))
    except ValueError as error:
        shown = str(error)
    assert "Zq7" not in shown and "Kv9" not in shown


def test_passwords_are_not_logged_with_the_settings() -> None:
    url = "redis+sentinel://me:secret@one,two/jobs?sentinel_username=s&sentinel_password=hush&db=1"
    shown = describe(queue_settings(url))["redis_url"]
    assert shown == "redis+sentinel://me:***@one,two/jobs?sentinel_username=s&sentinel_password=***&db=1"


def test_a_machine_that_vanished_is_noticed_by_its_connections(redis_url: str) -> None:
    client = read_address(redis_url).client(timeout_s=30, connect_timeout_s=3, health_check_s=30)
    connection = client.connection_pool.get_connection()
    try:
        assert connection._sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        assert connection._sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 10_000
    finally:
        connection.disconnect()


# ---- a job's whole life


async def whole_life(front: Front, vision, start_worker, url: str) -> None:
    """Submits, runs, fails, retries, cancels, watches, lists, uploads, pauses, resumes, purges, deletes."""
    await serving(front, True)
    await start_worker(redis_url=url)
    done = await front.submit(b"ok one", request_id="one")
    assert state(await front.end(done.job_id)) == "SUCCEEDED"
    failed = await front.submit(b"bad", max_attempts=1)
    await front.end(failed.job_id)
    slow = await front.submit(b"slow")
    await vision.wait_for_calls(1)
    await front.stub.CancelJob(pb.CancelJobRequest(job_id=slow.job_id))
    ended = await front.end(slow.job_id)
    assert state(ended) == "CANCELLED"
    await front.stub.RetryJob(pb.RetryJobRequest(job_id=slow.job_id))
    await vision.wait_for_calls(1)
    vision.release()
    assert state(await front.end(slow.job_id)) == "SUCCEEDED"

    async def upload() -> AsyncIterator[pb.UploadMediaRequest]:
        yield pb.UploadMediaRequest(config=pb.UploadMediaConfig(content_type="image/jpeg"))
        for _ in range(3):
            yield pb.UploadMediaRequest(chunk=b"x" * 200_000)

    media = (await front.stub.UploadMedia(upload())).media
    answered = [one async for one in front.stub.GetMedia(pb.GetMediaRequest(media_id=media.media_id))]
    assert len(answered) > 1
    await front.stub.PauseQueue(pb.PauseQueueRequest(queue="default"))
    held = [await front.submit(b"ok", priority=3) for _ in range(3)]
    listed = (await front.stub.ListJobs(pb.ListJobsRequest(page_size=2))).jobs
    assert {job.job_id for job in listed} == {job.job_id for job in held[1:]}
    await front.stub.PurgeQueue(pb.PurgeQueueRequest(queue="default"))
    await front.stub.ResumeQueue(pb.ResumeQueueRequest(queue="default"))
    later = await front.submit(b"ok later")
    assert state(await front.end(later.job_id)) == "SUCCEEDED"
    await front.stub.DeleteJob(pb.DeleteJobRequest(job_id=done.job_id))
    assert (await refusal(front.get(done.job_id)))[1] == "JOB_NOT_FOUND"
    await front.stub.GetQueueStats(pb.GetQueueStatsRequest())
    assert len((await front.stub.ListWorkers(pb.ListWorkersRequest())).workers) == 1


@pytest.fixture
def tls(redis_url: str, tmp_path: Path) -> Iterator[TlsFront]:
    make_certificates(tmp_path)
    front = TlsFront(tmp_path, int(redis_url.rpartition(":")[2].split("/")[0]))
    front.start()
    yield front
    front.stop()


async def test_redis_over_tls_with_a_clients_certificate(tls: TlsFront, tmp_path: Path, vision, start_worker) -> None:
    known = f"rediss://127.0.0.1:{tls.port}/0?ssl_ca_certs={tmp_path}/ca.pem"
    url = f"{known}&ssl_certfile={tmp_path}/client.pem&ssl_keyfile={tmp_path}/client.key"
    async with serve(queue_settings(url)) as front:
        await whole_life(front, vision, start_worker, url)
    # And without what it needs it is refused: no certificate of ours, an authority that we do not know
    for wrong in (known, f"rediss://127.0.0.1:{tls.port}/0"):
        async with serve(queue_settings(wrong)) as front:
            code, reason, _ = await refusal(front.submit())
            assert (code, reason) == (grpc.StatusCode.UNAVAILABLE, "STORE_UNAVAILABLE")


async def test_redis_behind_a_socket(tmp_path: Path, vision, start_worker) -> None:
    server = Server(tmp_path, "--unixsocket", str(tmp_path / "redis.sock"))
    try:
        url = f"unix://{tmp_path}/redis.sock?db=1"
        async with serve(queue_settings(url)) as front:
            await serving(front, True)
            await start_worker(redis_url=url)
            assert state(await front.end((await front.submit()).job_id)) == "SUCCEEDED"
    finally:
        server.stop()


# ---- rights

ACL_LINE = (
    "ACL SETUSER ai4thai on >PASSWORD resetchannels resetkeys ~{vq} ~{vq}:* -@all"
    " +hello +ping +select +info +config|get +time +multi +exec +evalsha +script|load +script|exists +keys"
    " +del +exists +expire +pexpire +pexpireat +persist +pttl +rename"
    " +get +set +append +getrange +strlen"
    " +hdel +hexists +hget +hgetall +hincrby +hlen +hmget +hset"
    " +lindex +llen +lpop +lpush +lrange +rpush"
    " +sadd +scard +sismember +smembers +srem +sunion"
    " +zadd +zcard +zincrby +zrange +zrangebyscore +zrem +zremrangebyscore +zrevrange +zrevrangebylex +zscore"
    " +xadd +xread +xrevrange"
)
"""What the queue server and the workers need, and no more; docs/queue.md has the same."""
# What the connection, Python's code and Dramatiq's script ask for, besides the commands of our scripts.
DIRECT = {
    *(
        "hello",
        "ping",
        "select",
        "info",
        "config|get",
        "time",
        "multi",
        "exec",
        "evalsha",
        "script|load",
        "script|exists",
    ),
    *(
        "del",
        "get",
        "set",
        "exists",
        "hgetall",
        "hget",
        "hmget",
        "hlen",
        "zcard",
        "zrange",
        "zrevrange",
        "zrevrangebylex",
        "zrem",
    ),
    *(
        "xread",
        "xrevrange",
        "lrange",
        "llen",
        "append",
        "getrange",
        "rename",
        "pexpire",
        "sismember",
        "sunion",
        "lpush",
        "rpush",
    ),
}


def commands_of_scripts() -> set[str]:
    folder = Path(dramatiq.brokers.redis.__file__).parent / "redis"
    texts = [*scripts.load_all().values(), (folder / "dispatch.lua").read_text("utf-8")]
    return {name.lower() for text in texts for name in re.findall(r"""redis\.p?call\(["']([A-Za-z]+)["']""", text)}


def test_the_rights_are_those_that_are_used() -> None:
    allowed = set(re.findall(r"\+(\S+)", ACL_LINE))
    assert allowed == commands_of_scripts() | DIRECT


def test_the_docs_tell_the_tested_rights() -> None:
    text = (ROOT / "docs" / "queue.md").read_text("utf-8")
    (line,) = re.findall(r"^ACL SETUSER .*$", text, re.MULTILINE)
    assert line == ACL_LINE


@pytest.fixture
def guarded(redis_client: redis.Redis, redis_url: str) -> Iterator[str]:
    """REDIS_URL of the user with the least rights."""
    redis_client.execute_command(*ACL_LINE.replace("PASSWORD", "p@ss/word").split(" "))
    redis_client.acl_log_reset()
    yield redis_url.replace("://", "://ai4thai:p%40ss%2Fword@")
    redis_client.acl_deluser("ai4thai")


async def test_a_user_with_those_rights_can_do_everything(guarded: str, redis_client, vision, start_worker) -> None:
    async with serve(queue_settings(guarded)) as front:
        await whole_life(front, vision, start_worker, guarded)
        (check,) = [check for check in front.health.checks if check.name == "redis"]
        assert "everysec" in check.detail
    refused = {
        (entry["reason"], entry["object"])
        for entry in redis_client.acl_log()
        # redis-py tells its name, and does without when it may not.
        if not entry["object"].startswith("client")
    }
    assert refused == set()


async def test_without_a_right_it_is_told_which(guarded: str, redis_client: redis.Redis) -> None:
    fewer = ACL_LINE.replace(" +config|get", "").replace(" +hset", "").replace("PASSWORD", "p@ss/word")
    redis_client.execute_command(*fewer.split(" "))
    async with serve(queue_settings(guarded)) as front:
        # CONFIG may be kept back
        await serving(front, True)
        (check,) = [check for check in front.health.checks if check.name == "redis"]
        assert "cannot be read" in check.detail
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await front.submit()
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE and "ACL" in caught.value.details()


async def test_a_wrong_password_is_told_and_not_shown(guarded: str) -> None:
    wrong = guarded.replace("p%40ss%2Fword", "wrongword")
    async with serve(queue_settings(wrong)) as front:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await front.submit()
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert "password" in caught.value.details() and "wrongword" not in caught.value.details()


# ---- Sentinel


@pytest.fixture
def sentinels(tmp_path: Path) -> Iterator[Cluster]:
    with cluster(tmp_path) as running:
        yield running


def test_a_master_that_hangs_is_left_for_the_new_one(sentinels: Cluster) -> None:
    client = read_address(sentinels.url).client(timeout_s=0.5, connect_timeout_s=3, health_check_s=30)
    # Given several idle connections to a master that then hangs, without closing any of them
    connections = [client.connection_pool.get_connection() for _ in range(5)]
    for connection in connections:
        client.connection_pool.release(connection)
    client.set("number", 0)
    with sentinels.master.client() as direct:
        assert direct.execute_command("WAIT", 1, 3000) == 1
    sentinels.master.process.send_signal(signal.SIGSTOP)
    with pytest.raises(redis.TimeoutError):
        client.get("number")
    # Then none of them is used again: a late answer would be taken for another command's
    assert not any(connection.is_connected for connection in connections)
    # And the next commands go to the new master as soon as there is one
    until_s = time.monotonic() + 10
    while True:
        try:
            client.set("number", 1)
            break
        except redis.RedisError:
            assert time.monotonic() < until_s
            time.sleep(0.1)
    assert client.get("number") == b"1" and client.ping() is True
    with sentinels.replica.client() as direct:
        assert direct.get("number") == b"1"
    client.close()


async def insist(submit, *arguments: object, **fields: object):
    """As a client does: again, with the same request_id, while the server is unavailable."""
    async with asyncio.timeout(20):
        while True:
            try:
                return await submit(*arguments, **fields)
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.UNAVAILABLE:
                    raise
                await asyncio.sleep(0.1)


async def test_jobs_go_on_after_a_failover(sentinels: Cluster, vision, start_worker) -> None:
    url = sentinels.url
    async with serve(queue_settings(url)) as front:
        await serving(front, True)
        await start_worker(redis_url=url, worker_threads=2)
        # Given jobs of which some have ended, one runs, others wait, when the master is killed
        first = await front.submit(b"ok first")
        assert state(await front.end(first.job_id)) == "SUCCEEDED"
        jobs = [await front.submit(b"slow running"), *[await front.submit(b"ok %d" % n) for n in range(20)]]
        await vision.wait_for_calls(2)
        with sentinels.master.client() as client:
            assert client.execute_command("WAIT", 1, 3000) == 1
        sentinels.master.kill()
        killed_s = time.monotonic()
        # Then the next submission is accepted within seconds
        late = await insist(front.submit, b"ok late", request_id="late")
        assert time.monotonic() - killed_s < 10
        vision.release()
        # And all that the new master has ends, each once
        for job in (first, *jobs, late):
            ended = await insist(front.end, job.job_id)
            assert state(ended) == "SUCCEEDED"
        assert time.monotonic() - killed_s < 20
        with sentinels.replica.client() as client:
            assert client.info("replication")["role"] == "master"
        await serving(front, True)
