"""The chaos runs in small, and that they notice when a safeguard is missing."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import redis
from ai4thai.job_results import DetectItem, DetectJobResult, Job, JobState
from ai4thai.results import DetectResult

from benchmarks.chaos import MODES
from benchmarks.chaos_moments import KILLED, moments
from benchmarks.chaos_oracle import Promise, Told, judge, read_promises
from benchmarks.chaos_plan import Pace, Planned, plan, read_plan, stand_in_answer, write_plan
from benchmarks.chaos_power import LOST_S, Cut
from benchmarks.chaos_run import Size, run
from benchmarks.chaos_stack import SETTINGS, Stack
from benchmarks.chaos_vision import answer, write_image

QUICK = {**SETTINGS, "QUEUE_LEASE_S": "1.5", "QUEUE_RENEW_S": "0.4", "QUEUE_OVERDUE_S": "2", "QUEUE_SWEEP_S": "0.2"}
PACE = Pace(slow_s=(0.4, 1.2), delay_s=(0.2, 2.0))
GOOD = write_image(0.0, good=True, filling=b"picture")


def small(**changes: object) -> Size:
    values = {"jobs": 60, "submitters": 2, "seconds": 5.0, "kills": 2, "pauses": 2, "settle_s": 40.0}
    return Size(**{**values, "pace": PACE, **changes})  # type: ignore[arg-type]


def test_killed_at_random_no_job_is_lost_or_done_twice(tmp_path: Path) -> None:
    # Given 60 jobs from two submitters, when everything is killed twice and workers are stopped past their lease
    found = run(MODES["everysec"], small(), 1, tmp_path, settings=QUICK)
    # Then every promise was kept
    assert found.verdict.problems == []
    assert found.verdict.job_count >= 55 and found.verdict.ends["SUCCEEDED"] >= 40
    assert [found.kills[whom] for whom in (*KILLED, "pause")] == [2, 2, 2, 2, 2]
    assert found.verdict.lost_count == 0


def test_without_the_fence_the_run_fails(tmp_path: Path) -> None:
    # Given slow jobs, when workers stop in the middle of them until others have begun them again
    pace = Pace(slow_s=(0.8, 1.2), slow_share=1.0)
    size = small(jobs=20, submitters=1, seconds=2.5, kills=0, pauses=3, settle_s=20.0, pace=pace)
    found = run(MODES["everysec"], size, 2, tmp_path, without="fence", settings=QUICK)
    # Then attempts that were over have been recorded all the same, and the oracle has seen it
    assert any("recorded" in problem or "went from" in problem for problem in found.verdict.problems)


def test_without_the_sweeper_the_run_fails(tmp_path: Path) -> None:
    size = small(jobs=20, submitters=1, seconds=0.5, kills=0, pauses=0, settle_s=1.5)
    found = run(MODES["everysec"], size, 3, tmp_path, without="sweeper", settings=QUICK)
    assert any("never ended: it is SCHEDULED" in problem for problem in found.verdict.problems)


def test_a_power_loss_takes_the_last_second_and_no_more(tmp_path: Path) -> None:
    # Given a Redis in which something was written long ago and something just now
    stack = Stack(tmp_path)
    stack.redis.start()
    stack.power.start()
    try:
        client = stack.open_redis()
        _answering(client)
        client.set("old", "1")
        _looked_a_second_ago(stack, b"old")
        # When its machine loses its power (that moment is noted first: however long the write takes, it comes after it)
        stack.power.next_start_is_after_power_loss()
        client.set("new", "1")
        assert stack.redis.kill()
        time.sleep(0.2)
        _answering(client)
        # Then the second is gone
        assert (client.exists("old"), client.exists("new")) == (1, 0)
        (cut,) = stack.power.cuts
        assert cut.size_bytes > 0 and cut.killed_s - cut.from_s >= 1.0
        client.close()
    finally:
        stack.power.stop()
        stack.redis.stop()


def _looked_a_second_ago(stack: Stack, written: bytes) -> None:
    """Until the file was last looked at a second ago with this in it."""
    until_s = time.monotonic() + 20
    while not any(written in path.read_bytes() for path in stack.power._files()):
        assert time.monotonic() < until_s
        time.sleep(0.02)
    written_s = time.monotonic()
    while not any(written_s <= at_s <= time.monotonic() - LOST_S for at_s, _ in list(stack.power._sizes)):
        assert time.monotonic() < until_s
        time.sleep(0.02)


def _answering(client: redis.Redis) -> None:
    until_s = time.monotonic() + 10
    while True:
        try:
            client.ping()
            return
        except redis.RedisError:
            assert time.monotonic() < until_s
            time.sleep(0.05)


# ---- the oracle


def planned(**changes: object) -> Planned:
    return Planned(
        **{"request_id": "r", "client": "c", "at_s": 0.0, "images": (GOOD,), "priority": "", "queue": "", **changes}
    )  # type: ignore[arg-type]


def told(*states: str, image: bytes = GOOD) -> Told:
    found = answer(image)
    assert found is not None
    item = DetectItem(DetectResult("", "", found.width_px, found.height_px, detections=()))
    jobs = [
        Job("j", "detect", JobState(state), revision=number, attempt_count=1) for number, state in enumerate(states, 1)
    ]
    last = Job("j", "detect", JobState(states[-1]), attempt_count=1, result=DetectJobResult((item,)))
    return Told(jobs, last)


def promise(*states: str, acknowledged_s: float = 100.0, **changes: object) -> Promise:
    made = Promise(planned(**changes), job_ids=[(acknowledged_s, "j")])
    made.seen["j"] += [(101.0, number, state) for number, state in enumerate(states, 1)]
    return made


def right(image: bytes) -> str:
    return stand_in_answer(image).split(" ")[0] + " "


LIFE = ("QUEUED", "RUNNING", "SUCCEEDED")


def test_a_promise_that_was_kept_is_no_problem() -> None:
    verdict = judge({"r": promise(*LIFE)}, {"j": told(*LIFE)}, right)
    assert verdict.problems == [] and verdict.ends == {"SUCCEEDED": 1}


@pytest.mark.parametrize(
    ("made", "answered", "problem"),
    [
        (promise(*LIFE), told("QUEUED", "RUNNING", "SUCCEEDED", "SUCCEEDED"), "recorded 2 times"),
        (promise(*LIFE), told("QUEUED", "SUCCEEDED"), "went from QUEUED to SUCCEEDED"),
        (promise("QUEUED", "RUNNING"), told(*LIFE), "never brought its end"),
        (promise("QUEUED", "RUNNING", "FAILED"), told(*LIFE), "brought the end FAILED"),
        (promise(*LIFE), told(*LIFE, image=write_image(0, good=True, filling=b"other")), "wrong result"),
        (promise("QUEUED", "RUNNING", "FAILED"), told("QUEUED", "RUNNING", "FAILED"), "is FAILED"),
        (promise("QUEUED"), told("QUEUED", "RUNNING"), "never ended"),
        (promise(*LIFE), Told((), None, "JOB_NOT_FOUND"), "is lost"),
        (Promise(planned()), told(*LIFE), "never acknowledged"),
    ],
)
def test_a_broken_promise_is_a_problem(made: Promise, answered: Told, problem: str) -> None:
    problems = judge({"r": made}, {"j": answered}, right).problems
    assert any(problem in line for line in problems), problems


def test_only_what_a_power_loss_explains_may_be_lost() -> None:
    cuts = [Cut(from_s=99.5, killed_s=100.5, size_bytes=1)]
    gone = {"j": Told((), None, "JOB_LOST")}
    verdict = judge({"r": promise(acknowledged_s=100.0)}, gone, right, cuts)
    assert (verdict.problems, verdict.lost_count, verdict.lost_reported_count) == ([], 1, 1)
    # JOB_NOT_FOUND says less, and is all that can be said when the queue server, too, was killed
    unknown = {"j": Told((), None, "JOB_NOT_FOUND")}
    assert judge({"r": promise(acknowledged_s=100.0)}, unknown, right, cuts).problems
    assert judge({"r": promise(acknowledged_s=100.0)}, unknown, right, cuts, [100.2]).problems == []
    for acknowledged_s in (99.0, 103.0):
        assert judge({"r": promise(acknowledged_s=acknowledged_s)}, gone, right, cuts).problems


def test_a_plan_and_its_moments_are_the_same_for_the_same_seed(tmp_path: Path) -> None:
    first, again = (plan(5, 2, 40, 10.0, pace=PACE) for _ in range(2))
    assert first == again != plan(6, 2, 40, 10.0, pace=PACE)
    write_plan(tmp_path / "plan", first[0])
    assert read_plan(tmp_path / "plan") == first[0]
    times = moments(5, 10.0, kills=3, pauses=2, workers=3)
    assert times == moments(5, 10.0, kills=3, pauses=2, workers=3) and len(times) == 3 * len(KILLED) + 2


def test_promises_are_read_from_a_log_whose_last_line_is_half_written(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text('{"event": "acknowledged", "at_s": 1.0, "request_id": "r", "job_id": "j", "state": "QUEUED"}\n{"eve')
    assert read_promises([planned()], [log])["r"].job_ids == [(1.0, "j")]
