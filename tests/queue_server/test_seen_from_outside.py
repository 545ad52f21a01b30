"""What an operator sees: a line for each change of a job in whichever process, its trace, depth for scalers, checks, metrics."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import grpc
import httpx
import pytest
import redis
import yaml
from ai4thai.queue.v1 import queue_service_pb2 as pb

from queue_server import keys
from serving.errors import Code
from tests.processes import ROOT, ServerProcess
from tests.queue_server.conftest import Front, detect, let_pass, state, worker_environment
from tests.queue_server.fake_vision import FakeVision, error
from tests.queue_server.hook_receiver import SECRET, HookReceiver

DOCS = ROOT / "docs" / "queue.md"
TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
TRACEPARENT = f"00-{TRACE_ID}-00f067aa0ba902b7-01"


@pytest.fixture
def server(redis_url: str) -> Iterator[ServerProcess]:
    environment = {
        "REDIS_URL": redis_url,
        "QUEUE_WORKER_PORT": "0",
        "QUEUE_SWEEP_S": "0.1",
        "QUEUE_LEASE_S": "2",
        "QUEUE_OVERDUE_S": "1",
        "QUEUE_WEBHOOK_SECRET": SECRET,
        "QUEUE_WEBHOOK_ALLOWED_HOSTS": "127.0.0.1",
        "QUEUE_WEBHOOK_RETRY_S": "0.05",
    }
    with ServerProcess("queue_server", env=environment) as process:
        yield process


@pytest.fixture
async def front(server: ServerProcess) -> Any:
    async with grpc.aio.insecure_channel(server.address) as channel:
        yield Front(channel, None, None)  # type: ignore[arg-type]


def start_worker(redis_url: str, vision: FakeVision, **changes: str) -> ServerProcess:
    return ServerProcess("queue_server.worker", env=worker_environment(redis_url, vision, **changes))


async def submit(front: Front, name: str, image: bytes = b"ok", **fields: Any) -> str:
    """A job's id; its submitter calls it by the name, and follows it by TRACEPARENT."""
    request = pb.SubmitJobRequest(request_id=name, **{"work": detect(image), **fields})
    return str((await front.stub.SubmitJob(request, metadata=(("traceparent", TRACEPARENT),))).job.job_id)


def lines_of(job_id: str, *processes: ServerProcess) -> list[dict[str, Any]]:
    return [line for process in processes for line in process.events if line.get("job_id") == job_id]


def changes_of(job_id: str, *processes: ServerProcess) -> Counter[str]:
    """How often each line about a change of the job, or about its webhook, was written."""
    events = [str(line["event"]) for line in lines_of(job_id, *processes)]
    return Counter(event for event in events if event.startswith(("job ", "webhook ")))


async def until(true: Any, timeout_s: float = 15) -> None:
    until_s = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < until_s
        await asyncio.sleep(0.02)


async def test_every_change_of_a_job_is_one_line(
    front: Front, server: ServerProcess, redis_url: str, redis_client: redis.Redis, vision: FakeVision
) -> None:
    expected: dict[str, dict[str, int]] = {}
    with HookReceiver() as receiver:
        # Given jobs that no worker takes: cancelled (and once more, which changes nothing), purged, without a message, expired
        cancelled = await submit(front, "cancelled", webhook=pb.Webhook(url=receiver.url()))
        receiver.answers = [(500, {})]
        for _ in range(2):
            await front.stub.CancelJob(pb.CancelJobRequest(job_id=cancelled))
        expected[cancelled] = {
            "job QUEUED": 1,
            "job CANCELLED: it had not begun": 1,
            "webhook not taken": 1,
            "webhook delivered": 1,
        }
        purged = await submit(front, "purged", queue="other", not_before_time={"seconds": int(time.time()) + 100})
        await front.stub.PurgeQueue(pb.PurgeQueueRequest(queue="other"))
        expected[purged] = {"job SCHEDULED": 1, "job CANCELLED: its queue was purged": 1}
        again = await submit(front, "sent again")
        assert await submit(front, "sent again") == again
        redis_client.delete(keys.dramatiq_list("standard"))
        expected[again] = {"job QUEUED": 1, "job asked for again": 1, "job sent again: nobody had its message": 1}
        await asyncio.to_thread(server.wait_for, "job sent again: nobody had its message", job_id=again)
        await front.stub.CancelJob(pb.CancelJobRequest(job_id=again))
        expected[again]["job CANCELLED: it had not begun"] = 1
        expired = await submit(front, "expired", deadline={"seconds": int(time.time()) + 3600})
        let_pass(redis_client, keys.DEADLINES, expired)
        expected[expired] = {"job QUEUED": 1, "job EXPIRED: its deadline has passed": 1}
        await asyncio.to_thread(server.wait_for, "webhook delivered", job_id=cancelled)
        await asyncio.to_thread(server.wait_for, "job EXPIRED: its deadline has passed", job_id=expired)

    with start_worker(redis_url, vision) as first, start_worker(redis_url, vision) as second:
        # Given jobs that are run: at a later time, tried again by itself and by hand, cancelled while it runs, deleted, forgotten
        vision.failures = [error(Code.INTERNAL, "INTERNAL")] * 2
        retried = await submit(front, "retried", max_attempts=2)
        assert state(await front.end(retried)) == "FAILED"
        await front.stub.RetryJob(pb.RetryJobRequest(job_id=retried))
        await front.until(retried, lambda job: state(job) == "SUCCEEDED")
        expected[retried] = {
            "job QUEUED": 1,
            "job RUNNING": 3,
            "job SCHEDULED": 1,
            "job QUEUED: its time has come": 1,
            "job FAILED": 1,
            "job QUEUED: tried again by hand": 1,
            "job SUCCEEDED": 1,
        }
        later = await submit(front, "later", not_before_time={"seconds": int(time.time()) + 1})
        await front.end(later)
        await front.stub.DeleteJob(pb.DeleteJobRequest(job_id=later))
        begun = {"job RUNNING": 1, "job SUCCEEDED": 1}
        # Its second may have come before it did.
        due = {"job SCHEDULED": 1, "job QUEUED: its time has come": 1}
        expected[later] = {
            **(due if changes_of(later, server)["job SCHEDULED"] else {"job QUEUED": 1}),
            **begun,
            "job forgotten: it was deleted": 1,
        }
        forgotten = await submit(front, "forgotten")
        await front.end(forgotten)
        redis_client.zadd(keys.ENDED, {forgotten: 1})
        expected[forgotten] = {"job QUEUED": 1, **begun, "job forgotten: its lifetime has passed": 1}
        stopped = await submit(front, "stopped", b"slow")
        await front.until(stopped, lambda job: state(job) == "RUNNING")
        await front.stub.CancelJob(pb.CancelJobRequest(job_id=stopped))
        await front.end(stopped)
        expected[stopped] = {
            "job QUEUED": 1,
            "job RUNNING": 1,
            "job RUNNING: its worker is asked to stop": 1,
            "job CANCELLED": 1,
        }
        # And one whose worker is killed
        lost = await submit(front, "lost", b"slow")
        await until(lambda: changes_of(lost, first, second)["job RUNNING"])
        (first if changes_of(lost, first) else second).process.kill()
        await asyncio.to_thread(server.wait_for, "job QUEUED: its worker stopped answering", job_id=lost)
        vision.release()
        await front.end(lost)
        expected[lost] = {
            "job QUEUED": 1,
            "job RUNNING": 2,
            "job QUEUED: its worker stopped answering": 1,
            "job SUCCEEDED": 1,
        }
        await asyncio.to_thread(server.wait_for, "job forgotten: its lifetime has passed", job_id=forgotten)
        processes = (server, first, second)
        # Then each change is one line of one process, with the submitter's name of the job and its trace
        for job_id, changes in expected.items():
            await until(lambda: sum(changes_of(job_id, *processes).values()) >= sum(changes.values()))  # noqa: B023
            assert changes_of(job_id, *processes) == Counter(changes)
            for line in lines_of(job_id, *processes):
                assert line["client_request_id"] and line["trace_id"] == TRACE_ID, line
        # And every attempt that was begun is counted with its outcome, that of the killed worker too
        counts = {
            name.decode(): int(number) for name, number in redis_client.hgetall(keys.queue_counts("default")).items()
        }
        outcomes = {name.split(":")[2]: number for name, number in counts.items() if name.startswith("outcome:")}
        assert outcomes == {"succeeded": 4, "failed": 1, "retried": 1, "cancelled": 1, "lost": 1}
        assert counts["attempts:detect"] == sum(outcomes.values())


async def test_a_trace_goes_from_the_submitter_to_the_vision_server(
    front: Front, server: ServerProcess, redis_url: str
) -> None:
    # Given a vision server of our own making: its log is that of every server
    with ServerProcess("tests.serving.echo_server", "0") as vision:
        environment = {"REDIS_URL": redis_url, "QUEUE_VISION_ADDRESS": vision.address}
        with ServerProcess("queue_server.worker", env=environment) as worker:
            # When jobs are submitted with a traceparent by gRPC, by HTTP, and with ones that are not valid
            by_grpc = await submit(front, "grpc")
            async with httpx.AsyncClient(base_url=f"http://{server.address}") as web:

                async def post(traceparent: str) -> str:
                    body = {"work": {"detect": {"images": [{"content": "b2s="}]}}}
                    answer = await web.post("/v1/jobs", json=body, headers={"traceparent": traceparent})
                    return str(answer.json()["job"]["job_id"])

                other_id = "a" * 32
                by_http = await post(f"00-{other_id}-{'b' * 16}-00")
                untraced = [
                    await post(text) for text in (f"00-{'0' * 32}-{'b' * 16}-00", f"00-{other_id}-b-00", "none")
                ]
            for job_id in (by_grpc, by_http, *untraced):
                await front.end(job_id)
            # Then the vision server's log has the trace of each call, as have the lines of the queue server and the worker
            for job_id, trace_id in ((by_grpc, TRACE_ID), (by_http, other_id)):
                call = await asyncio.to_thread(vision.wait_for, "call ended", request_id=f"{job_id}.1")
                assert call["trace_id"] == trace_id
                assert {line["trace_id"] for line in lines_of(job_id, server, worker)} == {trace_id}
                accepted = server.wait_for("job QUEUED", job_id=job_id)
                assert server.wait_for("call ended", request_id=accepted["request_id"])["trace_id"] == trace_id
            for job_id in untraced:
                assert "trace_id" not in await asyncio.to_thread(
                    vision.wait_for, "call ended", request_id=f"{job_id}.1"
                )
                assert not any("trace_id" in line for line in lines_of(job_id, server, worker))


async def test_depth_checks_and_metrics(
    front: Front, server: ServerProcess, redis_url: str, redis_client: redis.Redis, vision: FakeVision
) -> None:
    async with httpx.AsyncClient(base_url=f"http://{server.address}", timeout=10) as web:
        # Given no worker, two jobs that wait, and one that is refused
        for _ in range(2):
            await submit(front, "", b"slow")
        with pytest.raises(grpc.aio.AioRpcError):
            await submit(front, "", webhook=pb.Webhook(url="https://10.0.0.1/"))
        # Then a scaler reads numbers that call for one worker
        told = (await web.get("/queue/depth")).json()
        assert (told["queue"], told["depth"], told["running"], told["backlog"]) == ("default", 2, 0, 2)
        assert 0 < told["oldest_age_seconds"] < 30
        assert (await web.get("/queue/depth", params={"queue": "unheard-of"})).json() == {
            "queue": "unheard-of",
            **{"depth": 0, "held": 0, "running": 0, "backlog": 0, "workable": 0, "oldest_age_seconds": 0.0},
        }
        assert (await web.get("/queue/depth", params={"queue": "NO!"})).status_code == 400
        # And of all queues together, of which one is paused: what is held there calls for no worker
        await front.stub.PauseQueue(pb.PauseQueueRequest(queue="nightly"))
        await front.submit(queue="nightly")
        told = (await web.get("/queue/depth", params={"queue": "*"})).json()
        assert told.pop("oldest_age_seconds") > 0
        assert told == {"queue": "*", "depth": 3, "held": 1, "running": 0, "backlog": 3, "workable": 2}
        # As the docs have KEDA ask, to the letter
        (block,) = re.findall(r"```yaml\n(apiVersion: keda.sh.*?)```", DOCS.read_text(), re.S)
        (trigger,) = yaml.safe_load(block)["spec"]["triggers"]
        asked = await web.get(httpx.URL(trigger["metadata"]["url"]).raw_path.decode())
        assert trigger["type"] == "metrics-api"
        assert asked.json()[trigger["metadata"]["valueLocation"]] == 2 and int(trigger["metadata"]["targetValue"]) > 0
        # And a person reads that no worker is there, which makes nothing unready
        warned = await asyncio.to_thread(server.wait_for, "health check passes with a warning", check="workers")
        assert warned["level"] == "warning"

        wanted = {"redis", "workers", "sweeper", "webhooks"}
        async with asyncio.timeout(15):
            while not wanted <= set((await web.get("/health/detailed")).json()["checks"]):  # noqa: ASYNC110  # nobody tells
                await asyncio.sleep(0.05)
        detailed = await web.get("/health/detailed")
        checks = detailed.json()["checks"]
        assert detailed.status_code == 200 and detailed.json()["status"] == "SERVING"
        assert checks["workers"]["status"] == "WARNING" and "no worker is alive" in checks["workers"]["detail"]
        with start_worker(redis_url, vision):
            await until(lambda: len(vision.calls) == 2)
            told = (await web.get("/queue/depth")).json()
            assert (told["depth"], told["running"], told["backlog"]) == (0, 2, 2)
            vision.release()
            vision.failures = [error(Code.INTERNAL, "INTERNAL")]
            await front.end(await submit(front, "retried"))
            await asyncio.to_thread(server.wait_for, "health check passes", check="workers")

        async def metrics() -> dict[str, float]:
            lines = (await web.get("/metrics")).text.splitlines()
            return {
                line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")
            }

        name = "ai4thai_queue_jobs_ended_total"
        of_detect = '{kind="detect",queue="default"}'
        until_s = time.monotonic() + 10
        while (found := await metrics()).get(f'{name}{{kind="detect",queue="default",state="SUCCEEDED"}}') != 3:
            assert time.monotonic() < until_s, found
            await asyncio.sleep(0.1)
        assert found[f"ai4thai_queue_attempts_total{of_detect}"] == 4
        assert found['ai4thai_queue_attempts_ended_total{kind="detect",outcome="succeeded",queue="default"}'] == 3
        assert found['ai4thai_queue_attempts_ended_total{kind="detect",outcome="retried",queue="default"}'] == 1
        # What alerts wait for is 0, not missing: the first one would be no increase
        assert found['ai4thai_queue_attempts_ended_total{kind="detect",outcome="lost",queue="default"}'] == 0
        for outcome in ("delivered", "failed", "given_up"):
            assert found[f'ai4thai_queue_webhook_tries_total{{outcome="{outcome}"}}'] == 0
        for histogram, count in (("job", 3), ("wait", 4), ("run", 4)):
            assert found[f"ai4thai_queue_{histogram}_seconds_count{of_detect}"] == count
            assert (
                found[f'ai4thai_queue_{histogram}_seconds_bucket{{kind="detect",le="+Inf",queue="default"}}'] == count
            )
            assert 0 < found[f"ai4thai_queue_{histogram}_seconds_sum{of_detect}"] < 60
        assert found['ai4thai_queue_submissions_refused_total{reason="INVALID_FIELD"}'] == 1
        assert found['ai4thai_queue_depth{queue="default"}'] == found['ai4thai_queue_paused{queue="default"}'] == 0
        assert found["ai4thai_queue_redis_memory_bytes"] > 100_000
        assert found["ai4thai_queue_redis_limit_bytes"] == 256 << 20
        # And while Redis is away the scaler hears 503, in the contract's form
        redis_pid = redis_client.info("server")["process_id"]
        os.kill(redis_pid, signal.SIGSTOP)
        try:
            away = await web.get("/queue/depth")
        finally:
            os.kill(redis_pid, signal.SIGCONT)
        assert away.status_code == 503 and away.json()["error"]["details"][0]["reason"] == "STORE_UNAVAILABLE"
