"""A check that passes with a warning: it is told, logged when it turns, and makes nothing unready."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

import pytest

from serving import health as module
from serving.health import Health, Warned


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    lines: list[tuple[str, str]] = []

    class Log:
        def info(self, event: str, **_: object) -> None:
            lines.append(("info", event))

        def warning(self, event: str, **_: object) -> None:
            lines.append(("warning", event))

    monkeypatch.setattr(module, "_log", Log())
    return lines


async def test_a_probe_may_warn(lines: list[tuple[str, str]]) -> None:
    health = Health()
    details: list[str] = ["fine", Warned("nothing is kept on disk"), Warned("still nothing"), "fine again"]

    async def probe() -> str:
        if not details:
            raise OSError("away")
        return details.pop(0)

    health.expose("service", "redis")
    async with aclosing(health.watch("service")) as watch:
        assert await anext(watch) is False
        seen = []
        health.add_probe("redis", probe, interval_s=0.02)
        assert await anext(watch) is True
        # When it passes, warns, warns otherwise, passes, and fails at last
        while health.serving("service"):
            (check,) = health.checks
            if (check.status, check.detail) not in seen:
                seen.append((check.status, check.detail))
            await asyncio.sleep(0.002)
    # Then the service was ready until it failed, and each turn was one line
    assert seen == [
        ("OK", "fine"),
        ("WARNING", "nothing is kept on disk"),
        ("WARNING", "still nothing"),
        ("OK", "fine again"),
    ]
    assert health.checks[0].status == "NOT_OK"
    assert lines == [
        ("info", "health check passes"),
        ("warning", "health check passes with a warning"),
        ("info", "health check passes"),
        ("warning", "health check does not pass"),
    ]
    await health.stop()


def test_what_does_not_pass_warns_of_nothing() -> None:
    health = Health()
    health.report("model", False, Warned("loading"))
    assert health.checks[0].status == "NOT_OK" and not health.checks[0].warns
