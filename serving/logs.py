"""Logs as sentences with fields: one line when a call ends, one when a state changes."""

from __future__ import annotations

import json
import logging
import sys
from contextvars import ContextVar
from typing import Any

import structlog

request_id: ContextVar[str] = ContextVar("request_id", default="")
"""The id of the call that the current task works for; every line logged meanwhile carries it."""

trace_id: ContextVar[str] = ContextVar("trace_id", default="")
"""The id of the trace (W3C Trace Context) that the current task or thread works for; every line logged meanwhile carries it."""

# Without the frames' local variables: they hold callers' images and the operator's secrets.
_TRACEBACKS = structlog.processors.ExceptionRenderer(structlog.tracebacks.ExceptionDictTransformer(show_locals=False))

# One for all lines: json.dumps makes a new one for each, which takes a quarter of a line's time.
_ENCODER = json.JSONEncoder(ensure_ascii=False, default=repr)


def get_logger(name: str) -> structlog.stdlib.BoundLogger:
    """The logger of one part of the program; `name` comes out as the field `part`."""
    logger: structlog.stdlib.BoundLogger = structlog.get_logger(part=name)
    return logger


def configure(level: str, form: str) -> None:
    """Sends every line to stderr. `form`: `json`, `console`, or `auto` (console on a terminal, JSON elsewhere)."""
    shared: list[Any] = [
        _add_ids,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    console = form == "console" or (form == "auto" and sys.stderr.isatty())
    if console:
        end: list[Any] = [structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), pad_event_to=0)]
    else:
        end = [_TRACEBACKS, structlog.processors.JSONRenderer(serializer=lambda event, **_: _ENCODER.encode(event))]
    number = logging.getLevelNamesMapping()[level.upper()]
    structlog.configure(
        processors=[*shared, *end],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=True,
    )
    # What third parties log goes the same way, warnings and worse only.
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*shared, structlog.stdlib.ExtraAdder()],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *end],
        )
    )
    logging.basicConfig(level=max(number, logging.WARNING), handlers=[handler], force=True)


def _add_ids(_logger: object, _method: str, event: dict[str, Any]) -> dict[str, Any]:
    current = request_id.get()
    if current and "request_id" not in event:
        event["request_id"] = current
    trace = trace_id.get()
    if trace and "trace_id" not in event:
        event["trace_id"] = trace
    return event
