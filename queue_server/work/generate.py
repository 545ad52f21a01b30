"""Answers a job's conversation."""

from __future__ import annotations

from ai4thai.queue.v1 import work_pb2
from ai4thai.vision.v1 import generation_pb2, vision_service_pb2

from queue_server.work.task import Task


def run(task: Task, work: work_pb2.Work) -> work_pb2.JobResult:
    """The whole answer; progress tells the pieces of text that have come."""
    request = vision_service_pb2.GenerateRequest(model=work.generate.model)
    for message in work.generate.messages:
        turn = request.messages.add(role=message.role)
        for part in message.parts:
            turn.parts.append(_part(task, part))
    if work.generate.HasField("options"):
        request.options.CopyFrom(work.generate.options)
    summary = task.vision.generate(request, lambda pieces: task.progress(0, 1, f"{pieces} pieces of text"))
    task.progress(1, 1)
    return work_pb2.JobResult(generate=work_pb2.GenerateResult(summary=summary))


def _part(task: Task, part: work_pb2.WorkMessagePart) -> generation_pb2.MessagePart:
    if part.WhichOneof("part") == "text":
        return generation_pb2.MessagePart(text=part.text)
    piece = generation_pb2.MessagePart()
    piece.image.content = task.content(part.image)
    return piece
