"""Puts loads of `ai4thai bench` on a server, on the quickest event loop that there is."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

import uvloop
from ai4thai.bench import Bench, Load
from ai4thai.bench_results import LoadReport

T = TypeVar("T")


def put(address: str, images: Sequence[bytes], load: Load) -> LoadReport:
    """One load from begin to end; raises when any call failed, since the figures would be of something else."""
    report = run(Bench(address, images, load).run())
    if report.failures:
        raise RuntimeError(
            f"{report.failed_count} of {report.sent_count} calls failed, first: {report.failures[0].message}"
        )
    return report


def run(work: Coroutine[Any, Any, T]) -> T:
    """Runs asyncio work to its end."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(work)
