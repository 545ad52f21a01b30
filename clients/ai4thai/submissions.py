"""A job that is ready to be submitted, and how many of them are put into one call."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Self, Unpack

from ai4thai import queue_answers, queue_wire
from ai4thai.errors import AI4ThaiError, InvalidInput, Unavailable
from ai4thai.job_results import SubmitOutcome
from ai4thai.media_input import JobFile, JobFileInput, read_job_file
from ai4thai.options import DetectOptions, Message, SubmitOptions, TextOptions
from ai4thai.queue.v1 import queue_service_pb2

MAX_INLINE_FILE_BYTES: Final = 4_000_000
"""A larger file is uploaded by itself: in pieces, and again from where the server has it, when the connection breaks."""
MAX_INLINE_BYTES: Final = 24_000_000
"""Of the files of one job so many bytes travel inside the submission, the smallest first; far below the server's 60 MiB."""
MAX_BATCH_BYTES: Final = 24_000_000
MAX_BATCH_JOBS: Final = 200
"""The contract allows 1000; each is a script of its own in Redis, and an answer should not take seconds."""


@dataclass(frozen=True)
class Submission:
    """What to do and how to queue it. Made by detect(), generate(), analyze() or video(); sent by a client's submit().

    It has a request_id from the beginning: to submit the same Submission again, after whatever error, gives the same job.
    Files named by their path are read when it is sent.
    """

    _request: queue_service_pb2.SubmitJobRequest = field(repr=False)
    _files: tuple[JobFile, ...]

    @classmethod
    def detect(
        cls,
        images: Iterable[JobFileInput],
        *,
        detect: DetectOptions | None = None,
        **submit: Unpack[SubmitOptions],
    ) -> Self:
        """Finds the objects in 1 to 1000 images.

        Raises:
            OSError: there is no such file.
            TypeError, ValueError: an option or image is of no known kind.
        """
        files = _files(images)
        work = queue_wire.write_detect_work(len(files), detect or {})
        return cls(queue_wire.write_submit(work, submit), files)

    @classmethod
    def generate(
        cls, messages: Iterable[Message], *, text: TextOptions | None = None, **submit: Unpack[SubmitOptions]
    ) -> Self:
        """Answers a conversation; raises as detect()."""
        work, files = queue_wire.write_generate_work(messages, text or {})
        return cls(queue_wire.write_submit(work, submit), tuple(files))

    @classmethod
    def analyze(
        cls,
        images: Iterable[JobFileInput],
        question: str,
        *,
        detect: DetectOptions | None = None,
        text: TextOptions | None = None,
        **submit: Unpack[SubmitOptions],
    ) -> Self:
        """Finds the objects in 1 to 1000 images and answers a question about each; raises as detect()."""
        files = _files(images)
        work = queue_wire.write_analyze_work(len(files), question, detect or {}, text or {})
        return cls(queue_wire.write_submit(work, submit), files)

    @classmethod
    def video(
        cls,
        video: JobFileInput,
        *,
        detect: DetectOptions | None = None,
        stride: int = 0,
        tracker: str = "",
        annotate: bool = False,
        max_frames: int = 0,
        **submit: Unpack[SubmitOptions],
    ) -> Self:
        """Finds and follows the objects of a video; raises as detect().

        Args:
            video: what FFmpeg reads: MP4, MOV, MKV, WebM, AVI.
            detect: how to detect, for every frame looked at.
            stride: every how many frames one is looked at, 1 to 1000. 0: every frame.
            tracker: follows the objects: `bytetrack` (default), `botsort` or `none`.
            annotate: also make an MP4 with the boxes drawn in.
            max_frames: at most so many frames are looked at. 0: the server's limit.
            **submit: how to queue it.
        """
        work = queue_wire.write_video_work(detect or {}, stride, tracker, annotate, max_frames)
        return cls(queue_wire.write_submit(work, submit), (read_job_file(video),))

    @property
    def request_id(self) -> str:
        """The submission's own name."""
        return self._request.request_id

    @property
    def uploads(self) -> Mapping[int, JobFile]:
        """The files that are to be uploaded before, by their place in the work."""
        room_bytes, large = MAX_INLINE_BYTES, {}
        for place, file in sorted(enumerate(self._files), key=lambda item: item[1].size_bytes):
            if file.media_id:
                continue
            room_bytes -= file.size_bytes
            if room_bytes < 0 or file.size_bytes > MAX_INLINE_FILE_BYTES:
                large[place] = file
        return dict(sorted(large.items()))

    @property
    def inline_bytes(self) -> int:
        """How large its request is about to be."""
        uploads = self.uploads
        return self._request.ByteSize() + sum(
            file.size_bytes for place, file in enumerate(self._files) if place not in uploads
        )

    def write(self, media_ids: Mapping[int, str]) -> queue_service_pb2.SubmitJobRequest:
        """The request with all files in it; those that were uploaded by their ids.

        Raises:
            OSError: a file can't be read.
        """
        request = queue_service_pb2.SubmitJobRequest()
        request.CopyFrom(self._request)
        for place, (source, file) in enumerate(zip(queue_wire.sources_of(request.work), self._files, strict=True)):
            if media_id := media_ids.get(place, file.media_id):
                source.media_id = media_id
            else:
                source.content = file.read()
        return request


class Submitting:
    """Many submissions on their way in several calls, and what became of each."""

    def __init__(self, submissions: Sequence[Submission]) -> None:
        self.submissions = submissions
        self._outcomes: dict[int, SubmitOutcome] = {}
        self._requests: dict[int, queue_service_pb2.SubmitJobRequest] = {}
        self._away: Unavailable | None = None

    def batches(self) -> Iterator[list[int]]:
        """The places of those that go together, neither too large nor too many; none follow once the server is away."""
        batch: list[int] = []
        size_bytes = 0
        for place, submission in enumerate(self.submissions):
            more_bytes = submission.inline_bytes
            if batch and (len(batch) == MAX_BATCH_JOBS or size_bytes + more_bytes > MAX_BATCH_BYTES):
                yield batch
                if self._away is not None:
                    return
                batch, size_bytes = [], 0
            batch.append(place)
            size_bytes += more_bytes
        if batch:
            yield batch

    def add(self, place: int, request: queue_service_pb2.SubmitJobRequest) -> None:
        """Puts a submission into the next call."""
        self._requests[place] = request

    def refuse(self, place: int, error: AI4ThaiError | OSError) -> None:
        """Notes why a submission can't be made."""
        if isinstance(error, Unavailable):
            self._away = error
        if isinstance(error, OSError):
            error = InvalidInput(f"A file of the submission can't be read: {error}", code="INVALID_ARGUMENT")
        self._outcomes[place] = SubmitOutcome(error=error)

    def request(self) -> queue_service_pb2.BatchSubmitJobsRequest | None:
        """The call for what was added; None for nothing."""
        return queue_service_pb2.BatchSubmitJobsRequest(requests=self._requests.values()) if self._requests else None

    def take(self, response: queue_service_pb2.BatchSubmitJobsResponse) -> None:
        """Notes what the call answered."""
        self._outcomes.update(zip(self._requests, queue_answers.read_batch(response), strict=True))
        self._requests.clear()

    def fail(self, error: AI4ThaiError) -> None:
        """Notes that the call failed as a whole."""
        for place in self._requests:
            self.refuse(place, error)
        self._requests.clear()

    def outcomes(self) -> list[SubmitOutcome]:
        """One for each submission, in their order."""
        return [self._outcomes.get(place) or SubmitOutcome(error=self._away) for place in range(len(self.submissions))]


def _files(images: Iterable[JobFileInput]) -> tuple[JobFile, ...]:
    if isinstance(images, str | bytes):  # one path would otherwise be read letter by letter
        raise TypeError("images is a list of images; put the single one into a list.")
    return tuple(read_job_file(image) for image in images)
