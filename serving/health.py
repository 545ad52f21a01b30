"""Named checks: the one truth behind grpc.health.v1, GET /health and GET /health/detailed.

check "redis" ok?  ┐
check "model/x" ok? ├─ expose("ai4thai.….VisionService", "redis", "model/x") → SERVING | NOT_SERVING
draining?          ┘

A check that passes may carry a warning, for a person to read; it makes nothing unready.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass

from serving.logs import get_logger

LIVENESS = ""
"""The health name of the process itself: SERVING from the moment the port opens."""

_log = get_logger("health")


class Warned(str):
    """A probe's detail that someone should act on although the check passes."""


@dataclass(frozen=True)
class Check:
    """The last word about one named thing; `warns`: it passes, and its detail is worth someone's attention."""

    name: str
    ok: bool
    detail: str
    latency_ms: float
    since_unix_s: float
    warns: bool = False

    @property
    def status(self) -> str:
        """`OK`, `WARNING` or `NOT_OK`."""
        if not self.ok:
            return "NOT_OK"
        return "WARNING" if self.warns else "OK"


class Health:
    """Keeps the checks and tells who waits when the answer for a service changes. Lives on one event loop."""

    def __init__(self, *, on_failed: Callable[[], object] = lambda: None) -> None:
        self._on_failed = on_failed
        self._checks: dict[str, Check] = {}
        self._exposed: dict[str, tuple[str, ...]] = {LIVENESS: ()}
        self._draining = self._watches_ended = False
        self._failed = ""
        self._changed = asyncio.Event()
        self._probes: set[asyncio.Task[None]] = set()

    def report(self, check: str, ok: bool, detail: str = "", *, latency_ms: float = 0.0) -> None:
        """Records the state of a check (`detail` may be Warned); a change of the state is logged."""
        before = self._checks.get(check)
        warns = ok and isinstance(detail, Warned)
        turned = before is None or (before.ok, before.warns) != (ok, warns)
        since_unix_s = time.time() if turned or before is None else before.since_unix_s
        self._checks[check] = Check(check, ok, detail, latency_ms, since_unix_s, warns)
        if turned:
            # A check that starts out not ok is a beginning, not a fault.
            log = _log.warning if warns or (before is not None and not ok) else _log.info
            word = "passes with a warning" if warns else "passes" if ok else "does not pass"
            log(f"health check {word}", check=check, detail=detail)
            self._notify()

    def forget(self, check: str) -> None:
        """Removes a check and the service of the same name (a model that was unloaded)."""
        self._checks.pop(check, None)
        self._exposed.pop(check, None)
        self._notify()

    def add_probe(
        self, check: str, probe: Callable[[], Awaitable[str]], *, interval_s: float = 2.0, timeout_s: float = 2.0
    ) -> None:
        """Asks `probe` again and again; it returns a detail (Warned, for one to act on), or raises what is wrong."""
        task = asyncio.create_task(self._run_probe(check, probe, interval_s, timeout_s), name=f"probe {check}")
        self._probes.add(task)
        task.add_done_callback(self._probes.discard)

    def expose(self, service: str, *checks: str) -> None:
        """Gives a grpc.health.v1 name to a set of checks; it is SERVING while all of them pass."""
        self._exposed[service] = checks
        self._notify()

    def fail_for_good(self, why: str) -> None:
        """Makes the process itself NOT_SERVING: a CUDA fault cannot be mended from inside. `on_failed` is called."""
        self._failed = why
        _log.error("the process cannot go on: it fails its liveness check", why=why)
        self._notify()
        self._on_failed()

    @property
    def failed(self) -> bool:
        """Whether the process is to be started again."""
        return bool(self._failed)

    def drain(self) -> None:
        """From now on every service is NOT_SERVING; the process itself still lives."""
        self._draining = True
        self._notify()

    def end_watches(self) -> None:
        """Ends every `watch`: what lasts as long as its caller likes must not hold up the process's end."""
        self._watches_ended = True
        self._notify()

    @property
    def draining(self) -> bool:
        """Whether the process is on its way out."""
        return self._draining

    @property
    def checks(self) -> tuple[Check, ...]:
        """Every check with its last state, in the order of their first report."""
        return tuple(self._checks.values())

    @property
    def services(self) -> tuple[str, ...]:
        """Every exposed name."""
        return tuple(self._exposed)

    def serving(self, service: str) -> bool | None:
        """Whether a service is ready; None: no such name."""
        if service not in self._exposed:
            return None
        return not self.why_not(service)

    def why_not(self, service: str) -> list[str]:
        """What keeps a service from being ready, one sentence each; empty: nothing."""
        if self._failed:
            return [self._failed]
        if service == LIVENESS:
            return []
        reasons = ["The server is shutting down."] if self._draining else []
        for name in self._exposed.get(service, ()):
            check = self._checks.get(name)
            if check is None:
                reasons.append(f"{name}: starting")
            elif not check.ok:
                reasons.append(f"{name}: {check.detail or 'not ok'}")
        return reasons

    async def watch(self, service: str) -> AsyncIterator[bool | None]:
        """Yields `serving(service)` now and after each change of it, until `end_watches`."""
        last: bool | str | None = "never yielded"
        while not self._watches_ended:
            changed = self._changed
            current = self.serving(service)
            if current != last:
                last = current
                yield current
            else:
                await changed.wait()

    async def stop(self) -> None:
        """Ends the probes."""
        for probe in tuple(self._probes):
            probe.cancel()
            with suppress(asyncio.CancelledError):
                await probe

    async def _run_probe(
        self, check: str, probe: Callable[[], Awaitable[str]], interval_s: float, timeout_s: float
    ) -> None:
        while True:
            began = time.perf_counter()
            try:
                async with asyncio.timeout(timeout_s):
                    detail = await probe()
                ok = True
            except TimeoutError:
                ok, detail = False, f"no answer within {timeout_s:g} s"
            except Exception as error:
                ok, detail = False, str(error) or type(error).__name__
            self.report(check, ok, detail, latency_ms=(time.perf_counter() - began) * 1000)
            await asyncio.sleep(interval_s)

    def _notify(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()
