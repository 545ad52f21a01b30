"""A remote describer among the models: found, away, missed until it is back, and never named by a caller."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from serving.errors import Code, ServiceError
from serving.health import Health
from tests.vision_server.describers.fake_peer import MODEL, FakePeer, error
from vision_server import models as models_module
from vision_server.describers import remote
from vision_server.describers.describer import PicturedTurn
from vision_server.metrics import MODELS
from vision_server.models import READY_NAME, Models
from vision_server.requests import GenerateOptions, Role
from vision_server.results import GenerateSummary, ModelState, Task
from vision_server.settings import VisionSettings

NAME = "thai"


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models_module, "_FIRST_PAUSE_S", 0.05)
    monkeypatch.setattr(models_module, "_LONGEST_PAUSE_S", 0.1)
    monkeypatch.setattr(remote, "_LOOK_EVERY_S", 0.1)
    monkeypatch.setattr(remote, "_LOOK_AGAIN_S", 0.1)


@asynccontextmanager
async def serving(tmp_path: Path, describer: str, **settings: Any) -> AsyncIterator[tuple[Models, Health]]:
    """Models without a detector; any other than remote describers would need a device."""
    health = Health()
    models = Models(VisionSettings(data_dir=tmp_path, detector="", describer=describer, **settings))
    models.start(health)
    try:
        yield models, health
    finally:
        await models.stop()
        await health.stop()


async def until(holds: Callable[[], object]) -> None:
    async with asyncio.timeout(20):
        while not holds():  # noqa: ASYNC110  # seen from outside, as callers see it
            await asyncio.sleep(0.005)


def state(models: Models) -> ModelState:
    return models.infos[0].state


async def refused(asked: Awaitable[object]) -> ServiceError:
    with pytest.raises(ServiceError) as caught:
        await asked
    return caught.value


async def ask(models: Models, name: str = "") -> str:
    with models.use_describer(name, "model") as loaded:
        prompt = await loaded.describer.prepare([PicturedTurn(Role.USER, ("Hello",))])
        async with aclosing(loaded.describer.stream(prompt, GenerateOptions())) as pieces:
            async for piece in pieces:
                if isinstance(piece, GenerateSummary):
                    return piece.text
    raise AssertionError("no summary")


async def test_it_is_found_tried_out_listed_and_called(tmp_path: Path) -> None:
    async with FakePeer().serving() as peer, serving(tmp_path, f"{NAME}=openai+{peer.url}") as (models, health):
        await until(lambda: state(models) is ModelState.READY)
        (example,) = peer.asked
        assert (example["model"], example["max_tokens"]) == (MODEL, 1)
        assert example["messages"][0]["content"][0]["type"] == "image_url"
        (info,) = models.infos
        assert (info.name, info.task, info.is_default) == (NAME, Task.GENERATE, True)
        assert info.card is not None
        assert (info.card.engine, info.card.version, info.card.device, info.card.memory_bytes) == (
            "openai",
            MODEL,
            "remote",
            0,
        )
        assert health.serving(f"model/{NAME}")
        assert health.serving(READY_NAME)
        assert models.ready
        for name in ("", NAME, f"{NAME}@{MODEL}"):
            assert await ask(models, name) == "A red circle."
        # No device of this machine is busy with it.
        assert models.busy_s() == {}
        assert not [sample for metric in MODELS.collect() for sample in metric.samples if "device" in sample.labels]


async def test_the_operator_chooses_the_servers_model_and_its_key(tmp_path: Path) -> None:
    async with FakePeer().serving() as peer:
        peer.key = "hush"
        async with serving(tmp_path, f"openai+{peer.url}#another", remote_api_key="hush") as (models, _):
            await until(lambda: state(models) is ModelState.READY)
            assert await ask(models, "another") == "A red circle."
            assert {asked["model"] for asked in peer.asked} == {"another"}
            assert {headers["authorization"] for headers in peer.headers} == {"Bearer hush"}


@pytest.mark.parametrize(
    ("set_up", "words"),
    [
        (lambda peer: peer.models.clear(), "has no model 'another'; it has none"),
        (lambda peer: peer.models.remove("another"), f"has no model 'another'; it has {MODEL}"),
        (lambda peer: setattr(peer, "key", "hush"), "answered 401: Unauthorized"),
        (lambda peer: setattr(peer, "refusal", error(400, "no pictures, please")), "no pictures, please"),
        (lambda peer: setattr(peer, "tail", []), "hung up in the middle of an example"),
    ],
)
async def test_what_keeps_it_from_serving_is_told_until_it_is_mended(
    tmp_path: Path, set_up: Callable[[FakePeer], object], words: str
) -> None:
    async with FakePeer().serving() as peer:
        set_up(peer)
        async with serving(tmp_path, f"openai+{peer.url}#another") as (models, health):
            await until(lambda: words in models.infos[0].state_reason)
            await until(lambda: words in str(health.why_not("model/another")))
            fault = await refused(models.load("another"))
            assert fault.code is Code.UNAVAILABLE
            assert fault.retry_after_s == 5
            assert words in str(fault)
            assert (await refused(ask(models))).code is Code.UNAVAILABLE
            peer.models, peer.key, peer.refusal, peer.tail = ["another"], "", None, None
            await until(lambda: state(models) is ModelState.READY)
            assert await ask(models) == "A red circle."
            assert health.serving("model/another")


async def test_a_server_that_starts_later_goes_and_comes_back_is_found_each_time(tmp_path: Path) -> None:
    peer = FakePeer()
    async with peer.serving():
        pass  # now it has a port
    async with serving(tmp_path, f"{NAME}=openai+{peer.url}") as (models, health):
        for number in range(2):
            await until(lambda: "cannot be reached" in str(health.why_not(f"model/{NAME}")))
            assert models.infos[0].state_reason or state(models) is not ModelState.FAILED
            assert (await refused(ask(models))).code is Code.UNAVAILABLE
            peer.models = [f"model-{number}"]  # without a `#` whatever it serves is taken
            async with peer.serving():
                await until(lambda: state(models) is ModelState.READY)
                assert await ask(models) == "A red circle."
                assert peer.asked[-1]["model"] == f"model-{number}"
                info = models.infos[0]
                assert info.card is not None
                assert info.card.version == f"model-{number}"
                assert not info.state_reason
            await until(lambda: state(models) is not ModelState.READY)
        assert not health.serving(READY_NAME)
        assert health.serving("")  # no reason to start this server again


async def test_what_is_unloaded_is_not_missed(tmp_path: Path) -> None:
    async with FakePeer().serving() as peer, serving(tmp_path, f"{NAME}=openai+{peer.url}") as (models, _):
        await until(lambda: state(models) is ModelState.READY)
        assert (await models.unload(NAME)).state is ModelState.UNLOADED
        looks = peer.looks
        await asyncio.sleep(0.4)
        assert peer.looks == looks
        assert (await refused(ask(models))).reason == "MODEL_UNLOADED"
        loaded = await models.load(NAME, ["th"])
        assert (loaded.state, loaded.aliases) == (ModelState.READY, ("th",))
        assert await ask(models, "th") == "A red circle."
        # Loaded anew while it serves, by two at once: they share one load.
        asked = len(peer.asked)
        await asyncio.gather(models.load(NAME), models.load(NAME))
        assert len(peer.asked) == asked + 1


async def test_one_that_is_unloaded_while_it_is_away_is_left_alone(tmp_path: Path) -> None:
    peer = FakePeer()
    async with peer.serving():
        pass
    async with serving(tmp_path, f"{NAME}=openai+{peer.url}") as (models, _):
        await until(lambda: models.infos[0].state_reason)
        await models.unload(NAME)
        async with peer.serving():
            await asyncio.sleep(0.4)
            assert (peer.looks, state(models)) == (0, ModelState.UNLOADED)


async def test_no_caller_can_have_an_address_of_his_own_asked(tmp_path: Path) -> None:
    async with FakePeer().serving() as peer, serving(tmp_path, "") as (models, _):
        for name in (f"openai+{peer.url}", f"x=openai+{peer.url}", "remote", MODEL):
            assert (await refused(models.load(name))).code is Code.NOT_FOUND
        assert (peer.looks, peer.asked) == (0, [])


async def test_a_slow_server_keeps_no_other_model_waiting(tmp_path: Path) -> None:
    go = asyncio.Event()
    async with FakePeer().serving() as slow, FakePeer().serving() as quick:
        slow.before_chunk = lambda _: go.wait()
        listed = f"slow=openai+{slow.url},quick=openai+{quick.url}"
        async with serving(tmp_path, listed, remote_silence_s=30) as (models, health):
            await until(lambda: models.infos[1].state is ModelState.READY)
            await until(lambda: models.infos[0].state is ModelState.WARMING_UP)
            assert not health.serving(READY_NAME)  # not before all have been tried
            assert await ask(models, "quick") == "A red circle."
            go.set()
            await until(lambda: health.serving(READY_NAME))
