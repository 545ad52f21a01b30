"""The exceptions that the clients raise.

    AI4ThaiError          code, reason, message, metadata, retry_after_s, field_violations, address, request_id
    ├── InvalidInput      INVALID_ARGUMENT, OUT_OF_RANGE       the request was wrong; .field_violations says where
    ├── NotFound          NOT_FOUND                            no such model, job or file
    │   └── JobLost       NOT_FOUND, reason JOB_LOST           accepted, but Redis lost it: submit it again
    ├── AlreadyExists     ALREADY_EXISTS                       a request_id was used for something else
    ├── WrongMoment       FAILED_PRECONDITION                  not in this state
    ├── Busy              RESOURCE_EXHAUSTED                   full; .retry_after_s says when to come back
    ├── Unavailable       UNAVAILABLE                          loading, draining or away; .retry_after_s
    ├── DeadlineExceeded  DEADLINE_EXCEEDED                    timeout_s passed before the answer
    ├── Cancelled         CANCELLED                            the call was cancelled
    ├── NotServedYet      UNIMPLEMENTED                        in the contract, but this server doesn't do it
    ├── NotAllowed        UNAUTHENTICATED, PERMISSION_DENIED   who you are, or what you may do
    └── ServerFault       INTERNAL and whatever else           the server's own fault; its log knows more

Every gRPC error becomes one of these, in this file alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Final

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2
from google.rpc.status_pb2 import Status

_DETAILS_KEY: Final = "grpc-status-details-bin"


@dataclass(frozen=True)
class FieldViolation:
    """A field of the request that was wrong: its path (`options.min_confidence`) and why."""

    field: str
    description: str


class AI4ThaiError(Exception):
    """A call that failed; `str()` is a sentence for the person who meets it."""

    def __init__(
        self,
        message: str,
        *,
        code: str = "UNKNOWN",
        reason: str = "",
        metadata: Mapping[str, str] | None = None,
        retry_after_s: float | None = None,
        field_violations: Iterable[FieldViolation] = (),
        address: str = "",
        request_id: str = "",
    ) -> None:
        """Remembers what the server said.

        Args:
            message: what was wrong, with which value, and what to do.
            code: gRPC's name of the kind of failure (`INVALID_ARGUMENT`).
            reason: a value of error_reason.proto without its prefix; empty when no server of this kind answered.
            metadata: the message's numbers by name (`limit_bytes`).
            retry_after_s: how long to wait before trying again; None when waiting doesn't help or isn't known.
            field_violations: the fields that were wrong.
            address: the server, as the client was told it.
            request_id: under which the server's log speaks of the call; empty when it gave none.
        """
        super().__init__(message)
        self.message = message
        self.code = code
        self.reason = reason
        self.metadata = dict(metadata or {})
        self.retry_after_s = retry_after_s
        self.field_violations = tuple(field_violations)
        self.address = address
        self.request_id = request_id


class InvalidInput(AI4ThaiError):
    """The request was wrong; sending it again changes nothing."""


class NotFound(AI4ThaiError):
    """There is no such model, job or file."""


class JobLost(NotFound):
    """The job was accepted, but Redis came back from a restart without it; submit it again, with the same request_id."""


class AlreadyExists(AI4ThaiError):
    """The request_id belongs to another request."""


class WrongMoment(AI4ThaiError):
    """Not in this state: a job that runs can't be deleted, a model that failed can't answer."""


class Busy(AI4ThaiError):
    """The server is full; come back after `retry_after_s`."""


class Unavailable(AI4ThaiError):
    """Nothing answers, or the server is starting or stopping."""


class DeadlineExceeded(AI4ThaiError):
    """The time allowed passed before the answer was there."""


class Cancelled(AI4ThaiError):
    """The call was cancelled before its end."""


class NotServedYet(AI4ThaiError):
    """The contract has it, this server doesn't yet."""


class NotAllowed(AI4ThaiError):
    """The server doesn't know the caller, or doesn't let them do this."""


class ServerFault(AI4ThaiError):
    """A fault of the server's own."""


_CLASSES: Final[Mapping[str, type[AI4ThaiError]]] = {
    "INVALID_ARGUMENT": InvalidInput,
    "OUT_OF_RANGE": InvalidInput,
    "NOT_FOUND": NotFound,
    "ALREADY_EXISTS": AlreadyExists,
    "FAILED_PRECONDITION": WrongMoment,
    "RESOURCE_EXHAUSTED": Busy,
    "UNAVAILABLE": Unavailable,
    "DEADLINE_EXCEEDED": DeadlineExceeded,
    "CANCELLED": Cancelled,
    "UNIMPLEMENTED": NotServedYet,
    "UNAUTHENTICATED": NotAllowed,
    "PERMISSION_DENIED": NotAllowed,
}

_BY_REASON: Final[Mapping[str, type[AI4ThaiError]]] = {"JOB_LOST": JobLost}

_NAMES: Final = {int(code.value[0]): code.name for code in grpc.StatusCode}


@contextmanager
def translated(address: str) -> Iterator[None]:
    """Around a call: what gRPC raises inside comes out as an AI4ThaiError."""
    try:
        yield
    except grpc.RpcError as error:
        raise from_rpc_error(error, address) from None


def from_rpc_error(error: Any, address: str = "") -> AI4ThaiError:
    """Translates what gRPC raised, sync or asyncio: anything with code(), details() and trailing_metadata()."""
    code = error.code().name
    trailers = dict(error.trailing_metadata() or ())
    request_id = str(trailers.get("x-request-id", ""))
    with suppress(DecodeError):  # what a stranger in between puts there is no reason to lose the error itself
        if _DETAILS_KEY in trailers:
            return from_status(Status.FromString(trailers[_DETAILS_KEY]), address, request_id)
    message = _own_words(code, error.details() or "", address)
    return _CLASSES.get(code, ServerFault)(message, code=code, address=address, request_id=request_id)


def from_status(status: Status, address: str = "", request_id: str = "") -> AI4ThaiError:
    """Translates a google.rpc.Status: of a call, of one frame, of one item of a job."""
    code = _NAMES.get(status.code, "UNKNOWN")
    info, bad, retry = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
    has_retry = False
    for detail in status.details:
        with suppress(DecodeError):
            detail.Unpack(info)
            detail.Unpack(bad)
            has_retry = detail.Unpack(retry) or has_retry
    kind = _BY_REASON.get(info.reason) or _CLASSES.get(code, ServerFault)
    return kind(
        status.message or f"The server answered {code}.",
        code=code,
        reason=info.reason,
        metadata=info.metadata,
        retry_after_s=retry.retry_delay.ToMilliseconds() / 1000 if has_retry else None,
        field_violations=[FieldViolation(item.field, item.description) for item in bad.field_violations],
        address=address,
        request_id=request_id,
    )


def _own_words(code: str, details: str, address: str) -> str:
    # Without a Status the words are gRPC's own, written for its developers; the common ones are said plainly.
    if code == "UNAVAILABLE" and "unhealthy" in details:
        return f"The server at {address} says that it doesn't serve at this moment: it is starting or stopping."
    if code == "UNAVAILABLE":
        return (
            f"No server answers at {address}: it isn't running, is starting or stopping, or the network is in between."
        )
    if code == "DEADLINE_EXCEEDED":
        return f"{address} did not answer in time. Allow more with timeout_s, or send less at once."
    if code == "CANCELLED":
        return "The call was cancelled."
    if code == "UNIMPLEMENTED":
        return f"The server at {address} doesn't know this call: another service, or an older version."
    if code == "RESOURCE_EXHAUSTED" and "larger than max" in details:
        return f"The message is larger than what {address} takes at once ({details}). Send less at once."
    return f"{address}: {details or code}"
