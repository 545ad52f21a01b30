"""A program at a terminal of its own: what a person would type goes in, what they would see comes out."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Mapping

from tests.processes import ROOT

# Colours, cursor movements, bracketed paste.
_ESCAPES = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]")
# Makes the terminal the program's own, so that Ctrl-C reaches it; then becomes the program.
_AT_TERMINAL = (
    "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.executable, sys.argv[1:])"
)


class Terminal:
    """`python -m MODULE ARGUMENTS…` at a terminal; a context manager that ends it."""

    def __init__(self, module: str, *arguments: str, env: Mapping[str, str] | None = None, columns: int = 80) -> None:
        self._command = [sys.executable, "-c", _AT_TERMINAL, sys.executable, "-m", module, *arguments]
        paths = os.pathsep.join([str(ROOT / "clients"), str(ROOT)])
        self._env = {**os.environ, "PYTHONPATH": paths, "TERM": "xterm", "LC_ALL": "C.UTF-8", **(env or {})}
        for size in ("COLUMNS", "LINES"):
            self._env.pop(size, None)
        self._columns = columns
        self._bytes = b""
        self._seen = 0

    def __enter__(self) -> Terminal:
        self._screen, inner = pty.openpty()
        fcntl.ioctl(inner, termios.TIOCSWINSZ, struct.pack("HHHH", 24, self._columns, 0, 0))
        self.process = subprocess.Popen(
            self._command, cwd=ROOT, env=self._env, stdin=inner, stdout=inner, stderr=inner, start_new_session=True
        )
        os.close(inner)
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self._screen)

    @property
    def text(self) -> str:
        """All that has been shown, without colours."""
        return _ESCAPES.sub("", self._bytes.decode(errors="replace")).replace("\r", "")

    def type(self, keys: str) -> None:
        """Types; "\\n" is the enter key, "\\x03" Ctrl-C, "\\x04" Ctrl-D."""
        os.write(self._screen, keys.encode())

    def wait_for(self, words: str, timeout_s: float = 30) -> str:
        """What is shown up to and with these words, since the last wait."""
        until_s = time.monotonic() + timeout_s
        while (at := self.text.find(words, self._seen)) < 0:
            assert self._read(until_s - time.monotonic()), f"{words!r} did not come; shown was:\n{self.text}"
        begin, self._seen = self._seen, at + len(words)
        return self.text[begin : self._seen]

    def wait(self, timeout_s: float = 20) -> int:
        """The exit code."""
        until_s = time.monotonic() + timeout_s
        while self._read(until_s - time.monotonic()):
            pass
        return self.process.wait(max(0.1, until_s - time.monotonic()))

    def _read(self, timeout_s: float) -> bool:
        """False: nothing more comes, or not in time."""
        readable, _, _ = select.select([self._screen], [], [], max(0.0, timeout_s))
        if not readable:
            return False
        try:
            more = os.read(self._screen, 1 << 16)
        except OSError:  # Linux's way to say that the other side is closed
            return False
        self._bytes += more
        return bool(more)
