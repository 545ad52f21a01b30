"""The jobs in Prometheus' terms, as they were last read from Redis.

The scripts count in Redis, once for all servers and workers: what a killed worker did is counted too, and several queue servers
tell the same numbers (take max(), not sum(), over them).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from queue_server.statistics import Totals

_QUEUE_KIND = ["queue", "kind"]


class JobMetrics(Collector):
    """Tells Prometheus what `update` was told last."""

    def __init__(self) -> None:
        self._totals: tuple[Totals, ...] = ()
        self._worker_count = 0

    def register(self, registry: CollectorRegistry) -> None:
        """Adds the metrics to a registry."""
        registry.register(self)

    def unregister(self, registry: CollectorRegistry) -> None:
        """Takes them out again."""
        registry.unregister(self)

    def update(self, totals: Iterable[Totals], worker_count: int) -> None:
        """Remembers the numbers until the next time."""
        self._totals, self._worker_count = tuple(totals), worker_count

    def collect(self) -> Iterator[Metric]:
        """Called at each scrape."""
        depth = GaugeMetricFamily("ai4thai_queue_depth", "Jobs that a worker may take now.", labels=["queue"])
        scheduled = GaugeMetricFamily("ai4thai_queue_scheduled", "Jobs whose time has not come.", labels=["queue"])
        running = GaugeMetricFamily("ai4thai_queue_running", "Jobs that a worker is at.", labels=["queue"])
        age = GaugeMetricFamily(
            "ai4thai_queue_oldest_age_seconds", "How long the oldest queued job has waited.", labels=["queue"]
        )
        attempts = CounterMetricFamily("ai4thai_queue_attempts", "Attempts begun.", labels=_QUEUE_KIND)
        ended = CounterMetricFamily("ai4thai_queue_jobs_ended", "Jobs ended, by state.", labels=[*_QUEUE_KIND, "state"])
        latency = HistogramMetricFamily(
            "ai4thai_queue_job_seconds", "From a job's submission to its end.", labels=_QUEUE_KIND
        )
        for one in self._totals:
            depth.add_metric([one.queue], one.depth)
            scheduled.add_metric([one.queue], one.scheduled)
            running.add_metric([one.queue], one.running)
            age.add_metric([one.queue], one.oldest_age_s)
            for kind, number in one.attempts.items():
                attempts.add_metric([one.queue, kind], number)
            for (kind, state), number in one.ended.items():
                ended.add_metric([one.queue, kind, state], number)
            for kind, histogram in one.latency.items():
                buckets = [(f"{bound:g}", float(number)) for bound, number in histogram.counts.items()]
                latency.add_metric(
                    [one.queue, kind], buckets=[*buckets, ("+Inf", float(histogram.count))], sum_value=histogram.sum_s
                )
        yield from (depth, scheduled, running, age, attempts, ended, latency)
        workers = GaugeMetricFamily("ai4thai_queue_workers", "Workers alive.")
        workers.add_metric([], self._worker_count)
        yield workers
