from __future__ import annotations

import grpc
import pytest
from ai4thai import AI4ThaiError, errors
from ai4thai.errors import from_rpc_error, from_status
from google.protobuf.any_pb2 import Any as AnyMessage
from google.rpc.status_pb2 import Status
from hypothesis import given
from hypothesis import strategies as st

from serving.errors import Code, ServiceError
from serving.status import to_status

CODES = [code for code in grpc.StatusCode if code is not grpc.StatusCode.OK]


class FailedCall(grpc.RpcError):
    """What gRPC raises, in shape."""

    def __init__(self, code: grpc.StatusCode, details: str, trailers: tuple[tuple[str, bytes | str], ...] = ()) -> None:
        super().__init__()
        self._code, self._details, self._trailers = code, details, trailers

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str:
        return self._details

    def trailing_metadata(self) -> tuple[tuple[str, bytes | str], ...]:
        return self._trailers


@pytest.mark.parametrize("code", list(Code))
def test_what_a_server_says_arrives_whole(code: Code) -> None:
    said = ServiceError(
        code, "REASON", "7 is too many.", cure="Send 3.", metadata={"limit": 3}, field="images", retry_after_s=1.5
    )

    error = from_status(to_status(said, "vision.ai4thai"), "here:1", "call-1")

    assert (str(error), error.code, error.reason) == ("7 is too many. Send 3.", code, "REASON")
    assert (error.metadata, error.retry_after_s, error.address) == ({"limit": "3"}, 1.5, "here:1")
    assert [violation.field for violation in error.field_violations] == ["images"]
    assert error.request_id == "call-1"


@pytest.mark.parametrize("code", CODES)
def test_every_code_has_its_class_and_a_sentence_of_its_own(code: grpc.StatusCode) -> None:
    error = from_rpc_error(FailedCall(code, "details"), "here:1")

    assert error.code == code.name
    assert type(error) is not AI4ThaiError
    assert "here:1" in str(error) or code is grpc.StatusCode.CANCELLED
    assert "StatusCode" not in str(error) and "_InactiveRpcError" not in str(error)


def test_the_tree_at_the_top_of_the_file_is_true() -> None:
    tree = errors.__doc__ or ""
    classes = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, AI4ThaiError)]
    for kind in classes:
        assert kind.__name__ in tree
    for code in Code:
        kind = type(from_status(Status(code=grpc.StatusCode[code].value[0]), ""))
        line = next((line for line in tree.splitlines() if kind.__name__ in line), "")
        assert code in line or kind.__name__ == "ServerFault"


@given(
    code=st.integers(-3, 40),
    message=st.text(max_size=40),
    details=st.lists(st.tuples(st.text(max_size=20), st.binary(max_size=20)), max_size=3),
)
def test_a_status_of_any_form_becomes_an_error(code: int, message: str, details: list[tuple[str, bytes]]) -> None:
    status = Status(
        code=code, message=message, details=[AnyMessage(type_url=url, value=value) for url, value in details]
    )

    assert str(from_status(status))


def test_details_of_another_version_are_no_obstacle() -> None:
    status = to_status(ServiceError(Code.NOT_FOUND, "JOB_NOT_FOUND", "No such job."), "queue.ai4thai")
    status.details.add(type_url="type.googleapis.com/unknown.Detail", value=b"\x01")
    trailers = (("grpc-status-details-bin", status.SerializeToString()), ("x-request-id", "call-9"))

    error = from_rpc_error(FailedCall(grpc.StatusCode.NOT_FOUND, "No such job.", trailers), "here:1")

    assert (error.reason, error.request_id) == ("JOB_NOT_FOUND", "call-9")


def test_trailers_that_are_no_status_are_no_obstacle() -> None:
    error = from_rpc_error(
        FailedCall(grpc.StatusCode.UNAVAILABLE, "x", (("grpc-status-details-bin", b"\xff\xff\xff"),)), "here:1"
    )
    assert error.code == "UNAVAILABLE"
