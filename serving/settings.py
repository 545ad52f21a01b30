"""What the operator can set about any server process: addresses, limits, times."""

from __future__ import annotations

import os
import re
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import AliasChoices, Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict, SettingsError

SECRETS_DIR = Path("/run/secrets")
"""Where Docker and Kubernetes put secrets, one a file."""


class ServingSettings(BaseSettings):
    """Settings of the port and the process; environment variables are named SERVING_…."""

    model_config = SettingsConfigDict(env_prefix="SERVING_", extra="ignore")

    host: str = Field("0.0.0.0", description="Address to listen on; `::` listens on IPv6 (and, on Linux, IPv4 too).")
    drain_seconds: float = Field(
        30.0, ge=0, description="On SIGTERM, running calls get this long to end. 0 ends them at once."
    )
    unready_seconds: float = Field(
        0.0,
        ge=0,
        description="On SIGTERM, health says NOT_SERVING this long before new calls are refused, so that balancers notice. "
        "0 refuses at once.",
    )
    max_message_bytes: int = Field(64 << 20, ge=1 << 16, description="Bytes of one gRPC message or HTTP body.")
    max_connections: int = Field(4096, ge=1, description="Open connections; more are closed at once.")
    max_concurrent_calls: int = Field(1024, ge=1, description="gRPC calls at once; more get RESOURCE_EXHAUSTED.")
    max_connection_age_seconds: float = Field(
        0.0,
        ge=0,
        description="A gRPC connection this old takes no new calls: its client connects anew, and so finds servers that were "
        "added behind the same name. Calls that run go on to their end. 0: any age.",
    )
    first_bytes_seconds: float = Field(
        10.0, gt=0, description="A connection that has not said by then what it speaks is closed."
    )
    http_request_seconds: float = Field(60.0, gt=0, description="An HTTP request must have arrived whole by then.")
    http_keep_alive_seconds: float = Field(30.0, gt=0, description="An idle HTTP connection is closed after this long.")
    cors_origins: list[str] = Field(
        [],
        description='Web pages that may call from a browser, as a JSON list: `["https://app.example"]`, `["*"]` for any.',
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="The least level logged.")
    log_format: Literal["auto", "json", "console"] = Field(
        "auto", description="`auto`: console on a terminal, JSON elsewhere."
    )
    access_log: bool = Field(True, description="One line for each call that ends.")


Settings = TypeVar("Settings", bound=BaseSettings)


def secrets_dir() -> Path | None:
    """Where secrets lie as files: AI4THAI_SECRETS_DIR, else /run/secrets if it is there and may be listed; None: nowhere."""
    if given := os.environ.get("AI4THAI_SECRETS_DIR"):
        return Path(given)
    return SECRETS_DIR if SECRETS_DIR.is_dir() and os.access(SECRETS_DIR, os.R_OK | os.X_OK) else None


def read(kind: type[Settings]) -> Settings:
    """The settings from the environment, and what it does not say from files called like the variable in lower case.

    `/run/secrets/redis_password` is REDIS_PASSWORD; blanks and line ends around what is in it do not count. What is wrong is told
    by the variables' names, and ends the process with 2.
    """
    try:
        with warnings.catch_warnings():
            # A folder in a secret's place (Docker makes one when the file to mount is missing), or a link that leads elsewhere:
            # pydantic-settings warns and goes on without, but a server without its password must not seem well.
            warnings.filterwarnings("error", "attempted to load secret file|directory .* does not exist")
            return kind(_secrets_dir=secrets_dir())
    except ValidationError as error:
        for problem in error.errors():
            name = str(problem["loc"][0]) if problem["loc"] else ""
            variable, is_secret = _variable(kind, name)
            value = SecretStr(str(problem["input"])) if is_secret else problem["input"]
            print(f"{variable} is {_masked(value)!r}: {problem['msg']}.", file=sys.stderr)
    except (SettingsError, UserWarning) as error:
        print(_unreadable(error), file=sys.stderr)
    sys.exit(2)


def _variable(kind: type[BaseSettings], place: str) -> tuple[str, bool]:
    """The variable that a problem's place, a field's name or its alias, belongs to; and whether it holds a secret."""
    for name, field in kind.model_fields.items():
        alias = field.validation_alias
        aliases = alias.choices if isinstance(alias, AliasChoices) else [alias]
        if place == name or place in aliases:
            prefix = str(kind.model_config.get("env_prefix", ""))
            return f"{prefix}{name}".upper() if alias is None else str(aliases[0]), field.annotation is SecretStr
    return place, False


def _unreadable(error: Exception) -> str:
    """What is wrong with a file, or with JSON in a variable; never what is in it."""
    cause = error.__cause__
    if isinstance(cause, ValueError) and not isinstance(cause, UnicodeDecodeError):
        return f"{error}: {cause}."
    why = f"{error}: not UTF-8" if isinstance(cause, UnicodeDecodeError) else str(cause or error).rstrip(".")
    return (
        f"A secret in {secrets_dir()} cannot be read: {why}. It is to be a file that the server's user may read (chmod 644, in a "
        "folder that only you may enter); AI4THAI_SECRETS_DIR names another folder."
    )


# `user:password@`; what stands there alone may be a token. Up to the last @: one in a password may be unquoted.
_URL_PASSWORD = re.compile(r"(?<=://)(?:([^/@:\s]*):)?[^\s]*@")
# `?password=…`, `&sentinel_password=…`.
_QUERY_PASSWORD = re.compile(r"(?<=[?&])(\w*password)=[^&#\s]*")


def describe(settings: BaseSettings) -> dict[str, object]:
    """The settings as plain values for the log: secrets and the passwords in URLs come out as `***`."""
    return {name: _masked(value) for name, value in settings.model_dump().items()}


def _masked(value: object) -> object:
    if isinstance(value, SecretStr):
        return "***" if value.get_secret_value() else ""
    if isinstance(value, str):
        value = _QUERY_PASSWORD.sub(r"\1=***", value)
        return _URL_PASSWORD.sub(lambda found: f"{found[1]}:***@" if found[1] is not None else "***@", value)
    if isinstance(value, Mapping):
        return {key: _masked(inner) for key, inner in value.items()}
    if isinstance(value, bool | int | float) or value is None:
        return value
    return _masked(str(value))
