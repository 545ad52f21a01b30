"""The jobs of a chaos run: what is submitted when, and what each must bring."""

from __future__ import annotations

import base64
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from ai4thai.job_results import DetectItem

from benchmarks.chaos_vision import answer, write_image

PRIORITIES = ("INTERACTIVE", "STANDARD", "STANDARD", "BATCH")
QUEUES = ("default", "second")
# Attempts are for kills: with so many no job may fail, however often its worker or its vision server is killed.
MAX_ATTEMPTS = 20
# Images that many jobs share, so that their files outlive the jobs that brought them.
SHARED_COUNT = 12


@dataclass(frozen=True)
class Planned:
    """One job. Times are seconds: `at_s` after the run's beginning, `delay_s` and `deadline_s` after the submission."""

    request_id: str
    client: str
    at_s: float
    images: tuple[bytes, ...]
    priority: str
    queue: str
    delay_s: float = 0.0
    deadline_s: float | None = None
    cancel_after_s: float | None = None
    again: bool = False
    """Submitted a second time with the same request_id, once it was acknowledged."""
    batch: str = ""
    """Submitted together with the others that say the same; empty: alone."""


Pictures = Callable[[random.Random, float, bool], bytes]
"""Makes an image: of which random numbers, how many seconds it is to take, whether it is to be good."""


@dataclass(frozen=True)
class Pace:
    """How long things take: `image_s` an image, `slow_s` one of a slow job, `delay_s` a delayed job waits; ranges."""

    image_s: tuple[float, float] = (0.005, 0.06)
    slow_s: tuple[float, float] = (0.8, 3.0)
    delay_s: tuple[float, float] = (0.5, 8.0)
    slow_share: float = 0.12


def stand_in_picture(numbers: random.Random, seconds: float, good: bool) -> bytes:
    """An image for benchmarks.chaos_vision, of 0.1 to 4 kB."""
    return write_image(seconds, good=good, filling=numbers.randbytes(numbers.randint(100, 4000)))


def stand_in_answer(image: bytes) -> str:
    """What `seen` must say of such an image."""
    found = answer(image)
    if found is None:
        return "IMAGE_UNREADABLE"
    return f"{found.width_px}x{found.height_px} {found.detections[0].label}"


def seen(item: DetectItem) -> str:
    """What became of one image, in a line that can be compared."""
    if item.detection is None:
        return item.error.reason if item.error is not None else "nothing"
    found = item.detection
    return f"{found.width_px}x{found.height_px} {' '.join(sorted(one.label for one in found.detections))}"


def plan(
    seed: int, submitters: int, jobs: int, seconds: float, *, pace: Pace, picture: Pictures = stand_in_picture
) -> list[list[Planned]]:
    """For each submitter its jobs, in the order of their times; the same seed gives the same plan."""
    numbers = random.Random(seed)
    shared = [picture(numbers, numbers.uniform(*pace.image_s), True) for _ in range(SHARED_COUNT)]
    plans: list[list[Planned]] = [[] for _ in range(submitters)]
    for number in range(jobs):
        submitter = number % submitters
        images = []
        slow = numbers.random() < pace.slow_share
        for _ in range(numbers.randint(1, 5)):
            if numbers.random() < 0.2:
                images.append(numbers.choice(shared))
            else:
                images.append(picture(numbers, numbers.uniform(*pace.image_s), numbers.random() > 0.06))
        if slow:
            images[0] = picture(numbers, numbers.uniform(*pace.slow_s), True)
        job = Planned(
            request_id=f"{seed}-{number}",
            client=f"submitter-{submitter}",
            at_s=round(numbers.uniform(0, seconds), 3),
            images=tuple(images),
            priority=numbers.choice(PRIORITIES),
            queue=numbers.choice(QUEUES),
            again=numbers.random() < 0.05,
        )
        draw = numbers.random()
        if draw < 0.08:
            # A slow one, so that there is something to cancel.
            images[-1] = picture(numbers, numbers.uniform(*pace.slow_s), True)
            after_s = round(numbers.uniform(0, pace.slow_s[1]), 3)
            job = replace(job, images=tuple(images), cancel_after_s=after_s)
        elif draw < 0.18:
            job = replace(job, delay_s=round(numbers.uniform(*pace.delay_s), 3))
        elif draw < 0.22:
            job = replace(job, deadline_s=round(numbers.uniform(0.1, pace.delay_s[1] / 2), 3))
        elif draw < 0.40:
            # With whoever else of this submitter is drawn for the same tenth of the run.
            tenth = int(job.at_s / seconds * 10)
            job = replace(job, at_s=round(tenth * seconds / 10, 3), batch=f"{submitter}-{tenth}")
        plans[submitter].append(job)
    return [sorted(one, key=lambda job: job.at_s) for one in plans]


def write_plan(path: Path, jobs: Sequence[Planned]) -> None:
    """Writes a submitter's jobs into a file, a line each."""
    with path.open("w") as file:
        for job in jobs:
            images = [base64.b64encode(image).decode() for image in job.images]
            file.write(json.dumps({**asdict(job), "images": images}) + "\n")


def read_plan(path: Path) -> list[Planned]:
    """The jobs of such a file."""
    jobs = []
    for line in path.read_text().splitlines():
        fields = json.loads(line)
        fields["images"] = tuple(base64.b64decode(image) for image in fields["images"])
        jobs.append(Planned(**fields))
    return jobs
