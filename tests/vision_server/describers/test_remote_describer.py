"""A describer on another server: text, errors and ends as one that runs here has them, over HTTP with a server of the tests'."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import aclosing, asynccontextmanager
from itertools import repeat
from typing import Any

import numpy as np
import pytest
import regex
from starlette.responses import PlainTextResponse, Response

from serving.errors import Code, ServiceError
from serving.telemetry import REGISTRY
from tests.vision_server.describers.fake_peer import MODEL, FakePeer, error
from vision_server.describers import remote
from vision_server.describers.describer import PicturedTurn
from vision_server.describers.peer import Peer
from vision_server.describers.remote import RemoteDescriber
from vision_server.images import Image
from vision_server.requests import GenerateOptions, Priority, Role
from vision_server.results import FinishReason, GenerateSummary

NAME = "far"
QUESTION = (PicturedTurn(Role.USER, (Image(np.zeros((8, 8, 3), np.uint8), 8, 8), "What is it?")),)


@asynccontextmanager
async def described(
    peer: FakePeer, *, silence_s: float = 20, on_away: Callable[[str], object] = lambda _: None, **limits: int
) -> AsyncIterator[RemoteDescriber]:
    """A describer of a peer that serves."""
    client = Peer(peer.url, api_key="", silence_s=silence_s, max_answers=4)
    client.open()
    chosen = {"max_running": 4, "max_queued": 8, "max_bytes": 1 << 30, **limits}
    describer = RemoteDescriber(NAME, MODEL, client, ageing_ms=500, threads=1, on_away=on_away, **chosen)
    describer.start()
    try:
        yield describer
    finally:
        await describer.stop()


async def ask(
    describer: RemoteDescriber,
    options: GenerateOptions | None = None,
    on_piece: Callable[[str], Awaitable[object]] | None = None,
    **how: Any,
) -> tuple[list[str], GenerateSummary]:
    """The pieces, then the summary."""
    pieces: list[str] = []
    prompt = await describer.prepare(QUESTION)
    async with aclosing(describer.stream(prompt, options or GenerateOptions(), **how)) as stream:
        async for piece in stream:
            if isinstance(piece, GenerateSummary):
                return pieces, piece
            pieces.append(piece)
            if on_piece is not None:
                await on_piece(piece)
    raise AssertionError("no summary")


async def refused(asked: Awaitable[object]) -> ServiceError:
    with pytest.raises(ServiceError) as caught:
        await asked
    assert "Traceback" not in str(caught.value)
    return caught.value


async def until(holds: Callable[[], object], within_s: float = 20) -> None:
    async with asyncio.timeout(within_s):
        while not holds():  # noqa: ASYNC110  # seen from outside
            await asyncio.sleep(0.005)


def count(metric: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(f"ai4thai_{metric}", {"model": NAME, **labels}) or 0.0


@pytest.fixture
async def peer() -> AsyncIterator[FakePeer]:
    async with FakePeer().serving() as serving:
        yield serving


async def test_an_answer_comes_in_pieces_with_its_usage_and_times(peer: FakePeer) -> None:
    before = count("generated_tokens_total"), count("generations_total", finish_reason="stop")
    async with described(peer) as describer:
        pieces, summary = await ask(describer, since_s=time.perf_counter() - 1)
    assert "".join(pieces) == summary.text == "A red circle."
    assert len(pieces) > 1
    assert (summary.finish_reason, summary.model) == (FinishReason.STOP, NAME)
    usage, timings = summary.usage, summary.timings
    assert (usage.prompt_tokens, usage.image_tokens, usage.completion_tokens) == (40, 36, 4)
    assert 1000 <= timings.queue_ms < timings.time_to_first_token_ms < timings.total_ms
    after = count("generated_tokens_total"), count("generations_total", finish_reason="stop")
    assert (after[0] - before[0], after[1] - before[1]) == (4, 1)
    assert (describer.card.version, describer.card.engine, describer.card.device) == (MODEL, "openai", "remote")


async def test_what_is_asked_for_is_passed_on(peer: FakePeer) -> None:
    options = GenerateOptions(max_new_tokens=7, temperature=0.5, top_p=0.9, seed=11, stop=("x", "ไม่"))
    async with described(peer) as describer:
        await ask(describer, options, priority=Priority.BATCH)
        await ask(describer)
    first, second = peer.asked
    assert {key: value for key, value in first.items() if key != "messages"} == {
        "model": MODEL,
        "max_tokens": 7,
        "temperature": 0.5,
        "top_p": 0.9,
        "seed": 11,
        "stop": ["x", "ไม่"],
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    assert {"seed", "stop"}.isdisjoint(second)  # absent, not null: some servers refuse null
    picture, words = first["messages"][0]["content"]
    assert picture["image_url"]["url"].startswith("data:image/png;base64,")
    assert words == {"type": "text", "text": "What is it?"}
    assert [headers["x-priority"] for headers in peer.headers] == ["batch", "standard"]


@pytest.mark.parametrize("text", ["ที่นี่มีรูปสี่เหลี่ยมสีน้ำเงิน", "👨‍👩‍👧 and 🇹🇭🇱🇦", "ສະບາຍດີ ที่ 円\u2028x\x85e\u0301"])
async def test_pieces_are_whole_characters_wherever_the_peer_splits(peer: FakePeer, text: str) -> None:
    peer.chunks = list(text)  # code point by code point: within clusters too
    async with described(peer) as describer:
        pieces, summary = await ask(describer)
    assert "".join(pieces) == summary.text == text
    borders = {match.start() for match in regex.finditer(r"\X", text)}
    places = np.cumsum([0, *map(len, pieces)])[:-1]
    assert borders.issuperset(places.tolist())
    assert len(pieces) > 3


async def test_an_answer_that_was_cut_says_so(peer: FakePeer) -> None:
    peer.finish_reason = "length"
    async with described(peer) as describer:
        assert (await ask(describer))[1].finish_reason is FinishReason.LENGTH


async def test_without_usage_the_pieces_are_counted(peer: FakePeer) -> None:
    peer.usage = None
    async with described(peer) as describer:
        usage = (await ask(describer))[1].usage
    assert (usage.prompt_tokens, usage.image_tokens, usage.completion_tokens) == (0, 0, 4)


async def test_an_answer_without_words_is_one(peer: FakePeer) -> None:
    peer.chunks = ()
    async with described(peer) as describer:
        pieces, summary = await ask(describer)
    assert (pieces, summary.text, summary.finish_reason) == ([], "", FinishReason.STOP)
    assert 0 < summary.timings.time_to_first_token_ms <= summary.timings.total_ms


async def test_a_stop_text_that_the_peer_lets_through_ends_the_answer(peer: FakePeer) -> None:
    async with described(peer) as describer:
        pieces, summary = await ask(describer, GenerateOptions(stop=("ed c",)))
        assert "".join(pieces) == summary.text == "A r"
        assert summary.finish_reason is FinishReason.STOP
        await until(lambda: not peer.running)


async def test_when_the_caller_leaves_the_peer_is_left_at_once(peer: FakePeer) -> None:
    waiting = asyncio.Event()
    peer.chunks = ["word "] * 100
    peer.before_chunk = lambda number: waiting.wait() if number == 5 else asyncio.sleep(0)
    cancelled = count("generations_total", finish_reason="cancelled")
    async with described(peer) as describer:
        for leave in ("the task is cancelled", "the iterator is closed"):
            prompt = await describer.prepare(QUESTION)
            stream = describer.stream(prompt, GenerateOptions())
            first = await anext(stream)
            assert first
            assert peer.running == 1
            if leave == "the iterator is closed":
                await stream.aclose()
            else:
                async with aclosing(stream):
                    reading = asyncio.create_task(_drain(stream))
                    await asyncio.sleep(0.05)
                    reading.cancel()
                    await asyncio.wait({reading})
                    assert reading.cancelled()
            await until(lambda: peer.running == 0, within_s=5)
        assert peer.left == 2
        assert count("generations_total", finish_reason="cancelled") == cancelled + 2
        assert count("running_generations") == 0
        waiting.set()
        assert (await ask(describer))[1].text == "word " * 100


async def _drain(stream: AsyncIterator[object]) -> None:
    async for _ in stream:
        pass


@pytest.mark.parametrize("chunk", [0, 2])
async def test_a_deadline_that_passes_ends_it(peer: FakePeer, chunk: int) -> None:
    peer.before_chunk = lambda number: asyncio.sleep(60 if number == chunk else 0)
    async with described(peer) as describer:
        fault = await refused(ask(describer, deadline_s=time.perf_counter() + 0.5))
        assert fault.code is Code.DEADLINE_EXCEEDED
        await until(lambda: peer.running == 0)
        assert (await refused(ask(describer, deadline_s=time.perf_counter() - 1))).code is Code.DEADLINE_EXCEEDED


async def test_so_many_are_asked_at_once_and_the_rest_wait_by_priority(peer: FakePeer) -> None:
    go = asyncio.Event()
    peer.before_chunk = lambda number: go.wait() if number == 0 else asyncio.sleep(0)
    async with described(peer, max_running=2, max_queued=4) as describer:
        begun: list[str] = []

        async def asking(label: str, priority: Priority) -> float:
            summary = (await ask(describer, priority=priority))[1]
            begun.append(label)
            return summary.timings.queue_ms

        callers = [asyncio.create_task(asking("first", Priority.STANDARD)) for _ in range(2)]
        await until(lambda: peer.running == 2)
        assert count("running_generations") == 2
        for label, priority in (("batch", Priority.BATCH), ("late", Priority.INTERACTIVE)):
            callers.append(asyncio.create_task(asking(label, priority)))
            await until(lambda: describer.queued == len(callers) - 2)
        callers.append(asyncio.create_task(asking("gone", Priority.INTERACTIVE)))
        await until(lambda: describer.queued == 3)
        # BATCH may fill three quarters of the places, the others one more.
        full = await refused(ask(describer, priority=Priority.BATCH))
        assert (full.code, full.reason) == (Code.RESOURCE_EXHAUSTED, "QUEUE_FULL")
        assert full.retry_after_s is not None
        describer.check_room(Priority.STANDARD)
        overdue = await refused(ask(describer, deadline_s=time.perf_counter() + 0.05))
        assert overdue.code is Code.DEADLINE_EXCEEDED
        callers.pop().cancel()
        await until(lambda: describer.queued == 2)
        assert len(peer.asked) == 2
        go.set()
        waits = await asyncio.gather(*callers)
        assert begun.index("late") < begun.index("batch")
        assert max(waits[:2]) < min(waits[2:])
        assert describer.queued == 0
        assert count("running_generations") == 0


async def test_conversations_that_wait_hold_no_more_bytes_than_they_may(peer: FakePeer) -> None:
    go = asyncio.Event()
    peer.before_chunk = lambda _: go.wait()
    async with described(peer, max_bytes=100) as describer:  # one that is larger than that alone is let through
        caller = asyncio.create_task(ask(describer))
        await until(lambda: peer.running)
        full = await refused(ask(describer))
        assert (full.code, full.reason) == (Code.RESOURCE_EXHAUSTED, "QUEUE_FULL")
        go.set()
        await caller
        await ask(describer)


ENDS: dict[str, tuple[Any, Code, str, float | None]] = {
    "400": (error(400, "max_tokens is 9 too large"), Code.INVALID_ARGUMENT, "max_tokens is 9 too large", None),
    "422": (lambda: Response('{"detail": "no such role"}', 422), Code.INVALID_ARGUMENT, "no such role", None),
    "413": (lambda: PlainTextResponse("Too large", 413), Code.INVALID_ARGUMENT, "Too large", None),
    "429": (error(429, "slow down", retry_after="7"), Code.RESOURCE_EXHAUSTED, "slow down", 7.0),
    "503": (error(503, "", retry_after="3"), Code.UNAVAILABLE, "503", 3.0),
    "502": (lambda: PlainTextResponse("<html>Bad Gateway", 502), Code.UNAVAILABLE, "Bad Gateway", 5.0),
    "401": (error(401, "Unauthorized"), Code.UNAVAILABLE, "Unauthorized", 5.0),
    "404": (error(404, "no model"), Code.UNAVAILABLE, "no model", 5.0),
    "500": (error(500, "File /srv/secret.py"), Code.INTERNAL, "failed", None),
    "redirect": (lambda: Response(status_code=307, headers={"location": "/else"}), Code.INTERNAL, "failed", None),
    "no stream": (lambda: PlainTextResponse("Hello"), Code.INTERNAL, "failed", None),
}


@pytest.mark.parametrize("case", ENDS)
async def test_a_peers_error_is_told_by_whose_fault_it_is(peer: FakePeer, case: str) -> None:
    peer.refusal, code, words, retry_after_s = ENDS[case]
    errors = count("generations_total", finish_reason="error")
    async with described(peer) as describer:
        fault = await refused(ask(describer))
        assert fault.code is code, str(fault)
        assert words in str(fault)
        assert "secret" not in str(fault)
        if retry_after_s is not None:
            assert fault.retry_after_s == retry_after_s
        assert count("generations_total", finish_reason="error") == errors + 1
        peer.refusal = None
        assert (await ask(describer))[1].text == "A red circle."


def _bang() -> Awaitable[object]:
    raise ConnectionAbortedError("the peer dies")


TAILS: dict[str, tuple[Iterable[str], Code]] = {
    "ends without a word": ([], Code.UNAVAILABLE),
    "given up there": (
        ['data: {"choices": [{"delta": {}, "finish_reason": "abort"}]}\n\n', "data: [DONE]\n\n"],
        Code.UNAVAILABLE,
    ),
    "an error, as vLLM tells it": (
        [f"data: {json.dumps({'error': {'message': 'too long', 'code': 400}})}\n\n", "data: [DONE]\n\n"],
        Code.INVALID_ARGUMENT,
    ),
    "an error without a number": (['data: {"error": "out of memory"}\n\n'], Code.INTERNAL),
    "another vision server that leaves": (
        ['data: {"error": {"message": "shutting down", "type": "server_error", "code": "draining"}}\n\n'],
        Code.UNAVAILABLE,
    ),
    "no JSON": (["data: {nonsense\n\n"], Code.INTERNAL),
    "other JSON": (["data: [1, 2]\n\n"], Code.INTERNAL),
    "no text": (['data: {"choices": [{"delta": {"content": 3}}]}\n\n'], Code.INTERNAL),
    "an endless line": (repeat("data: " + "x" * 100_000), Code.INTERNAL),
    "endless text": (repeat(f'data: {{"choices": [{{"delta": {{"content": "{"x" * 900}"}}}}]}}\n\n'), Code.INTERNAL),
}


@pytest.mark.parametrize("case", TAILS)
async def test_a_stream_that_goes_wrong_in_the_middle_is_an_error(peer: FakePeer, case: str) -> None:
    peer.tail, code = TAILS[case]
    pieces: list[str] = []

    async def keep(piece: str) -> None:
        pieces.append(piece)

    async with described(peer) as describer:
        fault = await refused(ask(describer, on_piece=keep))
        assert fault.code is code, str(fault)
        assert "".join(pieces).startswith("A red ")
        await until(lambda: peer.running == 0)


async def test_a_connection_that_breaks_in_the_middle_is_unavailable(peer: FakePeer) -> None:
    peer.before_chunk = lambda number: _bang() if number == 2 else asyncio.sleep(0)
    async with described(peer) as describer:
        fault = await refused(ask(describer))
        assert (fault.code, fault.retry_after_s) == (Code.UNAVAILABLE, 5.0)
        assert "hung up" in str(fault)


async def test_a_peer_that_says_nothing_is_given_up(peer: FakePeer) -> None:
    peer.before_chunk = lambda number: asyncio.sleep(60 if number == 1 else 0)
    async with described(peer, silence_s=0.5) as describer:
        fault = await refused(ask(describer))
        assert fault.code is Code.UNAVAILABLE
        assert "said nothing for 0.5 s" in str(fault)
        await until(lambda: peer.running == 0)


async def test_other_lines_of_a_stream_are_passed_over(peer: FakePeer) -> None:
    peer.chunks = ("A",)
    peer.tail = [
        ": keep-alive\n\nevent: message\r\nid: 4\r\n",
        'data:{"choices": [{"delta": {"content": "B", "reasoning_content": "hm"}, "finish_reason": "stop"}]}\r\n\r\n',
        'data: {"choices": [], "usage": {"prompt_tokens": -4, "completion_tokens": "many"}}\n\ndata: [DO',
        "NE]",
    ]
    async with described(peer) as describer:
        _, summary = await ask(describer)
    assert summary.text == "AB"
    assert (summary.usage.prompt_tokens, summary.usage.completion_tokens) == (0, 0)


async def test_when_the_server_stops_the_running_and_the_waiting_are_told(peer: FakePeer) -> None:
    peer.before_chunk = lambda number: asyncio.sleep(60 if number == 1 else 0)
    async with described(peer, max_running=1) as describer:
        callers = [asyncio.create_task(refused(ask(describer))) for _ in range(2)]
        await until(lambda: peer.running == 1 and describer.queued == 1)
        await describer.stop()
        faults = await asyncio.gather(*callers)
        assert [fault.reason for fault in faults] == ["DRAINING", "DRAINING"]
        await until(lambda: peer.running == 0)
        assert (await refused(_drain(describer.stream(b"[]", GenerateOptions())))).reason == "DRAINING"


async def test_a_peer_that_is_away_is_told_of_once_two_looks_found_it_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_LOOK_AGAIN_S", 0.2)
    monkeypatch.setattr(remote, "_LOOK_EVERY_S", 1000)  # only a call that fails has it looked at
    away: list[str] = []
    peer = FakePeer()
    async with peer.serving():
        client = Peer(peer.url, api_key="", silence_s=20, max_answers=4)
        client.open()
        limits = {"max_running": 1, "max_queued": 8, "max_bytes": 1 << 30}
        describer = RemoteDescriber(NAME, MODEL, client, ageing_ms=500, threads=1, on_away=away.append, **limits)
        describer.start()
        peer.refusal = error(502, "a moment")
        looks = peer.looks
        assert (await refused(ask(describer))).code is Code.UNAVAILABLE
        await until(lambda: peer.looks > looks)  # a look at once, which finds it well
        peer.refusal = None
        await ask(describer)
        peer.refusal, peer.lost_looks, looks = error(502, "a moment"), 1, peer.looks
        await refused(ask(describer))
        await until(lambda: peer.looks == looks + 2)  # one that fails is no proof
        await asyncio.sleep(0.05)
        assert not away
        peer.refusal, looks = error(400, "your fault"), peer.looks
        await refused(ask(describer))
        await asyncio.sleep(0.05)
        assert peer.looks == looks
    fault = await refused(ask(describer))
    assert fault.code is Code.UNAVAILABLE
    assert "cannot be reached" in str(fault)
    await until(lambda: away)
    assert "cannot be reached" in away[0]
    await describer.stop()


async def test_a_hundred_callers_that_leave_at_random_leave_nothing_running(peer: FakePeer) -> None:
    peer.chunks = ["ที่ "] * 30
    peer.before_chunk = lambda _: asyncio.sleep(0.005)
    rng = np.random.default_rng(5)
    async with described(peer, max_running=8, max_queued=200) as describer:
        callers = [asyncio.create_task(ask(describer, priority=Priority.INTERACTIVE)) for _ in range(100)]
        stay = {*range(0, 100, 20)}
        for number in rng.permutation(100).tolist():
            await asyncio.sleep(0.005)
            if number not in stay:
                callers[number].cancel()
        outcomes = await asyncio.gather(*callers, return_exceptions=True)
        for number in stay:
            outcome = outcomes[number]
            assert isinstance(outcome, tuple)
            assert outcome[1].text == "ที่ " * 30
        await until(lambda: peer.running == 0)
        assert (describer.queued, count("running_generations")) == (0, 0)
