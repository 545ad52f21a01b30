"""What goes on during a rehearsal: jobs, single calls and streams through the edge, each counted as its caller met it."""

from __future__ import annotations

import itertools
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from ai4thai import QueueClient, VisionClient
from ai4thai.channel import open_channel
from ai4thai.job_results import Job, JobState
from ai4thai.submissions import Submission
from ai4thai.vision.v1 import image_pb2, vision_service_pb2_grpc
from ai4thai.vision.v1 import vision_service_pb2 as pb

from benchmarks.rehearsal_parts import ROOT

SAMPLES = ROOT / "clients" / "ai4thai" / "samples"
SCENES = tuple(sorted(SAMPLES.glob("scene-*.jpg")))
VIDEO = SAMPLES / "clip-01.mp4"
FRAMES = 40
FRAME_S = 0.2
JOB_S = 180.0


@dataclass(frozen=True)
class Door:
    """How callers reach the edge."""

    vision: str
    queue: str
    authority: Path

    @property
    def credentials(self) -> grpc.ChannelCredentials:
        """Those with which the edge's certificate is believed."""
        return grpc.ssl_channel_credentials(self.authority.read_bytes())

    def open_queue(self) -> QueueClient:
        """A client of the queue."""
        return QueueClient(self.queue, credentials=self.credentials)

    def open_vision(self) -> VisionClient:
        """A client of the vision servers."""
        return VisionClient(self.vision, credentials=self.credentials)


def submission(number: int, **submit: Any) -> Submission:
    """Job number `number`: each seventh a video, each fifth delayed, the others of 1 to 12 images."""
    if number % 7 == 3:
        return Submission.video(VIDEO, tracker="bytetrack", **submit)
    images = list(itertools.islice(itertools.cycle(SCENES), number, number + 1 + number % 12))
    if number % 5 == 1:
        submit["delay_s"] = 4.0
    return Submission.detect(images, **submit)


def fault_of(job: Job) -> str:
    """What is wrong with a job that has ended; empty: nothing."""
    if job.state is not JobState.SUCCEEDED:
        return f"{job.job_id} is {job.state}: {job.error}"
    result: Any = job.outcome()
    if job.kind == "detect" and any(item.error is not None for item in result.items):
        return f"{job.job_id} has an item with an error"
    return ""


class Load:
    """Callers in threads, until stop(). `phase` is what is going on; everything is counted under the one in which it ended."""

    def __init__(self, door: Door, *, submitters: int = 4, detectors: int = 2, streams: int = 3) -> None:
        self.phase = ""
        self.counts: Counter[tuple[str, str]] = Counter()
        """By phase and what ended well: `jobs`, `calls`, `streams`; and `moves` of streams away from servers that leave."""
        self.faults: list[tuple[str, str, str]] = []
        """Phase, kind, and what went wrong."""
        self.job_ids: list[str] = []
        self.slowest_s: defaultdict[str, float] = defaultdict(float)
        """The longest single call of each phase."""
        self._door = door
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        kinds = [self._submit] * submitters + [self._detect] * detectors + [self._stream] * streams
        self._threads = [threading.Thread(target=kind, daemon=True) for kind in kinds]

    def start(self) -> None:
        """Begins."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Begins nothing more; returns when all that was begun has ended."""
        self._stopping.set()
        for thread in self._threads:
            thread.join(JOB_S + 60)
            if thread.is_alive():
                self._note("threads", "a caller hangs")

    def count(self, kind: str) -> int:
        """How many of a kind have ended well so far."""
        return sum(count for (_, one), count in self.counts.items() if one == kind)

    def _note(self, kind: str, fault: str = "") -> None:
        with self._lock:
            if fault:
                self.faults.append((self.phase, kind, fault))
            else:
                self.counts[self.phase, kind] += 1

    def _try(self, kind: str, act: Callable[[], str]) -> None:
        try:
            fault = act()
        except Exception as error:
            fault = repr(error)
        self._note(kind, fault)

    def _submit(self) -> None:
        with self._door.open_queue() as queue:
            while not self._stopping.is_set():
                number = next(self._numbers)

                def one(number: int = number) -> str:
                    job = queue.submit(submission(number, labels={"number": str(number)}))
                    with self._lock:
                        self.job_ids.append(job.job_id)
                    return fault_of(queue.wait(job.job_id, JOB_S))

                self._try("jobs", one)

    def _detect(self) -> None:
        with self._door.open_vision() as vision:
            while not self._stopping.is_set():
                began_s = time.monotonic()
                self._try("calls", lambda: "" if vision.detect(SCENES[0]).detections else "nothing found")
                took_s = time.monotonic() - began_s
                with self._lock:
                    self.slowest_s[self.phase] = max(self.slowest_s[self.phase], took_s)
                self._stopping.wait(0.05)

    def _stream(self) -> None:
        # Without retries, which a stream that the caller writes could not have anyway.
        with open_channel(self._door.vision, credentials=self._door.credentials, retries=False) as channel:
            while not self._stopping.is_set():

                def one() -> str:
                    answered, moves = follow(channel, FRAMES, FRAME_S)
                    for _ in range(moves):
                        self._note("moves")
                    return "" if answered == list(range(FRAMES)) else f"frames answered: {answered}"

                self._try("streams", one)


def follow(channel: grpc.Channel, count: int, pause_s: float) -> tuple[list[int], int]:
    """A camera of so many frames; the ones that were answered, and how often it had to move.

    A server that leaves ends a stream that lasts too long, once the frames it has read are answered: with UNAVAILABLE, whose
    message says so. The camera then goes on where the answers end, on another server. Any other error is raised.
    """
    stub: Any = vision_service_pb2_grpc.VisionServiceStub(channel)
    answered: list[int] = []
    moves = 0
    while len(answered) < count:
        call = stub.DetectStream(_frames(len(answered), count, pause_s), timeout=120)
        try:
            for answer in call:
                if answer.HasField("result"):
                    answered.append(answer.result.frame_id)
        except grpc.RpcError as error:
            told: Any = error
            if told.code() is not grpc.StatusCode.UNAVAILABLE or "shutting down" not in told.details():
                raise
            moves += 1
    return answered, moves


def _frames(first: int, count: int, pause_s: float) -> Iterator[pb.DetectStreamRequest]:
    yield pb.DetectStreamRequest(config=pb.StreamConfig())
    content = SCENES[0].read_bytes()
    for number in range(first, count):
        yield pb.DetectStreamRequest(frame=pb.Frame(frame_id=number, image=image_pb2.Image(content=content)))
        time.sleep(pause_s)
