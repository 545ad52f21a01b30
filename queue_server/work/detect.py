"""Finds the objects in a job's images."""

from __future__ import annotations

from ai4thai.queue.v1 import work_pb2
from ai4thai.vision.v1 import image_pb2, vision_service_pb2
from google.rpc.status_pb2 import Status

from queue_server.work.files import Files
from queue_server.work.images import answer_each
from queue_server.work.task import Answer, Task


def read(work: work_pb2.Work, files: Files) -> tuple[work_pb2.Work, int]:
    """An item for each image; raises InvalidField."""
    asked = work.detect
    light = work_pb2.DetectWork(
        images=files.images(asked.images, "work.detect.images"),
        options=asked.options if asked.HasField("options") else None,
    )
    return work_pb2.Work(detect=light), len(light.images)


def run(task: Task, work: work_pb2.Work) -> work_pb2.JobResult:
    """One item for each image, in their order; a bad image is its own item's error."""

    def begin(content: bytes) -> Answer[vision_service_pb2.DetectResponse]:
        request = vision_service_pb2.DetectRequest(image=image_pb2.Image(content=content))
        if work.detect.HasField("options"):
            request.options.CopyFrom(work.detect.options)
        return task.vision.detect(request)

    result = work_pb2.DetectResult()
    for outcome in answer_each(task, work.detect.images, begin):
        if isinstance(outcome, Status):
            result.items.add(error=outcome)
        else:
            result.items.add(detection=outcome)
    return work_pb2.JobResult(detect=result)
