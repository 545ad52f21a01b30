"""The error that a server answers its callers with.

    ServiceError          code, reason, message, cure, metadata, field, retry_after_s
    └── a server's own    vision_server.errors, queue_server.errors

Knows no grpc: status.py translates, once, at the edge.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum


class Code(StrEnum):
    """What kind of failure; the names are gRPC's (google.rpc.Code)."""

    CANCELLED = "CANCELLED"
    INVALID_ARGUMENT = "INVALID_ARGUMENT"
    DEADLINE_EXCEEDED = "DEADLINE_EXCEEDED"
    NOT_FOUND = "NOT_FOUND"
    ALREADY_EXISTS = "ALREADY_EXISTS"
    PERMISSION_DENIED = "PERMISSION_DENIED"
    RESOURCE_EXHAUSTED = "RESOURCE_EXHAUSTED"
    FAILED_PRECONDITION = "FAILED_PRECONDITION"
    ABORTED = "ABORTED"
    OUT_OF_RANGE = "OUT_OF_RANGE"
    UNIMPLEMENTED = "UNIMPLEMENTED"
    INTERNAL = "INTERNAL"
    UNAVAILABLE = "UNAVAILABLE"
    UNAUTHENTICATED = "UNAUTHENTICATED"


# A caller that is told to come back needs to know when; raised without a better guess, this is it.
DEFAULT_RETRY_AFTER_S = 1.0


class ServiceError(Exception):
    """A failure that the caller is told about.

    `reason` is a value of the package's error_reason.proto without its prefix. `message` says what was wrong and with which
    value, `cure` what to do about it. `field` is the path of a bad field (`options.min_confidence`). `retry_after_s` is how
    long to wait before trying again; RESOURCE_EXHAUSTED and UNAVAILABLE always have one.
    """

    def __init__(
        self,
        code: Code,
        reason: str,
        message: str,
        *,
        cure: str = "",
        metadata: Mapping[str, object] | None = None,
        field: str = "",
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(f"{message} {cure}" if cure else message)
        if retry_after_s is None and code in (Code.RESOURCE_EXHAUSTED, Code.UNAVAILABLE):
            retry_after_s = DEFAULT_RETRY_AFTER_S
        self.code = code
        self.reason = reason
        self.message = message
        self.cure = cure
        self.metadata = {name: str(value) for name, value in (metadata or {}).items()}
        self.field = field
        self.retry_after_s = retry_after_s
