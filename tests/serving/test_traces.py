"""The W3C Trace Context that callers send: what is passed on, what is logged, what is ignored."""

from __future__ import annotations

import grpc
import httpx
import pytest
from ai4thai.vision.v1 import vision_service_pb2 as pb
from ai4thai.vision.v1 import vision_service_pb2_grpc as rpc
from hypothesis import given
from hypothesis import strategies as st

from serving.traces import read_traceparent, trace_id_of
from tests.processes import ServerProcess

TRACE_ID, SPAN_ID = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
GOOD = f"00-{TRACE_ID}-{SPAN_ID}-01"


@pytest.mark.parametrize(
    "text", [GOOD, f"cc-{TRACE_ID}-{SPAN_ID}-01", f"01-{TRACE_ID}-{SPAN_ID}-01-what-the-future-is-like"]
)
def test_a_good_one_is_passed_on_as_version_00(text: str) -> None:
    assert read_traceparent(text) == GOOD
    assert trace_id_of(read_traceparent(text)) == TRACE_ID


@pytest.mark.parametrize(
    "text",
    [
        *("", "00", GOOD.upper(), GOOD + "-more", GOOD + "\n", " " + GOOD, GOOD[:-1], GOOD.replace("-", "_")),
        *(f"ff-{TRACE_ID}-{SPAN_ID}-01", f"00-{'0' * 32}-{SPAN_ID}-01", f"00-{TRACE_ID}-{'0' * 16}-01"),
        *(
            f"00-{TRACE_ID[:-1]}-{SPAN_ID}-01",
            f"00-{TRACE_ID}-{SPAN_ID}-zz",
            f"01-{TRACE_ID}-{SPAN_ID}-01-" + "x" * 999,
        ),
    ],
)
def test_a_bad_one_is_none(text: str) -> None:
    assert read_traceparent(text) == "" and trace_id_of(read_traceparent(text)) == ""


@given(
    st.text(alphabet="0123456789abcdef-gF\n", max_size=70)
    | st.from_regex(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")
)
def test_whatever_comes_what_is_passed_on_has_the_form(text: str) -> None:
    read = read_traceparent(text)
    if read:
        version, trace_id, span_id, flags = read.split("-")
        assert (version, len(trace_id), len(span_id), len(flags)) == ("00", 32, 16, 2)
        assert int(trace_id, 16) and int(span_id, 16) and int(flags, 16) >= 0
        assert read_traceparent(read) == read and trace_id == trace_id_of(read)


def test_the_log_line_of_a_call_has_its_trace(echo: ServerProcess) -> None:
    with grpc.insecure_channel(echo.address) as channel:
        stub = rpc.VisionServiceStub(channel)
        for identity, traceparent in (("traced", GOOD), ("badly-traced", GOOD + "-more"), ("untraced", "")):
            stub.Detect(pb.DetectRequest(), metadata=(("x-request-id", identity), ("traceparent", traceparent)))
    httpx.post(
        f"http://{echo.address}/v1/vision:detect", json={}, headers={"x-request-id": "by-http", "traceparent": GOOD}
    ).raise_for_status()
    assert echo.wait_for("call ended", request_id="traced")["trace_id"] == TRACE_ID
    assert echo.wait_for("call ended", request_id="by-http")["trace_id"] == TRACE_ID
    for identity in ("badly-traced", "untraced"):
        assert "trace_id" not in echo.wait_for("call ended", request_id=identity)
