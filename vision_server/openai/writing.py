"""Writes answers, model lists and errors in OpenAI's shapes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ai4thai.vision.v1 import generation_pb2, model_service_pb2, vision_service_pb2

from serving.errors import Code, ServiceError
from serving.http_calls import HTTP_STATUS
from vision_server.openai.reading import MAX_TOKENS_FIELDS

OWNER = "ai4thai"

_FINISH_REASONS = {
    generation_pb2.FINISH_REASON_STOP: "stop",
    generation_pb2.FINISH_REASON_LENGTH: "length",
}
# Where clients look for a code of OpenAI's own, it is that one; else our reason in lower case.
_CODES = {"PROMPT_TOO_LONG": "context_length_exceeded", "QUEUE_FULL": "rate_limit_exceeded"}
_TYPES = {
    Code.UNAUTHENTICATED: "authentication_error",
    Code.PERMISSION_DENIED: "permission_error",
    Code.RESOURCE_EXHAUSTED: "rate_limit_error",
}


@dataclass(frozen=True, slots=True)
class Head:
    """What all chunks of an answer begin with."""

    identity: str
    created_s: int
    """Unix time."""
    model: str
    fingerprint: str
    """The model's version; empty: not known."""

    def write(self, kind: str) -> dict[str, Any]:
        """`kind` is `chat.completion` or `chat.completion.chunk`."""
        head = {"id": f"chatcmpl-{self.identity}", "object": kind, "created": self.created_s, "model": self.model}
        return {**head, "system_fingerprint": self.fingerprint} if self.fingerprint else head


def completion(head: Head, summary: vision_service_pb2.GenerateSummary) -> dict[str, Any]:
    """A whole `chat.completion`."""
    message = {"role": "assistant", "content": summary.text, "refusal": None}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": _finish_reason(summary)}
    return {**head.write("chat.completion"), "choices": [choice], "usage": usage(summary)}


def chunk(head: Head, delta: Mapping[str, str], *, includes_usage: bool, ends: str | None = None) -> dict[str, Any]:
    """A `chat.completion.chunk`; `ends` is the finish reason of the last one with a choice."""
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": ends}
    written = {**head.write("chat.completion.chunk"), "choices": [choice]}
    return {**written, "usage": None} if includes_usage else written


def last_chunk(head: Head, summary: vision_service_pb2.GenerateSummary, *, includes_usage: bool) -> dict[str, Any]:
    """The chunk that says why the answer ended."""
    return chunk(head, {}, includes_usage=includes_usage, ends=_finish_reason(summary))


def usage_chunk(head: Head, summary: vision_service_pb2.GenerateSummary) -> dict[str, Any]:
    """The chunk after the last, where the usage was asked for."""
    return {**head.write("chat.completion.chunk"), "choices": [], "usage": usage(summary)}


def usage(summary: vision_service_pb2.GenerateSummary) -> dict[str, Any]:
    """OpenAI's `usage`; `image_tokens` are among the prompt's."""
    used = summary.usage
    return {
        "prompt_tokens": used.prompt_tokens,
        "completion_tokens": used.completion_tokens,
        "total_tokens": used.prompt_tokens + used.completion_tokens,
        "prompt_tokens_details": {"image_tokens": used.image_tokens, "cached_tokens": 0},
    }


def model_entry(name: str, created_s: int) -> dict[str, Any]:
    """OpenAI's `model`; `created_s` is the Unix time of the server's start, since models do not tell theirs."""
    return {"id": name, "object": "model", "created": created_s, "owned_by": OWNER}


def model_entries(models: model_service_pb2.ListModelsResponse, created_s: int) -> list[dict[str, Any]]:
    """The models that a chat can name now: each describer that is ready, then the aliases of it."""
    return [
        model_entry(name, created_s)
        for model in models.models
        if model.task == model_service_pb2.TASK_GENERATE and model.state == model_service_pb2.MODEL_STATE_READY
        for name in (model.name, *model.aliases)
    ]


def error_body(error: ServiceError, max_tokens_field: str = MAX_TOKENS_FIELDS[0]) -> dict[str, Any]:
    """`{"error": {"message", "type", "param", "code"}}`, with Generate's names for fields turned into OpenAI's."""
    message, field = str(error), error.field
    if field:
        param = _param(field, max_tokens_field)
        message = re.sub(r"\bROLE_(SYSTEM|USER|ASSISTANT)\b", lambda found: f'"{found[1].lower()}"', message)
        message = message.replace(field, param)
    else:
        param = None
    return {
        "error": {
            "message": message,
            "type": error_type(error.code),
            "param": param,
            "code": _CODES.get(error.reason, error.reason.lower()),
        }
    }


def error_type(code: Code) -> str:
    """OpenAI's word for a kind of failure."""
    return _TYPES.get(code, "server_error" if HTTP_STATUS[code] >= 500 else "invalid_request_error")


def _param(field: str, max_tokens_field: str) -> str:
    """`options.max_new_tokens` → `max_tokens`, `messages[0].parts[1].image` → `messages[0].content[1].image_url.url`."""
    if field == "options.max_new_tokens":
        return max_tokens_field
    field = field.removeprefix("options.")
    field = re.sub(r"\.parts\b", ".content", field)
    return re.sub(r"\.image\b.*", ".image_url.url", field)


def _finish_reason(summary: vision_service_pb2.GenerateSummary) -> str:
    return _FINISH_REASONS.get(summary.finish_reason, "stop")
