"""Reads which describers another server runs, and where, from the operator's list of describers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

UNNAMED = "remote"
"""The name of a remote describer for which neither a name nor a model was given."""

ELSEWHERE = "remote"
"""The device of a model that another server computes."""

_MARK = "openai+"


@dataclass(frozen=True, slots=True)
class RemoteAddress:
    """`NAME=openai+BASE_URL#MODEL`: a describer on an OpenAI-compatible server; NAME= and #MODEL may be left out.

    `name` is what callers call it; left out, it is the model's, and without that `remote`. `base_url` is where the server's
    `/models` and `/chat/completions` hang. `model` is which of its models is meant; empty: the first that it lists.
    """

    name: str
    base_url: str
    model: str = ""


def is_remote(listed: str) -> bool:
    """Whether an entry of the list means another server."""
    return listed.startswith(_MARK) or f"={_MARK}" in listed


def read_remote(listed: str) -> RemoteAddress:
    """Reads an entry that is_remote(). Raises ValueError with a sentence for the operator, which repeats no secret."""
    before, _, url = listed.partition(_MARK)
    name = before.removesuffix("=").strip()
    if before and not name:
        raise ValueError(f"nothing stands before `={_MARK}`; name a describer as `NAME={_MARK}http://HOST:PORT/v1`")
    if "@" in url.partition("#")[0]:
        raise ValueError(
            "the address of a describer holds a user or a password; give the key in VISION_REMOTE_API_KEY instead"
        )
    try:
        parts = urlsplit(url)
        is_whole = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # brackets that do not close, a port that is no number
        is_whole = False
    if not is_whole:
        raise ValueError(f"{listed!r} is no address of a describer; write `{_MARK}http://HOST:PORT/v1`, or https")
    if parts.query:
        raise ValueError(
            "the address of a describer has a `?`; end it with the path that `/chat/completions` is added to, and give a key "
            "in VISION_REMOTE_API_KEY"
        )
    model = unquote(parts.fragment)
    path = parts.path.rstrip("/")
    return RemoteAddress(name or model or UNNAMED, f"{parts.scheme}://{parts.netloc}{path}", model)


def read_describers(listed: Sequence[str]) -> Mapping[str, RemoteAddress | None]:
    """The describers by name, in order; None: it runs in this process.

    Raises ValueError: an address that cannot be read, or two describers with one name.
    """
    described: dict[str, RemoteAddress | None] = {}
    for entry in listed:
        address = read_remote(entry) if is_remote(entry) else None
        name = entry if address is None else address.name
        if name in described:
            raise ValueError(f"two describers are called {name!r}; name one of them: `NAME={_MARK}http://HOST:PORT/v1`")
        described[name] = address
    return described
