"""Reads the W3C Trace Context that a caller sends, so that its trace can be followed through the servers.

00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01
   the trace's id                   the caller's span flags
"""

from __future__ import annotations

import re

TRACEPARENT = "traceparent"
"""Metadata and HTTP header."""

# https://www.w3.org/TR/trace-context/#traceparent-header: version ff and ids of zeros alone are invalid; a version after 00 may
# have more parts behind these four.
_FORM = re.compile(
    r"(?P<version>(?!ff)[0-9a-f]{2})"
    r"-(?P<rest>(?P<trace_id>(?!0{32})[0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2})"
    r"(?P<more>-[\x21-\x7e]{0,200})?"
)


def read_traceparent(value: str | None) -> str:
    """A traceparent fit to be passed on, always of version 00; empty for none and for one that is not valid (as W3C says)."""
    match = _FORM.fullmatch(value or "")
    if match is None or (match["version"] == "00" and match["more"] is not None):
        return ""
    return f"00-{match['rest']}"


def trace_id_of(traceparent: str) -> str:
    """The trace's id, 32 hex digits, of what read_traceparent gave; empty for the empty one."""
    return traceparent[3:35]
