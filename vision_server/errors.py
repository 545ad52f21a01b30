"""The errors of the vision server.

ServiceError
├── InvalidField         a value out of range or missing
├── ImageError
│   ├── ImageEmpty       none sent, or zero bytes
│   ├── ImageTooLarge    over the limit on bytes or pixels
│   └── ImageUnreadable  no image, or a broken one
├── ModelNotFound        no such name
├── ModelLoading         not yet
├── ModelFailed          could not be loaded
├── ModelUnloaded        not in memory
├── MemoryExceeded       a model that does not fit
├── ModelControlOff      callers may not load or unload
├── WrongTask            a describer asked to detect, or the other way round
├── QueueFull            too much waits
├── StreamsFull          too many streams are open
├── DeadlinePassed       not worth computing any more
├── Draining             the server is on its way out
├── WrongOrder           messages of a stream
├── PromptTooLong        does not fit into the model's context
├── AnswerTooLong        does not fit into the memory for conversations
├── MemoryRanOut         of the device, for one generation
├── WaitTooLong          what waits takes too long
├── ExecutorStuck        a batch that does not end
├── ModelBroken          does not compute any more
└── Fault                the server's own
"""

from __future__ import annotations

from collections.abc import Sequence

from serving.errors import Code, ServiceError


class InvalidField(ServiceError):
    """A field's value is out of range or missing."""

    def __init__(self, field: str, problem: str, cure: str = "") -> None:
        super().__init__(Code.INVALID_ARGUMENT, "INVALID_FIELD", f"{field} {problem}", cure=cure, field=field)


class ImageError(ServiceError):
    """Something is wrong with an image; `at(field)` says which."""

    def __init__(
        self, reason: str, message: str, *, cure: str, field: str = "image", metadata: dict[str, object] | None = None
    ) -> None:
        super().__init__(Code.INVALID_ARGUMENT, reason, message, cure=cure, field=field, metadata=metadata)

    def at(self, field: str) -> ImageError:
        """The same error about the image in `field`."""
        self.field = field
        return self


class ImageEmpty(ImageError):
    """No image was sent, or one of zero bytes."""

    def __init__(self, field: str = "image") -> None:
        super().__init__(
            "IMAGE_EMPTY",
            "There is no image, or it has zero bytes.",
            cure="Send the bytes of an image file.",
            field=field,
        )


class ImageTooLarge(ImageError):
    """The image has more bytes or pixels than the server takes."""

    def __init__(self, *, amount: int, limit: int, unit: str, setting: str) -> None:
        super().__init__(
            "IMAGE_TOO_LARGE",
            f"The image has {amount:,} {unit}; the limit is {limit:,}.",
            cure=f"Send a smaller one, or raise {setting} on the server.",
            metadata={unit: amount, f"max_{unit}": limit},
        )


class ImageUnreadable(ImageError):
    """The bytes are no image, or a broken one."""

    def __init__(
        self, problem: str, cure: str = "Send a whole JPEG, PNG, WebP, BMP, TIFF or GIF file.", field: str = "image"
    ) -> None:
        super().__init__("IMAGE_UNREADABLE", problem, cure=cure, field=field)


class ModelNotFound(ServiceError):
    """There is no model of this name."""

    def __init__(self, name: str, there_are: Sequence[str], field: str = "model") -> None:
        listed = ", ".join(there_are) or "none"
        message = f"There is no model {name!r}." if name else "This server has no model for that."
        super().__init__(
            Code.NOT_FOUND,
            "MODEL_NOT_FOUND",
            message,
            cure=f"There are: {listed}.",
            metadata={"models": listed},
            field=field,
        )


class ModelLoading(ServiceError):
    """The model is still loading."""

    def __init__(self, name: str, progress: float, retry_after_s: float) -> None:
        super().__init__(
            Code.UNAVAILABLE,
            "MODEL_LOADING",
            f"The model {name!r} is loading ({progress:.0%}).",
            cure="Try again soon.",
            metadata={"model": name, "load_progress": f"{progress:.2f}"},
            retry_after_s=retry_after_s,
        )


class ModelFailed(ServiceError):
    """The model could not be loaded."""

    def __init__(self, name: str, why: str) -> None:
        super().__init__(
            Code.FAILED_PRECONDITION,
            "MODEL_FAILED",
            f"The model {name!r} could not be loaded: {why}",
            cure="The server's operator can mend that and load it again (LoadModel).",
            metadata={"model": name},
        )


class ModelUnloaded(ServiceError):
    """The model is not in memory."""

    def __init__(self, name: str, field: str = "model") -> None:
        super().__init__(
            Code.FAILED_PRECONDITION,
            "MODEL_UNLOADED",
            f"The model {name!r} is not loaded.",
            cure=f"Load it: `ai4thai models load {name}`, or LoadModel.",
            metadata={"model": name},
            field=field,
        )


class MemoryExceeded(ServiceError):
    """The model does not fit into what models may take."""

    def __init__(self, name: str, *, needed_bytes: int, taken_bytes: int, limit_bytes: int) -> None:
        super().__init__(
            Code.FAILED_PRECONDITION,
            "MEMORY_EXCEEDED",
            f"The model {name!r} takes about {needed_bytes:,} bytes; {taken_bytes:,} of {limit_bytes:,} are taken.",
            cure="Unload another model, or raise VISION_MAX_MODEL_BYTES on the server.",
            metadata={
                "model": name,
                "needed_bytes": needed_bytes,
                "taken_bytes": taken_bytes,
                "limit_bytes": limit_bytes,
            },
        )


class ModelControlOff(ServiceError):
    """The operator keeps loading and unloading to himself."""

    def __init__(self) -> None:
        super().__init__(
            Code.PERMISSION_DENIED,
            "MODEL_CONTROL_OFF",
            "This server lets no caller load or unload models.",
            cure="Set VISION_MODEL_CONTROL=true on the server, or name the models in VISION_DETECTOR and VISION_DESCRIBER.",
        )


class WrongTask(ServiceError):
    """The model does another task."""

    def __init__(self, name: str, does: str, asked: str, field: str) -> None:
        super().__init__(
            Code.INVALID_ARGUMENT,
            "WRONG_TASK",
            f"The model {name!r} can {does}, not {asked}.",
            cure="ListModels tells which model does what.",
            metadata={"model": name, "task": does},
            field=field,
        )


class QueueFull(ServiceError):
    """Too much waits already; a `total` above the limit is what more urgent callers may fill."""

    def __init__(self, *, what: str, waiting: int, limit: int, retry_after_s: float, total: int | None = None) -> None:
        limited = (
            f"the limit is {limit:,}"
            if total is None or total <= limit
            else f"the limit for callers of this priority is {limit:,} of {total:,}"
        )
        super().__init__(
            Code.RESOURCE_EXHAUSTED,
            "QUEUE_FULL",
            f"{waiting:,} {what} wait already; {limited}.",
            cure="Try again later, or send fewer at once.",
            metadata={"waiting": waiting, "limit": limit},
            retry_after_s=retry_after_s,
        )


class StreamsFull(ServiceError):
    """Too many streams are open."""

    def __init__(self, limit: int) -> None:
        super().__init__(
            Code.RESOURCE_EXHAUSTED,
            "QUEUE_FULL",
            f"{limit:,} streams are open; no more are let in.",
            cure="Try again later, or raise VISION_MAX_STREAMS on the server.",
            metadata={"limit": limit},
            retry_after_s=5.0,  # streams last: no use in knocking every second
        )


class DeadlinePassed(ServiceError):
    """The caller's deadline passed before its turn came."""

    def __init__(self, waited_ms: float) -> None:
        super().__init__(
            Code.DEADLINE_EXCEEDED,
            "DEADLINE_EXCEEDED",
            f"The deadline passed after {waited_ms:.0f} ms of waiting.",
            cure="Allow more time, or send less at once.",
        )


class Draining(ServiceError):
    """The server is shutting down."""

    def __init__(self) -> None:
        super().__init__(
            Code.UNAVAILABLE,
            "DRAINING",
            "The server is shutting down.",
            cure="Try again, on another server if there is one.",
        )


class WrongOrder(ServiceError):
    """A stream's messages came in the wrong order."""

    def __init__(self, message: str, cure: str) -> None:
        super().__init__(Code.INVALID_ARGUMENT, "WRONG_ORDER", message, cure=cure, field="message")


class PromptTooLong(ServiceError):
    """The prompt does not fit into the model's context."""

    def __init__(self, prompt_tokens: int, context_tokens: int) -> None:
        super().__init__(
            Code.INVALID_ARGUMENT,
            "PROMPT_TOO_LONG",
            f"The prompt has {prompt_tokens:,} tokens; the model's context holds {context_tokens:,}.",
            cure="Send fewer messages, shorter texts or fewer images.",
            metadata={"prompt_tokens": prompt_tokens, "context_tokens": context_tokens},
            field="messages",
        )


class AnswerTooLong(ServiceError):
    """Prompt and answer together would not fit into what a describer may keep of conversations, even alone."""

    def __init__(self, prompt_tokens: int, max_new_tokens: int, limit_tokens: int) -> None:
        super().__init__(
            Code.INVALID_ARGUMENT,
            "PROMPT_TOO_LONG",
            f"The prompt has {prompt_tokens:,} tokens and the answer may have {max_new_tokens:,}; "
            f"there is memory for {limit_tokens:,} together.",
            cure="Send less, lower max_new_tokens, or raise VISION_MAX_CACHE_BYTES on the server.",
            metadata={
                "prompt_tokens": prompt_tokens,
                "max_new_tokens": max_new_tokens,
                "limit_tokens": limit_tokens,
            },
            field="messages",
        )


class MemoryRanOut(ServiceError):
    """The device's memory ran out for a generation; the others go on."""

    def __init__(self, name: str, retry_after_s: float) -> None:
        super().__init__(
            Code.RESOURCE_EXHAUSTED,
            "MEMORY_EXCEEDED",
            f"The memory of the model {name!r}'s device ran out for this generation.",
            cure="Try again later or send less; an operator lowers VISION_MAX_CACHE_BYTES or VISION_MAX_RUNNING_GENERATIONS.",
            metadata={"model": name},
            retry_after_s=retry_after_s,
        )


class Fault(ServiceError):
    """A fault of the server itself; says nothing of its inside, the log does."""

    def __init__(self, what: str) -> None:
        super().__init__(
            Code.INTERNAL,
            "INTERNAL",
            f"{what} failed.",
            cure="The server's log has the details under this call's x-request-id.",
        )


class WaitTooLong(ServiceError):
    """What waits for the model already takes longer than callers are to wait."""

    def __init__(self, model: str, *, wait_s: float, limit_s: float) -> None:
        super().__init__(
            Code.RESOURCE_EXHAUSTED,
            "QUEUE_FULL",
            f"Waiting for the model {model!r} takes about {wait_s:.2f} s now; the limit is {limit_s:g} s.",
            cure="Try again later, or send fewer at once.",
            metadata={"model": model, "wait_ms": round(wait_s * 1000), "limit_ms": round(limit_s * 1000)},
            retry_after_s=wait_s,
        )


class ExecutorStuck(ServiceError):
    """The batch did not end; INTERNAL, so that nobody sends again by itself what may have been the cause."""

    def __init__(self, model: str, after_s: float) -> None:
        super().__init__(
            Code.INTERNAL,
            "INTERNAL",
            f"The model {model!r} did not finish within {after_s:g} s and was given up.",
            cure="Try again; if this image does it again, tell the server's operator.",
            metadata={"model": model},
        )


class ModelBroken(ServiceError):
    """The model fails again and again, and the server asks to be started again; why is in its health and its log."""

    def __init__(self, model: str) -> None:
        super().__init__(
            Code.UNAVAILABLE,
            "MODEL_FAILED",
            f"The model {model!r} does not compute any more; the server has to be started again.",
            cure="Try again later, or on another server if there is one.",
            metadata={"model": model},
        )
