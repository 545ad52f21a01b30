"""What a load found out about a server: latencies, failures, batches, where the time went."""

from __future__ import annotations

import time
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from ai4thai.errors import AI4ThaiError


@dataclass(frozen=True)
class Latency:
    """How long calls took, in milliseconds; all zero when there were none. A percentile is a real call's (nearest rank)."""

    count: int = 0
    mean_ms: float = 0.0
    p50_ms: float = 0.0
    p90_ms: float = 0.0
    p99_ms: float = 0.0
    max_ms: float = 0.0

    @classmethod
    def of(cls, seconds: Iterable[float]) -> Latency:
        """Counts latencies that are given in seconds."""
        sorted_ms = sorted(second * 1000 for second in seconds)
        if not sorted_ms:
            return cls()
        p50_ms, p90_ms, p99_ms = (sorted_ms[-(-len(sorted_ms) * percent // 100) - 1] for percent in (50, 90, 99))
        return cls(len(sorted_ms), sum(sorted_ms) / len(sorted_ms), p50_ms, p90_ms, p99_ms, sorted_ms[-1])


@dataclass(frozen=True)
class Failure:
    """The calls that failed with the same code and reason.

    `message` is the first one's. The server's advice when to come back (RetryInfo) is None where it gave none.
    """

    code: str
    reason: str
    message: str
    latency: Latency
    retry_info_count: int
    retry_delay_min_s: float | None
    retry_delay_mean_s: float | None


@dataclass(frozen=True)
class Steps:
    """Where the mean answered image spent its time, in milliseconds; together its latency.

    The first four are the server's Timings (`inference_ms` is the whole batch's forward pass), `server_ms` what else the server
    took from admission to the answer, `outside_ms` all before and after: the network, reading, writing, and the wait to be sent.
    """

    decode_ms: float = 0.0
    queue_ms: float = 0.0
    inference_ms: float = 0.0
    postprocess_ms: float = 0.0
    server_ms: float = 0.0
    outside_ms: float = 0.0


@dataclass(frozen=True)
class LoadReport:
    """What became of the images that were due in the measured `seconds`, each followed to its end.

    `sent_count` is `answered_count` + `failed_count` + `dropped_count`. `unsent_count` were due at a fixed rate while
    `max_outstanding` were on their way already. `images_per_s` counts the answers that came within the seconds.
    `batch_images` counts the answered images by the size of the batch that they shared.
    """

    seconds: float
    sent_count: int
    answered_count: int
    failed_count: int
    dropped_count: int
    unsent_count: int
    images_per_s: float
    latency: Latency
    failures: tuple[Failure, ...]
    batch_images: Mapping[int, int]
    steps: Steps
    peak_outstanding: int
    send_lag_p99_ms: float
    """How late a fixed rate's calls were sent, by this program's own fault; 0 without a rate."""
    generator_cpu_ratio: float
    """CPU seconds of this program for each second; near 1 it measures itself rather than the server."""
    all_answered_count: int = 0
    """Answers of any time, the warm-up's and late ones too: what the server has worked for from the first call to the last."""
    images_by_caller: tuple[int, ...] = ()
    """Answers to each caller or stream; empty for unary calls at a fixed rate."""

    @property
    def mean_batch_size(self) -> float:
        """Images for each forward pass."""
        batches = sum(images / size for size, images in self.batch_images.items())
        return sum(self.batch_images.values()) / batches if batches else 0.0


@dataclass(frozen=True)
class LoadProgress:
    """A moment of a running load; `images_per_s` is that since the last moment."""

    elapsed_s: float
    total_s: float
    is_warm: bool
    images_per_s: float
    failed_count: int
    outstanding_count: int


class _Timings(Protocol):
    """The contract's Timings."""

    decode_ms: float
    queue_ms: float
    inference_ms: float
    postprocess_ms: float
    total_ms: float
    batch_size: int


@dataclass
class _Failures:
    message: str
    seconds: list[float] = field(default_factory=list)
    retry_delays_s: list[float] = field(default_factory=list)


class Tally:
    """Counts calls that were due from `begin_s` up to `end_s` (moments of time.perf_counter()); others only as on their way."""

    def __init__(self, begin_s: float, end_s: float, callers: int) -> None:
        self.begin_s = begin_s
        self.end_s = end_s
        self.outstanding_count = 0
        self.answered_count = 0
        """Answers of any time, the warm-up's too."""
        self.failed_count = 0
        self._in_time = 0
        self._sent = 0
        self._peak = 0
        self._dropped = 0
        self._unsent = 0
        self._latencies_s = array("d")
        self._lags_s = array("d")
        self._failures: dict[tuple[str, str], _Failures] = {}
        self._batches: Counter[int] = Counter()
        self._steps: defaultdict[str, float] = defaultdict(float)
        self._by_caller = [0] * callers

    def sent(self, due_s: float) -> None:
        """A call leaves."""
        self.outstanding_count += 1
        self._sent += self._counts(due_s)
        self._peak = max(self._peak, self.outstanding_count)

    def lagged(self, due_s: float) -> None:
        """A call of a fixed rate leaves, later than it should."""
        if self._counts(due_s):
            self._lags_s.append(time.perf_counter() - due_s)

    def unsent(self, due_s: float) -> None:
        """A call was due, but too many were on their way."""
        self._unsent += self._counts(due_s)

    def answered(self, due_s: float, timings: _Timings, caller: int | None = None) -> None:
        """An answer came; `caller` counts who got it."""
        now_s = time.perf_counter()
        self.outstanding_count -= 1
        self.answered_count += 1
        self._in_time += self._counts(now_s)
        if not self._counts(due_s):
            return
        latency_s = now_s - due_s
        self._latencies_s.append(latency_s)
        if timings.batch_size > 0:  # a server that does not say counts for nothing
            self._batches[timings.batch_size] += 1
        if caller is not None:
            self._by_caller[caller] += 1
        named_ms = timings.decode_ms + timings.queue_ms + timings.inference_ms + timings.postprocess_ms
        for name, step_ms in (
            ("decode_ms", timings.decode_ms),
            ("queue_ms", timings.queue_ms),
            ("inference_ms", timings.inference_ms),
            ("postprocess_ms", timings.postprocess_ms),
            ("server_ms", timings.total_ms - named_ms),
            ("outside_ms", latency_s * 1000 - timings.total_ms),
        ):
            self._steps[name] += step_ms

    def dropped(self, due_s: float) -> None:
        """A frame was passed over for a later one."""
        self.outstanding_count -= 1
        self._dropped += self._counts(due_s)

    def failed(self, due_s: float, error: AI4ThaiError) -> None:
        """A call failed."""
        self.outstanding_count -= 1
        if not self._counts(due_s):
            return
        self.failed_count += 1
        failures = self._failures.setdefault((error.code, error.reason), _Failures(str(error)))
        failures.seconds.append(time.perf_counter() - due_s)
        if error.retry_after_s is not None:
            failures.retry_delays_s.append(error.retry_after_s)

    def report(self, generator_cpu_s: float) -> LoadReport:
        """What was counted."""
        seconds = self.end_s - self.begin_s
        answered = len(self._latencies_s)
        return LoadReport(
            seconds=seconds,
            sent_count=self._sent,
            answered_count=answered,
            failed_count=self.failed_count,
            dropped_count=self._dropped,
            unsent_count=self._unsent,
            images_per_s=self._in_time / seconds if seconds > 0 else 0.0,
            latency=Latency.of(self._latencies_s),
            failures=tuple(
                _failure(code, reason, failures)
                for (code, reason), failures in sorted(self._failures.items(), key=lambda one: -len(one[1].seconds))
            ),
            batch_images=dict(sorted(self._batches.items())),
            steps=Steps(**{name: total_ms / answered for name, total_ms in self._steps.items()}),
            peak_outstanding=self._peak,
            send_lag_p99_ms=Latency.of(self._lags_s).p99_ms,
            generator_cpu_ratio=generator_cpu_s / seconds if seconds > 0 else 0.0,
            all_answered_count=self.answered_count,
            images_by_caller=tuple(self._by_caller) if any(self._by_caller) else (),
        )

    def _counts(self, moment_s: float) -> bool:
        return self.begin_s <= moment_s < self.end_s


def _failure(code: str, reason: str, failures: _Failures) -> Failure:
    delays_s = failures.retry_delays_s
    return Failure(
        code=code,
        reason=reason,
        message=failures.message,
        latency=Latency.of(failures.seconds),
        retry_info_count=len(delays_s),
        retry_delay_min_s=min(delays_s) if delays_s else None,
        retry_delay_mean_s=sum(delays_s) / len(delays_s) if delays_s else None,
    )
