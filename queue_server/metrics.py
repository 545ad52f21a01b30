"""The jobs in Prometheus' terms, as they were last read from Redis; docs/metrics.md explains them, and a test compares the two.

The scripts count in Redis, once for all servers and workers: what a killed process did is counted too, and several queue servers
tell the same numbers (take max(), not sum(), over them). Only what a server alone knows, its watchers and the submissions that it
refused, is its own. No label names a client or a job: there are at most QUEUE_MAX_QUEUES queues, and a few kinds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from queue_server.statistics import Histogram, StoreTotals, Totals
from serving.errors import ServiceError

_QUEUE = ["queue"]
_QUEUE_KIND = ["queue", "kind"]


class JobMetrics(Collector):
    """Tells Prometheus what `update` was told last; `watchers` counts the calls of WatchJob at this server."""

    def __init__(self, watchers: Callable[[], int] = lambda: 0) -> None:
        self._watchers = watchers
        self._totals: tuple[Totals, ...] = ()
        self._store = StoreTotals()
        self._refused: Counter[str] = Counter()

    def register(self, registry: CollectorRegistry) -> None:
        """Adds the metrics to a registry."""
        registry.register(self)

    def unregister(self, registry: CollectorRegistry) -> None:
        """Takes them out again."""
        registry.unregister(self)

    def update(self, totals: Iterable[Totals], store: StoreTotals) -> None:
        """Remembers the numbers until the next time."""
        self._totals, self._store = tuple(totals), store

    def count_refused(self, error: ServiceError) -> None:
        """Counts a submission that was not accepted; its reason is one of error_reason.proto."""
        self._refused[error.reason] += 1

    @contextmanager
    def refusals(self) -> Iterator[None]:
        """Around a submission: counts it when it is refused."""
        try:
            yield
        except ServiceError as error:
            self.count_refused(error)
            raise

    def collect(self) -> Iterator[Metric]:
        """Called at each scrape."""
        yield from self._collect_queues()
        yield from self._collect_counters()
        yield from self._collect_times()
        yield from self._collect_store()

    def _collect_queues(self) -> Iterator[Metric]:
        depth = GaugeMetricFamily("ai4thai_queue_depth", "Jobs that wait for a worker.", labels=_QUEUE)
        held = GaugeMetricFamily("ai4thai_queue_held", "Of these, jobs that are held.", labels=_QUEUE)
        scheduled = GaugeMetricFamily("ai4thai_queue_scheduled", "Jobs whose time has not come.", labels=_QUEUE)
        running = GaugeMetricFamily("ai4thai_queue_running", "Jobs that a worker is at.", labels=_QUEUE)
        age = GaugeMetricFamily(
            "ai4thai_queue_oldest_age_seconds", "How long the oldest queued job has waited.", labels=_QUEUE
        )
        paused = GaugeMetricFamily("ai4thai_queue_paused", "1 while the queue is paused.", labels=_QUEUE)
        size = GaugeMetricFamily("ai4thai_queue_jobs_bytes", "Bytes of jobs that have not ended.", labels=_QUEUE)
        for one in self._totals:
            depth.add_metric([one.queue], one.depth)
            held.add_metric([one.queue], one.held)
            scheduled.add_metric([one.queue], one.scheduled)
            running.add_metric([one.queue], one.running)
            age.add_metric([one.queue], one.oldest_age_s)
            paused.add_metric([one.queue], int(one.paused))
            size.add_metric([one.queue], one.size_bytes)
        yield from (depth, held, scheduled, running, age, paused, size)

    def _collect_counters(self) -> Iterator[Metric]:
        begun = CounterMetricFamily("ai4thai_queue_attempts", "Attempts begun.", labels=_QUEUE_KIND)
        outcomes = CounterMetricFamily(
            "ai4thai_queue_attempts_ended", "Attempts ended, by outcome.", labels=[*_QUEUE_KIND, "outcome"]
        )
        ended = CounterMetricFamily("ai4thai_queue_jobs_ended", "Jobs ended, by state.", labels=[*_QUEUE_KIND, "state"])
        for one in self._totals:
            for kind, number in one.attempts.items():
                begun.add_metric([one.queue, kind], number)
            for (kind, outcome), number in one.outcomes.items():
                outcomes.add_metric([one.queue, kind, outcome], number)
            for (kind, state), number in one.ended.items():
                ended.add_metric([one.queue, kind, state], number)
        refused = CounterMetricFamily(
            "ai4thai_queue_submissions_refused", "Submissions not accepted, by reason.", labels=["reason"]
        )
        for reason, number in self._refused.items():
            refused.add_metric([reason], number)
        yield from (begun, outcomes, ended, refused)

    def _collect_times(self) -> Iterator[Metric]:
        families = {
            "total": HistogramMetricFamily(
                "ai4thai_queue_job_seconds", "From a job's submission to its end.", labels=_QUEUE_KIND
            ),
            "wait": HistogramMetricFamily(
                "ai4thai_queue_wait_seconds", "From a job's turn to wait to an attempt's begin.", labels=_QUEUE_KIND
            ),
            "run": HistogramMetricFamily(
                "ai4thai_queue_run_seconds", "From an attempt's begin to its end.", labels=_QUEUE_KIND
            ),
        }
        for one in self._totals:
            for (kind, name), histogram in one.times.items():
                families[name].add_metric([one.queue, kind], _buckets(histogram), histogram.sum_s)
        yield from families.values()

    def _collect_store(self) -> Iterator[Metric]:
        for name, meaning, value in (
            ("ai4thai_queue_workers", "Workers alive.", self._store.worker_count),
            ("ai4thai_queue_watchers", "Calls of WatchJob at this server.", self._watchers()),
            ("ai4thai_queue_webhooks_waiting", "Ends of jobs still to be told.", self._store.webhooks_waiting),
            ("ai4thai_queue_redis_memory_bytes", "Memory that Redis uses.", self._store.memory_bytes),
            ("ai4thai_queue_redis_limit_bytes", "Redis' maxmemory; 0: none.", self._store.memory_limit_bytes),
        ):
            yield GaugeMetricFamily(name, meaning, value=value)
        tries = CounterMetricFamily("ai4thai_queue_webhook_tries", "Webhooks sent, by outcome.", labels=["outcome"])
        for outcome, number in self._store.webhook_tries.items():
            tries.add_metric([outcome], number)
        yield tries


def _buckets(histogram: Histogram) -> list[tuple[str, float]]:
    bounded = [(f"{bound:g}", float(number)) for bound, number in histogram.counts.items()]
    return [*bounded, ("+Inf", float(histogram.count))]
