"""Do this machine, Redis and the servers agree about the time?"""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Iterator
from contextlib import closing

from ai4thai.doctor.findings import Finding, Level, Situation
from ai4thai.doctor.redis_server import NoPackage, open_redis
from ai4thai.doctor.servers import ask_health, base_url

WARN_S = 2.0
FAIL_S = 60.0
"""TLS certificates, signatures of webhooks (5 min) and start times of jobs are judged by the clock."""
_TIME_ERROR = 5  # of adjtimex(2): the clock is not synchronised
_CURE = "Switch time synchronisation on, on both machines: sudo timedatectl set-ntp true; chronyc tracking"


def check_clock(situation: Situation) -> Iterator[Finding]:
    """Against Redis' TIME, against the Date of whoever answers for the servers, and what the kernel says."""
    yield from _check_kernel()
    if (ahead_s := _redis_ahead_s(situation)) is not None:
        yield _judge("Redis", ahead_s)
    for name, address in (("vision", situation.vision), ("queue", situation.queue)):
        if (url := base_url(address)) and (ahead_s := ask_health(url).clock_ahead_s) is not None:
            yield _judge(f"the {name} server", ahead_s)


def _judge(whose: str, ahead_s: float) -> Finding:
    away_s = abs(ahead_s)
    if away_s <= WARN_S:
        return Finding("clock", Level.OK, f"as that of {whose} ({away_s:.1f} s apart)")
    told = f"the clock of {whose} is {away_s:.0f} s {'ahead of' if ahead_s > 0 else 'behind'} this machine's"
    return Finding("clock", Level.FAILURE if away_s > FAIL_S else Level.WARNING, told, _CURE)


def _redis_ahead_s(situation: Situation) -> float | None:
    try:
        client = open_redis(situation)
    except (NoPackage, ValueError):
        return None
    import redis

    with closing(client):
        try:
            client.ping()  # connected before the time is taken
            before_s = time.time()
            seconds, microseconds = client.time()
        except redis.RedisError:
            return None  # the check of Redis tells why
    return float(seconds) + float(microseconds) / 1e6 - (before_s + time.time()) / 2


def _check_kernel() -> Iterator[Finding]:
    """Asked of the kernel itself, because a container has no timedatectl."""
    if sys.platform != "linux":
        return
    try:
        state = ctypes.CDLL(None).adjtimex(ctypes.create_string_buffer(512))  # zeros: read only, which anybody may
    except (OSError, AttributeError):
        return
    if state == _TIME_ERROR:
        yield Finding("clock", Level.WARNING, "the kernel says that nothing sets this machine's clock", _CURE)
    elif state >= 0:
        yield Finding("clock", Level.OK, "set by time synchronisation")
