"""What a failure of the server that runs a describer means to those who asked.

the server is away, overloaded (502, 503, 504), refuses our key or has lost the model   UNAVAILABLE, come again
it takes no more (429)                                                                  RESOURCE_EXHAUSTED, come again
it will not have the conversation (400, 413, 422)                                       INVALID_ARGUMENT, its own words
anything else                                                                           INTERNAL, its words in our log
"""

from __future__ import annotations

from serving.errors import Code, ServiceError
from serving.logs import get_logger
from vision_server.describers.peer import PeerAway, PeerError, PeerRefused
from vision_server.errors import Fault, InvalidField

AWAY_RETRY_AFTER_S = 5.0

_ASKED_WRONGLY = (400, 413, 422)
_FULL = 429
# Nothing that the caller can mend, and the next look at the server's models will find it: the operator is told by health.
_NOT_SERVED = (401, 403, 404)
_OVERLOADED = (408, 502, 503, 504)

_log = get_logger("remote")


class ModelAway(ServiceError):
    """The server that runs the model does not answer; it is asked until it does."""

    def __init__(self, name: str, why: str, retry_after_s: float | None = None) -> None:
        super().__init__(
            Code.UNAVAILABLE,
            "MODEL_FAILED",
            f"The model {name!r} runs on another server, which does not serve it now: {why}.",
            cure="Try again later; the server is asked again and again.",
            metadata={"model": name},
            retry_after_s=AWAY_RETRY_AFTER_S if retry_after_s is None else retry_after_s,
        )


class PeerFull(ServiceError):
    """The server that runs the model takes no more for now."""

    def __init__(self, name: str, why: str, retry_after_s: float) -> None:
        super().__init__(
            Code.RESOURCE_EXHAUSTED,
            "QUEUE_FULL",
            f"The server that runs the model {name!r} takes no more for now: {why}.",
            cure="Try again later, or send fewer at once.",
            metadata={"model": name},
            retry_after_s=retry_after_s,
        )


def is_doubtful(error: PeerError) -> bool:
    """Whether the server may be away or changed for everybody; else it is this conversation's or this moment's fault."""
    return not (isinstance(error, PeerRefused) and error.status in (*_ASKED_WRONGLY, _FULL))


def told(name: str, error: PeerError, retry_after_s: float) -> ServiceError:
    """What the callers of the model `name` are told; `retry_after_s` is for a server that is full and does not say until when."""
    why = str(error).rstrip(".")
    if isinstance(error, PeerAway):
        return ModelAway(name, why)
    if isinstance(error, PeerRefused):
        if error.status in _ASKED_WRONGLY:
            return InvalidField("messages", f"are refused by the server that runs the model {name!r}: {error.said}")
        if error.status == _FULL:
            return PeerFull(name, why, retry_after_s if error.retry_after_s is None else error.retry_after_s)
        if error.status in (*_NOT_SERVED, *_OVERLOADED):
            return ModelAway(name, why, error.retry_after_s)
    _log.error("a generation failed on another server", model=name, reason=why)
    return Fault(f"The model {name!r}")
