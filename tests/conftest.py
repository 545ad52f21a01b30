"""What all tests stand on."""

from __future__ import annotations

import signal


def pytest_configure() -> None:
    # A shell starts what runs in the background with Ctrl-C ignored, and so would be every process that the tests interrupt.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
