"""Generations that share steps: what each caller gets, who goes first, what a failure costs, and when a place is free again."""

from __future__ import annotations

import asyncio
import random
import time
from contextlib import aclosing
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from serving.telemetry import REGISTRY
from tests.vision_server.describers.asking import QUESTIONS, answer, asked, generating, picture, reference
from tests.vision_server.describers.fake_model import END, FakeModel, Gate, prompt
from vision_server.describers.language_model import LanguageModel
from vision_server.describers.prompts import Prompt
from vision_server.describers.scheduler import Generations, is_out_of_memory
from vision_server.errors import AnswerTooLong, DeadlinePassed, Draining, ExecutorStuck, Fault, MemoryRanOut, QueueFull
from vision_server.requests import GenerateOptions, Priority
from vision_server.results import FinishReason

TEN = GenerateOptions(max_new_tokens=10)
ENDLESS = GenerateOptions(max_new_tokens=4000)


def numbers(first: int, count: int) -> str:
    return "".join(f"{first + 1 + place} " for place in range(count))


def metric(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(name, labels) or 0.0


async def until(condition: Any) -> None:
    async with asyncio.timeout(30):
        # ASYNC110: what is waited for happens in the model's thread, which offers no event.
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.002)


async def begin(generations: Generations, prompt: Prompt, options: GenerateOptions, **more: Any) -> asyncio.Task[Any]:
    """A caller on its way: it stands in line, or further on."""
    task = asyncio.ensure_future(answer(generations, prompt, options, **more))
    await asyncio.sleep(0)
    return task


# ---- with the shipped model


async def test_several_at_once_answer_as_if_alone(describer: LanguageModel) -> None:
    prompts = [asked(describer, question) for question in QUESTIONS]
    options = GenerateOptions(max_new_tokens=30)
    async with generating(describer) as generations:
        together = await asyncio.gather(*(answer(generations, prompt, options) for prompt in prompts))
    for prompt_, (pieces, summary) in zip(prompts, together, strict=True):
        ids = reference(describer, prompt_, 30)
        assert "".join(pieces) == summary.text == describer.decode(ids)
        assert summary.usage.completion_tokens == len(ids)
        assert summary.usage.prompt_tokens == prompt_.prompt_tokens


async def test_an_answer_ends_at_its_length_or_its_stop_text(describer: LanguageModel) -> None:
    question = asked(describer, QUESTIONS[0])
    async with generating(describer) as generations:
        _, whole = await answer(generations, question, GenerateOptions(max_new_tokens=40))
        _, short = await answer(generations, question, GenerateOptions(max_new_tokens=3))
        stop = whole.text[4:7]
        pieces, stopped = await answer(generations, question, GenerateOptions(max_new_tokens=40, stop=(stop,)))
    assert (short.finish_reason, short.usage.completion_tokens) == (FinishReason.LENGTH, 3)
    assert stopped.finish_reason is FinishReason.STOP
    assert "".join(pieces) == stopped.text == whole.text[: whole.text.index(stop)]


async def test_the_same_seed_gives_the_same_text_whatever_the_batch_mates(describer: LanguageModel) -> None:
    question = asked(describer, QUESTIONS[0])
    options = GenerateOptions(max_new_tokens=25, temperature=1.8, top_p=0.95, seed=11)
    async with generating(describer, max_running=8) as generations:
        _, alone = await answer(generations, question, options)
        mates = [
            (asked(describer, QUESTIONS[1]), GenerateOptions(max_new_tokens=9)),
            *((question, replace(options, seed=seed)) for seed in (12, 13, 14)),
            (asked(describer, QUESTIONS[2], picture(), picture()), replace(options, top_p=0.5)),
        ]
        (_, again), *others = await asyncio.gather(
            answer(generations, question, options), *(answer(generations, *mate) for mate in mates)
        )
    assert again.text == alone.text
    assert any(other.text != alone.text for _, other in others)


async def test_thai_arrives_piece_by_piece(describer: LanguageModel) -> None:
    async with generating(describer) as generations:
        pieces, summary = await answer(generations, asked(describer, QUESTIONS[1]), GenerateOptions())
    assert any("\u0e00" <= letter <= "\u0e7f" for letter in summary.text)
    assert len(pieces) >= 5


async def test_a_picture_that_comes_again_is_not_read_again(describer: LanguageModel) -> None:
    question = asked(describer, QUESTIONS[2])
    async with generating(describer) as generations:
        _, first = await answer(generations, question, TEN)
        hits, misses = (
            metric("ai4thai_image_features_total", model=describer.name, outcome=outcome) for outcome in ("hit", "miss")
        )
        _, second = await answer(generations, asked(describer, QUESTIONS[2]), TEN)
    assert second.text == first.text
    assert metric("ai4thai_image_features_total", model=describer.name, outcome="hit") == hits + 1
    assert metric("ai4thai_image_features_total", model=describer.name, outcome="miss") == misses
    assert metric("ai4thai_image_feature_bytes", model=describer.name) > 0


async def test_200_clients_that_leave_at_random_moments_leave_nothing_and_change_nothing(
    describer: LanguageModel,
) -> None:
    # given: what those who stay are answered when they are alone
    rng = random.Random(5)
    staying = [asked(describer, question) for question in QUESTIONS]
    options = GenerateOptions(max_new_tokens=30)
    async with generating(describer, max_running=8, max_queued=300) as generations:
        alone = [(await answer(generations, question, options))[1].text for question in staying]

        async def leaver(number: int) -> None:
            await asyncio.sleep(rng.random() * 2)
            endless = GenerateOptions(max_new_tokens=900, temperature=2.0, seed=number)
            stream = generations.stream(rng.choice(staying), endless)
            leaving = asyncio.ensure_future(anext(stream))
            await asyncio.wait({leaving}, timeout=rng.random() * 0.5)
            if leaving.done():
                async with aclosing(stream):
                    for _ in range(rng.randrange(10)):
                        await anext(stream)
            else:
                leaving.cancel()  # in line, being read, or before its first piece

        # when: 200 come and go
        leavers = [asyncio.ensure_future(leaver(number)) for number in range(200)]
        stayers = [await begin(generations, question, options) for question in staying * 2]
        await asyncio.gather(*leavers, return_exceptions=True)
        # then: soon none of them has a place any more, nor waits for one
        async with asyncio.timeout(10):
            while any(row.left.is_set() for row in (*generations._rows, *generations._line)):  # noqa: ASYNC110  # as in until()
                await asyncio.sleep(0.002)
        texts = [(await stayer)[1].text for stayer in stayers]
        # and nothing runs when those who stayed have been answered, as if they had been alone
        await until(lambda: not generations._rows and not generations.queued and generations._reading is None)
        tokens = metric("ai4thai_generated_tokens_total", model=describer.name)
        await asyncio.sleep(0.2)
        assert metric("ai4thai_generated_tokens_total", model=describer.name) == tokens
        assert metric("ai4thai_running_generations", model=describer.name) == 0
    assert texts == alone * 2


# ---- with a model that counts, a step at a time


async def test_a_late_joiner_has_its_first_token_two_steps_later_at_most() -> None:
    model = FakeModel()
    gate = Gate(model.rows)
    async with generating(model) as generations:
        first = await begin(generations, prompt(10), ENDLESS)
        gate.step(3)
        await until(lambda: len(model.rows.steps) == 3)
        # when: another comes while a step computes, with a prompt as long as is read at once
        late = await begin(generations, prompt(2000, tokens=100), TEN)
        assert generations.queued == 1
        gate.step(2)
        await until(lambda: len(model.rows.steps) == 5)
        # then: it had part in the step after the one under way, or that one had not begun
        assert [2000 in step for step in model.rows.steps].index(True) <= 4
        first.cancel()
        gate.open()
        await late


async def test_a_long_prompt_is_read_between_steps_and_stops_nobody() -> None:
    model = FakeModel()
    gate = Gate(model.rows)
    async with generating(model) as generations:
        first = await begin(generations, prompt(10), ENDLESS)
        gate.step(1)
        await until(lambda: len(model.rows.steps) == 1)
        long = await begin(generations, prompt(2000, tokens=1001), TEN)
        await until(lambda: generations.queued or generations._reading)
        gate.open()
        await long
        first.cancel()
    # Ten chunks, and a step of the running row after each.
    begun = model.rows.pieces
    assert len(begun) == 10
    assert all(later - earlier >= 1 for earlier, later in pairwise(begun))


async def test_the_more_urgent_goes_first_and_nobody_waits_for_ever() -> None:
    model = FakeModel()
    gate = Gate(model.rows)
    async with generating(model, max_running=1) as generations:
        running = await begin(generations, prompt(10), GenerateOptions(max_new_tokens=2))
        await until(lambda: generations.queued == 0)
        batch = await begin(generations, prompt(100), GenerateOptions(max_new_tokens=1), priority=Priority.BATCH)
        await begin(generations, prompt(200), GenerateOptions(max_new_tokens=1), priority=Priority.STANDARD)
        await begin(generations, prompt(300), GenerateOptions(max_new_tokens=1), priority=Priority.INTERACTIVE)
        gate.open()
        await asyncio.gather(running, batch)
    assert [step[0] for step in model.rows.steps] == [10, 11, 300, 200, 100]


async def test_a_generation_waits_for_memory_and_one_that_never_fits_is_refused() -> None:
    model = FakeModel(max_tokens=50)
    gate = Gate(model.rows)
    async with generating(model) as generations:
        with pytest.raises(AnswerTooLong) as refused:
            await answer(generations, prompt(10, tokens=20), GenerateOptions(max_new_tokens=31))
        first = await begin(generations, prompt(10), GenerateOptions(max_new_tokens=30))
        second = await begin(generations, prompt(100), GenerateOptions(max_new_tokens=30))
        small = await begin(generations, prompt(1000), GenerateOptions(max_new_tokens=10))
        gate.open()
        for task, first_number in ((first, 10), (second, 100), (small, 1000)):
            _, summary = await task
            assert summary.text.startswith(numbers(first_number, 10))
    assert refused.value.metadata["limit_tokens"] == "1000"
    # The second did not fit beside the first; the third, which would have, did not pass it by.
    steps = model.rows.steps
    assert not any(any(token < 100 for token in step) and any(100 <= token < 200 for token in step) for step in steps)
    assert not any(any(token < 100 for token in step) and any(token >= 1000 for token in step) for step in steps)
    assert any(len(step) == 2 for step in steps)


async def test_memory_that_runs_out_fails_the_newest_and_the_others_go_on() -> None:
    model = FakeModel()
    failed: list[Exception] = []
    long = GenerateOptions(max_new_tokens=300)

    def full_with_three(tokens: list[int]) -> None:
        if len(tokens) > 2:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory")

    model.rows.on_step = full_with_three
    generations = Generations(model, max_running=4, max_queued=8, on_failure=failed.append)
    generations.start()
    try:
        tasks = [asyncio.ensure_future(answer(generations, prompt(first), long)) for first in (10, 100, 1000)]
        answers = await asyncio.gather(*tasks, return_exceptions=True)
    finally:
        await generations.stop()
    first, second, third = answers
    assert not isinstance(first, BaseException) and first[1].text == numbers(10, 300)
    assert not isinstance(second, BaseException) and second[1].text == numbers(100, 300)
    assert isinstance(third, MemoryRanOut) and third.retry_after_s
    assert failed == [], "memory that ran out says nothing about the device"


async def test_a_step_that_fails_for_good_fails_all_and_the_next_caller_is_served() -> None:
    model = FakeModel()
    failed: list[Exception] = []
    broken = True

    def step(_tokens: list[int]) -> None:
        if broken:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    model.rows.on_step = step
    generations = Generations(model, max_running=4, max_queued=8, on_failure=failed.append)
    generations.start()
    try:
        answers = await asyncio.gather(
            *(answer(generations, prompt(first), TEN) for first in (10, 100)), return_exceptions=True
        )
        assert [type(outcome) for outcome in answers] == [Fault, Fault]
        assert len(failed) == 2
        broken = False
        assert (await answer(generations, prompt(10), TEN))[1].text == numbers(10, 10)
    finally:
        await generations.stop()


async def test_scores_that_are_no_numbers_fail_their_row_alone() -> None:
    model = FakeModel()
    step = model.rows.step

    def ill(tokens: Any) -> Any:
        scores = step(tokens)
        for row, token in enumerate(tokens):
            if token == 103:
                scores[row] = float("nan")
        return scores

    model.rows.step = ill  # type: ignore[method-assign]
    async with generating(model) as generations:
        well, unwell = await asyncio.gather(
            answer(generations, prompt(10), TEN), answer(generations, prompt(100), TEN), return_exceptions=True
        )
    assert not isinstance(well, BaseException) and well[1].text == numbers(10, 10)
    assert isinstance(unwell, Fault)


async def test_the_models_own_end_and_its_context_end_an_answer() -> None:
    model = FakeModel()
    model.context_tokens = 25
    async with generating(model) as generations:
        _, ended = await answer(generations, prompt(END - 4), TEN)
        _, full = await answer(generations, prompt(10, tokens=20), TEN)
    assert (ended.finish_reason, ended.text) == (FinishReason.STOP, numbers(END - 4, 3))
    assert (full.finish_reason, full.usage.completion_tokens) == (FinishReason.LENGTH, 5)


async def test_when_the_caller_leaves_its_row_is_free_at_the_next_step() -> None:
    model = FakeModel()
    gate = Gate(model.rows)
    cancelled = metric("ai4thai_generations_total", model="fake", finish_reason="cancelled")
    async with generating(model, max_running=1) as generations:
        async with aclosing(generations.stream(prompt(10), ENDLESS)) as pieces:
            gate.step(2)
            await anext(pieces)
        waiting = await begin(generations, prompt(100), GenerateOptions(max_new_tokens=2))
        gate.open()
        await waiting
    steps = [step[0] for step in model.rows.steps]
    assert steps[-2:] == [100, 101]
    assert len(steps) <= 5, "two steps that were let go, one that was under way, two of the next"
    assert metric("ai4thai_generations_total", model="fake", finish_reason="cancelled") == cancelled + 1


async def test_a_full_line_is_refused_by_priority_with_a_time_to_come_back() -> None:
    model = FakeModel()
    gate = Gate(model.rows)
    async with generating(model, max_running=1, max_queued=4) as generations:
        tasks = [await begin(generations, prompt(10), TEN)]
        await until(lambda: generations.queued == 0)
        tasks += [await begin(generations, prompt(100 * n), TEN) for n in (1, 2, 3)]
        with pytest.raises(QueueFull) as refused:
            generations.check_room(Priority.BATCH)
        generations.check_room(Priority.INTERACTIVE)
        tasks += [await begin(generations, prompt(400), TEN)]
        with pytest.raises(QueueFull):
            generations.check_room(Priority.INTERACTIVE)
        gate.open()
        await asyncio.gather(*tasks)
    assert refused.value.retry_after_s is not None and refused.value.retry_after_s > 0


async def test_a_deadline_ends_a_generation_that_waits_or_that_a_slow_step_holds() -> None:
    model = FakeModel()
    gate = Gate(model.rows)
    async with generating(model, max_running=1) as generations:
        soon = time.perf_counter() + 0.1
        running = await begin(generations, prompt(10), TEN, deadline_s=soon)
        await until(lambda: generations.queued == 0)
        waiting = await begin(generations, prompt(100), TEN, deadline_s=soon)
        for task in (running, waiting):  # while the step still computes
            with pytest.raises(DeadlinePassed):
                await task
        gate.open()
        assert (await answer(generations, prompt(1000), TEN))[1].text == numbers(1000, 10)
        assert not any(100 in step for step in model.rows.steps), "nobody waited for it any more"


async def test_stopping_tells_those_who_run_and_those_who_wait() -> None:
    model = FakeModel()
    gate = Gate(model.rows)
    generations = Generations(model, max_running=1, max_queued=8)
    generations.start()
    tasks = [await begin(generations, prompt(10), ENDLESS), await begin(generations, prompt(100), ENDLESS)]
    await until(lambda: generations.queued == 1)
    stopping = asyncio.ensure_future(generations.stop())
    await asyncio.sleep(0.01)
    gate.open()
    await stopping
    for task in tasks:
        with pytest.raises(Draining):
            await task
    with pytest.raises(Draining):
        await answer(generations, prompt(10), TEN)


async def test_a_step_that_never_ends_is_given_up_and_everyone_is_told() -> None:
    model = FakeModel()
    gate = Gate(model.rows)
    told: list[str] = []
    generations = Generations(model, max_running=1, max_queued=8, stuck_after_s=0.3, on_stuck=told.append)
    generations.start()
    tasks = [await begin(generations, prompt(first), TEN) for first in (10, 100)]
    for outcome in await asyncio.gather(*tasks, return_exceptions=True):
        assert isinstance(outcome, ExecutorStuck)
    assert told == ["a step has computed for 0.3 s"]
    with pytest.raises(Draining):
        await answer(generations, prompt(10), TEN)
    await generations.stop()  # does not wait for what never ends
    gate.open()


async def test_pictures_are_looked_at_ahead_when_there_is_time() -> None:
    model = FakeModel()
    async with generating(model) as generations:
        generations.look(prompt(10))
        await until(lambda: model.rows.looked)
        assert (await answer(generations, prompt(10), TEN))[1].text == numbers(10, 10)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory."), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."), True),
        (RuntimeError("CUDA error: device-side assert triggered"), False),
        (ValueError("DefaultCPUAllocator"), False),
    ],
)
def test_out_of_memory_is_known_by_its_class_or_words(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


async def test_prompts_that_wait_are_bounded_by_their_bytes_and_let_go_once_read() -> None:
    model = FakeModel()
    gate = Gate(model.rows)
    size_bytes = prompt(10, tokens=100).size_bytes
    generations = Generations(model, max_running=1, max_queued=8, max_bytes=2 * size_bytes)
    generations.start()
    try:
        tasks = [await begin(generations, prompt(10, tokens=100), TEN)]
        await until(lambda: generations._rows)
        assert generations._held_bytes == 0, "it has been read"
        assert not generations._rows[0].prompt.inputs
        tasks += [await begin(generations, prompt(first, tokens=100), TEN) for first in (200, 300)]
        with pytest.raises(QueueFull) as refused:
            await answer(generations, prompt(400, tokens=100), TEN)
        gate.open()
        await asyncio.gather(*tasks)
        assert generations._held_bytes == 0
        await answer(generations, prompt(400, tokens=300), TEN)  # one alone may be larger
    finally:
        await generations.stop()
    assert "bytes of prompts" in refused.value.message
