"""A film through the whole platform: stored, looked at by the shipped detector, followed, and drawn in."""

from __future__ import annotations

import io
import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from ai4thai.queue.v1 import job_pb2, work_pb2
from ai4thai.queue.v1 import queue_service_pb2 as queue_pb
from ai4thai.vision.v1 import vision_service_pb2 as pb
from google.protobuf.json_format import ParseDict
from PIL import Image

from tests.end_to_end.calling import Server
from tests.end_to_end.test_jobs import ended, submit
from tests.end_to_end.test_tracking import FRAMES, HEIGHT_PX, WIDTH_PX, Shot, assert_followed, film

pytestmark = pytest.mark.usefixtures("workers", "vision")

FRAME_MS = 100


def as_file(shots: tuple[Shot, ...], path: Path) -> bytes:
    """The film as an MP4."""
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("libx264", rate=Fraction(1000, FRAME_MS), options={"crf": "18"})
        stream.width, stream.height, stream.pix_fmt = WIDTH_PX, HEIGHT_PX, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for number, shot in enumerate(shots):
            frame = av.VideoFrame.from_image(Image.open(io.BytesIO(shot.content)))
            frame.pts, frame.time_base = number * FRAME_MS, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path.read_bytes()


def upload(queue: Server, content: bytes) -> str:
    """Stores a file in pieces; its id."""
    pieces = [content[at : at + 10_000] for at in range(0, len(content), 10_000)]
    config = queue_pb.UploadMediaRequest(config=queue_pb.UploadMediaConfig(content_type="video/mp4"))
    requests = [config, *(queue_pb.UploadMediaRequest(chunk=piece) for piece in pieces)]
    media_id: str = queue.queue.UploadMedia(iter(requests), timeout=20).media.media_id
    return media_id


def fetched(queue: Server, media_id: str) -> bytes:
    responses = queue.queue.GetMedia(queue_pb.GetMediaRequest(media_id=media_id), timeout=20)
    return b"".join(response.chunk for response in responses)


def as_results(tracks: dict[str, Any]) -> list[pb.FrameResult]:
    """The frames of a tracks' file as the stream gave them: its names are the contract's."""
    return [
        pb.FrameResult(
            frame_id=frame["frame"],
            detection=ParseDict({"detections": frame["detections"]}, pb.DetectResponse()),
        )
        for frame in tracks["frames"]
    ]


def drawn(pixels: Any, film_pixels: Any, box: Any) -> float:
    """How much more the pictures differ along the box's outline than they do elsewhere."""
    difference = np.abs(pixels.astype(int) - film_pixels.astype(int)).sum(axis=2)
    left, top, right, bottom = (round(edge) for edge in (box.x_min_px, box.y_min_px, box.x_max_px, box.y_max_px))
    outline = np.zeros(difference.shape, bool)
    outline[max(0, top - 1) : bottom + 1, max(0, left - 1) : right + 1] = True
    outline[top + 2 : bottom - 2, left + 2 : right - 2] = False
    return float(difference[outline].mean() - np.median(difference))


def test_a_film_is_followed_and_drawn_in(queue: Server, tmp_path: Path) -> None:
    # Given a film of four shapes that move, stored beforehand
    shots = film()
    media_id = upload(queue, as_file(shots, tmp_path / "film.mp4"))
    work = work_pb2.VideoWork(video=work_pb2.MediaSource(media_id=media_id), annotate=True)
    # When it is a job
    job = ended(queue, submit(queue, work_pb2.Work(video=work)).job_id)
    assert job.state == job_pb2.JOB_STATE_SUCCEEDED, job.error
    # Then every frame was looked at
    result = job.result.video
    assert (result.frame_count, result.detected_frame_count, result.failed_frame_count) == (FRAMES, FRAMES, 0)
    assert (result.width_px, result.height_px) == (WIDTH_PX, HEIGHT_PX)
    assert result.duration.ToMilliseconds() == FRAMES * FRAME_MS
    # and each shape has kept its number, in the file of tracks as in the stream
    tracks = json.loads(fetched(queue, result.tracks_media_id))
    results = as_results(tracks)
    assert_followed(results, shots)
    assert {track.label for track in result.tracks} >= {"circle", "star", "square", "triangle"}
    assert [track["track_id"] for track in tracks["tracks"]] == [track.track_id for track in result.tracks]
    triangle = next(track for track in result.tracks if track.label == "triangle")
    assert triangle.first_time.ToMilliseconds() >= 17 * FRAME_MS
    assert triangle.last_time.ToMilliseconds() == (FRAMES - 1) * FRAME_MS
    # And the MP4 shows the same film at the same pace, with the boxes in it
    path = tmp_path / "annotated.mp4"
    path.write_bytes(fetched(queue, result.annotated_media_id))
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
    assert [round(frame.time * 1000) for frame in frames] == [number * FRAME_MS for number in range(FRAMES)]
    for frame, shot, found in zip(frames, shots, results, strict=True):
        assert (frame.width, frame.height) == (WIDTH_PX, HEIGHT_PX)
        pixels = np.asarray(frame.to_image())
        original = np.asarray(Image.open(io.BytesIO(shot.content)).convert("RGB"))
        for detection in found.detection.detections:
            assert drawn(pixels, original, detection.box) > 60, (frame.time, detection.label)


def test_what_is_no_video_is_the_jobs_error(queue: Server) -> None:
    work = work_pb2.VideoWork(video=work_pb2.MediaSource(media_id=upload(queue, b"no video at all" * 1000)))
    job = ended(queue, submit(queue, work_pb2.Work(video=work)).job_id)
    assert (job.state, job.attempt_count) == (job_pb2.JOB_STATE_FAILED, 1)
    assert "no video" in job.error.message
