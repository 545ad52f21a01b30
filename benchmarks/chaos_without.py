"""Starts a process of the product with one of its safeguards taken out: `python -m benchmarks.chaos_without fence MODULE`.

Only to prove that a chaos run notices. The product has no such switch: it is taken apart from here, and if its code has changed
so that there is nothing to take out, that is an error.
"""

from __future__ import annotations

import re
import runpy
import sys
from typing import Any

from queue_server import scripts
from queue_server.sweeper import Sweeper
from queue_server.worker_store import WorkerStore

SAFEGUARDS = ("sweeper", "fence")


def take_out_sweeper() -> None:
    """Nothing moves on what time moves on: due, lost, expired, overdue."""

    async def start(_: Sweeper) -> None:
        """Begins nothing."""

    Sweeper.start = start  # type: ignore[method-assign, assignment]


def take_out_fence() -> None:
    """An attempt that lost its lease is not told, and its outcome is recorded like any other."""
    load_all, renew, look = scripts.load_all, WorkerStore.renew, WorkerStore.look

    def load_unfenced() -> dict[str, str]:
        texts = load_all()
        unfenced, count = re.subn(
            r"^if (?!not job)[^\n]* then return \{'refused',[^\n]*\} end\n", "", texts["finish"], flags=re.MULTILINE
        )
        if count == 0:
            raise RuntimeError("finish.lua refuses nothing any more: there is no fence to take out.")
        return {**texts, "finish": unfenced}

    def renew_unfenced(self: WorkerStore, *arguments: Any) -> str:
        return renew(self, *arguments).replace("lost", "ok")

    def look_unfenced(self: WorkerStore, *arguments: Any) -> list[str]:
        return [word.replace("lost", "ok") for word in look(self, *arguments)]

    scripts.load_all = load_unfenced
    WorkerStore.renew = renew_unfenced  # type: ignore[method-assign, assignment]
    WorkerStore.look = look_unfenced  # type: ignore[method-assign, assignment]


def main() -> None:
    """Runs the module as `python -m` does."""
    _, safeguard, module, *arguments = sys.argv
    {"sweeper": take_out_sweeper, "fence": take_out_fence}[safeguard]()
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
