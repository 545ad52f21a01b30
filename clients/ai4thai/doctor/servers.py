"""Are the servers ready, and if not, why not; is the certificate of a TLS address good?"""

from __future__ import annotations

import os
import socket
import ssl
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import httpx

from ai4thai import queue_client, vision_client
from ai4thai.channel import channel_target
from ai4thai.doctor.findings import Finding, Level, Situation

SERVICES: Final = {"vision": vision_client.SERVICE_NAME, "queue": queue_client.SERVICE_NAME}
"""By the server's name, the health service that says whether it is ready."""
_VARIABLES: Final = {
    "vision": "AI4THAI_VISION_ADDRESS, a worker's QUEUE_VISION_ADDRESS",
    "queue": "AI4THAI_QUEUE_ADDRESS",
}
_LOADING: Final = ("PENDING", "LOADING", "WARMING_UP")
_ASK_S = 3.0
_RENEW_DAYS = 14


@dataclass(frozen=True)
class Answer:
    """What a server's /health/detailed said; `health` is empty when it said nothing of that kind, `problem` says why."""

    health: dict[str, Any] = field(default_factory=dict)
    problem: str = ""
    is_away: bool = False
    clock_ahead_s: float | None = None
    """How far the server's clock is ahead of ours; None: it did not tell."""


def base_url(address: str) -> str:
    """The http(s) URL of a server's address; empty for one that has none (`unix:…`)."""
    address = address.removeprefix("dns:///").removeprefix("ipv4:").removeprefix("ipv6:")
    parts = urlsplit(address if "://" in address else f"grpc://{address}")
    scheme = {"grpc": "http", "grpcs": "https", "http": "http", "https": "https"}.get(parts.scheme, "")
    return f"{scheme}://{parts.netloc}" if scheme and parts.netloc and not address.startswith("unix:") else ""


def ask_health(url: str, timeout_s: float = _ASK_S) -> Answer:
    """Asks for the detailed health; raises nothing."""
    before_s = time.time()
    try:
        answer = httpx.get(f"{url}/health/detailed", timeout=timeout_s, trust_env=False, verify=_authorities(url))
        body = answer.json()
    except (httpx.ConnectError, httpx.ConnectTimeout) as error:
        return Answer(problem=str(error) or type(error).__name__, is_away=True)
    except httpx.RemoteProtocolError:
        return Answer(problem="it answers, but not in HTTP: another program, or one that wants TLS (grpcs://)")
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        return Answer(problem=f"{type(error).__name__} {error}".strip())
    except ValueError:
        return Answer(problem=f"HTTP {answer.status_code} without JSON")
    ahead_s = None
    if date := answer.headers.get("date"):
        with suppress(ValueError):
            # The header has whole seconds: half of one more is the best guess.
            ahead_s = parsedate_to_datetime(date).timestamp() + 0.5 - (before_s + time.time()) / 2
    if not isinstance(body, dict) or "checks" not in body:
        return Answer(problem=f"HTTP {answer.status_code}, and no health of ours", clock_ahead_s=ahead_s)
    return Answer(body, clock_ahead_s=ahead_s)


def _authorities(url: str) -> ssl.SSLContext | bool:
    """What an answer over TLS is judged by; nothing for plain HTTP, since reading the authorities takes a while."""
    return _trust() if url.startswith("https://") else False


def _trust() -> ssl.SSLContext:
    """Those of the system, or of SSL_CERT_FILE; besides, those that gRPC was told of."""
    context = ssl.create_default_context()
    if (own := os.environ.get("GRPC_DEFAULT_SSL_ROOTS_FILE_PATH")) and Path(own).is_file():
        context.load_verify_locations(own)
    return context


def check_servers(situation: Situation) -> Iterator[Finding]:
    """The vision server and the queue server, last those that are away and that nobody has said to be there."""
    away: list[tuple[str, str, Answer]] = []
    is_one_there = bool(situation.named)
    for name, address in (("vision", situation.vision), ("queue", situation.queue)):
        try:
            channel_target(address)
        except ValueError as error:
            yield Finding("servers", Level.FAILURE, f"{name}: {error}", f"Correct AI4THAI_{name.upper()}_ADDRESS.")
            continue
        url = base_url(address)
        if not url:
            yield Finding("servers", Level.NOTE, f"{name} {address}: no address for HTTP; ai4thai health asks by gRPC")
            continue
        if url.startswith("https://"):
            yield (certificate := _check_certificate(name, address))
            if certificate.level is Level.FAILURE:
                continue
        answer = ask_health(url)
        is_one_there |= not answer.is_away
        if answer.is_away and name not in situation.named:
            away.append((name, address, answer))
        elif not answer.health:
            yield _unreached(name, address, answer)
        elif SERVICES[name] not in answer.health.get("services", {}):
            yield Finding(
                "servers",
                Level.FAILURE,
                f"{name} {address}: it is not the {name} server that answers there",
                f"Set AI4THAI_{name.upper()}_ADDRESS to the {name} server's address.",
            )
        else:
            yield from _tell(name, address, url, answer.health)
    for name, address, answer in away:
        # Who asks for the servers means one of them at least; a pod or a container may well have the one without the other.
        if "servers" in situation.asked and not is_one_there:
            yield _unreached(name, address, answer)
        else:
            yield Finding("servers", Level.NOTE, f"{name} {address}: nothing answers; none is started here")


def _unreached(name: str, address: str, answer: Answer) -> Finding:
    return Finding(
        "servers",
        Level.FAILURE,
        f"{name} {address}: {answer.problem}",
        f"Is it started, and its address right ({_VARIABLES[name]})? docker logs --tail 50 team10-{name}; ai4thai up",
    )


def _tell(name: str, address: str, url: str, health: dict[str, Any]) -> Iterator[Finding]:
    checks: dict[str, Any] = health["checks"]
    if health.get("status") == "SERVING":
        yield Finding("servers", Level.OK, f"{name} {address}: SERVING")
    elif health.get("draining"):
        yield Finding(
            "servers",
            Level.WARNING,
            f"{name} {address}: it is stopping",
            "Wait until it is started again, or start it.",
        )
    elif loading := _loading(url) if name == "vision" else "":
        yield Finding(
            "servers",
            Level.WARNING,
            f"{name} {address}: loading {loading}",
            "Wait: production models take 5 to 10 minutes. ai4thai info tells how far it is.",
        )
    else:
        why = "; ".join(map(str, health.get("why", ()))) or "it does not say why"
        yield Finding(
            "servers",
            Level.FAILURE,
            f"{name} {address}: NOT_SERVING: {why}",
            f"docs/operations.md by this reason; docker logs team10-{name}",
        )
    told = (
        ("WARNING", "NOT_OK") if health.get("status") == "SERVING" else ("WARNING",)
    )  # what makes it unready is told above
    for check, state in checks.items():
        if state.get("status") in told:
            yield Finding("servers", Level.WARNING, f"{name}, its check {check}: {state.get('detail')}", "As it says.")


def _loading(url: str) -> str:
    """The models that are on their way, with how far they are."""
    try:
        models = httpx.get(f"{url}/info", timeout=_ASK_S, trust_env=False, verify=_authorities(url)).json()["models"]
        states = [(model["name"], model["state"].removeprefix("MODEL_STATE_"), model) for model in models]
    except (httpx.HTTPError, ValueError, KeyError, TypeError):
        return ""
    if any(state == "FAILED" and model.get("is_default") for _, state, model in states):
        return ""  # it will not become ready by waiting
    return ", ".join(
        f"{name} ({float(model.get('load_progress', 0)):.0%})" for name, state, model in states if state in _LOADING
    )


def _check_certificate(name: str, address: str) -> Finding:
    parts = urlsplit(address)
    place = (parts.hostname or "", parts.port or 443)
    try:
        with (
            socket.create_connection(place, _ASK_S) as connection,
            _trust().wrap_socket(connection, server_hostname=place[0]) as secure,
        ):
            until = str((secure.getpeercert() or {})["notAfter"])
    except ssl.SSLCertVerificationError as error:
        return Finding(
            "servers",
            Level.FAILURE,
            f"{name} {address}: the certificate is refused: {error.verify_message}",
            "Renew it, or name your own authority: SSL_CERT_FILE=/ca.pem, for gRPC GRPC_DEFAULT_SSL_ROOTS_FILE_PATH=/ca.pem",
        )
    except OSError as error:
        return Finding("servers", Level.FAILURE, f"{name} {address}: no TLS: {error}", "Is it grpc:// (plain) instead?")
    days = (ssl.cert_time_to_seconds(until) - time.time()) / 86_400
    if days < _RENEW_DAYS:
        return Finding(
            "servers", Level.WARNING, f"{name} {address}: the certificate ends in {days:.0f} days", "Renew it now."
        )
    return Finding("servers", Level.OK, f"{name} {address}: the certificate is good for {days:.0f} days")
