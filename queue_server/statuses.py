"""Writes errors as the google.rpc.Status that records and results keep."""

from __future__ import annotations

from google.rpc import error_details_pb2
from google.rpc.status_pb2 import Status

from queue_server.errors import DOMAIN
from serving.errors import ServiceError
from serving.status import to_status


def write_error(error: ServiceError) -> bytes:
    """An error as the serialised Status that a record keeps."""
    return bytes(to_status(error, DOMAIN).SerializeToString())


def write_status(error: ServiceError) -> Status:
    """An error as the Status of one item of a result."""
    return to_status(error, DOMAIN)


def write_exhausted(last: bytes, *, spent: int) -> bytes:
    """The Status of a job whose every attempt failed: the last attempt's, its details behind an ErrorInfo that says so."""
    status = Status.FromString(last)
    info = error_details_pb2.ErrorInfo(reason="ATTEMPTS_EXHAUSTED", domain=DOMAIN, metadata={"attempts": str(spent)})
    details = [detail for detail in status.details if not detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR)]
    exhausted = Status(code=status.code, message=status.message)
    exhausted.details.add().Pack(info)
    exhausted.details.extend(details)
    return bytes(exhausted.SerializeToString())
