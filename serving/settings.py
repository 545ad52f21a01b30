"""What the operator can set about any server process: addresses, limits, times."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from typing import Literal, TypeVar

from pydantic import Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict


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


def read(kind: type[Settings]) -> Settings:
    """The settings from the environment; what is wrong with them is told by the variables' names, and ends the process with 2."""
    try:
        return kind()
    except ValidationError as error:
        prefix = str(kind.model_config.get("env_prefix", ""))
        for problem in error.errors():
            name = str(problem["loc"][0]) if problem["loc"] else ""
            field = kind.model_fields.get(name)
            variable = name if field is None else f"{prefix}{name}".upper()
            value = SecretStr(str(problem["input"])) if field and field.annotation is SecretStr else problem["input"]
            print(f"{variable} is {_masked(value)!r}: {problem['msg']}.", file=sys.stderr)
        sys.exit(2)


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
