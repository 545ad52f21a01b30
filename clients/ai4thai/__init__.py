"""The Python client of the AI4Thai vision platform: `from ai4thai import VisionClient, QueueClient`."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ai4thai.async_queue_client import AsyncQueueClient
    from ai4thai.errors import (
        AI4ThaiError,
        AlreadyExists,
        Busy,
        Cancelled,
        DeadlineExceeded,
        InvalidInput,
        JobLost,
        NotAllowed,
        NotFound,
        NotServedYet,
        ServerFault,
        Unavailable,
        WrongMoment,
    )
    from ai4thai.job_results import Job, JobState, Media, Priority
    from ai4thai.options import DetectOptions, Message, StreamOptions, SubmitOptions, TextOptions
    from ai4thai.queue_client import QueueClient
    from ai4thai.results import Analysis, Answer, Box, Detection, DetectResult, FrameResult, StreamSummary
    from ai4thai.server_info import Health, ServerInfo
    from ai4thai.submissions import Submission
    from ai4thai.vision_client import AsyncVisionClient, VisionClient

# Loaded when first asked for: whoever imports only the stubs (ai4thai.vision.v1) doesn't load the clients.
_HOMES = {
    "ai4thai.errors": (
        "AI4ThaiError AlreadyExists Busy Cancelled DeadlineExceeded InvalidInput JobLost NotAllowed NotFound "
        "NotServedYet ServerFault Unavailable WrongMoment"
    ),
    "ai4thai.async_queue_client": "AsyncQueueClient",
    "ai4thai.job_results": "Job JobState Media Priority",
    "ai4thai.options": "DetectOptions Message StreamOptions SubmitOptions TextOptions",
    "ai4thai.queue_client": "QueueClient",
    "ai4thai.results": "Analysis Answer Box DetectResult Detection FrameResult StreamSummary",
    "ai4thai.server_info": "Health ServerInfo",
    "ai4thai.submissions": "Submission",
    "ai4thai.vision_client": "AsyncVisionClient VisionClient",
}
_HOME = {name: home for home, names in _HOMES.items() for name in names.split()}

__all__ = [
    "AI4ThaiError",
    "AlreadyExists",
    "Analysis",
    "Answer",
    "AsyncQueueClient",
    "AsyncVisionClient",
    "Box",
    "Busy",
    "Cancelled",
    "DeadlineExceeded",
    "DetectOptions",
    "DetectResult",
    "Detection",
    "FrameResult",
    "Health",
    "InvalidInput",
    "Job",
    "JobLost",
    "JobState",
    "Media",
    "Message",
    "NotAllowed",
    "NotFound",
    "NotServedYet",
    "Priority",
    "QueueClient",
    "ServerFault",
    "ServerInfo",
    "StreamOptions",
    "StreamSummary",
    "Submission",
    "SubmitOptions",
    "TextOptions",
    "Unavailable",
    "VisionClient",
    "WrongMoment",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
