"""What is sent to another server is JSON that says the same, and pictures that show the same, within bounds."""

from __future__ import annotations

import base64
import io
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as Pillow

from serving.errors import Code
from vision_server.colour import Pixels
from vision_server.describers import remote_messages
from vision_server.describers.describer import PicturedTurn
from vision_server.describers.remote_messages import write_body, write_messages
from vision_server.errors import InvalidField
from vision_server.images import Image
from vision_server.requests import GenerateOptions, Role

# What UTF-8 can hold: callers' texts come through protobuf.
TEXTS = st.text(st.characters(codec="utf-8"))


def image(rgb: Pixels) -> Image:
    return Image(rgb, rgb.shape[1], rgb.shape[0])


def sent(rgb: Pixels) -> tuple[str, Pixels]:
    """The kind of a picture that is sent, and its pixels as the other server sees them."""
    (message,) = json.loads(write_messages([PicturedTurn(Role.USER, (image(rgb), "?"))]))
    kind, _, content = message["content"][0]["image_url"]["url"].partition(";base64,")
    return kind.removeprefix("data:"), np.asarray(Pillow.open(io.BytesIO(base64.b64decode(content))).convert("RGB"))


@settings(deadline=None)  # the machine may be busy
@given(
    st.lists(st.tuples(st.sampled_from(Role), st.lists(TEXTS, min_size=1, max_size=3)), min_size=1, max_size=4),
    st.builds(
        GenerateOptions,
        max_new_tokens=st.integers(1, 4096),
        temperature=st.floats(0, 2),
        top_p=st.floats(0.01, 1),
        seed=st.none() | st.integers(-(2**63), 2**63 - 1),
        stop=st.lists(TEXTS, max_size=8).map(tuple),
    ),
)
def test_any_conversation_becomes_json_that_says_the_same(
    turns: list[tuple[Role, list[str]]], options: GenerateOptions
) -> None:
    messages = write_messages([PicturedTurn(role, tuple(parts)) for role, parts in turns])
    body: dict[str, Any] = json.loads(write_body(messages, "a/model", options))
    for message, (role, parts) in zip(body["messages"], turns, strict=True):
        texts = [{"type": "text", "text": part} for part in parts]
        assert message == {"role": role.value, "content": parts[0] if len(parts) == 1 else texts}
    said = (body["max_tokens"], body["temperature"], body["top_p"], body.get("seed"), tuple(body.get("stop", ())))
    assert said == (options.max_new_tokens, options.temperature, options.top_p, options.seed, options.stop)
    assert (body["model"], body["stream"], body["stream_options"]) == ("a/model", True, {"include_usage": True})


@pytest.mark.parametrize("size", [(1, 1), (37, 501), (1024, 1024)])
def test_pictures_up_to_a_megapixel_arrive_as_they_are(size: tuple[int, int]) -> None:
    rgb = np.random.default_rng(3).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    kind, seen = sent(rgb)
    assert kind == "image/png"
    assert np.array_equal(seen, rgb)


def test_larger_ones_arrive_smaller_and_look_the_same() -> None:
    y, x = np.mgrid[:1500, :2000]
    rgb = np.stack([x % 256, y % 256, (x + y) // 14], axis=-1).astype(np.uint8)
    rgb[:, 1000:] = (200, 30, 40)
    kind, seen = sent(rgb)
    assert kind == "image/jpeg"
    assert seen.shape == rgb.shape
    assert np.abs(seen.astype(int) - rgb)[:, 1010:].max() <= 3
    assert np.abs(seen.astype(int) - rgb).mean() < 3


@pytest.mark.parametrize("size", [(6000, 4000), (40_000, 600)])
def test_what_no_model_looks_at_is_not_sent(size: tuple[int, int]) -> None:
    rgb = np.zeros((size[1], size[0], 3), np.uint8)
    rgb[:, size[0] // 2 :] = 255
    _, seen = sent(rgb)
    assert seen.shape[0] * seen.shape[1] <= remote_messages.MAX_PIXELS
    assert seen.shape[1] / seen.shape[0] == pytest.approx(size[0] / size[1], rel=0.01)
    assert seen.mean() == pytest.approx(127.5, abs=1)


def test_pictures_that_are_too_many_bytes_together_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_messages, "MAX_PICTURE_BYTES", 20_000)
    noise = image(np.random.default_rng(4).integers(0, 256, (50, 100, 3), dtype=np.uint8))  # 15 kB each
    assert write_messages([PicturedTurn(Role.USER, (noise, "?"))])
    with pytest.raises(InvalidField) as refused:
        write_messages([PicturedTurn(Role.USER, (noise, "?")), PicturedTurn(Role.USER, (noise,))])
    assert (refused.value.code, refused.value.field) == (Code.INVALID_ARGUMENT, "messages")
    assert "20,000 bytes" in str(refused.value)
