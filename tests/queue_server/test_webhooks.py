"""Webhooks: the end of a job told to a real receiver, at least once, signed, and never to where it must not go."""

from __future__ import annotations

import asyncio
import base64
import json
import secrets
import signal
import socket
import ssl
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import grpc
import pytest
import redis
from ai4thai.queue.v1 import queue_service_pb2 as pb
from standardwebhooks.webhooks import WebhookVerificationError

from queue_server import keys
from queue_server.addresses import Guard
from queue_server.connection import Connection
from queue_server.settings import QueueSettings
from queue_server.webhook_calls import Sender, SendFailed, read_secrets
from queue_server.webhooks import Webhooks
from serving.settings import describe, read
from tests.queue_server.conftest import Front, let_pass, queue_settings, serve, state
from tests.queue_server.hook_receiver import SECRET, HookReceiver

ALLOWED = {"webhook_allowed_hosts": "127.0.0.1"}
QUICK = {"webhook_retry_s": 0.1, "webhook_timeout_s": 1.0}


@pytest.fixture
def receiver() -> Iterator[HookReceiver]:
    with HookReceiver() as receiver:
        yield receiver


def hook_settings(redis_url: str, **changes: Any) -> Any:
    return queue_settings(redis_url, **{"webhook_secret": SECRET, **ALLOWED, **QUICK, **changes})


@pytest.fixture
async def front(redis_url: str) -> AsyncIterator[Front]:
    async with serve(hook_settings(redis_url)) as front:
        yield front


def hook(url: str) -> pb.Webhook:
    return pb.Webhook(url=url)


async def wait_for(receiver: HookReceiver, count: int) -> Any:
    return await asyncio.to_thread(receiver.wait_for, count)


async def refusal(front: Front, **fields: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await front.submit(**fields)
    return caught.value


# ---- what is told


async def test_an_end_is_told_signed_and_recorded(front: Front, start_worker, receiver: HookReceiver) -> None:
    await start_worker()
    # When a job with a webhook has ended
    job = await front.submit(b"ok", webhook=hook(receiver.url()), labels={"a": "ก"}, request_id="mine")
    assert job.webhook == pb.SubmitJobResponse(job={"webhook": {"url": receiver.url()}}).job.webhook
    (told,) = await wait_for(receiver, 1)
    # Then its receiver has the job as the JSON API shows it, without its result
    values = told.verified()
    assert set(values) == {"type", "timestamp", "data"} and values["type"] == "job.ended"
    shown = values["data"]["job"]
    assert (shown["job_id"], shown["state"], shown["labels"]) == (job.job_id, "JOB_STATE_SUCCEEDED", {"a": "ก"})
    assert "result" not in shown and shown["attempts"][0]["number"] == 1
    ended = await front.get(job.job_id)
    assert values["timestamp"].endswith("+00:00") and shown["end_time"].startswith(values["timestamp"][:19])
    assert told.path == "/hook?of=tests" and told.headers["content-type"] == "application/json"
    assert told.headers["host"] == f"127.0.0.1:{receiver.port}"
    assert told.headers["webhook-id"] == f"{job.job_id}.{ended.revision}"
    # And the job says that it was told
    told_job = await front.until(job.job_id, lambda one: one.webhook.HasField("deliver_time"))
    assert told_job.webhook.attempt_count == 1 and not told_job.webhook.HasField("error")
    assert told_job.revision == ended.revision
    # And what was changed on the way is found out
    with pytest.raises(WebhookVerificationError):
        told.verified("whsec_" + base64.b64encode(b"x" * 24).decode())


@pytest.mark.parametrize("end", ["FAILED", "CANCELLED", "EXPIRED"])
async def test_every_kind_of_end_is_told(
    front: Front, start_worker, receiver: HookReceiver, redis_client, end: str
) -> None:
    fields: dict[str, Any] = {"webhook": hook(receiver.url())}
    if end == "EXPIRED":
        fields["deadline"] = {"seconds": int(time.time()) + 3600}
    if end == "FAILED":
        fields |= {
            "max_attempts": 1,
            "work": {"generate": {"messages": [{"role": 2, "parts": [{"image": {"content": b"bad"}}]}]}},
        }
    job = await front.submit(**fields)
    if end == "EXPIRED":
        let_pass(redis_client, keys.DEADLINES, job.job_id)
    elif end == "CANCELLED":
        await front.stub.CancelJob(pb.CancelJobRequest(job_id=job.job_id))
    elif end == "FAILED":
        await start_worker()
    (told,) = await wait_for(receiver, 1)
    shown = told.verified()["data"]["job"]
    assert shown["state"] == f"JOB_STATE_{end}"
    assert (end == "CANCELLED") == ("error" not in shown)


async def test_a_retry_by_hand_is_another_end(front: Front, receiver: HookReceiver) -> None:
    job = await front.submit(webhook=hook(receiver.url()))
    await front.stub.CancelJob(pb.CancelJobRequest(job_id=job.job_id))
    await wait_for(receiver, 1)
    await front.until(job.job_id, lambda one: one.webhook.HasField("deliver_time"))
    # When the job is tried again and ends again
    again = (await front.stub.RetryJob(pb.RetryJobRequest(job_id=job.job_id))).job
    assert again.webhook.attempt_count == 0 and not again.webhook.HasField("deliver_time")
    await front.stub.CancelJob(pb.CancelJobRequest(job_id=job.job_id))
    # Then that is told under an id of its own
    first, second = await wait_for(receiver, 2)
    assert first.headers["webhook-id"] != second.headers["webhook-id"]
    await front.until(job.job_id, lambda one: one.webhook.HasField("deliver_time"))


async def test_all_secrets_sign(redis_url: str, receiver: HookReceiver) -> None:
    newer = "whsec_" + base64.b64encode(secrets.token_bytes(32)).decode().rstrip("=")
    async with serve(hook_settings(redis_url, webhook_secret=f"{SECRET}, {newer}")) as front:
        job = await front.submit(webhook=hook(receiver.url()))
        await front.stub.CancelJob(pb.CancelJobRequest(job_id=job.job_id))
        (told,) = await wait_for(receiver, 1)
    assert told.headers["webhook-signature"].count("v1,") == 2
    assert told.verified(SECRET) == told.verified(newer)


# ---- told again


async def test_what_was_not_taken_is_sent_again(
    front: Front, receiver: HookReceiver, redis_client: redis.Redis
) -> None:
    # Given a receiver that fails twice, in two ways
    receiver.answers = [(500, {}), (302, {"location": "/elsewhere"})]
    job = await front.submit(webhook=hook(receiver.url()))
    await front.stub.CancelJob(pb.CancelJobRequest(job_id=job.job_id))
    await wait_for(receiver, 1)
    failed = await front.until(job.job_id, lambda one: one.webhook.attempt_count == 1)
    assert failed.webhook.error.code == 14 and "answered 500" in failed.webhook.error.message
    # Then it is told a third time, to the same place: a redirect is not followed
    told = await wait_for(receiver, 3)
    assert {one.path for one in told} == {"/hook?of=tests"}
    assert len({one.headers["webhook-id"] for one in told}) == 1
    done = await front.until(job.job_id, lambda one: one.webhook.HasField("deliver_time"))
    assert done.webhook.attempt_count == 3 and not done.webhook.HasField("error")
    assert told[1].at_s - told[0].at_s >= 0.08 and told[2].at_s - told[1].at_s >= 6 * 0.08
    assert redis_client.hgetall(keys.HOOK_COUNTS) == {b"failed": b"2", b"delivered": b"1"}
    assert redis_client.zcard(keys.HOOKS) == 0


@pytest.mark.parametrize(("answer", "tries"), [((410, {}), 1), ((404, {}), 3)])
async def test_it_is_given_up(redis_url: str, receiver: HookReceiver, redis_client, answer, tries: int) -> None:
    receiver.always = answer
    async with serve(hook_settings(redis_url, webhook_tries=3, webhook_retry_s=0.02)) as front:
        job = await front.submit(webhook=hook(receiver.url()))
        await front.stub.CancelJob(pb.CancelJobRequest(job_id=job.job_id))
        # After the last try, or at once when the receiver says that it is gone for good
        given_up = await front.until(job.job_id, lambda one: redis_client.hget(keys.HOOK_COUNTS, "given_up") == b"1")
        given_up = await front.get(job.job_id)
        await asyncio.sleep(0.7)
    assert given_up.webhook.attempt_count == tries == len(receiver.received)
    assert str(answer[0]) in given_up.webhook.error.message and not given_up.webhook.HasField("deliver_time")
    assert redis_client.zcard(keys.HOOKS) == 0


async def test_retry_after_is_honoured(front: Front, receiver: HookReceiver) -> None:
    receiver.answers = [(503, {"retry-after": "2"})]
    job = await front.submit(webhook=hook(receiver.url()))
    await front.stub.CancelJob(pb.CancelJobRequest(job_id=job.job_id))
    first, second = await wait_for(receiver, 2)
    assert 2 <= second.at_s - first.at_s < 8


async def test_a_slow_receiver_and_an_endless_answer(redis_url: str, receiver: HookReceiver) -> None:
    async with serve(hook_settings(redis_url, webhook_timeout_s=0.4)) as front:
        # Given a receiver that does not answer in time
        receiver.delay_s = 0.8
        job = await front.submit(webhook=hook(receiver.url()))
        await front.stub.CancelJob(pb.CancelJobRequest(job_id=job.job_id))
        slow = await front.until(job.job_id, lambda one: one.webhook.attempt_count >= 1)
        assert "no answer within 0.4 s" in slow.webhook.error.message
        # And one whose answer never ends: what counts has been said at its beginning
        receiver.delay_s, receiver.endless = 0.0, True
        done = await front.until(job.job_id, lambda one: one.webhook.HasField("deliver_time"))
        assert done.webhook.attempt_count >= 2


async def test_a_receiver_that_hangs_does_not_hold_up_others(redis_url: str, receiver: HookReceiver) -> None:
    with HookReceiver() as hanging:
        hanging.delay_s = 0.6
        hanging.always = (503, {})
        async with serve(hook_settings(redis_url, webhook_retry_s=5.0)) as front:
            jobs = [await front.submit(webhook=hook(hanging.url())) for _ in range(60)]
            jobs.append(await front.submit(webhook=hook(receiver.url())))
            for job in jobs:
                await front.stub.CancelJob(pb.CancelJobRequest(job_id=job.job_id))
            began_s = time.monotonic()
            await wait_for(receiver, 1)
            assert time.monotonic() - began_s < 3
            await asyncio.sleep(1.5)
        # It has had its share, failed, and is left alone for a while
        assert hanging.most_in_flight <= 8 and len(hanging.received) <= 16


# ---- whatever is killed


async def test_what_a_killed_server_had_not_told_another_tells(
    redis_url: str, start_worker, start_process, receiver: HookReceiver, vision
) -> None:
    def start() -> Any:
        process = start_process(
            "queue_server",
            REDIS_URL=redis_url,
            QUEUE_WORKER_PORT="0",
            QUEUE_WEBHOOK_SECRET=SECRET,
            QUEUE_WEBHOOK_ALLOWED_HOSTS="127.0.0.1",
            QUEUE_WEBHOOK_TIMEOUT_S="0.5",
        )
        port = json.loads(process.lines_until('"listening"')[-1])["port"]
        return process, grpc.aio.insecure_channel(f"127.0.0.1:{port}")

    await start_worker()
    receiver.delay_s = 0.3
    process, channel = start()
    async with channel:
        before = Front(channel, None, None)  # type: ignore[arg-type]
        # Given a server that is killed while it tells of one job, and before another has ended
        running = await before.submit(b"slow", webhook=hook(receiver.url()))
        telling = await before.submit(b"ok", webhook=hook(receiver.url()))
        (first,) = await wait_for(receiver, 1)
        process.kill(signal.SIGKILL)
    vision.release()
    receiver.delay_s = 0.0
    # When another one starts
    async with serve(hook_settings(redis_url, webhook_timeout_s=0.5)) as after:
        assert state(await after.end(running.job_id)) == "SUCCEEDED"
        # Then both are told, the one that may have been told already under the same id
        told = await wait_for(receiver, 3)
        assert {one.job_id for one in told} == {running.job_id, telling.job_id}
        assert {one.headers["webhook-id"] for one in told if one.job_id == telling.job_id} == {
            first.headers["webhook-id"]
        }
        for job_id in (running.job_id, telling.job_id):
            await after.until(job_id, lambda one: one.webhook.HasField("deliver_time"))


async def test_two_servers_tell_each_end_once(redis_url: str, start_worker, receiver: HookReceiver) -> None:
    await start_worker()
    # Given a server, and what another one would send webhooks with
    settings = hook_settings(redis_url)
    connection = Connection(settings.url, settings.store_timeout_s, settings.terms)
    await connection.start()
    second = Webhooks(connection, settings)
    async with serve(settings) as one:
        await second.start()
        jobs = [await one.submit(b"ok", webhook=hook(receiver.url())) for _ in range(40)]
        for job in jobs:
            await one.until(job.job_id, lambda job: job.webhook.HasField("deliver_time"))
        await second.stop()
    await connection.stop()
    assert sorted(told.job_id for told in receiver.received) == sorted(job.job_id for job in jobs)


# ---- where it must not go


async def test_a_webhook_is_refused_at_submission(front: Front) -> None:
    for url in ("https://10.0.0.1/", "ftp://127.0.0.1/", "https://" + "a" * 3000 + ".com/", ""):
        error = await refusal(front, webhook=hook(url))
        assert error.code() == grpc.StatusCode.INVALID_ARGUMENT and "webhook" in (error.details() or "")


async def test_without_a_secret_none_is_taken(redis_url: str) -> None:
    async with serve(queue_settings(redis_url, **ALLOWED)) as unsigned:
        error = await refusal(unsigned, webhook=hook("https://example.com/"))
        assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert "QUEUE_WEBHOOK_SECRET" in (error.details() or "")


async def test_the_same_request_with_another_webhook_is_another_request(front: Front, receiver: HookReceiver) -> None:
    await front.submit(request_id="a", webhook=hook(receiver.url("/1")))
    assert not (await front.submit_response(request_id="a", webhook=hook(receiver.url("/1")))).created
    assert (
        await refusal(front, request_id="a", webhook=hook(receiver.url("/2")))
    ).code() == grpc.StatusCode.ALREADY_EXISTS


async def test_a_name_that_leads_to_a_private_address_is_refused_when_it_is_sent(redis_url: str) -> None:
    async with serve(hook_settings(redis_url, webhook_allowed_hosts="")) as front:
        # Given a name that submission cannot judge, and that resolves to this machine itself
        job = await front.submit(webhook=hook("https://localhost:8443/"))
        await front.stub.CancelJob(pb.CancelJobRequest(job_id=job.job_id))
        failed = await front.until(job.job_id, lambda one: one.webhook.attempt_count >= 1)
    assert (
        "not on the public internet" in failed.webhook.error.message and "127.0.0" not in failed.webhook.error.message
    )


@asynccontextmanager
async def sender(allowed: str, resolve: Any, context: ssl.SSLContext | None = None) -> AsyncIterator[Sender]:
    one = Sender(Guard(allowed.split(",")), SECRET, 2.0, resolve=resolve, ssl_context=context)
    await one.start()
    try:
        yield one
    finally:
        await one.stop()


async def test_the_address_that_was_checked_is_the_one_that_is_called(receiver: HookReceiver) -> None:
    # Given a name whose address changes between two look-ups, from one that is allowed to one that is not
    asked: list[str] = []

    async def resolve(host: str) -> list[Any]:
        asked.append(host)
        return [ip_address("127.0.0.2" if len(asked) == 1 else "127.0.0.1")]

    with socket.create_server(("127.0.0.2", receiver.port)):  # someone listens there, and never answers
        async with sender("127.0.0.2", resolve) as one:
            with pytest.raises(SendFailed, match="no answer within 2 s"):
                await one.send(f"http://rebinds.example:{receiver.port}/", "id", "{}")
            assert asked == ["rebinds.example"]
            # Then the other address is not called, neither by the same call nor by the next
            with pytest.raises(SendFailed, match="must be https"):
                await one.send(f"http://rebinds.example:{receiver.port}/", "id", "{}")
    assert not receiver.received


async def test_of_many_addresses_the_next_is_tried(receiver: HookReceiver) -> None:
    async def resolve(_host: str) -> list[Any]:
        return [ip_address("127.0.0.3"), ip_address("127.0.0.1")]  # nobody listens on the first

    async with sender("127.0.0.0/8", resolve) as one:
        await one.send(f"http://two.example:{receiver.port}/", "id", "{}")
    assert len(receiver.received) == 1
    with pytest.raises(SendFailed, match="not on the public internet"):
        async with sender("127.0.0.3", resolve) as one:
            await one.send("https://two.example/", "id", "{}")


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For `hooks.example` alone, signed by itself."""
    path = tmp_path_factory.mktemp("certificate")
    names = ("-subj", "/CN=hooks.example", "-addext", "subjectAltName=DNS:hooks.example")
    new = (
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:prime256v1",
        "-nodes",
        "-days",
        "2",
    )
    subprocess.run([*new, *names, "-keyout", "key.pem", "-out", "cert.pem"], cwd=path, check=True, capture_output=True)
    return path


async def test_tls_verifies_the_name_although_the_address_is_called(certificate: Path) -> None:
    async def resolve(_host: str) -> list[Any]:
        return [ip_address("127.0.0.1")]

    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(certificate / "cert.pem", certificate / "key.pem")
    trusted = ssl.create_default_context(cafile=str(certificate / "cert.pem"))
    with HookReceiver(server) as receiver:
        async with sender("127.0.0.1", resolve, trusted) as one:
            await one.send(f"https://hooks.example:{receiver.port}/in", "id", "{}")
            assert receiver.received[0].headers["host"] == f"hooks.example:{receiver.port}"
            # Another name on the same address, and an authority that is not known, are found out
            with pytest.raises(SendFailed, match="certificate"):
                await one.send(f"https://other.example:{receiver.port}/", "id", "{}")
        async with sender("127.0.0.1", resolve) as one:
            with pytest.raises(SendFailed, match="certificate"):
                await one.send(f"https://hooks.example:{receiver.port}/", "id", "{}")
    assert len(receiver.received) == 1


async def test_no_proxy_of_the_environment_is_used(receiver: HookReceiver, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    async with sender("127.0.0.1", None) as one:
        await one.send(receiver.url(), "id", "{}")
    assert len(receiver.received) == 1


# ---- the operator's settings


@pytest.mark.parametrize(
    "text", ["whsec_", "whsec_!!", "c2VjcmV0", "whsec_c2hvcnQ=", SECRET + ",whsec_x", "whsec_" + "A" * 200]
)
def test_a_secret_that_does_not_do_is_refused_untold(text: str) -> None:
    with pytest.raises(ValueError) as caught:
        read_secrets(text)
    assert "secret number" in str(caught.value)
    assert not text[6:] or text[6:] not in str(caught.value)


def test_a_wrong_secret_ends_the_process_and_is_not_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("QUEUE_WEBHOOK_SECRET", "whsec_wrong")
    monkeypatch.setenv("QUEUE_WEBHOOK_ALLOWED_HOSTS", "a/b")
    with pytest.raises(SystemExit) as left:
        read(QueueSettings)
    said = capsys.readouterr().err
    assert left.value.code == 2
    assert "QUEUE_WEBHOOK_SECRET" in said and "whsec_wrong" not in said and "24 to 64 bytes" in said
    assert "QUEUE_WEBHOOK_ALLOWED_HOSTS is 'a/b'" in said
    # And a good one is masked where the settings are logged
    monkeypatch.setenv("QUEUE_WEBHOOK_SECRET", SECRET)
    monkeypatch.setenv("QUEUE_WEBHOOK_ALLOWED_HOSTS", "")
    assert SECRET[6:] not in str(describe(read(QueueSettings)))
