"""The named checks of /health/detailed that make nothing unready: a server whose workers are away still takes jobs."""

from __future__ import annotations

from queue_server.statistics import Statistics
from queue_server.sweeper import Sweeper
from queue_server.webhooks import Webhooks
from serving.health import Health, Warned

# Each asks Redis a few times; a person who looks does not mind numbers this old.
INTERVAL_S = 5.0
# Rounds of the sweeper that may fail, or take their time, before someone should look.
MISSED_ROUNDS = 10


def add_checks(
    health: Health, statistics: Statistics, sweeper: Sweeper, webhooks: Webhooks, *, sweep_s: float, timeout_s: float
) -> None:
    """Adds `workers`, `sweeper` and `webhooks`; they pass with a warning, or fail while Redis is away."""

    async def workers() -> str:
        alive = await statistics.workers()
        if not alive:
            return Warned("no worker is alive: jobs wait (start one with `python -m queue_server.worker`)")
        return f"{len(alive)} alive, for {sum(worker.concurrency for worker in alive)} jobs at once"

    async def rounds() -> str:
        age_s = sweeper.idle_s
        detail = f"the last round ended {age_s:.1f} s ago"
        return Warned(detail) if age_s > max(10.0, MISSED_ROUNDS * sweep_s) else detail

    health.add_probe("workers", workers, interval_s=INTERVAL_S, timeout_s=timeout_s)
    health.add_probe("sweeper", rounds, interval_s=INTERVAL_S, timeout_s=timeout_s)
    health.add_probe("webhooks", webhooks.check, interval_s=INTERVAL_S, timeout_s=timeout_s)
