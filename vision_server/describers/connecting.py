"""Finds a model on an OpenAI-compatible server and has it answer an example, as any other model does before it is ready."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import aclosing

import numpy as np

from vision_server.describers.describer import PicturedTurn
from vision_server.describers.peer import Peer, PeerAway, PeerUnreadable
from vision_server.describers.remote_messages import write_body, write_messages
from vision_server.images import Image
from vision_server.requests import GenerateOptions, Role

# The side that CLIP and its like look at; smaller ones some processors refuse.
_EXAMPLE_SIDE_PX = 224


async def connect(peer: Peer, wanted: str, on_found: Callable[[], object], within_s: float) -> str:
    """The id of the model that is to answer: `wanted`, or the first that there is. `on_found` is called before the example.

    Raises PeerError, also where the model cannot take a picture.
    """
    model = choose(peer.url, await peer.models(), wanted)
    on_found()
    try:
        async with asyncio.timeout(within_s):
            await _answer_example(peer, model)
    except TimeoutError:
        raise PeerAway(f"{peer.url} did not answer an example within {within_s:g} s") from None
    return model


def choose(url: str, models: tuple[str, ...], wanted: str) -> str:
    """The model that is meant. Raises PeerUnreadable, which names those that there are."""
    if wanted and wanted not in models:
        raise PeerUnreadable(f"{url} has no model {wanted!r}; it has {', '.join(models) or 'none'}")
    if not models:
        raise PeerUnreadable(f"{url} has no models")
    return wanted or models[0]


async def _answer_example(peer: Peer, model: str) -> None:
    grey = np.full((_EXAMPLE_SIDE_PX, _EXAMPLE_SIDE_PX, 3), 127, np.uint8)
    picture = Image(grey, _EXAMPLE_SIDE_PX, _EXAMPLE_SIDE_PX)
    turns = (PicturedTurn(Role.USER, (picture, "What is in the picture?")),)
    messages = await asyncio.to_thread(write_messages, turns)
    async with aclosing(peer.answer(write_body(messages, model, GenerateOptions(max_new_tokens=1)), {})) as events:
        finish_reasons = [event.finish_reason async for event in events]
    if not any(finish_reasons):
        raise PeerAway(f"{peer.url} hung up in the middle of an example")
