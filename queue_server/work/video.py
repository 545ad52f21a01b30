"""Finds and follows the objects of a video: its frames go through one stream, what was found comes out as JSON and as an MP4.

file ─► Video, in a thread that decodes ahead ─► DetectStream ─► TrackWriter, and AnnotatedVideo when it was asked for
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path

from ai4thai.queue.v1 import work_pb2
from ai4thai.vision.v1 import image_pb2, vision_service_pb2
from google.protobuf.duration_pb2 import Duration
from google.rpc.code_pb2 import Code
from google.rpc.status_pb2 import Status

from queue_server import statuses
from queue_server.errors import InvalidField, ResultTooLarge
from queue_server.jobs import Failure
from queue_server.media.files import largest_bytes
from queue_server.work.ahead import Ahead
from queue_server.work.decoding import Damage, Limits, Picture, Video, opened, picture_count
from queue_server.work.encoding import AnnotatedVideo
from queue_server.work.files import Files
from queue_server.work.task import Task, VisionFailed
from queue_server.work.tracks import Track, TrackWriter

MAX_STRIDE = 1000
# Frames that are decoded and not sent yet.
DECODED_AHEAD = 4
# Tracks in the result itself, as the contract says; the JSON has all.
MAX_TRACKS = 1000
# What another attempt may mend, when not a single frame was answered.
_RETRIABLE = frozenset({Code.UNAVAILABLE, Code.RESOURCE_EXHAUSTED, Code.DEADLINE_EXCEEDED, Code.ABORTED, Code.INTERNAL})


def read(work: work_pb2.Work, files: Files) -> tuple[work_pb2.Work, int]:
    """How many frames there are is known once the video is open; raises InvalidField."""
    asked = work.video
    if not 0 <= asked.stride <= MAX_STRIDE:
        raise InvalidField(
            "work.video.stride", f"stride is {asked.stride}; it must be 1 to {MAX_STRIDE}, or 0 for every frame."
        )
    if asked.max_frames < 0:
        raise InvalidField("work.video.max_frames", f"max_frames is {asked.max_frames}; it must be 0 or more.")
    if asked.tracker not in vision_service_pb2.Tracker.values():
        raise InvalidField("work.video.tracker", f"There is no tracker {asked.tracker}.", cure="Send 0 to 3.")
    light = work_pb2.VideoWork(
        video=files.file(asked.video, "work.video.video"),
        options=asked.options if asked.HasField("options") else None,
        stride=asked.stride,
        tracker=asked.tracker,
        annotate=asked.annotate,
        max_frames=asked.max_frames,
    )
    return work_pb2.Work(video=light), 0


def run(task: Task, work: work_pb2.Work) -> work_pb2.JobResult:
    """The tracks' file and, with `annotate`, the video's; a frame that could not be decoded or answered is that frame's error.

    Raises:
        VideoUnreadable, ResultTooLarge, ItemError (the file is no longer kept), VisionFailed, Stopped.
    """
    settings = task.settings
    limits = Limits(settings.video_max_pixels, settings.video_stall_s, settings.video_threads)
    with (
        task.folder() as folder,
        task.open(work.video.video) as path,
        opened(path, limits, task.stopped) as video,
        closing(_Report(task, work.video, video, folder)) as report,
    ):
        return work_pb2.JobResult(video=report.make())


class _Report:
    """What comes of one video."""

    def __init__(self, task: Task, asked: work_pb2.VideoWork, video: Video, folder: Path) -> None:
        self._task = task
        self._asked = asked
        self._video = video
        self._stride = asked.stride or 1
        limit = task.settings.video_max_frames
        self._max_pictures = min(asked.max_frames or limit, limit)
        self._total = picture_count(video.facts, self._stride, self._max_pictures)
        self._under_way: deque[Picture | Damage] = deque()
        """Sent and not answered, and the damage between them, in the video's order."""
        self._answered = self._failed = self._damaged = 0
        self._last_error = Status()
        self._writer = TrackWriter(folder)
        self._annotated_path = folder / "annotated.mp4"
        self._annotated: AnnotatedVideo | None = None

    def make(self) -> work_pb2.VideoResult:
        """Reads the video, has it looked at, stores what came of it."""
        self._tell_progress()
        frames = self._video.frames(self._stride, self._max_pictures)
        in_flight = self._task.settings.video_frames_in_flight
        with ExitStack() as stack:
            ahead = stack.enter_context(Ahead(frames, DECODED_AHEAD))
            stream = self._task.vision.detect_stream(self._config(), self._outgoing(ahead), max_in_flight=in_flight)
            for result in stack.enter_context(closing(stream)):
                self._take(result)
        self._take_damage()
        if self._failed and not self._answered and self._last_error.code in _RETRIABLE:
            # One frame is that frame's affair; none at all says something of the server.
            status = self._last_error
            raise VisionFailed(
                Failure(Code.Name(status.code), status.message, status.SerializeToString(), retriable=True)
            )
        return self._stored()

    def close(self) -> None:
        """Closes the files."""
        self._writer.close()
        if self._annotated is not None:
            self._annotated.abandon()

    def _config(self) -> vision_service_pb2.StreamConfig:
        config = vision_service_pb2.StreamConfig(
            options=self._asked.options,
            tracker=self._asked.tracker or vision_service_pb2.TRACKER_BYTETRACK,
            overflow=vision_service_pb2.OVERFLOW_BLOCK,
        )
        config.options.annotate = self._asked.annotate
        return config

    def _outgoing(self, ahead: Ahead[Picture | Damage]) -> Iterator[vision_service_pb2.Frame]:
        """For gRPC's thread."""
        for found in ahead:
            if isinstance(found, Damage):
                self._under_way.append(found)
            else:
                self._under_way.append(replace(found, jpeg=b""))
                yield vision_service_pb2.Frame(frame_id=found.number, image=image_pb2.Image(content=found.jpeg))

    def _take(self, result: vision_service_pb2.FrameResult) -> None:
        self._take_damage()
        picture = self._under_way.popleft()
        if not isinstance(picture, Picture) or picture.number != result.frame_id:
            raise RuntimeError(f"The result of frame {result.frame_id} came where that of {picture.number} was due.")
        if result.WhichOneof("outcome") == "detection":
            self._answered += 1
            self._writer.add(picture.number, picture.time_s, result.detection, corrupt=picture.corrupt)
            if self._asked.annotate:
                self._draw(result.detection.annotated_image, picture.time_s)
        else:
            self._failed += 1
            self._last_error = result.error
            self._writer.add_error(picture.number, picture.time_s, result.error)
        self._check_size()
        self._tell_progress()

    def _draw(self, jpeg: bytes, time_s: float) -> None:
        if self._annotated is None:
            # Not sooner: whether the picture lies on its side is known once a frame has been decoded.
            facts, threads = self._video.facts, self._task.settings.video_threads
            rate = facts.frame_rate / self._stride
            self._annotated = AnnotatedVideo(self._annotated_path, rate, facts.pixel_aspect, threads)
        self._annotated.add(jpeg, time_s)

    def _take_damage(self) -> None:
        while self._under_way and isinstance(damage := self._under_way[0], Damage):
            self._under_way.popleft()
            self._damaged += 1
            self._writer.add_error(damage.number, damage.time_s, statuses.write_status(damage.error))

    def _check_size(self) -> None:
        """Now rather than when the last frame has been looked at."""
        settings = self._task.settings
        tracks_bytes, drawn_bytes = self._writer.size_bytes, self._annotated.size_bytes if self._annotated else 0
        largest_file_bytes, _ = largest_bytes(settings)
        for size_bytes, limit_bytes, cure in (
            (
                max(tracks_bytes, drawn_bytes),
                largest_file_bytes,
                "raise QUEUE_MAX_MEDIA_BYTES and QUEUE_MAX_REDIS_MEDIA_BYTES, or set QUEUE_MEDIA_URL",
            ),
            # The frames' entries are copied into the whole file at the end.
            (2 * tracks_bytes + drawn_bytes, settings.video_max_temp_bytes, "raise QUEUE_VIDEO_MAX_TEMP_BYTES"),
        ):
            if size_bytes > limit_bytes:
                raise ResultTooLarge(
                    size_bytes=size_bytes,
                    limit_bytes=limit_bytes,
                    cure=f"Send a larger stride or a smaller max_frames, leave `annotate` out, or {cure}.",
                )

    def _tell_progress(self) -> None:
        looked_at = self._answered + self._failed
        # The file may have said less than there is.
        self._task.progress(looked_at, max(self._total, looked_at) if self._total else 0)

    def _stored(self) -> work_pb2.VideoResult:
        facts, looked_at = self._video.facts, self._answered + self._failed
        head = {
            "video": {
                "width_px": facts.width_px,
                "height_px": facts.height_px,
                "duration_s": round(facts.duration_s, 6),
                "frame_rate": round(facts.frame_rate, 6),
                "frame_count": self._video.decoded_count,
            },
            "complete": self._video.complete,
            "model": self._writer.model,
            "stride": self._stride,
            "tracker": vision_service_pb2.Tracker.Name(self._config().tracker),
        }
        result = work_pb2.VideoResult(
            tracks_media_id=self._task.store(self._writer.finish(head, self._task.check), "application/json"),
            frame_count=self._video.decoded_count,
            detected_frame_count=looked_at,
            failed_frame_count=self._failed + self._damaged,
            duration=_duration(facts.duration_s),
            width_px=facts.width_px,
            height_px=facts.height_px,
            tracks=[_track(track) for track in self._writer.tracks[:MAX_TRACKS]],
        )
        if self._annotated is not None:
            self._annotated.finish(self._task.check)
            result.annotated_media_id = self._task.store(self._annotated_path, "video/mp4")
        self._task.progress(looked_at, looked_at)
        return result


def _track(track: Track) -> work_pb2.VideoTrack:
    return work_pb2.VideoTrack(
        track_id=track.track_id,
        label=track.label,
        first_time=_duration(track.first_time_s),
        last_time=_duration(track.last_time_s),
        frame_count=track.frame_count,
        max_confidence=track.max_confidence,
    )


def _duration(seconds: float) -> Duration:
    duration = Duration()
    duration.FromMicroseconds(round(seconds * 1_000_000))
    return duration
