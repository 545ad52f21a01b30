"""Runs the checks side by side, each within its time, and gives their findings in a fixed order."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

from ai4thai.doctor import (
    clock,
    containers,
    gpu,
    machine,
    model_access,
    packages,
    ports,
    redis_server,
    secret_files,
    servers,
)
from ai4thai.doctor.findings import Finding, Level, Situation

TIME_S: Final = 5.0
"""What one check may take. All run at once, so this is about what all of them take."""

Check = Callable[[Situation], Iterator[Finding]]

CHECKS: Final[dict[str, Check]] = {
    "python": packages.check_python,
    "packages": packages.check_packages,
    "gpu": gpu.check_gpu,
    "memory": machine.check_memory,
    "disk": machine.check_disk,
    "files": machine.check_open_files,
    "ports": ports.check_ports,
    "secrets": secret_files.check_secrets,
    "redis": redis_server.check_redis,
    "models": model_access.check_models,
    "servers": servers.check_servers,
    "clock": clock.check_clock,
    "containers": containers.check_containers,
}
"""By name, in the order in which they are told."""


@dataclass
class _Run:
    name: str
    check: Check
    findings: list[Finding] = field(default_factory=list)
    done: threading.Event = field(default_factory=threading.Event)

    def __call__(self, situation: Situation) -> None:
        try:
            for finding in self.check(situation):
                self.findings.append(finding)
        except Exception as error:  # one check that breaks must not hide the others' findings
            self.findings.append(
                Finding(
                    self.name,
                    Level.WARNING,
                    f"could not be looked at: {type(error).__name__}: {error}",
                    "This is a fault of the doctor; look yourself.",
                )
            )
        finally:
            self.done.set()


def examine(situation: Situation, names: Sequence[str] = (), *, time_s: float = TIME_S) -> list[Finding]:
    """The findings of the checks of these names, or of all; a check that hangs is left behind and told as a failure.

    Raises:
        ValueError: there is no check of such a name.
    """
    if unknown := [name for name in names if name not in CHECKS]:
        raise ValueError(f"There is no check {unknown[0]!r}; there are {', '.join(CHECKS)}.")
    runs = [_Run(name, check) for name, check in CHECKS.items() if not names or name in names]
    for run in runs:
        # Daemons: one that hangs in a driver or on a network drive keeps no process from ending.
        threading.Thread(target=run, args=(situation,), name=f"check-{run.name}", daemon=True).start()
    until_s = time.monotonic() + time_s
    findings: list[Finding] = []
    for run in runs:
        in_time = run.done.wait(max(0.0, until_s - time.monotonic()))
        findings += list(run.findings)
        if not in_time:
            findings.append(
                Finding(
                    run.name,
                    Level.FAILURE,
                    f"no answer within {time_s:g} s",
                    f"Something hangs. Look at it alone: ai4thai doctor {run.name} --time 60",
                )
            )
    return findings
