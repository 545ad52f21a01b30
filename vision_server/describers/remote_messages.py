"""What a conversation becomes on its way to an OpenAI-compatible server: the body of a chat completion, pictures as data URIs."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence

import cv2

from vision_server.colour import Pixels
from vision_server.describers.describer import PicturedTurn
from vision_server.errors import InvalidField
from vision_server.images import Image
from vision_server.requests import GenerateOptions

# Up to here a picture is sent as PNG, so that the model sees the very pixels that a local one would see; at most 3.2 MB.
MAX_LOSSLESS_PIXELS = 1 << 20
# Above it a PNG takes many megabytes and long to write; at this quality a JPEG takes about a tenth, and models scale such
# pictures down anyway, which evens out what is lost.
_JPEG_QUALITY = 95
# The most that a usual model looks at (Qwen-VL's `max_pixels`, 16384 × 28 × 28); more would be sent to be thrown away.
MAX_PIXELS = 12_845_056
# Servers bound a body, and ours a message (64 MB); base64 makes four bytes of three.
MAX_PICTURE_BYTES = 48_000_000

_FASTEST = 1  # of zlib's levels, 0 to 9; 9 takes ten times as long for a few per cent


def write_messages(turns: Sequence[PicturedTurn]) -> bytes:
    """The conversation as the JSON of `messages`, UTF-8. Encodes the pictures, off the loop.

    That takes 10 to 80 ms for most, a second for the largest.

    Raises InvalidField when the pictures together take more than MAX_PICTURE_BYTES.
    """
    left_bytes = MAX_PICTURE_BYTES
    messages: list[dict[str, object]] = []
    for turn in turns:
        parts: list[dict[str, object]] = []
        for part in turn.parts:
            if isinstance(part, str):
                parts.append({"type": "text", "text": part})
                continue
            kind, content = encode(part)
            left_bytes -= len(content)
            if left_bytes < 0:
                raise InvalidField(
                    "messages",
                    f"have pictures of more than {MAX_PICTURE_BYTES:,} bytes in all, as they are sent to the model.",
                    "Send fewer, or smaller ones.",
                )
            url = f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
            parts.append({"type": "image_url", "image_url": {"url": url}})
        # Chat templates that know nothing of parts take a plain text alone.
        text = turn.parts[0] if len(turn.parts) == 1 else None
        messages.append({"role": turn.role.value, "content": text if isinstance(text, str) else parts})
    return json.dumps(messages, ensure_ascii=False).encode()


def write_body(messages: bytes, model: str, options: GenerateOptions) -> bytes:
    """A whole body from what write_messages() gave; quick, however large the pictures are.

    `max_tokens` and not the newer `max_completion_tokens`: vLLM takes both, older servers the first alone.
    """
    asked: dict[str, object] = {
        "model": model,
        "max_tokens": options.max_new_tokens,
        "temperature": options.temperature,
        "top_p": options.top_p,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if options.seed is not None:
        asked["seed"] = options.seed
    if options.stop:
        asked["stop"] = options.stop
    return b"".join((json.dumps(asked).encode()[:-1], b', "messages": ', messages, b"}"))


def encode(image: Image) -> tuple[str, bytes]:
    """The kind of file (`png`, `jpeg`) and its bytes."""
    rgb = _shrunk(image.rgb)
    bgr = cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR)
    if rgb.shape[0] * rgb.shape[1] <= MAX_LOSSLESS_PIXELS:
        kind, parameters = "png", [cv2.IMWRITE_PNG_COMPRESSION, _FASTEST]
    else:
        kind, parameters = "jpeg", [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY]
    done, content = cv2.imencode(f".{kind}", bgr, parameters)
    if not done:
        raise RuntimeError(f"OpenCV could not write a picture of {rgb.shape[1]} × {rgb.shape[0]} pixels as {kind}")
    return kind, content.tobytes()


def _shrunk(rgb: Pixels) -> Pixels:
    """The picture at MAX_PIXELS at most, its shape kept."""
    height_px, width_px = rgb.shape[:2]
    scale = (MAX_PIXELS / (height_px * width_px)) ** 0.5
    if scale >= 1:
        return rgb
    size = max(1, int(width_px * scale)), max(1, int(height_px * scale))
    shrunk: Pixels = cv2.resize(rgb, size, interpolation=cv2.INTER_AREA)
    return shrunk
