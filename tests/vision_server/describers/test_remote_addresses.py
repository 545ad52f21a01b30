"""How the operator names describers on other servers, and what is said of names that are none."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from vision_server.describers.addresses import RemoteAddress, read_describers, read_remote
from vision_server.settings import VisionSettings


@pytest.mark.parametrize(
    ("listed", "address"),
    [
        ("openai+http://gpu:8000/v1", RemoteAddress("remote", "http://gpu:8000/v1", "")),
        ("openai+https://gpu/v1/", RemoteAddress("remote", "https://gpu/v1", "")),
        ("openai+http://[::1]:8000", RemoteAddress("remote", "http://[::1]:8000", "")),
        (
            "openai+http://gpu/v1#Qwen/Qwen2-VL-7B",
            RemoteAddress("Qwen/Qwen2-VL-7B", "http://gpu/v1", "Qwen/Qwen2-VL-7B"),
        ),
        ("thai=openai+http://gpu/v1#a%2Cb", RemoteAddress("thai", "http://gpu/v1", "a,b")),
        ("thai=openai+http://gpu/v1", RemoteAddress("thai", "http://gpu/v1", "")),
        ("openai+http://gpu/v1#m@2", RemoteAddress("m@2", "http://gpu/v1", "m@2")),
    ],
)
def test_an_address_is_read(listed: str, address: RemoteAddress) -> None:
    assert read_remote(listed) == address


@pytest.mark.parametrize(
    ("listed", "words"),
    [
        ("openai+http://user:hush@gpu/v1", "VISION_REMOTE_API_KEY"),
        ("openai+http://hush@gpu/v1", "VISION_REMOTE_API_KEY"),
        ("openai+hush@gpu/v1", "VISION_REMOTE_API_KEY"),
        ("openai+http://gpu/v1?api_key=hush", "VISION_REMOTE_API_KEY"),
        ("openai+ftp://gpu/v1", "openai+http://HOST:PORT/v1"),
        ("openai+http:///v1", "openai+http://HOST:PORT/v1"),
        ("openai+http://gpu:99999/v1", "openai+http://HOST:PORT/v1"),
        ("openai+http://gpu:x/v1", "openai+http://HOST:PORT/v1"),
        ("openai+http://[::1/v1", "openai+http://HOST:PORT/v1"),
        ("openai+", "openai+http://HOST:PORT/v1"),
        ("=openai+http://gpu/v1", "NAME="),
        ("openai+http://a/v1,openai+http://b/v1", "two describers are called 'remote'"),
        ("x,x=openai+http://b/v1", "two describers are called 'x'"),
    ],
)
def test_what_is_none_is_refused_at_the_start_and_no_secret_repeated(listed: str, words: str) -> None:
    with pytest.raises(ValidationError) as refused:
        VisionSettings(describer=listed)
    (problem,) = refused.value.errors()
    assert problem["loc"] == ("describer",)
    assert words in problem["msg"]
    assert "hush" not in problem["msg"]


def test_local_and_remote_ones_stand_side_by_side_in_their_order() -> None:
    listed = "thai=openai+http://gpu/v1, shapes-describer, openai+http://other/v1#big, shapes-describer"
    settings = VisionSettings(describer=listed)
    assert list(settings.describers) == ["thai", "shapes-describer", "big"]
    assert settings.local_describers == ("shapes-describer",)
    assert VisionSettings(describer="").describers == {}


@settings(deadline=None)  # the machine may be busy
@given(st.lists(st.text("openai+htps:/#?@=[]1.,% é", max_size=30).map("openai+http://".__add__), max_size=3))
def test_nothing_but_a_value_error_comes_of_any_address(listed: list[str]) -> None:
    try:
        described = read_describers(listed)
    except ValueError:
        return
    for name, address in described.items():
        assert address is not None
        assert name == address.name != ""
        assert address.base_url.startswith("http://")
        assert "@" not in address.base_url
        assert "?" not in address.base_url
