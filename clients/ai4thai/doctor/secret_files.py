"""Can the secrets be read that lie as files, and have they their form? Their values are never shown."""

from __future__ import annotations

import base64
import binascii
import os
from collections.abc import Iterator
from typing import Final

from ai4thai.doctor.findings import Finding, Level, Situation

NAMES: Final = ("redis_url", "redis_password", "queue_webhook_secret", "hf_token", "vision_remote_api_key")


def check_secrets(situation: Situation) -> Iterator[Finding]:
    """The directory of the secrets, each file of a known name in it, and the form of the webhooks' secret wherever it is from."""
    folder = situation.secrets_dir
    if folder is None:
        yield Finding("secrets", Level.NOTE, "no directory of secrets: they come from the environment")
    elif not os.access(folder / ".", os.R_OK | os.X_OK):
        yield Finding(
            "secrets",
            Level.FAILURE,
            f"AI4THAI_SECRETS_DIR is {folder}, which is no directory that user {os.getuid()} may read",
            "Make it, let the user in, or unset AI4THAI_SECRETS_DIR (then /run/secrets is read where it is).",
        )
    else:
        found = []
        for name in NAMES:
            path = folder / name
            if not path.exists():
                continue
            try:
                text = path.read_text("utf-8").strip()
            except (OSError, ValueError) as error:
                yield Finding(
                    "secrets",
                    Level.FAILURE,
                    f"{path} cannot be read: {getattr(error, 'strerror', None) or 'it is no text'}",
                    f"Let user {os.getuid()} read it (compose: the file's own mode counts; chmod 0444, in a 0700 directory).",
                )
                continue
            found.append(name if text else f"{name} (empty)")
        yield Finding("secrets", Level.OK, f"{folder}: {', '.join(found) or 'none of ours'}")
    yield from _check_webhook_secret(situation)


def _check_webhook_secret(situation: Situation) -> Iterator[Finding]:
    for text in filter(None, (part.strip() for part in situation.secret("QUEUE_WEBHOOK_SECRET").split(","))):
        try:
            if text.startswith("whsec_") and 24 <= len(base64.b64decode(text[6:], validate=True)) <= 64:
                continue
        except binascii.Error:
            pass
        yield Finding(
            "secrets",
            Level.FAILURE,
            "QUEUE_WEBHOOK_SECRET is not `whsec_` and the base64 of 24 to 64 bytes: the queue server will not start",
            "Make one: echo whsec_$(openssl rand -base64 32)",
        )
        return
