"""Writes what was found in a video as JSON, frame by frame, and sums up the objects that were followed."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from ai4thai.vision.v1 import detection_pb2, vision_service_pb2
from google.protobuf.json_format import MessageToDict
from google.rpc import error_details_pb2
from google.rpc.code_pb2 import Code
from google.rpc.status_pb2 import Status

COPIED_BYTES = 1 << 20


@dataclass
class Track:
    """One object that was followed; times are seconds from the video's beginning."""

    track_id: int
    first_time_s: float
    last_time_s: float = 0.0
    frame_count: int = 0
    max_confidence: float = 0.0
    labels: Counter[str] = field(default_factory=Counter)

    @property
    def label(self) -> str:
        """The label it had most often."""
        return self.labels.most_common(1)[0][0]


class TrackWriter:
    """The file while it is written: a frame's entry leaves the memory at once, a track is kept to the end."""

    def __init__(self, folder: Path) -> None:
        self._frames_path = folder / "frames.json"
        self._path = folder / "tracks.json"
        self._frames: IO[bytes] = self._frames_path.open("wb")
        self._tracks: dict[int, Track] = {}
        self._entries = 0
        self.size_bytes = 0
        """What has been written so far; the whole file takes that much again."""
        self.model = ""

    @property
    def tracks(self) -> list[Track]:
        """In the order of their first frames."""
        return list(self._tracks.values())

    def add(self, number: int, time_s: float, found: vision_service_pb2.DetectResponse, *, corrupt: bool) -> None:
        """A frame that was looked at."""
        self.model = self.model or found.model
        entry: dict[str, Any] = {"frame": number, "time_s": _rounded(time_s)}
        if corrupt:
            entry["corrupt"] = True
        entry["detections"] = [_detection(one) for one in found.detections]
        if found.classes:
            entry["classes"] = [_fields(one) for one in found.classes]
        self._write(entry)
        for one in found.detections:
            if one.HasField("track_id"):
                self._follow(one, time_s)

    def add_error(self, number: int, time_s: float, status: Status) -> None:
        """A frame that could not be decoded or answered."""
        info = error_details_pb2.ErrorInfo()
        reason = next((info.reason for detail in status.details if detail.Unpack(info)), "")
        error = {"code": Code.Name(status.code), "reason": reason, "message": status.message}
        self._write({"frame": number, "time_s": _rounded(time_s), "error": error})

    def finish(self, head: Mapping[str, object], check: Callable[[], None]) -> Path:
        """The whole file: `head`'s fields, the frames, the tracks; asks `check` now and then whether to go on."""
        self.close()
        with self._path.open("wb") as file, self._frames_path.open("rb") as frames:
            file.write(_text(head).removesuffix(b"}") + b',\n"frames":[')
            while piece := frames.read(COPIED_BYTES):
                check()
                file.write(piece)
            file.write(b'\n],\n"tracks":[')
            for number, track in enumerate(self._tracks.values()):
                check()
                file.write((b"," if number else b"") + b"\n" + _text(_track(track)))
            file.write(b"\n]}\n")
        return self._path

    def close(self) -> None:
        """Closes the file."""
        self._frames.close()

    def _write(self, entry: Mapping[str, object]) -> None:
        text = (b"," if self._entries else b"") + b"\n" + _text(entry)
        self._frames.write(text)
        self._entries += 1
        self.size_bytes += len(text)

    def _follow(self, one: detection_pb2.Detection, time_s: float) -> None:
        track = self._tracks.setdefault(one.track_id, Track(one.track_id, time_s))
        track.last_time_s = time_s
        track.frame_count += 1
        track.max_confidence = max(track.max_confidence, one.confidence)
        track.labels[one.label] += 1


def _detection(one: detection_pb2.Detection) -> dict[str, Any]:
    entry = _fields(one)
    if "track_id" in entry:
        entry["track_id"] = (
            one.track_id
        )  # protobuf's JSON writes an int64 as text; ours says in `tracks` what it says here
    return entry


def _fields(message: detection_pb2.Detection | detection_pb2.Classification) -> dict[str, Any]:
    # As the HTTP door writes the contract's messages.
    return MessageToDict(message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)


def _track(track: Track) -> dict[str, object]:
    return {
        "track_id": track.track_id,
        "label": track.label,
        "first_time_s": _rounded(track.first_time_s),
        "last_time_s": _rounded(track.last_time_s),
        "frame_count": track.frame_count,
        "max_confidence": round(track.max_confidence, 6),
    }


def _rounded(time_s: float) -> float:
    return round(time_s, 6)


def _text(entry: Mapping[str, object]) -> bytes:
    return json.dumps(entry, ensure_ascii=False, separators=(",", ":")).encode()
