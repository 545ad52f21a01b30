"""The options that several commands share."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, TypeAlias

import typer

from ai4thai import queue_client, vision_client

VisionAddress: TypeAlias = Annotated[
    str,
    typer.Option(
        "--vision", metavar="HOST:PORT", envvar="AI4THAI_VISION_ADDRESS", help="The vision server; grpcs://… for TLS."
    ),
]
QueueAddress: TypeAlias = Annotated[
    str,
    typer.Option(
        "--queue", metavar="HOST:PORT", envvar="AI4THAI_QUEUE_ADDRESS", help="The queue server; grpcs://… for TLS."
    ),
]
VISION = vision_client.DEFAULT_ADDRESS
QUEUE = queue_client.DEFAULT_ADDRESS

AsJson: TypeAlias = Annotated[bool, typer.Option("--json", help="Print JSON, a line for each result.")]
TimeoutS: TypeAlias = Annotated[
    float, typer.Option("--timeout", metavar="SECONDS", min=0.1, help="Give up after this.")
]
Image: TypeAlias = Annotated[Path, typer.Argument(metavar="IMAGE", help="JPEG, PNG, WebP, BMP, TIFF or GIF.")]
Images: TypeAlias = Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="JPEG, PNG, WebP, BMP, TIFF or GIF.")]
Question: TypeAlias = Annotated[str, typer.Argument(metavar="QUESTION", help="In any language that the model speaks.")]
JobId: TypeAlias = Annotated[str, typer.Argument(metavar="JOB_ID", help="As `submit` and `jobs` print it.")]
Client: TypeAlias = Annotated[
    str,
    typer.Option(metavar="NAME", envvar="AI4THAI_CLIENT", help="Who submits; clients share the workers fairly."),
]

Detector: TypeAlias = Annotated[str, typer.Option("--model", help="The detector's name. \\[default: the server's]")]
MinConfidence: TypeAlias = Annotated[
    float | None, typer.Option(help="Leave weaker detections out, 0 to 1. \\[default: 0.25]")
]
IouThreshold: TypeAlias = Annotated[
    float | None, typer.Option(help="Of boxes that overlap by more keep the surest, 0 to 1. \\[default: 0.7]")
]
MaxDetections: TypeAlias = Annotated[int | None, typer.Option(help="At most so many an image. \\[default: 300]")]
OnlyLabels: TypeAlias = Annotated[list[str] | None, typer.Option("--label", help="Only this label; may be repeated.")]
Masks: TypeAlias = Annotated[bool, typer.Option("--masks", help="Also the objects' masks, of models that segment.")]
MaskForm: TypeAlias = Annotated[
    str, typer.Option(metavar="FORM", help="How masks are written: polygon or rle. \\[default: polygon]")
]
Priority: TypeAlias = Annotated[
    str, typer.Option(metavar="PRIORITY", help="interactive, standard or batch. \\[default: standard]")
]

Describer: TypeAlias = Annotated[str, typer.Option("--model", help="The describer's name. \\[default: the server's]")]
MaxNewTokens: TypeAlias = Annotated[int | None, typer.Option(help="At most so many tokens. \\[default: 256]")]
Temperature: TypeAlias = Annotated[
    float | None, typer.Option(help="0 is repeatable, up to 2 more varied. \\[default: 0]")
]
TopP: TypeAlias = Annotated[
    float | None, typer.Option(help="Only the likeliest tokens up to this probability. \\[default: 1]")
]
Seed: TypeAlias = Annotated[int | None, typer.Option(help="The same seed gives the same text.")]

_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(s|m|min|h|d)")
_UNITS_S = {"s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}


def parse_moment(text: str) -> datetime:
    """A moment as people write it: `90s`, `10m`, `2h`, `1d` from now, or ISO 8601, in this machine's time zone if it names none.

    Raises:
        ValueError: it is neither.
    """
    if found := _DURATION.fullmatch(text.strip()):
        return datetime.now(UTC) + timedelta(seconds=float(found[1]) * _UNITS_S[found[2]])
    try:
        return datetime.fromisoformat(text.strip()).astimezone()
    except ValueError:
        raise ValueError(
            f"{text!r} is neither a time from now (90s, 10m, 2h, 1d) nor ISO 8601 (2027-01-31T18:00)."
        ) from None
