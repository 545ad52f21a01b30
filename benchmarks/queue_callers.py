"""Callers that submit jobs which do nothing, `python -m benchmarks.queue_callers`; a process, so that its CPU time is its own.

Writes one line: when it began, how long it took, how long each call took, which jobs there are.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time

import grpc.aio
from ai4thai.queue.v1 import queue_service_pb2, queue_service_pb2_grpc, work_pb2
from ai4thai.vision.v1 import generation_pb2

from benchmarks.loads import run


def request(queue: str = "", client: str = "") -> queue_service_pb2.SubmitJobRequest:
    """A job that does nothing: a question of one word."""
    message = work_pb2.WorkMessage(role=generation_pb2.ROLE_USER)
    message.parts.add(text="?")
    return queue_service_pb2.SubmitJobRequest(
        queue=queue, client=client, work=work_pb2.Work(generate=work_pb2.GenerateWork(messages=[message]))
    )


class Callers:
    """Submits `count` jobs: from so many callers at once, `batch` in a call; or one by one in even steps, `rate_per_s`."""

    def __init__(self, stub: queue_service_pb2_grpc.QueueServiceAsyncStub, client: str) -> None:
        self._stub = stub
        self._request = request(client=client)
        self.calls_ms: list[float] = []
        self.job_ids: list[str] = []

    async def as_fast_as_possible(self, count: int, callers: int, batch: int) -> None:
        """Each caller submits again when it was answered."""
        left = iter(range(0, count, batch))

        async def caller() -> None:
            for _ in left:
                await self._submit(batch)

        await asyncio.gather(*(caller() for _ in range(callers)))

    async def at_rate(self, count: int, rate_per_s: float) -> None:
        """Each is due at its time, answered or not; a call counts from then."""
        began_s = time.perf_counter()
        calls = []
        for number in range(count):
            due_s = began_s + number / rate_per_s
            await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
            calls.append(asyncio.create_task(self._submit(1, due_s)))
        await asyncio.gather(*calls)

    async def _submit(self, batch: int, due_s: float | None = None) -> None:
        due_s = time.perf_counter() if due_s is None else due_s
        if batch == 1:
            jobs = [(await self._stub.SubmitJob(self._request)).job]
        else:
            many = queue_service_pb2.BatchSubmitJobsRequest(requests=[self._request] * batch)
            answer = await self._stub.BatchSubmitJobs(many)
            refused = [item.error.message for item in answer.items if item.WhichOneof("outcome") == "error"]
            if refused:
                raise RuntimeError(f"{len(refused)} of {batch} jobs were refused: {refused[0]}")
            jobs = [item.accepted.job for item in answer.items]
        self.calls_ms.append((time.perf_counter() - due_s) * 1000)
        self.job_ids += [job.job_id for job in jobs]


async def submit(
    address: str, count: int, *, callers: int = 1, batch: int = 1, rate_per_s: float = 0.0, client: str = ""
) -> dict[str, object]:
    """What the process writes."""
    async with grpc.aio.insecure_channel(address) as channel:
        await channel.channel_ready()
        made = Callers(queue_service_pb2_grpc.QueueServiceStub(channel), client)
        began_s = time.monotonic()
        if rate_per_s:
            await made.at_rate(count, rate_per_s)
        else:
            await made.as_fast_as_possible(count, callers, batch)
        return {
            "began_s": began_s,
            "seconds": time.monotonic() - began_s,
            "calls_ms": made.calls_ms,
            "job_ids": made.job_ids,
        }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--address", required=True)
    parser.add_argument("--count", type=int, required=True)
    parser.add_argument("--callers", type=int, default=1)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rate", type=float, default=0.0)
    parser.add_argument("--client", default="")
    arguments = parser.parse_args()
    found = run(
        submit(
            arguments.address,
            arguments.count,
            callers=arguments.callers,
            batch=arguments.batch,
            rate_per_s=arguments.rate,
            client=arguments.client,
        )
    )
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
