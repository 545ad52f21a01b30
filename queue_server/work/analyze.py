"""Finds the objects in a job's images and answers its question about each."""

from __future__ import annotations

from ai4thai.queue.v1 import work_pb2
from ai4thai.vision.v1 import image_pb2, vision_service_pb2
from google.rpc.status_pb2 import Status

from queue_server.errors import InvalidField
from queue_server.work.files import Files
from queue_server.work.images import answer_each
from queue_server.work.task import Answer, Task


def read(work: work_pb2.Work, files: Files) -> tuple[work_pb2.Work, int]:
    """An item for each image; raises InvalidField."""
    asked = work.analyze
    light = work_pb2.AnalyzeWork(
        images=files.images(asked.images, "work.analyze.images"),
        question=asked.question,
        detect_options=asked.detect_options if asked.HasField("detect_options") else None,
        generate_options=asked.generate_options if asked.HasField("generate_options") else None,
        model=asked.model,
    )
    if not light.question.strip():
        raise InvalidField("work.analyze.question", "The question is empty.")
    return work_pb2.Work(analyze=light), len(light.images)


def run(task: Task, work: work_pb2.Work) -> work_pb2.JobResult:
    """One item for each image, in their order; a bad image is its own item's error."""
    asked = work.analyze

    def begin(content: bytes) -> Answer[vision_service_pb2.AnalyzeResponse]:
        request = vision_service_pb2.AnalyzeRequest(
            image=image_pb2.Image(content=content), question=asked.question, model=asked.model
        )
        if asked.HasField("detect_options"):
            request.detect_options.CopyFrom(asked.detect_options)
        if asked.HasField("generate_options"):
            request.generate_options.CopyFrom(asked.generate_options)
        return task.vision.analyze(request)

    result = work_pb2.AnalyzeResult()
    for outcome in answer_each(task, asked.images, begin):
        if isinstance(outcome, Status):
            result.items.add(error=outcome)
        else:
            result.items.add(analysis=outcome)
    return work_pb2.JobResult(analyze=result)
