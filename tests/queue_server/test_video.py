"""A video goes in; what was found in its frames comes out, and the same video with the boxes drawn in."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import av
import pytest
from ai4thai.queue.v1 import job_pb2, work_pb2
from ai4thai.queue.v1 import queue_service_pb2 as pb
from ai4thai.vision.v1 import vision_service_pb2 as vision_pb

from queue_server.errors import VideoUnreadable
from queue_server.temporary import PREFIX
from queue_server.work import decoding
from queue_server.work.decoding import Limits, Picture, opened
from serving.errors import Code
from tests.queue_server.conftest import Front, state
from tests.queue_server.fake_vision import FakeVision, error
from tests.queue_server.test_retries import reasons
from tests.queue_server.videos import (
    DISC_PX,
    SIZE_PX,
    even,
    left_px,
    read_video,
    write_audio,
    write_video,
)

pytestmark = pytest.mark.usefixtures("own_temporary_directory")


def video(content: bytes, **fields: Any) -> work_pb2.Work:
    return work_pb2.Work(video=work_pb2.VideoWork(video=work_pb2.MediaSource(content=content), **fields))


async def fetch(front: Front, media_id: str) -> bytes:
    return b"".join([piece.chunk async for piece in front.stub.GetMedia(pb.GetMediaRequest(media_id=media_id))])


async def end(front: Front, content: bytes, **fields: Any) -> job_pb2.Job:
    return await front.end((await front.submit(work=video(content, **fields))).job_id)


async def done(front: Front, content: bytes, **fields: Any) -> tuple[work_pb2.VideoResult, dict[str, Any]]:
    """The result and the tracks' file of a video that must succeed."""
    ended = await end(front, content, **fields)
    assert state(ended) == "SUCCEEDED", ended.error
    result = ended.result.video
    assert (ended.progress.completed_count, ended.progress.total_count) == (result.detected_frame_count,) * 2
    return result, json.loads(await fetch(front, result.tracks_media_id))


async def refused(front: Front, content: bytes, **fields: Any) -> str:
    """The message of a video that must fail at once."""
    ended = await end(front, content, **fields)
    assert (state(ended), ended.attempt_count) == ("FAILED", 1)
    assert reasons(ended.error) == ["VIDEO_UNREADABLE"]
    return ended.error.message


def damaged(content: bytes, *numbers: int) -> bytes:
    """A video of JPEGs, some of which are no longer any."""
    starts = [at for at in range(len(content)) if content[at : at + 3] == b"\xff\xd8\xff"]
    broken = bytearray(content)
    for number in numbers:
        start, end = starts[number], starts[number + 1] - 8
        broken[start:end] = bytes(end - start)
    return bytes(broken)


def folders() -> set[Path]:
    return set(Path(tempfile.gettempdir()).glob(f"{PREFIX}*"))


async def test_every_frame_is_looked_at_and_the_disc_is_followed(front: Front, start_worker, vision, tmp_path) -> None:
    await start_worker()
    before = folders()
    result, tracks = await done(front, write_video(tmp_path / "a.mp4", even(30), audio=True))
    # The result tells the sums
    assert (result.frame_count, result.detected_frame_count, result.failed_frame_count) == (30, 30, 0)
    assert (result.width_px, result.height_px) == SIZE_PX
    assert result.duration.ToMilliseconds() == pytest.approx(1200, abs=70)
    assert not result.annotated_media_id
    (track,) = result.tracks
    assert (track.track_id, track.label, track.frame_count, track.max_confidence) == (1, "circle", 30, 0.75)
    assert (track.first_time.ToMilliseconds(), track.last_time.ToMilliseconds()) == (0, 29 * 40)
    # The file tells each frame, with the field names of the contract's JSON
    assert tracks["video"] == {
        "width_px": SIZE_PX[0],
        "height_px": SIZE_PX[1],
        "duration_s": pytest.approx(1.2, abs=0.07),
        "frame_rate": pytest.approx(25, abs=0.5),
        "frame_count": 30,
    }
    assert (tracks["model"], tracks["stride"], tracks["tracker"]) == ("eye", 1, "TRACKER_BYTETRACK")
    assert tracks["complete"] is True
    assert [frame["frame"] for frame in tracks["frames"]] == list(range(30))
    assert [frame["time_s"] for frame in tracks["frames"]] == pytest.approx([0.04 * n for n in range(30)], abs=0.001)
    for number, frame in enumerate(tracks["frames"]):
        (found,) = frame["detections"]
        assert (found["label"], found["track_id"], found["confidence"]) == ("circle", 1, 0.75)
        assert found["box"]["x_min_px"] == pytest.approx(left_px(number), abs=3)
        assert found["box"]["x_max_px"] == pytest.approx(left_px(number) + DISC_PX, abs=3)
    assert tracks["tracks"] == [
        {
            **{"track_id": 1, "label": "circle", "first_time_s": 0.0, "last_time_s": 1.16},
            **{"frame_count": 30, "max_confidence": 0.75},
        }
    ]
    # The stream was asked as the contract says, and nothing is left on the disk
    (config,) = vision.stream_configs
    assert (config.tracker, config.overflow) == (vision_pb.TRACKER_BYTETRACK, vision_pb.OVERFLOW_BLOCK)
    assert folders() == before


async def test_the_annotated_video_shows_the_boxes_at_the_videos_own_pace(
    front: Front, start_worker, vision, tmp_path
) -> None:
    # Given a video whose frames come in fits and starts, when every second one is looked at, and drawn
    await start_worker()
    times_ms = [30 * n + (200 if n > 10 else 0) + (n % 3) * 5 for n in range(24)]
    content = write_video(tmp_path / "a.mkv", times_ms, size_px=(161, 121), codec="mjpeg")
    result, tracks = await done(front, content, stride=2, annotate=True)
    assert (result.frame_count, result.detected_frame_count) == (24, 12)
    assert vision.frame_ids == list(range(0, 24, 2)) == [frame["frame"] for frame in tracks["frames"]]
    expected_s = [time_ms / 1000 for time_ms in times_ms[::2]]
    assert [frame["time_s"] for frame in tracks["frames"]] == pytest.approx(expected_s, abs=0.0015)
    # Then the MP4 is one that browsers play from its first bytes on
    path = tmp_path / "annotated.mp4"
    path.write_bytes(await fetch(front, result.annotated_media_id))
    assert path.read_bytes().index(b"moov") < path.read_bytes().index(b"mdat")
    with av.open(str(path)) as container:
        (stream,) = container.streams
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert (stream.codec_context.width, stream.codec_context.height) == (160, 120)  # even, as yuv420p must be
    # with the frames' own times, and the boxes in them
    pictures, times_s = read_video(path)
    assert times_s == pytest.approx(expected_s, abs=0.0015)
    for number, picture in zip(range(0, 24, 2), pictures, strict=True):
        red, green, blue = picture.getpixel((left_px(number) + DISC_PX // 2, 51))
        assert green > 120 > max(red, blue), (number, red, green, blue)
        # and the colours as they were
        assert picture.getpixel((8, 8)) == pytest.approx((220, 0, 0), abs=16)
        assert picture.getpixel((120 if number < 10 else 8, 110)) == pytest.approx((225, 225, 225), abs=8)


@pytest.mark.parametrize(("turned", "corner"), [(-90, "right top"), (90, "left bottom"), (180, "right bottom")])
async def test_a_turned_video_is_looked_at_upright(
    front: Front, start_worker, tmp_path, turned: int, corner: str
) -> None:
    await start_worker()
    content = write_video(tmp_path / "a.mp4", even(4), turned=turned)
    result, tracks = await done(front, content, annotate=True)
    size_px = SIZE_PX if turned == 180 else SIZE_PX[::-1]
    assert (
        (result.width_px, result.height_px) == size_px == tuple(tracks["video"][k] for k in ("width_px", "height_px"))
    )
    path = tmp_path / "annotated.mp4"
    path.write_bytes(await fetch(front, result.annotated_media_id))
    pictures, _ = read_video(path)
    assert pictures[0].size == size_px
    place = (5 if "left" in corner else size_px[0] - 6, 5 if "top" in corner else size_px[1] - 6)
    assert pictures[0].getpixel(place) == pytest.approx((220, 0, 0), abs=16)
    (found,) = tracks["frames"][0]["detections"]
    # The disc begins near the left edge of the stored picture, in the middle of its height.
    box = found["box"]
    near_edge = {-90: box["y_min_px"], 90: size_px[1] - box["y_max_px"], 180: size_px[0] - box["x_max_px"]}[turned]
    assert near_edge == pytest.approx(left_px(0), abs=3)


async def test_no_more_frames_than_asked_for_and_no_tracker_when_none_is_wanted(
    front: Front, start_worker, vision, tmp_path
) -> None:
    await start_worker()
    content = write_video(tmp_path / "a.mp4", even(40))
    result, tracks = await done(front, content, max_frames=5, stride=3, tracker=vision_pb.TRACKER_NONE)
    assert vision.frame_ids == [0, 3, 6, 9, 12]
    assert (result.detected_frame_count, len(result.tracks)) == (5, 0)
    assert (tracks["complete"], tracks["tracks"], len(tracks["frames"])) == (False, [], 5)
    assert "track_id" not in tracks["frames"][0]["detections"][0]


async def test_a_frame_that_cannot_be_answered_is_its_own_error(front: Front, start_worker, vision, tmp_path) -> None:
    await start_worker()
    vision.frame_failures = {3: error(Code.INTERNAL, "INTERNAL")}
    result, tracks = await done(front, write_video(tmp_path / "a.mp4", even(6)), annotate=True)
    assert (result.detected_frame_count, result.failed_frame_count) == (6, 1)
    assert tracks["frames"][3] == {
        **{"frame": 3, "time_s": 0.12},
        "error": {"code": "INTERNAL", "reason": "INTERNAL", "message": "told to answer INTERNAL"},
    }
    assert [len(frame.get("detections", ())) for frame in tracks["frames"]] == [1, 1, 1, 0, 1, 1]
    assert result.tracks[0].frame_count == 5


async def test_a_server_that_answers_no_frame_at_all_fails_the_attempt(
    front: Front, start_worker, vision, tmp_path
) -> None:
    await start_worker()
    vision.frame_failures = {number: error(Code.INTERNAL, "INTERNAL") for number in range(4)}
    job = await front.submit(work=video(write_video(tmp_path / "a.mp4", even(4))), max_attempts=2)
    ended = await front.end(job.job_id)
    assert (state(ended), ended.attempt_count) == ("FAILED", 2)
    assert reasons(ended.error) == ["ATTEMPTS_EXHAUSTED", "INTERNAL"]


async def test_a_damaged_place_is_reported_and_decoding_goes_on(front: Front, start_worker, tmp_path) -> None:
    # Given a video of JPEGs, two of which are no longer any
    await start_worker()
    content = damaged(write_video(tmp_path / "a.avi", even(12), codec="mjpeg"), 4, 5)
    # Then the others are looked at, and the JSON tells of those two
    result, tracks = await done(front, content)
    assert result.failed_frame_count == 2
    assert result.detected_frame_count == 10
    errors = [entry for entry in tracks["frames"] if "error" in entry]
    assert [entry["error"]["reason"] for entry in errors] == ["VIDEO_UNREADABLE"] * 2
    assert tracks["frames"].index(errors[0]) == 4


def test_a_file_of_nothing_but_damage_is_not_read_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "MAX_DAMAGED", 3)
    (tmp_path / "a.avi").write_bytes(damaged(write_video(tmp_path / "a.avi", even(12), codec="mjpeg"), *range(5, 11)))
    with opened(tmp_path / "a.avi", Limits(10**6, 10, 1), lambda: False) as opened_video:
        found = list(opened_video.frames(1, 100))
        assert not opened_video.complete
    assert [isinstance(one, Picture) for one in found] == [True] * 5 + [False] * 3


async def test_of_a_file_that_breaks_off_what_there_is_is_looked_at(front: Front, start_worker, tmp_path) -> None:
    await start_worker()
    content = write_video(tmp_path / "a.mkv", even(40), g="5")
    result, tracks = await done(front, content[: len(content) * 6 // 10])
    assert 10 < result.frame_count < 40
    assert len(tracks["frames"]) >= result.detected_frame_count == result.frame_count


async def test_what_is_no_video_fails_at_once_and_says_why(front: Front, start_worker, vision, tmp_path) -> None:
    await start_worker()
    whole = write_video(tmp_path / "a.mp4", even(10))
    empty = write_video(tmp_path / "empty.avi", [], codec="mjpeg")
    contents = {
        "garbage": bytes(range(256)) * 40,
        "text": b"not a video at all",
        "a picture": b"\x89PNG\r\n\x1a\n" + bytes(200),
        "half of its head": whole[: len(whole) // 3],
        "only sound": write_audio(tmp_path / "a.m4a"),
        "no frames": empty,
    }
    said = await asyncio.gather(*(refused(front, content) for content in contents.values()))
    messages = dict(zip(contents, said, strict=True))
    assert "no video in it" in messages["only sound"]
    assert "No frame" in messages["no frames"]
    assert "Invalid data" in messages["garbage"]
    assert not any(str(tmp_path) in message or tempfile.gettempdir() in message for message in messages.values())
    assert vision.frame_ids == []


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("list.m3u8", "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{folder}/a.ts\n#EXT-X-ENDLIST\n"),
        ("list", "ffconcat version 1.0\nfile a.ts\n"),
    ],
)
def test_a_list_that_names_files_which_its_sender_may_not_see_is_no_video(tmp_path: Path, name: str, text: str) -> None:
    write_video(tmp_path / "a.ts", even(3))
    (tmp_path / name).write_text(text.format(folder=tmp_path))
    with av.open(str(tmp_path / name)) as container:
        assert len(list(container.decode(video=0))) == 3  # FFmpeg would
    with pytest.raises(VideoUnreadable), opened(tmp_path / name, Limits(10**6, 10, 1), lambda: False):
        raise AssertionError("it was opened")


async def test_a_video_that_is_too_large_is_refused(front: Front, start_worker, vision, tmp_path) -> None:
    await start_worker(video_max_pixels=SIZE_PX[0] * SIZE_PX[1] - 1)
    assert "160 × 120 pixels" in await refused(front, write_video(tmp_path / "a.mp4", even(3)))


@pytest.mark.parametrize("setting", ["video_max_temp_bytes", "max_redis_media_bytes"])
async def test_results_that_grow_too_large_fail_the_job_at_once(
    front: Front, start_worker, vision, tmp_path, setting: str
) -> None:
    await start_worker(**{setting: 2000})
    vision.slow_frame = 29  # is never reached
    ended = await end(front, write_video(tmp_path / "a.mp4", even(30)), annotate=True)
    assert (state(ended), reasons(ended.error)) == ("FAILED", ["RESULT_TOO_LARGE"])
    assert f"QUEUE_{setting.upper()}" in ended.error.message


@pytest.mark.parametrize("stop", ["cancel", "worker stops"])
async def test_a_video_stops_when_it_is_told_to(front: Front, start_worker, vision, tmp_path, stop: str) -> None:
    # Given a long video, some of whose frames have been looked at and drawn
    before = folders()
    worker = await start_worker(watch_s=0.2, video_frames_in_flight=4)
    vision.slow_frame = 8
    content = write_video(tmp_path / "a.mp4", even(400), preset="ultrafast")
    job = await front.submit(work=video(content, annotate=True))
    running = await front.until(job.job_id, lambda job: job.progress.completed_count == 8)
    assert running.progress.total_count == 400
    assert folders() > before
    # No more frames are decoded and sent than may be under way
    await asyncio.sleep(0.2)
    assert len(vision.frame_ids) <= 8 + 4
    # When it is stopped
    asked_s = time.monotonic()
    if stop == "cancel":
        await front.stub.CancelJob(pb.CancelJobRequest(job_id=job.job_id))
        assert state(await front.end(job.job_id)) == "CANCELLED"
    else:
        await asyncio.to_thread(worker.stop)
        assert state(await front.get(job.job_id)) == "QUEUED"
    # Then the call has ended, and nothing is left on the disk
    assert time.monotonic() - asked_s < 10, "the slow frame is never answered"
    assert len(vision.cancelled_s) == 1
    assert folders() == before


async def test_a_slow_server_is_no_fault_of_the_video(front: Front, start_worker, vision, tmp_path) -> None:
    # Given a server that takes longer for a frame than a file may for its next one
    await start_worker(video_stall_s=0.2, video_frames_in_flight=2)
    vision.slow_frame = 2
    job = await front.submit(work=video(write_video(tmp_path / "a.mp4", even(30))))
    await front.until(job.job_id, lambda job: job.progress.completed_count == 2)
    await asyncio.sleep(0.6)
    vision.release()
    ended = await front.end(job.job_id)
    assert (state(ended), ended.result.video.detected_frame_count) == ("SUCCEEDED", 30)


async def test_a_stream_that_is_not_answered_fails_the_attempt(front: Front, start_worker, vision, tmp_path) -> None:
    await start_worker(vision_call_s=0.4, watch_s=0.1)
    vision.slow_frame = 2
    job = await front.submit(work=video(write_video(tmp_path / "a.mp4", even(6))), max_attempts=1)
    ended = await front.end(job.job_id)
    assert (state(ended), reasons(ended.error)[0]) == ("FAILED", "ATTEMPTS_EXHAUSTED")
    assert "No frame was answered" in ended.error.message


async def test_a_connection_that_breaks_in_the_midst_costs_an_attempt_and_leaves_nothing_behind(
    front: Front, start_worker, vision, tmp_path
) -> None:
    # Given a video whose server dies of its third frame
    before = folders()
    await start_worker()
    vision.slow_frame = 3
    content = write_video(tmp_path / "a.mp4", even(20))
    job = await front.submit(work=video(content, annotate=True), max_attempts=2)
    await front.until(job.job_id, lambda job: job.progress.completed_count == 3)
    port = vision.port
    vision.break_off()
    failed = await front.until(job.job_id, lambda job: job.attempts[0].HasField("end_time"))
    assert reasons(failed.attempts[0].error) == ["VISION_UNAVAILABLE"]
    # When it is back, then the next attempt begins at the beginning
    late = FakeVision()
    late.start(port)
    try:
        ended = await front.end(job.job_id)
    finally:
        late.stop()
    assert (state(ended), ended.attempt_count) == ("SUCCEEDED", 2)
    assert late.frame_ids == list(range(20))
    assert ended.result.video.detected_frame_count == 20
    assert folders() == before


async def test_a_full_server_costs_a_video_no_attempt(front: Front, start_worker, vision, tmp_path) -> None:
    await start_worker()
    vision.failures = [error(Code.RESOURCE_EXHAUSTED, "QUEUE_FULL", 0.1)]
    job = await front.submit(work=video(write_video(tmp_path / "a.mp4", even(3))), max_attempts=1)
    assert state(await front.end(job.job_id)) == "SUCCEEDED"


@pytest.mark.parametrize("fields", [{"stride": -1}, {"stride": 1001}, {"max_frames": -1}, {"tracker": 9}])
async def test_what_cannot_be_asked_of_a_video_is_refused(front: Front, fields: dict[str, int]) -> None:
    import grpc

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await front.submit(work=video(b"video", **fields))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert f"work.video.{next(iter(fields))}" in str(caught.value.trailing_metadata())


def test_time_goes_on_when_the_clock_of_a_file_is_set_anew(tmp_path: Path) -> None:
    # Given a recording in two parts, the second of which begins its clock anew; and one with a leap of three days
    first = write_video(tmp_path / "a.ts", even(40))
    second = write_video(tmp_path / "b.ts", even(5))
    (tmp_path / "joined.ts").write_bytes(first + second)
    leap_ms = 3 * 24 * 3_600_000
    write_video(tmp_path / "leap.mkv", [0, 40, 80, leap_ms, leap_ms + 40])
    for name, count in (("joined.ts", 45), ("leap.mkv", 5)):
        with opened(tmp_path / name, Limits(10**6, 10, 1), lambda: False) as opened_video:
            times_s = [found.time_s for found in opened_video.frames(1, 100) if isinstance(found, Picture)]
        # Then the frames are told one after the other all the same
        assert times_s == pytest.approx([0.04 * number for number in range(count)], abs=0.01), name


def test_a_worker_needs_no_numpy_for_videos(tmp_path) -> None:
    write_video(tmp_path / "a.mp4", even(3), turned=90)
    program = f"""
import sys
from fractions import Fraction
from pathlib import Path
from queue_server.work import video
from queue_server.work.decoding import Limits, Picture, opened
from queue_server.work.encoding import AnnotatedVideo
assert "av" not in sys.modules  # only a worker that meets a video pays for it
folder = Path({str(tmp_path)!r})
out = AnnotatedVideo(folder / "out.mp4", 25, Fraction(1), 1)
with opened(folder / "a.mp4", Limits(10**6, 10, 1), lambda: False) as opened_video:
    for picture in opened_video.frames(1, 10):
        out.add(picture.jpeg, picture.time_s)
out.finish(lambda: None)
assert "av" in sys.modules and not {{"numpy", "cv2", "torch", "PIL"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", program], check=True, env={"PYTHONPATH": "clients:."}, timeout=60)
