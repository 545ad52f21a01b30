"""Answers a job's conversation."""

from __future__ import annotations

from ai4thai.queue.v1 import work_pb2
from ai4thai.vision.v1 import generation_pb2, vision_service_pb2

from queue_server.errors import InvalidField
from queue_server.work.files import Files
from queue_server.work.task import Task


def read(work: work_pb2.Work, files: Files) -> tuple[work_pb2.Work, int]:
    """One item, the conversation; raises InvalidField."""
    asked = work.generate
    if not asked.messages:
        raise InvalidField("work.generate.messages", "There are no messages.")
    if asked.messages[-1].role != generation_pb2.ROLE_USER:
        raise InvalidField("work.generate.messages", "The last message is not the user's.")
    light = work_pb2.GenerateWork(model=asked.model, options=asked.options if asked.HasField("options") else None)
    for number, message in enumerate(asked.messages):
        field = f"work.generate.messages[{number}]"
        if message.role == generation_pb2.ROLE_UNSPECIFIED:
            raise InvalidField(f"{field}.role", "The role is not set.", cure="Send ROLE_USER for the person who asks.")
        if not message.parts:
            raise InvalidField(f"{field}.parts", "The message has no parts.")
        turn = light.messages.add(role=message.role)
        for index, part in enumerate(message.parts):
            match part.WhichOneof("part"):
                case "text":
                    turn.parts.add(text=part.text)
                case "image":
                    turn.parts.add(image=files.image(part.image, f"{field}.parts[{index}].image"))
                case _:
                    raise InvalidField(f"{field}.parts[{index}]", "Neither text nor image is set.")
    return work_pb2.Work(generate=light), 1


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
