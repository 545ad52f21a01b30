"""One child process of the stack: how it is started, what it wrote, how it ended."""

from __future__ import annotations

import ctypes
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

KEPT_LOGS: Final = 3
"""Logs of earlier runs: `worker.log.1` is the last one."""


@dataclass
class Part:
    """One child process."""

    name: str
    command: list[str]
    env: Mapping[str, str]
    log: Path
    process: subprocess.Popen[bytes] | None = None
    started_s: float = 0.0
    restarts: int = 0
    restart_at_s: float | None = None

    @property
    def end(self) -> str:
        """How it ended."""
        code = self.exit_code
        return f"was killed by {signal.Signals(-code).name}" if code is not None and code < 0 else f"ended with {code}"

    def keep_earlier_logs(self) -> None:
        """Moves the log of the run before out of the way: `worker.log` becomes `worker.log.1`."""
        for number in range(KEPT_LOGS, 0, -1):
            earlier = self.log.with_name(f"{self.log.name}.{number - 1}") if number > 1 else self.log
            if earlier.exists():
                earlier.replace(self.log.with_name(f"{self.log.name}.{number}"))

    def spawn(self) -> None:
        """Starts it; what it writes is added to its log."""
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                self.command,
                env=dict(self.env),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                # A group of its own: the terminal's Ctrl-C reaches us alone, who stop all in order.
                start_new_session=True,
                preexec_fn=_ending_with_parent() if sys.platform == "linux" else None,
            )
        self.started_s, self.restart_at_s = time.monotonic(), None

    @property
    def exit_code(self) -> int | None:
        """None while it runs, and before it has been started."""
        return self.process.poll() if self.process else None

    def log_tail(self, lines: int = 15) -> str:
        """The last lines that it wrote."""
        try:
            return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])
        except OSError:
            return ""


class PartEnded(Exception):
    """A process of the stack has ended by itself, while it started or again and again."""

    def __init__(self, part: Part) -> None:
        super().__init__(f"{part.name} {part.end}. Its last words ({part.log}):\n{part.log_tail()}")
        self.part = part


def _ending_with_parent() -> Callable[[], None]:
    # Even a killed parent leaves nothing running (Linux: PR_SET_PDEATHSIG). What is called between fork and exec is looked up
    # before: threads may exist by then.
    prctl = ctypes.CDLL(None).prctl

    def end_with_parent() -> None:
        prctl(1, signal.SIGTERM)

    return end_with_parent
