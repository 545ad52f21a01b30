"""Translates a ServiceError into a google.rpc.Status with its details."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import error_details_pb2
from google.rpc.status_pb2 import Status

from serving.errors import Code, ServiceError

# google.rpc.Code: the numbers behind the names.
GRPC_CODE: Mapping[Code, grpc.StatusCode] = {code: grpc.StatusCode[code.name] for code in Code}


def number(code: Code) -> int:
    """The code's number in google.rpc.Code (`NOT_FOUND` → 5)."""
    return int(GRPC_CODE[code].value[0])


def from_exception(error: BaseException) -> ServiceError:
    """What the caller is told about any exception; an unknown one is INTERNAL and says nothing of its inside."""
    if isinstance(error, ServiceError):
        return error
    if isinstance(error, TimeoutError):
        return ServiceError(
            Code.DEADLINE_EXCEEDED,
            "DEADLINE_EXCEEDED",
            "The deadline passed before the answer was there.",
            cure="Allow more time, or send less at once.",
        )
    if isinstance(error, asyncio.CancelledError):
        return ServiceError(Code.CANCELLED, "CANCELLED", "The call was cancelled.")
    return ServiceError(
        Code.INTERNAL,
        "INTERNAL",
        "The server met a fault of its own.",
        cure="Its log has the details under this call's x-request-id.",
    )


def to_status(error: ServiceError, domain: str) -> Status:
    """The error as a Status: ErrorInfo always, BadRequest when a field was bad, RetryInfo when waiting helps."""
    details: list[Message] = [
        error_details_pb2.ErrorInfo(reason=error.reason, domain=domain, metadata=error.metadata),
    ]
    if error.field:
        violation = error_details_pb2.BadRequest.FieldViolation(
            field=error.field, description=str(error), reason=error.reason
        )
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    if error.retry_after_s is not None:
        delay = Duration()
        delay.FromMilliseconds(max(1, round(error.retry_after_s * 1000)))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    return Status(code=number(error.code), message=str(error), details=[_pack(detail) for detail in details])


def _pack(message: Message) -> AnyMessage:
    packed = AnyMessage()
    packed.Pack(message)
    return packed
