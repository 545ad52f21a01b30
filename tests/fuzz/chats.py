"""Fuzzes, by coverage, what reads chats and the URLs in them; not a part of the test suite.

`pip install atheris==3.0.0`, then `PYTHONPATH=clients:. python tests/fuzz/chats.py -max_total_time=300` (libFuzzer's arguments).
The suite's hypothesis tests (tests/vision_server/openai) look for the same faults with values rather than bytes.
"""

from __future__ import annotations

import json
import sys

import atheris

with atheris.instrument_imports(include=["vision_server.openai", "serving.http_calls"]):
    from serving.errors import Code, ServiceError
    from vision_server.openai.image_urls import ImageUrls, read_data_uri
    from vision_server.openai.reading import read_chat
    from vision_server.openai.writing import error_body
    from vision_server.settings import VisionSettings

MAX_BYTES = 300
SETTINGS = VisionSettings(max_image_bytes=MAX_BYTES)
URLS = ImageUrls(("cdn.example", "[::1]:8080"), MAX_BYTES)
PLACES = {(b"cdn.example", None), (b"::1", 8080)}


def one_input(data: bytes) -> None:
    """The first byte chooses what reads the rest."""
    try:
        match data[:1]:
            case b"d":
                content = read_data_uri("data:" + data[1:].decode("utf-8", "surrogatepass"), "url", MAX_BYTES)
                assert 0 < len(content) <= MAX_BYTES
            case b"u":
                url = URLS.check(data[1:].decode("utf-8", "surrogatepass"), "url")
                default = {"http": 80, "https": 443}[url.scheme]
                assert (url.raw_host, None if url.port == default else url.port) in PLACES
                assert not url.userinfo
            case _:
                chat = read_chat(data, SETTINGS, URLS)
                assert type(chat.request).FromString(chat.request.SerializeToString()) is not None
    except UnicodeDecodeError:
        pass  # no text to begin with
    except ServiceError as error:
        assert error.code is Code.INVALID_ARGUMENT
        json.dumps(error_body(error), ensure_ascii=False, allow_nan=False).encode()  # as it is sent


if __name__ == "__main__":
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()
