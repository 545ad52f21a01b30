"""A GPU fault that cannot be mended from inside fails liveness; anything else does not."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial

import pytest

from serving.errors import ServiceError
from serving.health import LIVENESS, Health
from vision_server import loading
from vision_server.batcher import Batcher
from vision_server.lanes import Replica
from vision_server.models import Models, fail_on_lost_device
from vision_server.settings import VisionSettings


class OutOfMemoryError(RuntimeError):
    """Named as torch.OutOfMemoryError is."""


@pytest.mark.parametrize(
    ("error", "lives"),
    [
        (RuntimeError("CUDA error: an illegal memory access was encountered\nCompile with …"), False),
        (OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB; CUDA error"), True),
        (ValueError("a shape does not fit"), True),
    ],
)
async def test_only_a_lost_device_fails_liveness(error: Exception, lives: bool) -> None:
    health = Health()

    def execute(items: Sequence[int]) -> list[int | Exception]:
        raise error

    batcher: Batcher[int, int] = Batcher(
        "broken",
        [Replica("cuda:0", execute)],
        max_batch=1,
        max_delay_ms=0,
        max_queued=1,
        on_failure=partial(fail_on_lost_device, health),
    )
    batcher.start()
    with pytest.raises(ServiceError):
        await batcher.submit(1)
    await batcher.stop()
    assert health.serving(LIVENESS) is lives


async def test_a_device_that_cannot_be_picked_is_told_for_each_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def prepare(*_: object) -> tuple[str, ...]:
        raise ImportError("libtorch is broken")

    monkeypatch.setattr(loading, "_prepare", prepare)
    health = Health()
    served = Models(VisionSettings(detector="shapes-detector", describer="shapes-describer"))
    served.start(health)
    async with asyncio.timeout(10):
        while any(info.state.value != "failed" for info in served.infos):  # noqa: ASYNC110  # seen from outside
            await asyncio.sleep(0.01)
    assert all("libtorch is broken" in info.state_reason for info in served.infos)
    assert not served.ready
    await served.stop()
