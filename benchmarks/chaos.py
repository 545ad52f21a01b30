"""Kills everything at random while jobs are submitted, and checks that every promise was kept: `make chaos`.

Redis keeps its file with appendfsync `always` in one run and `everysec` in another; in a third its machine loses its power each
time that it is killed: then what was written within the last second is gone, and nothing else may be.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.chaos_moments import KILLED
from benchmarks.chaos_run import SAID, Mode, Run, Size, run
from benchmarks.chaos_stack import LEASE_S, WORKERS
from benchmarks.chaos_without import SAFEGUARDS
from benchmarks.pages import RESULTS, Page, console
from benchmarks.processes import end_on_sigterm

MODES = {
    "always": Mode("always", "always"),
    "everysec": Mode("everysec", "everysec"),
    "power-loss": Mode("power loss", "everysec", power_loss=True),
}
SEED = 20_260
PROBLEMS_SHOWN = 20


def main() -> int:
    """Runs the modes one after another, writes the page; 1 when a promise was broken."""
    size = Size()
    parser = argparse.ArgumentParser(prog="make chaos", description=__doc__)
    parser.add_argument("modes", nargs="*", metavar="MODE", help=f"of {', '.join(MODES)} (default: all)")
    parser.add_argument("--seed", type=int, default=SEED, help=f"of jobs and kills (default: {SEED})")
    parser.add_argument("--jobs", type=int, default=size.jobs)
    parser.add_argument("--seconds", type=float, default=size.seconds, help=f"of chaos (default: {size.seconds:g})")
    parser.add_argument("--kills", type=int, default=size.kills, help=f"of each kind (default: {size.kills})")
    parser.add_argument("--without", choices=SAFEGUARDS, default="", help="take it out: the run has to fail")
    parser.add_argument("--real-vision", action="store_true", help="the real vision server instead of the stand-in")
    parser.add_argument("--keep", type=Path, help="keep the logs of all processes in this folder")
    parser.add_argument("--output", type=Path, default=RESULTS, help="the folder to write the page to")
    arguments = parser.parse_args()
    if unknown := sorted(set(arguments.modes) - set(MODES)):
        parser.error(f"there is no mode {', '.join(unknown)}; there are {', '.join(MODES)}")
    end_on_sigterm()
    size = replace(size, jobs=arguments.jobs, seconds=arguments.seconds, kills=arguments.kills, pauses=arguments.kills)
    page = Page("chaos", "Chaos", "make chaos")
    runs = []
    for name in arguments.modes or MODES:
        console.print(f"{name}: {size.jobs:,} jobs, {size.kills} kills of each kind within {size.seconds:g} s …")
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            runs.append(
                run(
                    MODES[name],
                    size,
                    arguments.seed,
                    folder,
                    without=arguments.without,
                    real_vision=arguments.real_vision,
                )
            )
            if arguments.keep:
                shutil.copytree(folder, arguments.keep / name, dirs_exist_ok=True)
        for problem in runs[-1].verdict.problems[:PROBLEMS_SHOWN]:
            console.print(problem, style="red", markup=False, soft_wrap=True)
        console.print(f"{name}: {len(runs[-1].verdict.problems)} problems, settled in {runs[-1].settled_s:.1f} s")
    describe(page, size, arguments.seed, runs)
    if arguments.without:
        print(page.text)
    else:
        page.write(arguments.output)
    return 1 if page.missed else 0


def describe(page: Page, size: Size, seed: int, runs: Sequence[Run]) -> None:
    """Writes what the runs brought onto the page."""
    page.say(
        f"{size.jobs:,} jobs of 1 to 5 images from {size.submitters} submitters (slow ones, cancelled, delayed, with deadlines, "
        f"in batches, of all priorities, in two queues) within {size.seconds:g} s. Meanwhile, at moments of a generator with the "
        f"seed {seed}, {WORKERS} workers, the vision server (a stand-in whose answers depend on each image's bytes), the queue "
        f"server and Redis are killed with SIGKILL, each at least {size.kills} times, and workers are stopped with SIGSTOP until "
        f"their lease of {LEASE_S:g} s has ended. A supervisor starts again what has ended. Submitters are processes with the "
        "real client; each repeats a submission with its request_id until it is acknowledged, and watches the job to its end. "
        "Judged from outside: by what the submitters were answered, by every job's history and result in the end, and by each "
        "key in Redis."
    )
    page.say(
        "`power loss`: each time that Redis is killed, what was written to its file within the last second is cut off before it "
        "starts again, as a machine without power would have it with `appendfsync everysec`. A job acknowledged within that "
        "second may be lost then, if its submitter is told so (JOB_LOST, or, when the queue server that had acknowledged it was "
        "killed as well, JOB_NOT_FOUND); no other may be."
    )
    rows: list[tuple[str, Sequence[object]]] = [
        ("jobs acknowledged", [f"{one.verdict.job_count:,}" for one in runs]),
        *((f"ended {state}", [one.verdict.ends[state] for one in runs]) for state in _states(runs)),
        *((f"kills: {whom}", [one.kills.get(whom, 0) for one in runs]) for whom in KILLED),
        ("workers stopped past their lease", [one.kills.get("pause", 0) for one in runs]),
        ("submissions turned away and repeated", [one.verdict.turned_away_count for one in runs]),
        ("watches that a client had to begin again", [one.verdict.watches_broken_count for one in runs]),
        ("jobs of 1 / 2 / 3 / more attempts", [_attempts(one) for one in runs]),
        *((name, [one.said[name] for one in runs]) for name in SAID.values()),
        (
            "jobs of which more than one attempt was done",
            [sum(count > 1 for count in one.finished.values()) for one in runs],
        ),
        ("longest time without an answer, s", [f"{one.outage_s:.1f}" for one in runs]),
        ("settled after the last kill, s", [f"{one.settled_s:.1f}" for one in runs]),
        ("power losses / bytes cut off", [f"{one.power_losses} / {one.lost_bytes:,}" for one in runs]),
        ("jobs lost with the last second / of these told as JOB_LOST", [_lost(one) for one in runs]),
        ("broken promises", [len(one.verdict.problems) for one in runs]),
    ]
    page.table(["", *(one.mode.name for one in runs)], [[name, *values] for name, values in rows])
    for one in runs:
        verdict, name = one.verdict, one.mode.name
        page.goal(
            f"{name}: every acknowledged job ended once, with the right result, seen by its watcher; nothing is left over in "
            f"Redis ({len(verdict.problems)} broken promises)",
            not verdict.problems,
        )
        least = min(one.kills.get(whom, 0) for whom in KILLED)
        page.goal(f"{name}: each killed {size.kills} times at least ({least})", least >= size.kills)
        if not one.mode.power_loss:
            page.goal(f"{name}: nothing lost ({verdict.lost_count})", verdict.lost_count == 0)
        else:
            page.goal(
                f"{name}: lost is at most what was acknowledged within the last second, and every submitter was told "
                f"({verdict.lost_count} jobs, {_unexplained(one)} otherwise)",
                _unexplained(one) == 0,
            )
        if verdict.problems:
            page.say("\n".join(f"- {problem}" for problem in verdict.problems[:PROBLEMS_SHOWN]))


def _unexplained(one: Run) -> int:
    """Lost jobs that no power loss explains, or of which the submitter was not told."""
    return sum("is lost" in problem for problem in one.verdict.problems)


def _states(runs: Sequence[Run]) -> list[str]:
    return sorted({state for one in runs for state in one.verdict.ends})


def _attempts(one: Run) -> str:
    counts = one.verdict.attempts
    more = sum(count for number, count in counts.items() if number > 3)
    return f"{counts[1]} / {counts[2]} / {counts[3]} / {more}"


def _lost(one: Run) -> str:
    return f"{one.verdict.lost_count} / {one.verdict.lost_reported_count}" if one.mode.power_loss else "-"


if __name__ == "__main__":
    sys.exit(main())
